"""Calibrated confidence: the probability that a branch's token is the one that the last branch would choose.

A score (the probability of the most probable token, its margin over the second, the negative entropy, each at the
branch's own temperature) becomes that probability through a curve that was fitted on a trace. It is pure Python, since
it runs for every token.
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
    """The number that a branch's distribution is reduced to."""

    MAX_PROBABILITY = "max_probability"
    """Probability of the most probable token."""
    MARGIN = "margin"
    """Probability of the most probable token minus that of the second."""
    NEGATIVE_ENTROPY = "negative_entropy"
    """Negative entropy of the distribution, in nats."""
    PROBE = "probe"
    """Output of the branch's probe; only for families with probes."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A piecewise linear map from a score at a temperature to the probability of agreement; it is constant outside."""

    temperature: float
    """Temperature of the branch's distribution."""
    scores: tuple[float, ...]
    """Scores of the curve's points, ascending."""
    chances: tuple[float, ...]
    """Probabilities of agreement at these points, ascending, 0 … 1."""

    def __post_init__(self) -> None:
        """Raise a ValueError unless the curve is valid."""
        xs, ys = self.scores, self.chances
        if not xs or len(xs) != len(ys) or not 0 <= ys[0] or not ys[-1] <= 1:
            raise ValueError("its points must be scores with probabilities, at least one")
        if not all(-1e9 <= x <= 1e9 for x in xs):  # false for NaN, too
            raise ValueError("its scores must be numbers from -1e9 to 1e9")
        if any(not a < b for a, b in pairwise(xs)) or any(not a <= b for a, b in pairwise(ys)):
            raise ValueError("its points must ascend")
        if not 0 < self.temperature < math.inf:
            raise ValueError("its temperature must be above 0")

    def __call__(self, score: float) -> float:
        """Return the probability that a token with this score is the last branch's."""
        xs, ys = self.scores, self.chances
        i = bisect_right(xs, score)
        if i == 0:
            return ys[0]
        if i == len(xs):
            return ys[-1]
        return ys[i - 1] + (ys[i] - ys[i - 1]) * (score - xs[i - 1]) / (xs[i] - xs[i - 1])


@dataclass(frozen=True, slots=True)
class Scale:
    """The meaning of confidence in a session: a score, and the curve of each early exit."""

    score: Score
    """The score that the curves map."""
    curves: Mapping[int, Curve]
    """The curve of each early exit."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Fitted curves of a family's early exits."""

    family: str
    """Fingerprint of the family."""
    curves: Mapping[Score, Mapping[int, Curve]]
    """The curve of each early exit, by score."""
