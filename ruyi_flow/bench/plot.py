"""A bench drawn: every sample, and the median of each side."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.figure import Figure

from ruyi_flow.bench.report import Measured

__all__ = ["draw"]


def draw(found: Measured, processor: str, file: Path) -> None:
    """Write a PNG: a panel for each kind of sample, a bar at each side's median, a dot for each sample."""
    sides = max(map(len, found.samples.values()))
    width = len(found.samples) * max(4.0, 1.5 * sides)
    figure = Figure(figsize=(width, 3.5), layout="constrained")
    panels = figure.subplots(1, len(found.samples), squeeze=False)[0]
    for axis, (unit, by_side) in zip(panels, found.samples.items(), strict=True):
        bars = axis.bar([*by_side], [statistics.median(values) for values in by_side.values()], width=0.6, alpha=0.6)
        axis.bar_label(bars, fmt="{:,.1f}", label_type="center", fontsize=8)
        for i, values in enumerate(by_side.values()):
            axis.plot([i] * len(values), values, "k.", markersize=3)
        axis.set_ylabel(unit)
        axis.tick_params(axis="x", labelsize=8)
    figure.suptitle(f"{found.bench}: {found.settings['family']}, {processor}", fontsize=9)
    figure.savefig(file, dpi=120)
