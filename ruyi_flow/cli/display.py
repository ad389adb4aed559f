"""Output of the commands: answers coloured by tier, tables of statistics, progress bars and node logs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
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
    "comma_list",
    "counting_bar",
    "err",
    "node_legend",
    "log_writer",
    "out",
    "print_json",
    "progress_bar",
    "stats_line",
    "stats_table",
    "status_table",
    "step_printer",
    "token_table",
    "token_text",
    "training_bar",
]

_PIPE_WIDTH = 120  # rich would assume 80 for a pipe and cut the tables
out = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
err = Console(stderr=True, width=None if sys.stderr.isatty() else _PIPE_WIDTH)

_LINK_STATES = {"idle": "not connected yet", "ready": "connected", "transient_failure": "unreachable"}
"""Words for gRPC's states of a connection."""

_COLOURS = ("green", "yellow", "cyan", "magenta", "blue", "red")
_UNKNOWN_COLOUR = "default"
"""Colour of a node that the client's topology does not have: the running nodes may have another one."""


@contextmanager
def progress_bar(what: str, *, total: float | None = None, quiet: bool = False) -> Iterator[Callable[[float], None]]:
    """Show a progress bar, or a spinner without a total; yields a function that takes the amount done so far."""
    columns = [TextColumn("{task.description}"), BarColumn() if total else SpinnerColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


@contextmanager
def counting_bar(*, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Show one progress bar for each part of the work; yields a function of (part's name, done, total)."""
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
    """Show a progress bar with speed and time left; yields a function of (done, total, tokens per second, note)."""
    text = TextColumn(
        "{task.completed:,.0f}/{task.total:,.0f} · {task.fields[speed]:,.0f} tokens/s {task.fields[note]}"
    )
    columns = [TextColumn("{task.description}"), BarColumn(), text, TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal) as progress:
        task = progress.add_task(what, total=1, speed=0.0, note="")
        yield lambda done, total, speed, note="": progress.update(
            task, completed=done, total=total, speed=speed, note=note
        )


def step_printer(quiet: bool = False) -> Callable[[str], None]:
    """Return a function that prints one step of a long task to standard error; it does nothing when quiet."""
    return lambda step: None if quiet else err.print(f"[dim]{escape(step)}[/dim]", soft_wrap=True)


def print_json(value: object) -> None:
    """Print a value to standard output as one line of JSON."""
    is_utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(value, ensure_ascii=not is_utf8) + "\n")


def _colour(topology: Topology, name: str) -> str:
    names = [node.name for node in topology.nodes]
    return _COLOURS[names.index(name) % len(_COLOURS)] if name in names else _UNKNOWN_COLOUR


def token_text(topology: Topology, token: Token) -> Text:
    """Return a token's text in the colour of the node that decided it."""
    return Text(token.text, style=_colour(topology, token.node))


def node_legend(topology: Topology) -> Text:
    """Return every node's name and exits in the node's colour."""
    return Text("  ").join(
        Text(f"{node.label} (exits {comma_list(node.exits)})", style=_colour(topology, node.name))
        for node in topology.nodes
    )


def log_writer(topology: Topology) -> Callable[[str, str], None]:
    """Return a function of (node name, line) that prints a line of a node's log in the node's colour."""
    width = max(len(node.name) for node in topology.nodes)

    def log(name: str, line: str) -> None:
        err.print(Text.assemble((f"{name:<{width}} │ ", _colour(topology, name)), line), soft_wrap=True)

    return log


def token_table(topology: Topology, tokens: list[Token]) -> Table:
    """Return a table with one row per token: the node and exit that decided it, its confidence and the reason."""
    table = Table("#", "token", "decided by", "exit", "confidence", "reason")
    for i, token in enumerate(tokens):
        colour, label = _colour(topology, token.node), topology.label_of(token.node)
        name = label if label == token.node else f"{label} ({token.node})"
        table.add_row(
            str(i), Text(repr(token.text), style=colour), name, str(token.exit), f"{token.confidence:.2f}", token.reason
        )
    return table


def stats_table(stats: Stats) -> Table:
    """Return a table of what each node spent on an answer; the caption is `stats_line`."""
    tokens = max(1, stats.new_tokens)
    times = ("compute\nms/token", "queue\nms/token", "link\nms/token")
    table = Table("node", *times, "messages\nreceived", "positions\nreceived", "bytes\nup", "bytes\ndown")
    for hop in stats.hops:
        spent = (f"{1000 * seconds / tokens:.2f}" for seconds in (hop.compute_s, hop.queue_s, hop.wire_s))
        counts = (f"{count:,}" for count in (hop.messages, hop.positions, hop.bytes_up, hop.bytes_down))
        table.add_row(hop.node, *spent, *counts)
    table.caption = stats_line(stats)
    table.caption_justify = "left"
    return table


def stats_line(stats: Stats) -> str:
    """Return one line that sums up an answer: tokens, times, escalations, accepted drafts, bytes sent up, seed."""
    up = sum(hop.bytes_up for hop in stats.hops)
    drafts = f", {stats.accepted} of {stats.drafted} drafted tokens accepted" if stats.drafted else ""
    return (
        f"{stats.new_tokens} tokens, first after {1000 * stats.first_token_s:.0f} ms, "
        f"then {1000 * stats.token_s:.1f} ms each · {stats.escalations} escalations{drafts} · "
        f"{up:,} bytes up" + (f" · seed {stats.seed}" if stats.seed else "")
    )


def status_table(answers: dict[str, NodeStatus | NodeError]) -> Table:
    """Return a table of the nodes' states; the caption lists why a node could not be asked."""
    headers = ("node", "state", "exits", "trunk\nlayers", "parameters\n(millions)", "memory, MB\n(tensors)")
    table = Table(*headers, "sessions\nopen/max", "KV positions\nused/max", "next node")
    table.columns[0].no_wrap = True
    for name, status in answers.items():
        if isinstance(status, NodeError):
            table.add_row(name, Text("down", style="red"))
            table.caption = Text(f"{table.caption or ''}\n{status}".strip(), style="red")
            continue
        table.add_row(
            status.node if status.tier == status.node else f"{status.node} ({status.tier})",
            status.state,
            comma_list(status.exits),
            f"{status.first_layer}-{status.last_layer - 1}",
            f"{status.parameters / 1e6:,.1f}",
            f"{status.resident_bytes / 1e6:,.0f} ({status.tensor_bytes / 1e6:,.0f})",
            f"{status.sessions}/{status.max_sessions}" + (f" + {status.waiting} waiting" if status.waiting else ""),
            f"{status.used_positions}/{status.max_positions}",
            f"{status.next_node}: {_LINK_STATES.get(status.next_state, status.next_state)}" if status.next_node else "",
        )
    return table


def comma_list(values: Iterable[object]) -> str:
    """Return the values as text, separated by commas."""
    return ", ".join(map(str, values))
