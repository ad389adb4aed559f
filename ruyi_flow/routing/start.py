"""The start rule of `cascade`, which chooses the exit that begins an answer from the prompt. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["READ_TOKENS", "Reading", "Start"]

READ_TOKENS = 64
"""Number of tokens at a prompt's end whose losses are computed; each of them costs vocabulary logits."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Statistics of a prompt under the first branch."""

    tokens: int
    """Number of tokens of the prompt."""
    loss: float
    """Mean cross-entropy of the last READ_TOKENS tokens, in nats."""
    entropy: float
    """Mean entropy of the branch's distributions for these tokens, in nats."""
    confidence: float
    """The branch's confidence in the first token after the prompt."""

    def features(self) -> tuple[float, ...]:
        """Return the features that `Start` weighs; the first one is constant."""
        return (1.0, self.loss, self.entropy, math.log(max(1, self.tokens)), self.confidence)


@dataclass(frozen=True, slots=True)
class Start:
    """A rule that chooses the shallowest exit whose answer is probably as good as the last exit's."""

    weights: Mapping[int, tuple[float, ...]]
    """Weights of a logistic regression on `Reading.features`, by early exit; an exit without weights never begins."""
    chance: float
    """The probability that suffices, 0 … 1; above 1 only the deepest exit begins."""

    def __post_init__(self) -> None:
        """Raise a ValueError unless the rule is valid."""
        size = len(Reading(1, 0.0, 0.0, 0.0).features())
        if any(len(w) != size or not all(map(math.isfinite, w)) for w in self.weights.values()):
            raise ValueError(f"the weights of a start must be {size} numbers for each exit")
        if not 0 <= self.chance <= 2:
            raise ValueError("the chance of a start must be a number from 0 to 1, or above it for never")

    def probability(self, exit: int, reading: Reading) -> float:
        """Return the probability that an early exit's answer is as good as the last one's."""
        odds = sum(w * x for w, x in zip(self.weights[exit], reading.features(), strict=True))
        return 1 / (1 + math.exp(-max(-50.0, min(50.0, odds))))

    def exit(self, reading: Reading, deepest: int) -> int:
        """Return the exit that begins the answer; the deepest one if no probability suffices."""
        for p in sorted(self.weights):
            if p < deepest and self.probability(p, reading) >= self.chance:
                return p
        return deepest
