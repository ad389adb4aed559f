"""What commands print: answers coloured by tier, tables of figures, progress, logs told apart."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import NodeError
from ruyi_flow.types import NodeStatus, Stats, Token

__all__ = [
    "coloured",
    "counting_bar",
    "err",
    "figures",
    "join",
    "legend",
    "node_log",
    "out",
    "print_json",
    "progress_bar",
    "say",
    "stats_table",
    "status_table",
    "token_table",
    "training_bar",
]

_WIDTH = None if sys.stdout.isatty() else 120  # a pipe has no width; rich would take 80 and cut the tables
out = Console(width=_WIDTH)
err = Console(stderr=True, width=None if sys.stderr.isatty() else 120)

_COLOURS = ("green", "yellow", "cyan", "magenta", "blue", "red")


@contextmanager
def progress_bar(what: str, *, total: float | None = None, quiet: bool = False) -> Iterator[Callable[[float], None]]:
    """A bar (or a spinner, when there is no total) on a terminal; gives a function that takes how much is done."""
    columns = [TextColumn("{task.description}"), BarColumn() if total else SpinnerColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


@contextmanager
def counting_bar(*, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for work in several parts; gives a function of the part's name, how much of it is done, and of how much."""
    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f}")]
    columns += [TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal) as progress:
        parts: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in parts:
                parts[what] = progress.add_task(what, total=total)
            progress.update(parts[what], completed=done, total=total)

        yield report


@contextmanager
def training_bar(what: str, *, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """A bar with speed and time left; gives a function of how much is done, of how much, tokens a second and a note."""
    text = TextColumn(
        "{task.completed:,.0f}/{task.total:,.0f} · {task.fields[speed]:,.0f} tokens/s {task.fields[note]}"
    )
    columns = [TextColumn("{task.description}"), BarColumn(), text, TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal) as progress:
        task = progress.add_task(what, total=1, speed=0.0, note="")
        yield lambda done, total, speed, note="": progress.update(
            task, completed=done, total=total, speed=speed, note=note
        )


def say(quiet: bool = False) -> Callable[[str], None]:
    """Prints a step of something that takes its time."""
    return lambda step: None if quiet else err.print(f"[dim]{escape(step)}[/dim]", soft_wrap=True)


def print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def _colour(topology: Topology, name: str) -> str:
    return _COLOURS[[node.name for node in topology.nodes].index(name) % len(_COLOURS)]


def coloured(topology: Topology, token: Token) -> Text:
    return Text(token.text, style=_colour(topology, token.node))


def legend(topology: Topology) -> Text:
    return Text("  ").join(
        Text(f"{node.label} (exits {join(node.exits)})", style=_colour(topology, node.name)) for node in topology.nodes
    )


def node_log(topology: Topology) -> Any:
    width = max(len(node.name) for node in topology.nodes)

    def log(name: str, line: str) -> None:
        err.print(Text.assemble((f"{name:<{width}} │ ", _colour(topology, name)), line), soft_wrap=True)

    return log


def token_table(topology: Topology, tokens: list[Token]) -> Table:
    table = Table("#", "token", "decided by", "exit", "confidence", "why")
    for i, token in enumerate(tokens):
        colour, node = _colour(topology, token.node), topology.node(token.node)
        name = node.label if node.label == node.name else f"{node.label} ({node.name})"
        table.add_row(
            str(i), Text(repr(token.text), style=colour), name, str(token.exit), f"{token.confidence:.2f}", token.reason
        )
    return table


def stats_table(stats: Stats) -> Table:
    n = max(1, stats.new_tokens)
    table = Table("node", "compute", "queue", "wire", "blocks", "positions", "bytes up", "bytes down")
    for hop in stats.hops:
        times = (f"{1000 * seconds / n:.2f}" for seconds in (hop.compute_s, hop.queue_s, hop.wire_s))
        counts = (f"{count:,}" for count in (hop.messages, hop.positions, hop.bytes_up, hop.bytes_down))
        table.add_row(hop.node, *times, *counts)
    table.caption = f"compute, queue and wire in ms a token\n{figures(stats)}"
    table.caption_justify = "left"
    return table


def figures(stats: Stats) -> str:
    up = sum(hop.bytes_up for hop in stats.hops)
    drafts = f", {stats.accepted} of {stats.drafted} drafts held" if stats.drafted else ""
    return (
        f"{stats.new_tokens} tokens, first after {1000 * stats.first_token_s:.0f} ms, "
        f"then {1000 * stats.token_s:.1f} ms each · {stats.escalations} escalations{drafts} · "
        f"{up:,} bytes up" + (f" · seed {stats.seed}" if stats.seed else "")
    )


def status_table(answers: dict[str, NodeStatus | NodeError]) -> Table:
    table = Table("node", "state", "exits", "layers", "params", "MB (tensors)", "sessions", "positions", "next")
    table.columns[0].no_wrap = True
    for name, s in answers.items():
        if isinstance(s, NodeError):
            table.add_row(name, Text("down", style="red"))
            table.caption = Text(f"{table.caption or ''}\n{s}".strip(), style="red")
            continue
        table.add_row(
            s.node if s.tier == s.node else f"{s.node} ({s.tier})",
            s.state,
            join(s.exits),
            f"{s.first_layer}-{s.last_layer - 1}",
            f"{s.parameters / 1e6:,.1f}M",
            f"{s.resident_bytes / 1e6:,.0f} ({s.tensor_bytes / 1e6:,.0f})",
            f"{s.sessions}/{s.max_sessions}" + (f" + {s.waiting} waiting" if s.waiting else ""),
            f"{s.used_positions}/{s.max_positions}",
            f"{s.next_node} {s.next_state}",
        )
    return table


def join(numbers: Any) -> str:
    return ", ".join(map(str, numbers))
