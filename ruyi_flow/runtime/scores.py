"""Confidence scores computed from logits on torch; `routing/confidence.py` defines the scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ruyi_flow.errors import RequestError
from ruyi_flow.family.transformer import Probe
from ruyi_flow.routing.confidence import Scale, Score
from ruyi_flow.types import Likelihood

__all__ = ["PLAIN", "Confidence", "likelihoods", "loss_and_entropy", "measure", "measure_all", "most_probable"]

_ROWS_AT_ONCE = 64
"""Rows that `measure_all` processes together, few enough to stay in the CPU caches."""


def most_probable(logits: Tensor) -> tuple[list[int], list[float]]:
    """Return the most probable token of each row of (n, vocab) logits, and its probability."""
    # In bfloat16 `argmax` alone takes four times as long as all of this (docs/log.md).
    wide = logits.float()
    tokens = wide.max(-1).indices
    return tokens.tolist(), wide.softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist()


def likelihoods(logits: Tensor, tokens: Sequence[int], top: int) -> list[Likelihood]:
    """Compute how probable a branch finds n tokens, and its most probable tokens in their places.

    Args:
        logits: (n, vocab) in any number format.
        tokens: the n tokens.
        top: number of most probable tokens of each place.
    """
    found = []
    for start in range(0, len(tokens), _ROWS_AT_ONCE):
        rows = logits[start : start + _ROWS_AT_ONCE].float().log_softmax(-1)
        chosen = torch.tensor(tokens[start : start + _ROWS_AT_ONCE], device=rows.device)
        best = rows.topk(min(top, rows.shape[1]), -1)
        own = rows.gather(-1, chosen[:, None])[:, 0].tolist()
        for logprob, ids, values in zip(own, best.indices.tolist(), best.values.tolist(), strict=True):
            found.append(Likelihood(logprob, tuple(zip(ids, values, strict=True))))
    return found


def measure(
    logits: Tensor,
    score: Score,
    temperature: float = 1.0,
    *,
    probe: Probe | None = None,
    head_input: Tensor | None = None,
) -> Tensor:
    """Compute a confidence score for each row of logits.

    Args:
        logits: (n, vocab) in any number format; excluded tokens have -inf.
        score: the score to compute.
        temperature: divides the logits, or the probe's log-odds, first.
        probe: the branch's probe; required by the probe score only.
        head_input: (n, hidden) input of the branch's LM head; required by the probe score only.

    Returns:
        (n,) scores in float32.
    """
    if score is Score.PROBE:
        assert probe is not None and head_input is not None
        odds: Tensor = probe.forward(head_input, logits) / temperature
        return odds.sigmoid()
    scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
    norm = scaled.logsumexp(-1)
    if score is Score.MAX_PROBABILITY:
        highest: Tensor = torch.exp(scaled.amax(-1) - norm)
        return highest
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
    head_input: Tensor | None = None,
) -> Tensor:
    """Compute several scores at several temperatures in fewer passes over the vocabulary than `measure` takes.

    The arguments are those of `measure`; without a probe, the probe score is 1.

    Returns:
        (n, scores, temperatures) scores in float32.
    """
    out = torch.ones(len(logits), len(scores), len(temperatures), device=logits.device)
    for start in range(0, len(logits), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        x = logits[rows].float()
        two = x.topk(2, -1).values
        lower = x - two[:, :1]
        odds = None if probe is None or head_input is None else probe.forward(head_input[rows], x)
        for t, temperature in enumerate(temperatures):
            relative = (lower / temperature).exp_()
            total = relative.sum(-1)
            first = 1 / total
            second = ((two[:, 1] - two[:, 0]) / temperature).exp() * first
            for s, score in enumerate(scores):
                if score is Score.MAX_PROBABILITY:
                    out[rows, s, t] = first
                elif score is Score.MARGIN:
                    out[rows, s, t] = first - second
                elif score is Score.NEGATIVE_ENTROPY:
                    mean = torch.linalg.vecdot(relative, lower) * first / temperature
                    out[rows, s, t] = mean - total.log()
                elif odds is not None:
                    out[rows, s, t] = (odds / temperature).sigmoid()
    return out


def loss_and_entropy(logits: Tensor, following: Tensor) -> tuple[float, float]:
    """Compute a branch's mean loss and mean entropy along a prompt, in nats; both are 0 without rows.

    `logits` are (n, vocab), and `following` are the (n,) tokens of the prompt that follow the rows.
    """
    if not len(following):
        return 0.0, 0.0
    log_probabilities = logits.float().log_softmax(-1)
    loss = -log_probabilities.gather(1, following[:, None].long())[:, 0]
    return float(loss.mean()), float(-(log_probabilities.exp() * log_probabilities).sum(-1).mean())


class Confidence:
    """The confidence of one exit's branch in one session.

    Args:
        scale: calibrated score of the policy. None: the most probable token's probability, uncalibrated.
        exit: the branch's exit; without a curve in the scale its confidence is uncalibrated.
        probe: the branch's probe, if it has one.

    Raises:
        RequestError: the scale needs a probe and the branch has none.
    """

    def __init__(self, scale: Scale | None, exit: int, probe: Probe | None = None) -> None:
        self._curve = None if scale is None else scale.curves.get(exit)
        self._score = Score.MAX_PROBABILITY if scale is None or self._curve is None else scale.score
        self._probe = probe if self._score is Score.PROBE else None
        if self._score is Score.PROBE and probe is None:
            raise RequestError(f"the policy needs probes; the branch at exit {exit} has none: use another policy")

    @property
    def plain(self) -> bool:
        """Whether the confidence is the most probable token's probability, uncalibrated."""
        return self._curve is None

    def __call__(self, logits: Tensor, head_input: Tensor | None = None) -> list[float]:
        """Return n confidences from 0 to 1, from (n, vocab) logits and the (n, hidden) input of the LM head."""
        curve = self._curve
        if curve is None:
            return measure(logits, self._score).tolist()
        found = measure(logits, self._score, curve.temperature, probe=self._probe, head_input=head_input).tolist()
        return [curve(value) if value == value else value for value in found]  # NaN stays NaN, an error


PLAIN = Confidence(None, 0)
"""The most probable token's probability, uncalibrated."""
