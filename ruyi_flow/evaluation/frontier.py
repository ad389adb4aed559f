"""A calibration drawn: what agreement costs, and whether confidence means what it says; PNG and CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from ruyi_flow.errors import ConfigError
from ruyi_flow.routing.calibration import Floats, Point, raw_confidences, reliability
from ruyi_flow.routing.trace import Trace

__all__ = ["write"]

_STYLES = {"calibrated": "o-", "uncalibrated": "s--", "random": ":", "always": "x"}


def write(out: Path, points: Sequence[Point], trace: Trace, confidence: Mapping[int, Floats]) -> list[Path]:
    """Write `frontier.csv`, `frontier.png` and `reliability.png`.

    Args:
        points: of the frontier.
        trace, confidence: prompts that the curves have not seen, and by early exit what the curves say of them.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("the report needs the extra: pip install 'ruyi-flow[eval]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    out.mkdir(parents=True, exist_ok=True)
    table, drawn, meaning = out / "frontier.csv", out / "frontier.png", out / "reliability.png"
    exits = trace.header.exits
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["policy", "setting", "agreement", "disagreement_early", "cost", "escalated", *(f"at_{p}" for p in exits)]
        )
        for point in points:
            o = point.outcome
            numbers = (o.agreement, o.disagreement, o.cost, 1 - o.decided[exits[0]], *(o.decided[p] for p in exits))
            rows.writerow([point.policy, point.setting, *(f"{n:.5f}" for n in numbers)])
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for policy, style in _STYLES.items():
        mine = sorted((p.outcome for p in points if p.policy == policy), key=lambda o: o.cost)
        axes[0].plot([o.cost for o in mine], [o.agreement for o in mine], style, label=policy, markersize=4)
        axes[1].plot(
            [1 - o.decided[exits[0]] for o in mine], [o.agreement for o in mine], style, label=policy, markersize=4
        )
    axes[0].set(xlabel="trunk layers and a branch, mean of tokens", ylabel="tokens that are the last exit's")
    axes[1].set(xlabel=f"share of tokens asked beyond exit {exits[0]}", ylabel="tokens that are the last exit's")
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
