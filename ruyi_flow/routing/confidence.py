"""How sure a branch is, as a number that means something: the probability that its token is the last branch's.

A score (the likeliest token's probability, its lead over the second, minus the entropy, each at a temperature of the
branch) becomes that probability through a curve that was fitted on a trace. Applying one is pure Python: it is done for
every token.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

__all__ = ["Calibration", "Curve", "Scale", "Score"]


class Score(StrEnum):
    """What a branch's distribution is reduced to."""

    MAX_PROBABILITY = "max_probability"
    MARGIN = "margin"
    """The likeliest token's probability less the second's."""
    NEGATIVE_ENTROPY = "negative_entropy"
    PROBE = "probe"
    """What the branch's probe says, where the family has probes."""


@dataclass(frozen=True, slots=True)
class Curve:
    """From a score at a temperature to the probability of agreement: straight between its points, flat outside."""

    temperature: float
    scores: tuple[float, ...]
    """Ascending."""
    chances: tuple[float, ...]
    """Ascending, 0 … 1."""

    def __post_init__(self) -> None:
        """Refuse what is not a curve with a ValueError."""
        xs, ys = self.scores, self.chances
        if not xs or len(xs) != len(ys) or not 0 <= ys[0] or not ys[-1] <= 1:
            raise ValueError("its points must be scores with probabilities, at least one")
        if any(not a < b for a, b in pairwise(xs)) or any(not a <= b for a, b in pairwise(ys)):
            raise ValueError("its points must ascend")
        if not 0 < self.temperature < math.inf:
            raise ValueError("its temperature must be above 0")

    def __call__(self, score: float) -> float:
        """The probability that a token with this score is the last branch's."""
        xs, ys = self.scores, self.chances
        i = bisect_right(xs, score)
        if i == 0:
            return ys[0]
        if i == len(xs):
            return ys[-1]
        return ys[i - 1] + (ys[i] - ys[i - 1]) * (score - xs[i - 1]) / (xs[i] - xs[i - 1])


@dataclass(frozen=True, slots=True)
class Scale:
    """What confidence means in a session: a score, and each early exit's curve."""

    score: Score
    curves: Mapping[int, Curve]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Curves of a family's early exits."""

    family: str
    """Fingerprint."""
    curves: Mapping[Score, Mapping[int, Curve]]
