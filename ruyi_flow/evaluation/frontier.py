"""A calibration drawn: what agreement costs, and whether confidence means what it says; PNG and CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruyi_flow.errors import ConfigError
from ruyi_flow.routing.calibration import Point
from ruyi_flow.routing.cascade import Worth
from ruyi_flow.routing.curves import Floats, raw_confidences, reliability
from ruyi_flow.routing.trace import Trace

__all__ = ["write", "write_cascade"]

_STYLES = {"calibrated": "o-", "uncalibrated": "s--", "random": ":", "always": "x"}


def write_cascade(out: Path, frontier: Sequence[Worth]) -> list[Path]:
    """Write `cascade.csv` and `cascade.png`: what answers are worth against the compute they take.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    pyplot = _pyplot()
    out.mkdir(parents=True, exist_ok=True)
    table, drawn = out / "cascade.csv", out / "cascade.png"
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["chance", "bound", "first", "score", "last_score", "compute", *(f"at_{p}" for p in frontier[0].decided)]
        )
        for w in frontier:
            numbers = (w.score, w.last, w.compute, *w.decided.values())
            rows.writerow([w.setting.chance, w.setting.bound, w.setting.first, *(f"{n:.5f}" for n in numbers)])
    figure, axis = pyplot.subplots(figsize=(5, 4), layout="constrained")
    points = sorted((w.compute, w.score / max(1e-9, w.last)) for w in frontier)
    axis.plot([x for x, _ in points], [y for _, y in points], "o-", markersize=4)
    axis.set(xlabel="compute, over the last exit's", ylabel="worth of the answers, over the last exit's")
    figure.savefig(drawn, dpi=120)
    pyplot.close(figure)
    return [table, drawn]


def write(out: Path, points: Sequence[Point], trace: Trace, confidence: Mapping[int, Floats]) -> list[Path]:
    """Write `frontier.csv`, `frontier.png` and `reliability.png`.

    Args:
        points: of the frontier.
        trace, confidence: prompts that the curves have not seen, and by early exit what the curves say of them.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    pyplot = _pyplot()
    out.mkdir(parents=True, exist_ok=True)
    table, drawn, meaning = out / "frontier.csv", out / "frontier.png", out / "reliability.png"
    exits = trace.header.exits
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            [
                "policy",
                "setting",
                "agreement",
                "disagreement_early",
                "cost",
                "escalated",
                "bytes_per_token",
                *(f"at_{p}" for p in exits),
            ]
        )
        for point in points:
            o = point.outcome
            x = point.spent
            numbers = [o.agreement, o.disagreement, o.cost, x.escalation, x.bytes_per_token]
            numbers += [o.decided[p] for p in exits]
            rows.writerow([point.policy, point.setting, *(f"{n:.5f}" for n in numbers)])
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for policy, style in _STYLES.items():
        mine = sorted((p for p in points if p.policy == policy), key=lambda p: p.outcome.cost)
        agreement = [p.outcome.agreement for p in mine]
        costs = (
            [p.outcome.cost for p in mine],
            [p.spent.escalation for p in mine],
            [p.spent.bytes_per_token for p in mine],
        )
        for axis, cost in zip(axes, costs, strict=True):
            axis.plot(cost, agreement, style, label=policy, markersize=4)
    axes[0].set(xlabel="trunk layers and a branch, mean of tokens", ylabel="tokens that are the last exit's")
    axes[1].set(xlabel="share of tokens asked beyond the first node")
    axes[2].set(xlabel="bytes upwards a token, on all links")
    axes[0].legend()
    figure.savefig(drawn, dpi=120)
    pyplot.close(figure)
    figure, panels = pyplot.subplots(
        1, len(confidence), figsize=(3 * len(confidence), 3), squeeze=False, layout="constrained"
    )
    raw = raw_confidences(trace)
    for axis, (p, calibrated) in zip(panels[0], confidence.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
        for name, values in (("own probability", raw[p]), ("calibrated", calibrated)):
            bins = reliability(values, trace.agrees[p])
            axis.plot([said for said, _, _ in bins], [was for _, was, _ in bins], "o-", label=name, markersize=3)
        axis.set(title=f"exit {p}", xlabel="confidence", ylabel="agrees")
    panels[0][0].legend(fontsize=7)
    figure.savefig(meaning, dpi=120)
    pyplot.close(figure)
    return [table, drawn, meaning]


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("the report needs the extra: pip install 'ruyi-flow[eval]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
