"""A calibration drawn: what agreement costs, and whether confidence means what it says; PNG and CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruyi_flow.calibration.cascade import CascadeChoice
from ruyi_flow.calibration.curves import Floats, raw_confidences, reliability
from ruyi_flow.calibration.thresholds import Point
from ruyi_flow.calibration.trace import Trace
from ruyi_flow.errors import ConfigError

__all__ = ["write", "write_cascade"]

_STYLES = {"calibrated": "o-", "uncalibrated": "s--", "random": ":", "always": "x", "oracle": "^:"}


def write_cascade(out: Path, found: CascadeChoice) -> list[Path]:
    """Write `cascade.csv`, `cascade.png` and `reliability.png`: what answers are worth against what they take.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    pyplot = _pyplot()
    out.mkdir(parents=True, exist_ok=True)
    table, drawn = out / "cascade.csv", out / "cascade.png"
    exits = list(found.tested.decided)
    policies = {"calibrated": found.frontier, **found.baselines}
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        columns = ["score", "last_score", "compute", "escalated", "bytes_per_token", *(f"at_{p}" for p in exits)]
        rows.writerow(["policy", "chance", "bound", "first", *columns])
        for policy, worths in policies.items():
            for w in worths:
                numbers = (w.score, w.last, w.compute, 1 - w.decided[exits[0]], w.bytes_per_token, *w.decided.values())
                setting = (w.setting.chance, w.setting.bound, w.setting.first)
                rows.writerow([policy, *setting, *(f"{n:.5f}" for n in numbers)])
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained", sharey=True)
    for policy, worths in policies.items():
        mine = sorted(worths, key=lambda w: w.compute)
        worth = [w.score / max(1e-9, w.last) for w in mine]
        costs = (
            [w.compute for w in mine],
            [1 - w.decided[exits[0]] for w in mine],
            [w.bytes_per_token for w in mine],
        )
        for axis, cost in zip(axes, costs, strict=True):
            axis.plot(cost, worth, _STYLES[policy], label=policy, markersize=4)
    axes[0].set(xlabel="compute, over the last exit's", ylabel="worth of the answers, over the last exit's")
    axes[1].set(xlabel="share of tokens decided beyond the first exit")
    axes[2].set(xlabel="bytes upwards a token")
    axes[0].legend()
    figure.savefig(drawn, dpi=120)
    pyplot.close(figure)
    return [table, drawn, _write_reliability(out, *found.unseen)]


def write(out: Path, points: Sequence[Point], trace: Trace, confidence: Mapping[int, Floats]) -> list[Path]:
    """Write `frontier.csv`, `frontier.png` and `reliability.png`.

    Args:
        points: of the frontier. With a scorer, what each exit's own answers are worth stands beside its `always`; what
            answers of several exits are worth together, a trace does not know.
        trace, confidence: prompts that the curves have not seen, and by early exit what the curves say of them.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    pyplot = _pyplot()
    out.mkdir(parents=True, exist_ok=True)
    table, drawn = out / "frontier.csv", out / "frontier.png"
    exits, right = trace.header.exits, trace.right
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
                "score",
            ]
        )
        for point in points:
            o = point.outcome
            x = point.spent
            numbers = [o.agreement, o.disagreement, o.cost, x.escalation, x.bytes_per_token]
            numbers += [o.decided[p] for p in exits]
            alone = right.get(int(point.setting)) if point.policy == "always" else None
            score = "" if alone is None else f"{alone:.5f}"
            rows.writerow([point.policy, point.setting, *(f"{n:.5f}" for n in numbers), score])
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for policy in dict.fromkeys(p.policy for p in points):
        mine = sorted((p for p in points if p.policy == policy), key=lambda p: p.outcome.cost)
        agreement = [p.outcome.agreement for p in mine]
        costs = (
            [p.outcome.cost for p in mine],
            [p.spent.escalation for p in mine],
            [p.spent.bytes_per_token for p in mine],
        )
        for axis, cost in zip(axes, costs, strict=True):
            axis.plot(cost, agreement, _STYLES[policy], label=policy, markersize=4)
    axes[0].set(xlabel="trunk layers and a branch, mean of tokens", ylabel="tokens that are the last exit's")
    axes[1].set(xlabel="share of tokens asked beyond the first node")
    axes[2].set(xlabel="bytes upwards a token, on all links")
    axes[0].legend()
    figure.savefig(drawn, dpi=120)
    pyplot.close(figure)
    return [table, drawn, _write_reliability(out, trace, confidence)]


def _write_reliability(out: Path, trace: Trace, confidence: Mapping[int, Floats]) -> Path:
    """Write `reliability.png`: how often a branch agrees, by how sure it is."""
    pyplot, drawn = _pyplot(), out / "reliability.png"
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
    figure.savefig(drawn, dpi=120)
    pyplot.close(figure)
    return drawn


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("the report needs the extra: pip install 'ruyi-flow[eval]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
