"""Reports of an evaluation: a Markdown table, JSON and a plot."""

from __future__ import annotations

import json
from pathlib import Path

from ruyi_flow.atomic_file import atomic_file
from ruyi_flow.evaluation.run import Column, Evaluation, Row

__all__ = ["cell", "heading", "markdown", "notes", "write"]


def heading(column: Column) -> str:
    """Return a column's heading; its arrow tells which direction is better."""
    return f"{column.task} {column.metric.replace('_', ' ')} {'↑' if column.higher_is_better else '↓'}".replace(
        f"{column.task} {column.task}", column.task
    )


def cell(row: Row, column: Column) -> str:
    """Format a value, with its standard error if there is one."""
    value, error = row.values[column.task], row.errors.get(column.task)
    shown = f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return shown if error is None else f"{shown} ± {error:.3f}"


def markdown(evaluation: Evaluation) -> str:
    """Format the table in Markdown, one row for each exit."""
    lines = [["exit", "layers", "parameters", *map(heading, evaluation.columns)]]
    lines.append(["---:"] * len(lines[0]))
    for row in evaluation.rows:
        size = f"{row.parameters / 1e6:,.0f}M" if row.parameters < 1e9 else f"{row.parameters / 1e9:.1f}B"
        lines.append([str(row.exit), str(row.layers), size, *(cell(row, c) for c in evaluation.columns)])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def notes(evaluation: Evaluation) -> list[str]:
    """Say what the table leaves out, in one sentence for each such column."""
    return [
        f"{column.task}: {column.skipped} chats were left out: they do not fit the family's context, or have no answer."
        for column in evaluation.columns
        if column.skipped
    ]


def write(evaluation: Evaluation, out: Path) -> list[Path]:
    """Write `table.md`, `evaluation.json` and, if matplotlib is installed, `plot.png`, and return their paths."""
    limit = "" if evaluation.limit is None else f", {evaluation.limit} questions of each task"
    head = f"{evaluation.family} ({evaluation.fingerprint[:12]}), {evaluation.dtype}, {evaluation.fewshot} shots{limit}"
    table, data, plot = out / "table.md", out / "evaluation.json", out / "plot.png"
    said = "".join(f"\n{note}\n" for note in notes(evaluation))
    with atomic_file(table) as new:
        new.write_text(f"{head}\n\n{markdown(evaluation)}{said}", encoding="utf-8")
    with atomic_file(data) as new:
        new.write_text(json.dumps(evaluation.to_dict(), indent=1) + "\n", encoding="utf-8")
    try:
        import matplotlib
    except ImportError:
        return [table, data]
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(evaluation.columns), figsize=(3.2 * len(evaluation.columns), 3), squeeze=False, layout="constrained"
    )
    exits = [row.exit for row in evaluation.rows]
    for axis, column in zip(axes[0], evaluation.columns, strict=True):
        errors = [row.errors.get(column.task, 0.0) for row in evaluation.rows]
        axis.errorbar(exits, [row.values[column.task] for row in evaluation.rows], errors, marker="o", capsize=3)
        axis.set(
            title=heading(column).replace("↑", "(higher is better)").replace("↓", "(lower is better)"), xlabel="exit"
        )
        axis.title.set_fontsize(8)
        axis.set_xticks(exits)
    with atomic_file(plot) as new:
        figure.savefig(new, dpi=120)
    pyplot.close(figure)
    return [table, data, plot]
