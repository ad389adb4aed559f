"""Reports of a calibration as CSV tables and PNG plots: what agreement costs, and whether confidence is honest."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruyi_flow.calibration.cascade import CascadeCalibration
from ruyi_flow.calibration.curves import Floats, raw_confidences, reliability_bins
from ruyi_flow.calibration.thresholds import TokenCalibration
from ruyi_flow.calibration.trace import Trace
from ruyi_flow.errors import ConfigError

__all__ = ["write_cascade_report", "write_token_report"]

_STYLES = {"calibrated": "o-", "uncalibrated": "s--", "random": ":", "always": "x", "oracle": "^:"}

_Lines = Mapping[str, Sequence[tuple[float, Sequence[float]]]]
"""For each policy: points of (value, its costs on each axis)."""


def write_cascade_report(out: Path, found: CascadeCalibration) -> list[Path]:
    """Write `cascade.csv`, `cascade.png` and `reliability.png`: the quality of answers against their cost.

    Returns:
        The files.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    pyplot = _import_pyplot()
    out.mkdir(parents=True, exist_ok=True)
    exits = list(found.tested.decided)
    policies = {"calibrated": found.frontier, **found.baselines}
    header = ["policy", "chance", "bound", "first", "score", "last_score", "compute", "escalated", "bytes_per_token"]
    rows: list[Sequence[Any]] = [[*header, *(f"at_{p}" for p in exits)]]
    lines: dict[str, list[tuple[float, Sequence[float]]]] = {}
    for policy, outcomes in policies.items():
        for o in sorted(outcomes, key=lambda o: o.compute):
            costs = (o.compute, 1 - o.decided[exits[0]], o.bytes_per_token)
            lines.setdefault(policy, []).append((o.score / max(1e-9, o.last), costs))
        for o in outcomes:
            numbers = (o.score, o.last, o.compute, 1 - o.decided[exits[0]], o.bytes_per_token, *o.decided.values())
            setting = (o.setting.chance, o.setting.bound, o.setting.first)
            rows.append([policy, *setting, *(f"{n:.5f}" for n in numbers)])
    table = _write_rows(out / "cascade.csv", rows)
    labels = (
        "compute, relative to the last exit",
        "share of tokens of deeper exits",
        "bytes up per token",
    )
    plot = _plot_lines(pyplot, out / "cascade.png", lines, labels, "quality, relative to the last exit")
    return [table, plot, _plot_reliability(pyplot, out, *found.unseen)]


def write_token_report(out: Path, found: TokenCalibration) -> list[Path]:
    """Write `frontier.csv`, `frontier.png` and `reliability.png`: agreement against its cost.

    With a scorer, the CSV has the quality of each exit's own answers in the rows of policy `always`. A trace does not
    contain the quality of answers that several exits decide.

    Returns:
        The files.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    pyplot = _import_pyplot()
    out.mkdir(parents=True, exist_ok=True)
    trace, confidence = found.unseen
    exits, right = trace.header.exits, trace.right
    header = ["policy", "setting", "agreement", "disagreement_early", "cost", "escalated", "bytes_per_token"]
    rows: list[Sequence[Any]] = [[*header, *(f"at_{p}" for p in exits), "score"]]
    lines: dict[str, list[tuple[float, Sequence[float]]]] = {}
    for point in found.frontier:
        o, cost = point.outcome, point.cost
        numbers = [o.agreement, o.disagreement, o.cost, cost.escalation, cost.bytes_per_token]
        numbers += [o.decided[p] for p in exits]
        alone = right.get(int(point.setting)) if point.policy == "always" else None
        score = "" if alone is None else f"{alone:.5f}"
        rows.append([point.policy, point.setting, *(f"{n:.5f}" for n in numbers), score])
        lines.setdefault(point.policy, []).append((o.agreement, (o.cost, cost.escalation, cost.bytes_per_token)))
    for points in lines.values():
        points.sort(key=lambda point: point[1][0])
    table = _write_rows(out / "frontier.csv", rows)
    labels = ("mean layers per token", "share of tokens that the first node escalates", "bytes up per token")
    plot = _plot_lines(pyplot, out / "frontier.png", lines, labels, "agreement with the last exit")
    return [table, plot, _plot_reliability(pyplot, out, trace, confidence)]


def _write_rows(path: Path, rows: Sequence[Sequence[Any]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def _plot_lines(pyplot: Any, path: Path, lines: _Lines, costs: Sequence[str], value: str) -> Path:
    """Plot a value against each of its costs, a line for each policy."""
    figure, axes = pyplot.subplots(1, len(costs), figsize=(14, 4), layout="constrained", sharey=True)
    for i, (axis, label) in enumerate(zip(axes, costs, strict=True)):
        for policy, points in lines.items():
            axis.plot([c[i] for _, c in points], [v for v, _ in points], _STYLES[policy], label=policy, markersize=4)
        axis.set(xlabel=label)
    axes[0].set(ylabel=value)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _plot_reliability(pyplot: Any, out: Path, trace: Trace, confidence: Mapping[int, Floats]) -> Path:
    """Plot how often each branch agrees with the last one against its confidence."""
    path = out / "reliability.png"
    figure, panels = pyplot.subplots(
        1, len(confidence), figsize=(3 * len(confidence), 3), squeeze=False, layout="constrained"
    )
    raw = raw_confidences(trace)
    for axis, (p, calibrated) in zip(panels[0], confidence.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
        for name, values in (("own probability", raw[p]), ("calibrated", calibrated)):
            bins = reliability_bins(values, trace.agrees[p])
            axis.plot([mean for mean, _, _ in bins], [share for _, share, _ in bins], "o-", label=name, markersize=3)
        axis.set(title=f"exit {p}", xlabel="confidence", ylabel="agreement")
    panels[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _import_pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("the report needs matplotlib: pip install 'ruyi-flow[eval]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
