"""Output of the commands: answers coloured by tier, tables of statistics, progress bars and node logs."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from ruyi_flow.config.replicas import node_of, replicas_of
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import NodeError
from ruyi_flow.reply import tier_colour
from ruyi_flow.types import FinishReason, NodeStatus, Reason, Stats, Token, counted

__all__ = [
    "LINE_EVERY_S",
    "beside_answers",
    "comma_list",
    "counting_bar",
    "err",
    "fallback_note",
    "log_writer",
    "node_colour",
    "node_legend",
    "out",
    "print_json",
    "print_text",
    "printable",
    "progress_bar",
    "stats_table",
    "stdout_is_terminal",
    "status_table",
    "status_tables",
    "step_printer",
    "summary_line",
    "token_label",
    "token_summary",
    "token_table",
    "token_text",
    "training_bar",
]

_PIPE_WIDTH = 120  # rich would assume 80 for a pipe and cut the tables
out = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
err = Console(
    stderr=True,
    width=None if sys.stderr.isatty() else _PIPE_WIDTH,
    force_interactive=None if sys.stderr.isatty() else False,  # FORCE_COLOR is for colours, not for spinners
)

_TAB = 4
"""Spaces that stand for a tab, whose width depends on where it is printed."""

_CONTROLS = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "\u2421"}
_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), "\ufffd")
_CONTROLS |= {ord("\n"): "\n", ord("\t"): " " * _TAB, ord("\r"): ""}
_PRINTABLE = str.maketrans(_CONTROLS)

LINE_EVERY_S = 30.0
"""Seconds between two lines of progress where standard error is not a terminal."""

_STATUS_ROWS = (
    *("address", "state", "exits", "trunk layers", "parameters (millions)", "memory, MB", "weights, MB"),
    *("KV cache + log, MB", "sessions open/max", "sessions parked", "KV positions used/max", "next node"),
)
"""What the table of nodes' states says of each node."""

_STATUS_COLUMNS = 4
"""Most nodes and replicas side by side in a table of their states; further ones are in a table below it."""

_LINK_STATES = {
    "idle": "not connected yet",
    "ready": "connected",
    "transient_failure": "unreachable",
    "shutdown": "lost",
}
"""Words for gRPC's states of a connection."""


def printable(text: str) -> str:
    """Return a text with a visible character for each control character, which could otherwise steer the terminal."""
    return text.translate(_PRINTABLE)


def stdout_is_terminal() -> bool:
    """Return whether a person reads standard output, and not a file or another program."""
    return sys.stdout.isatty()


def beside_answers() -> Console:
    """Return the console for what is no answer: elsewhere than in a terminal, standard output has answers alone."""
    return out if stdout_is_terminal() else err


def print_text(console: Console, text: str, style: str = "") -> None:
    """Print a text, in a terminal in lines that end between words, elsewhere as one line."""
    console.print(Text(printable(text), style=style), soft_wrap=not console.file.isatty())


class _Bars:
    """Progress bars in a terminal; in a pipe or a log, a line of text every 30 seconds.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool) -> None:
        text = TextColumn("{task.fields[text]}")
        columns = [TextColumn("{task.description}"), BarColumn(), text, TimeElapsedColumn(), TimeRemainingColumn()]
        self._shown = Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal)
        self._prints_lines = not quiet and not err.is_terminal
        self._parts: dict[str, TaskID] = {}
        self._line = ""
        self._began, self._ended = time.monotonic(), threading.Event()

    def report(self, what: str, done: float = 0, total: float | None = None, note: str = "") -> None:
        """Show a part of the work, how much of it is done, and its total, if it is known and not 0.

        A part without a total disappears when the next part is reported.
        """
        total = total or None
        done = max(0, done if total is None else min(done, total))
        text = note if total is None else f"{done:,.0f}/{total:,.0f} {note}".rstrip()
        if what not in self._parts:
            for task in self._shown.tasks:
                if task.total is None:
                    self._shown.update(task.id, visible=False)
            self._parts[what] = self._shown.add_task(what, total=total, text=text)
        self._shown.update(self._parts[what], completed=done, total=total, text=text, visible=True)
        self._line = f"{what}: {text}" if text else what

    def __enter__(self) -> _Bars:
        self._shown.start()
        if self._prints_lines:
            threading.Thread(target=self._print_lines, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._shown.stop()

    def _print_lines(self) -> None:
        while not self._ended.wait(LINE_EVERY_S):
            err.print(escape(f"{self._line} ({time.monotonic() - self._began:.0f} s)"), soft_wrap=True, highlight=False)


@contextmanager
def progress_bar(what: str, *, total: float | None = None, quiet: bool = False) -> Iterator[Callable[[float], None]]:
    """Show a progress bar, without a total a moving one; yields a function that takes the amount done so far."""
    with _Bars(quiet) as bars:
        bars.report(what, 0, total)
        yield lambda done: bars.report(what, done, total)


@contextmanager
def counting_bar(*, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Show one progress bar for each part of the work; yields a function of (part's name, done, total).

    A total of 0 means that it is not known.
    """
    with _Bars(quiet) as bars:
        yield bars.report


