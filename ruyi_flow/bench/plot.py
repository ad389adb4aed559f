"""The plot of a benchmark: every sample, and the median of everything that was compared."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.figure import Figure

from ruyi_flow.atomic_file import atomic_file
from ruyi_flow.bench.measurement import Measurement

__all__ = ["draw"]


def draw(found: Measurement, processor: str, file: Path) -> None:
    """Write a PNG with one panel for each kind of sample: bars at the medians, dots at the samples."""
    bars_per_panel = max(map(len, found.samples.values()))
    width = len(found.samples) * max(4.0, 1.5 * bars_per_panel)
    figure = Figure(figsize=(width, 3.5), layout="constrained")
    panels = figure.subplots(1, len(found.samples), squeeze=False)[0]
    for axis, (unit, samples) in zip(panels, found.samples.items(), strict=True):
        bars = axis.bar([*samples], [statistics.median(values) for values in samples.values()], width=0.6, alpha=0.6)
        axis.bar_label(bars, fmt="{:,.1f}", label_type="center", fontsize=8)
        for i, values in enumerate(samples.values()):
            axis.plot([i] * len(values), values, "k.", markersize=3)
        axis.set_ylabel(unit)
        axis.tick_params(axis="x", labelsize=8)
    figure.suptitle(f"{found.bench}: {found.settings['family']}, {processor}", fontsize=9)
    with atomic_file(file) as new:
        figure.savefig(new, dpi=120)
