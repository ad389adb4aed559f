"""Reports of a calibration as CSV tables and PNG plots: what agreement costs, and whether confidence is honest."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruyi_flow.atomic_file import atomic_file
from ruyi_flow.calibration.cascade import CascadeCalibration
from ruyi_flow.calibration.curves import Floats, raw_confidences, reliability_bins
from ruyi_flow.calibration.thresholds import TokenCalibration
from ruyi_flow.calibration.trace import Trace

__all__ = ["write_cascade_report", "write_token_report"]

_STYLES = {"calibrated": "o-", "uncalibrated": "s--", "random": ":", "always": "x", "oracle": "^:"}


@dataclass(frozen=True, slots=True)
class _Point:
    """One row of a table and one point of each plot."""

    policy: str
    cells: Sequence[Any]
    value: float
    costs: tuple[float, float, float]


def write_cascade_report(out: Path, found: CascadeCalibration) -> list[Path]:
    """Write `cascade.csv`, `cascade.png` and `reliability.png`, with quality against cost, and return their paths.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    exits = list(found.tested.decided)
    header = ["policy", "chance", "bound", "first", "score", "last_score", "compute", "escalated", "bytes_per_token"]
    points = []
    for policy, outcomes in {"calibrated": found.frontier, **found.baselines}.items():
        for o in outcomes:
            costs = (o.compute, 1 - o.decided[exits[0]], o.bytes_per_token)
            numbers = (f"{n:.5f}" for n in (o.score, o.last, *costs, *o.decided.values()))
            cells = (policy, o.setting.chance, o.setting.bound, o.setting.first, *numbers)
            points.append(_Point(policy, cells, o.score / max(1e-9, o.last), costs))
    labels = ("compute, relative to the last exit", "share of tokens of deeper exits", "bytes up per token")
    header += [f"at_{p}" for p in exits]
    files = _write_points(out / "cascade", header, points, labels, "quality, relative to the last exit")
    return [*files, _plot_reliability(out / "reliability.png", *found.unseen)]


def write_token_report(out: Path, found: TokenCalibration) -> list[Path]:
    """Write `frontier.csv`, `frontier.png` and `reliability.png`, with agreement against cost, and return their paths.

    With a scorer, the CSV has the quality of each exit's own answers in the rows of policy `always`. A trace does not
    contain the quality of answers that several exits decide.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    trace, _ = found.unseen
    exits, right = trace.header.exits, trace.right
    header = ["policy", "setting", "agreement", "disagreement_early", "cost", "escalated", "bytes_per_token"]
    points = []
    for point in found.frontier:
        o = point.outcome
        costs = (o.cost, point.cost.escalation, point.cost.bytes_per_token)
        numbers = [o.agreement, o.disagreement, *costs, *(o.decided[p] for p in exits)]
        alone = right.get(int(point.setting)) if point.policy == "always" else None
        cells = (point.policy, point.setting, *(f"{n:.5f}" for n in numbers), "" if alone is None else f"{alone:.5f}")
        points.append(_Point(point.policy, cells, o.agreement, costs))
    labels = ("mean layers per token", "share of tokens that the first node escalates", "bytes up per token")
    header += [*(f"at_{p}" for p in exits), "score"]
    files = _write_points(out / "frontier", header, points, labels, "agreement with the last exit")
    return [*files, _plot_reliability(out / "reliability.png", *found.unseen)]


def _write_points(
    path: Path, header: Sequence[str], points: Sequence[_Point], costs: Sequence[str], value: str
) -> list[Path]:
    """Write a CSV table, and plots of the value against each cost with a line for each policy."""
    pyplot, table, plot = _import_pyplot(), path.with_suffix(".csv"), path.with_suffix(".png")
    with atomic_file(table) as new, new.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *(point.cells for point in points)])
    figure, axes = pyplot.subplots(1, len(costs), figsize=(14, 4), layout="constrained", sharey=True)
    for policy in dict.fromkeys(point.policy for point in points):
        line = sorted((point for point in points if point.policy == policy), key=lambda point: point.costs[0])
        for i, axis in enumerate(axes):
            x, y = [point.costs[i] for point in line], [point.value for point in line]
            axis.plot(x, y, _STYLES[policy], label=policy, markersize=4)
    for axis, label in zip(axes, costs, strict=True):
        axis.set(xlabel=label)
    axes[0].set(ylabel=value)
    axes[0].legend()
    with atomic_file(plot) as new:
        figure.savefig(new, dpi=120)
    pyplot.close(figure)
    return [table, plot]


def _plot_reliability(path: Path, trace: Trace, confidence: Mapping[int, Floats]) -> Path:
    """Plot how often each branch agrees with the last one against its confidence."""
    pyplot = _import_pyplot()
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
    with atomic_file(path) as new:
        figure.savefig(new, dpi=120)
    pyplot.close(figure)
    return path


def _import_pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
