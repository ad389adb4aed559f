"""Curves from a branch's score to the probability that its token is the last branch's, fitted on traces."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ruyi_flow.calibration.trace import Trace
from ruyi_flow.errors import ConfigError
from ruyi_flow.routing.confidence import Calibration, Curve, Score

__all__ = [
    "Bools",
    "Floats",
    "best_score",
    "calibration_errors",
    "confidences",
    "ece",
    "evaluate_curve",
    "fit_curves",
    "raw_confidences",
    "reliability_bins",
]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_POINTS = 24
"""Most points of a curve."""


def fit_curves(trace: Trace) -> Calibration:
    """Fit a curve for every score and early exit, at the traced temperature that predicts agreement best."""
    curves: dict[Score, dict[int, Curve]] = {}
    for s, name in enumerate(trace.header.scores):
        by_exit = curves.setdefault(Score(name), {})
        for p, agrees in trace.agrees.items():
            tried = []
            for t, temperature in enumerate(trace.header.temperatures):
                scores = trace.scores[p][:, s, t].astype(np.float64)
                curve = _fit_curve(scores, agrees, temperature)
                tried.append((_log_loss(evaluate_curve(curve, scores), agrees), t, curve))
            by_exit[p] = min(tried)[2]
    return Calibration(trace.header.family, curves)


def confidences(trace: Trace, calibration: Calibration, score: Score) -> dict[int, Floats]:
    """Return (N,) calibrated confidences, by early exit.

    Raises:
        ConfigError: the calibration belongs to another family.
    """
    if calibration.family != trace.header.family:
        raise ConfigError(
            f"the calibration belongs to family {calibration.family[:12]}, the trace to {trace.header.family[:12]}; "
            "calibrate with this family's trace"
        )
    s = trace.header.scores.index(score)
    out = {}
    for p, curve in calibration.curves[score].items():
        t = trace.header.temperatures.index(curve.temperature)
        out[p] = evaluate_curve(curve, trace.scores[p][:, s, t].astype(np.float64))
    return out


def best_score(trace: Trace, calibration: Calibration) -> Score:
    """Choose the score whose curves predict agreement best along a trace, over all early exits."""

    def loss(score: Score) -> float:
        found = confidences(trace, calibration, score)
        return sum(_log_loss(found[p], agrees) for p, agrees in trace.agrees.items())

    return min((Score(name) for name in trace.header.scores), key=loss)


def raw_confidences(trace: Trace) -> dict[int, Floats]:
    """Return (N,) the branch's own probability of its most probable token, uncalibrated, by early exit."""
    s, t = trace.header.scores.index(Score.MAX_PROBABILITY), trace.header.temperatures.index(1.0)
    return {p: scores[:, s, t].astype(np.float64) for p, scores in trace.scores.items()}


def reliability_bins(confidence: Floats, agrees: Bools, bins: int = 15) -> list[tuple[float, float, int]]:
    """Return mean confidence, share that agrees and number of tokens for bins of equal width, without empty bins."""
    where = np.minimum((confidence * bins).astype(int), bins - 1)
    out = []
    for b in range(bins):
        inside = where == b
        if count := int(inside.sum()):
            out.append((float(confidence[inside].mean()), float(agrees[inside].mean()), count))
    return out


def ece(confidence: Floats, agrees: Bools, bins: int = 15) -> float:
    """Return the expected calibration error: mean distance of confidence and agreement (Naeini et al. 2015)."""
    return sum(abs(said - was) * count for said, was, count in reliability_bins(confidence, agrees, bins)) / len(agrees)


def calibration_errors(trace: Trace, confidence: Mapping[int, Floats]) -> dict[int, tuple[float, float]]:
    """Return the expected calibration error of each early exit's own probability and of its calibrated confidence."""
    raw = raw_confidences(trace)
    return {p: (ece(raw[p], agrees), ece(confidence[p], agrees)) for p, agrees in trace.agrees.items()}


def evaluate_curve(curve: Curve, scores: Floats) -> Floats:
    """Return a curve's probabilities at many scores."""
    return np.asarray(np.interp(scores, curve.scores, curve.chances), np.float64)


def _fit_curve(scores: Floats, agrees: Bools, temperature: float) -> Curve:
    """Measure agreement in bins of equal mass, made monotone by pooling adjacent violators (Ayer et al. 1955)."""
    order = np.argsort(scores, kind="stable")
    bins = [part for part in np.array_split(order, min(_POINTS, max(1, len(scores) // 20))) if len(part)]
    pools: list[tuple[float, float, int]] = []  # mean score, mean agreement, count
    for part in bins:
        x, y, n = float(scores[part].mean()), float(agrees[part].mean()), len(part)
        while pools and (pools[-1][1] >= y or pools[-1][0] >= x):
            px, py, pn = pools.pop()
            x, y, n = (px * pn + x * n) / (pn + n), (py * pn + y * n) / (pn + n), pn + n
        pools.append((x, y, n))
    return Curve(temperature, tuple(x for x, _, _ in pools), tuple(y for _, y, _ in pools))


def _log_loss(chances: Floats, agrees: Bools) -> float:
    clipped = chances.clip(1e-4, 1 - 1e-4)
    return float(-np.where(agrees, np.log(clipped), np.log1p(-clipped)).mean())
