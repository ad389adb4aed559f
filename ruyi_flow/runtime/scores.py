"""Scores of a branch's distribution, and what they say about it: the numbers behind `routing/confidence.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from ruyi_flow.routing.confidence import Scale, Score

__all__ = ["PLAIN", "Confidence", "measure"]


def measure(logits: Tensor, score: Score, temperature: float = 1.0) -> Tensor:
    """A score of distributions.

    Args:
        logits: (n, vocab), any number format; tokens that are ruled out have -inf.
        score: which.
        temperature: that the logits are divided by first.

    Returns:
        (n,) float32
    """
    scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
    norm = scaled.logsumexp(-1)
    if score is Score.MAX_PROBABILITY:
        likeliest: Tensor = torch.exp(scaled.amax(-1) - norm)
        return likeliest
    if score is Score.MARGIN:
        two = torch.exp(scaled.topk(2, -1).values - norm[:, None])
        return two[:, 0] - two[:, 1]
    entropy: Tensor = torch.special.entr(torch.exp(scaled - norm[:, None])).sum(-1)
    return -entropy


class Confidence:
    """How sure one exit's branch is, in one session.

    Args:
        scale: what confidence means in it; None is the likeliest token's probability, as the branch says it.
        exit: whose curve of the scale; an exit without one keeps the plain probability.
    """

    def __init__(self, scale: Scale | None, exit: int) -> None:
        self._curve = None if scale is None else scale.curves.get(exit)
        self._score = Score.MAX_PROBABILITY if scale is None or self._curve is None else scale.score

    def __call__(self, logits: Tensor) -> list[float]:
        """(n, vocab) -> n numbers in 0 … 1."""
        curve = self._curve
        if curve is None:
            return measure(logits, self._score).tolist()
        # What is not a number must not become one on the curve.
        return [curve(v) if v == v else v for v in measure(logits, self._score, curve.temperature).tolist()]


PLAIN = Confidence(None, 0)
"""The likeliest token's probability."""
