"""Scores of a branch's distribution, and what they say about it: the numbers behind `routing/confidence.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ruyi_flow.errors import RequestError
from ruyi_flow.family.transformer import Probe
from ruyi_flow.routing.confidence import Scale, Score

__all__ = ["PLAIN", "Confidence", "likeliest", "measure", "measure_all", "reading"]


def likeliest(logits: Tensor) -> tuple[list[int], list[float]]:
    """The likeliest token of each row of (n, vocab) logits, and its probability as the branch says it.

    All rows of a step at once, in the three quickest passes there are: in bfloat16, `argmax` alone takes four times as
    long as these together (docs/log.md).
    """
    wide = logits.float()
    tokens = wide.max(-1).indices
    return tokens.tolist(), wide.softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist()


def measure(
    logits: Tensor, score: Score, temperature: float = 1.0, *, probe: Probe | None = None, read: Tensor | None = None
) -> Tensor:
    """A score of distributions.

    Args:
        logits: (n, vocab), any number format; tokens that are ruled out have -inf.
        score: which.
        temperature: that the logits, or the probe's log-odds, are divided by first.
        probe, read: for the probe's score: it, and the (n, hidden) states that the branch's head read.

    Returns:
        (n,) float32
    """
    if score is Score.PROBE:
        assert probe is not None and read is not None
        odds: Tensor = probe.forward(read, logits) / temperature
        return odds.sigmoid()
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


def measure_all(
    logits: Tensor,
    scores: Sequence[Score],
    temperatures: Sequence[float],
    *,
    probe: Probe | None = None,
    read: Tensor | None = None,
) -> Tensor:
    """Many scores at many temperatures: what `measure` gives one by one, in a few passes over the vocabulary.

    Args:
        logits, probe, read: see `measure`; without a probe, its score is 1.

    Returns:
        (n, scores, temperatures) float32
    """
    out = torch.ones(len(logits), len(scores), len(temperatures), device=logits.device)
    for start in range(0, len(logits), _ROWS):
        rows = slice(start, start + _ROWS)
        x = logits[rows].float()
        two = x.topk(2, -1).values
        lower = x - two[:, :1]
        odds = None if probe is None or read is None else probe.forward(read[rows], x)
        for t, temperature in enumerate(temperatures):
            chances = (lower / temperature).exp_()
            total = chances.sum(-1)
            first = 1 / total
            second = ((two[:, 1] - two[:, 0]) / temperature).exp() * first
            for s, score in enumerate(scores):
                if score is Score.MAX_PROBABILITY:
                    out[rows, s, t] = first
                elif score is Score.MARGIN:
                    out[rows, s, t] = first - second
                elif score is Score.NEGATIVE_ENTROPY:
                    mean = torch.linalg.vecdot(chances, lower) * first / temperature
                    out[rows, s, t] = mean - total.log()
                elif odds is not None:
                    out[rows, s, t] = (odds / temperature).sigmoid()
    return out


_ROWS = 64
"""Rows that are measured together, so that they stay in the processor's caches."""


def reading(logits: Tensor, following: Tensor) -> tuple[float, float]:
    """(n, vocab) and the (n,) tokens that follow -> mean loss and mean entropy, in nats; 0 where there is no token."""
    if not len(following):
        return 0.0, 0.0
    chances = logits.float().log_softmax(-1)
    loss = -chances.gather(1, following[:, None].long())[:, 0]
    return float(loss.mean()), float(-(chances.exp() * chances).sum(-1).mean())


class Confidence:
    """How sure one exit's branch is, in one session.

    Args:
        scale: what confidence means in it; None is the likeliest token's probability, as the branch says it.
        exit: whose curve of the scale; an exit without one keeps the plain probability.
        probe: the branch's, where it has one.

    Raises:
        RequestError: the scale is the probe's, and there is none.
    """

    def __init__(self, scale: Scale | None, exit: int, probe: Probe | None = None) -> None:
        self._curve = None if scale is None else scale.curves.get(exit)
        self._score = Score.MAX_PROBABILITY if scale is None or self._curve is None else scale.score
        self._probe = probe if self._score is Score.PROBE else None
        if self._score is Score.PROBE and probe is None:
            raise RequestError(f"the policy's confidence is its family's probes'; the branch at exit {exit} has none")

    @property
    def plain(self) -> bool:
        """Whether it is the likeliest token's probability, as the branch says it."""
        return self._curve is None

    def __call__(self, logits: Tensor, read: Tensor | None = None) -> list[float]:
        """(n, vocab) logits, and the (n, hidden) states that the head read -> n numbers in 0 … 1."""
        curve = self._curve
        if curve is None:
            return measure(logits, self._score).tolist()
        found = measure(logits, self._score, curve.temperature, probe=self._probe, read=read).tolist()
        return [curve(value) if value == value else value for value in found]  # what is no number must not become one


PLAIN = Confidence(None, 0)
"""The likeliest token's probability."""
