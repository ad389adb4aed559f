"""The command that says what is wrong with this machine, a topology, its nodes and links: doctor."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.padding import Padding
from rich.status import Status
from rich.table import Table
from rich.text import Text

from ruyi_flow.cli.app import Panel, app
from ruyi_flow.cli.display import err, out, print_json
from ruyi_flow.cli.options import JsonOption, TopologyArgument, TopologyOption, is_given
from ruyi_flow.config.examples import DEFAULT_TOPOLOGY
from ruyi_flow.errors import ConfigError

if TYPE_CHECKING:
    from ruyi_flow.doctor.checks import Check

__all__ = ["doctor"]

_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "red")}


@app.command(rich_help_panel=Panel.RUN)
def doctor(
    context: typer.Context,
    file: TopologyArgument = None,
    topology: TopologyOption = DEFAULT_TOPOLOGY,
    machine: Annotated[bool, typer.Option("--machine", help="Check only this machine, and no topology.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check this machine, a topology, its nodes and their links, and say how to mend what is wrong.

    Each node is reached from here, and each node is asked to measure its link to
    the next one with about 1 MB. The nodes are compared with the topology and
    with each other: exits, family, version, addresses, encodings. The exit status
    is 1 when a check fails; warnings leave it 0.
    """
    if machine and (file is not None or is_given(context, "topology")):
        raise ConfigError("--machine checks no topology; remove it, or name no topology")
    checks = asyncio.run(_examine(None if machine else file or topology, as_json))
    failed, warned = (sum(check.mark == mark for check in checks) for mark in ("failed", "warning"))
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        out.print()
        out.print(_summary(len(checks), failed, warned))
    if failed:
        raise typer.Exit(1)


async def _examine(topology: Path | None, as_json: bool) -> list[Check]:
    """Make the checks, and print each of them as soon as it has ended."""
    from ruyi_flow.doctor.examination import examine

    checks: list[Check] = []
    with Status("looking at this machine", console=err) as spinner:
        spins = err.is_terminal and not as_json
        if not spins:
            spinner.stop()
        async with aclosing(examine(topology, spinner.update)) as found:
            async for check in found:
                if not as_json:
                    spinner.stop()
                    _show(checks, check)
                    if spins:
                        spinner.start()
                checks.append(check)
    return checks


def _show(before: Sequence[Check], check: Check) -> None:
    """Print a check, below the title of its group if it is the group's first."""
    if not before or before[-1].group != check.group:
        out.print(Text(f"\n{check.group}".removeprefix("\n" if not before else ""), style="bold"))
    mark, colour = _MARKS[check.mark]
    if not out.is_terminal:  # one line each, which a pipe can search
        out.print(Text(f" {mark} {check.text}" + (f"\n   fix: {check.fix}" if check.fix else "")), soft_wrap=True)
        return
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(mark, style=colour), Text(check.text))
    if check.fix:
        grid.add_row("", Text(f"fix: {check.fix}", style="bold"))
    out.print(Padding(grid, (0, 0, 0, 1)))


def _summary(total: int, failed: int, warned: int) -> Text:
    if not failed and not warned:
        return Text(f"all {total} checks are ok", style="green")
    parts = [(f"{failed} failed", "red")] * (failed > 0) + [(f"{warned} with a warning", "yellow")] * (warned > 0)
    return Text.assemble(f"{total} checks: ", *[x for p in parts for x in (p, ", ")][:-1])