@contextmanager
def training_bar(what: str, *, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Show a progress bar with speed and time left; yields a function of (done, total, tokens per second, note)."""
    with _Bars(quiet) as bars:
        bars.report(what)
        yield lambda done, total, speed, note="": bars.report(what, done, total, f"{speed:,.0f} tokens/s {note}")


def step_printer(quiet: bool = False) -> Callable[[str], None]:
    """Return a function that prints one step of a long task to standard error; it does nothing when quiet."""
    return lambda step: None if quiet else err.print(f"[dim]{escape(step)}[/dim]", soft_wrap=True)


def print_json(value: object) -> None:
    """Print a value to standard output as one line of JSON."""
    is_utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(value, ensure_ascii=not is_utf8) + "\n")
    sys.stdout.flush()  # here, so that a closed pipe ends the command quietly, and not at Python's exit


def node_colour(topology: Topology, name: str) -> str:
    """Return the colour of a node; one that the topology does not name has none."""
    names = [node.name for node in topology.nodes]
    return tier_colour(names, name).terminal if name in names else ""


def token_text(topology: Topology, token: Token) -> Text:
    """Return a token's text in the colour of the node that decided it."""
    return Text(token.text, style=node_colour(topology, token.node))


def node_legend(topology: Topology) -> Text:
    """Return every node's name and exits in the node's colour."""
    return Text("  ").join(
        Text(f"{node.label} (exits {comma_list(node.exits)})", style=node_colour(topology, node.name))
        for node in topology.nodes
    )


def log_writer(topology: Topology) -> Callable[[str, str], None]:
    """Return a function of (name of a node or replica, line) that prints a line of its log in the node's colour."""
    width = max(len(replica.name) for node in topology.nodes for replica in replicas_of(node))

    def log(name: str, line: str) -> None:
        err.print(Text.assemble((f"{name:<{width}} │ ", node_colour(topology, node_of(name))), line), soft_wrap=True)

    return log


def token_label(tokens: Sequence[Token], i: int, finish_reason: FinishReason | None) -> str:
    """Return how a table shows the text of a token; a token that ends the answer and has no text is <end>."""
    is_end = finish_reason is FinishReason.EOS and i == len(tokens) - 1 and not tokens[i].text
    return "<end>" if is_end else repr(tokens[i].text)


def token_table(topology: Topology, tokens: Sequence[Token], finish_reason: FinishReason | None) -> Table:
    """Return a table with one row per token: the node and exit that decided it, its confidence and the reason."""
    whole = [Column(name, no_wrap=True) for name in ("node", "exit", "confidence", "reason")]
    table = Table("#", Column("token", overflow="fold"), *whole)
    for i, token in enumerate(tokens):
        text = Text(token_label(tokens, i, finish_reason), style=node_colour(topology, token.node))
        exit, confidence = str(token.exit), f"{token.confidence:.2f}"
        table.add_row(str(i), text, escape(_node_name(topology, token.node)), exit, confidence, token.reason)
    return table


def token_summary(topology: Topology, tokens: Sequence[Token]) -> str:
    """Return one line: how many tokens each node decided, from shallow to deep, and its mean confidence."""
    known = [node.name for node in topology.nodes]
    parts = []
    for name in dict.fromkeys([*known, *(token.node for token in tokens)]):
        own = [token.confidence for token in tokens if token.node == name]
        if own:
            mean = sum(own) / len(own)
            parts.append(f"{_node_name(topology, name)} decided {len(own)} (mean confidence {mean:.2f})")
    return f"{counted(len(tokens), 'token')}: {comma_list(parts)}"


def fallback_note(topology: Topology, tokens: Sequence[Token]) -> str:
    """Return how many tokens a node decided only because no deeper one could be asked, and why; empty if none."""
    causes = Counter((token.node, token.reason) for token in tokens)
    sentences = []
    for (name, reason), count in causes.items():
        why = _cause(topology, name, reason)
        if why:
            were = "was" if count == 1 else "were"
            decided = f"{count} of {counted(len(tokens), 'token')} {were} decided by {_node_name(topology, name)}"
            sentences.append(f"{decided} because {why}.")
    return " ".join(sentences)


def _cause(topology: Topology, name: str, reason: Reason) -> str:
    """Return why a node could not ask a deeper one; empty for the other reasons."""
    if reason is Reason.LIMIT:
        return "the operator of a node allows no deeper exit (limits.deepest)"
    if reason is Reason.BUDGET:
        return "it had used up its bytes per minute (limits.bytes_up_per_minute)"
    if reason is not Reason.UNREACHABLE:
        return ""
    names = [node.name for node in topology.nodes]
    deeper = names[names.index(name) + 1 :] if name in names else []
    which = f"the next node, {_node_name(topology, deeper[0])}," if deeper else "the next node"
    return f"{which} was unreachable or full (fallback)"


def _node_name(topology: Topology, name: str) -> str:
    """Return a node's label as the legend has it, with its name if that is another word."""
    label = topology.label_of(name)
    return printable(label if label == name else f"{label} ({name})")


def stats_table(stats: Stats) -> Table:
    """Return a table of what each node spent on an answer, with one column per node."""
    tokens = max(1, stats.new_tokens)
    table = Table("")
    for hop in stats.hops:
        table.add_column(escape(printable(hop.node)), justify="right")
    for name, spent in (
        ("compute, ms/token", [1000 * hop.compute_s / tokens for hop in stats.hops]),
        ("queue, ms/token", [1000 * hop.queue_s / tokens for hop in stats.hops]),
        ("link, ms/token", [1000 * hop.wire_s / tokens for hop in stats.hops]),
    ):
        table.add_row(name, *(f"{ms:.2f}" for ms in spent))
    for name, counts in (
        ("messages received", [hop.messages for hop in stats.hops]),
        ("positions received", [hop.positions for hop in stats.hops]),
        ("bytes received", [hop.bytes_up for hop in stats.hops]),
        ("bytes returned", [hop.bytes_down for hop in stats.hops]),
    ):
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def summary_line(stats: Stats, finish_reason: FinishReason, max_new_tokens: int) -> str:
    """Return the summary of an answer's statistics, and what cut the answer off if something did."""
    if finish_reason is not FinishReason.LENGTH:
        return stats.summary
    is_limit = stats.new_tokens >= max_new_tokens
    cause = f"ended at --max-new-tokens {max_new_tokens}" if is_limit else "ended because the context is full"
    return f"{stats.summary} · {cause}"


def status_tables(
    answers: Mapping[str, NodeStatus | NodeError], addresses: Mapping[str, str] | None = None
) -> RenderableType:
    """Return the states of nodes and replicas as a table, or as several if there are many.

    Args:
        answers: each one's status by its name, as `Client.status` returns it; one that could not be asked is down.
        addresses: each one's address by its name, if the table is to have them.
    """
    names = list(answers)
    groups = [names[i : i + _STATUS_COLUMNS] for i in range(0, len(names), _STATUS_COLUMNS)]
    return Group(*(status_table({name: answers[name] for name in group}, addresses) for group in groups))


def status_table(answers: Mapping[str, NodeStatus | NodeError], addresses: Mapping[str, str] | None = None) -> Table:
    """Return a table of states with one column for each node or replica; `status_tables` explains the arguments."""
    addresses = addresses or {}
    table, columns = Table(""), list[list[RenderableType]]()
    for name, status in answers.items():
        address = addresses.get(name, "")
        if isinstance(status, NodeError):
            table.add_column(escape(printable(name)))
            columns.append([Text(address, overflow="fold"), Text("down", style="red")])
            continue
        table.add_column(escape(printable(name if status.tier == node_of(name) else f"{name} ({status.tier})")))
        state = _LINK_STATES.get(status.next_state, status.next_state)
        cells = (
            address,
            f"{status.state}, insecure" if status.insecure else status.state,
            comma_list(status.exits),
            f"{status.first_layer}-{status.last_layer - 1}",
            f"{status.parameters / 1e6:,.1f}",
            f"{status.resident_bytes / 1e6:,.0f}",
            f"{status.tensor_bytes / 1e6:,.0f}",
            f"{status.cache_bytes / 1e6:,.0f} + {status.log_bytes / 1e6:,.0f}",
            f"{status.sessions}/{status.max_sessions}" + (f" + {status.waiting} waiting" if status.waiting else ""),
            str(status.parked),
            f"{status.used_positions}/{status.max_positions}",
            f"{status.next_node}: {state}" if status.next_node else "",
        )
        columns.append([Text(printable(cell), overflow="fold") for cell in cells])
    for i, row in enumerate(_STATUS_ROWS):
        if i or addresses:
            table.add_row(row, *(cells[i] if i < len(cells) else "" for cells in columns))
    return table


def comma_list(values: Iterable[object]) -> str:
    """Return the values as text, separated by commas."""
    return ", ".join(map(str, values))
