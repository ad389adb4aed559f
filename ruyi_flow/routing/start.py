"""Which exit should answer a prompt, from what the first branch makes of it. Pure: no torch, clock or randomness."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["READ_TOKENS", "Reading", "Start"]

READ_TOKENS = 64
"""Of a prompt's last tokens, at most, the first branch's losses are taken: each costs a product with the vocabulary."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the first branch makes of a prompt."""

    tokens: int
    """Of the prompt."""
    loss: float
    """Mean over its last READ_TOKENS tokens, in nats."""
    entropy: float
    """Of the branch's distributions for these, likewise."""
    confidence: float
    """In its token after the prompt."""

    def features(self) -> tuple[float, ...]:
        """What `Start` weighs; the first one is constant."""
        return (1.0, self.loss, self.entropy, math.log(max(1, self.tokens)), self.confidence)


@dataclass(frozen=True, slots=True)
class Start:
    """The shallowest exit whose answer is likely enough to be as good as the last one's."""

    weights: Mapping[int, tuple[float, ...]]
    """By early exit: of a logistic regression on `Reading.features`; an exit without them never starts."""
    chance: float
    """That is likely enough, 0 … 1; above 1 none is."""

    def __post_init__(self) -> None:
        """Refuse what is not a rule with a ValueError."""
        size = len(Reading(1, 0.0, 0.0, 0.0).features())
        if any(len(w) != size or not all(map(math.isfinite, w)) for w in self.weights.values()):
            raise ValueError(f"the weights of a start must be {size} numbers for each exit")
        if not 0 <= self.chance <= 2:
            raise ValueError("the chance of a start must be a number from 0 to 1, or above it for never")

    def likely(self, exit: int, reading: Reading) -> float:
        """How likely an early exit's answer is as good as the last one's."""
        odds = sum(w * x for w, x in zip(self.weights[exit], reading.features(), strict=True))
        return 1 / (1 + math.exp(-max(-50.0, min(50.0, odds))))

    def exit(self, reading: Reading, deepest: int) -> int:
        """The exit to begin with; the deepest one where none is likely enough."""
        for p in sorted(self.weights):
            if p < deepest and self.likely(p, reading) >= self.chance:
                return p
        return deepest
