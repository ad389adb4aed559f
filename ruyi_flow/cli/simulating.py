"""Commands that ask "what if": profiles, simulations, sweeps, plans."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ruyi_flow.cli.app import Panel, app
from ruyi_flow.cli.display import comma_list, counting_bar, err, out, print_json
from ruyi_flow.cli.options import JsonOption, check_target, load_topology
from ruyi_flow.config.topology import check_address
from ruyi_flow.errors import ConfigError
from ruyi_flow.types import Weights

if TYPE_CHECKING:
    from ruyi_flow.sim.plan import Plan

__all__ = ["plan", "profile", "simulate", "sweep"]

ScenarioArgument = Annotated[Path, typer.Argument(help="Scenario file (YAML): a topology with a load.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Replace a key by a YAML value: nodes.edge.count=4, links.phone-edge.round_trip_ms=80, "
        "nodes.edge.hardware=l4, behaviour=null, 'policy.thresholds={5: 0.9}'. May be given several times.",
    ),
]


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends the process here: what is left has nothing to clean up.

    Thousands of coroutines that wait in virtual time would say so, and a pool's thread may wait for a process that was
    killed while it wrote.
    """
    try:
        yield
    except KeyboardInterrupt:
        err.print("interrupted")
        os._exit(130)


@app.command(rich_help_panel=Panel.SIMULATE)
def simulate(
    scenario: ScenarioArgument,
    changes: SetOption = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the scenario's.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder; runs/sim/<scenario> when left out.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Play a deployment in virtual time: latency, traffic, energy, cost and quality, before it is bought.

    A scenario is a topology with a load; relative paths in it are meant from its
    own folder. configs/sim has three, docs/simulation.md all keys.

    The run folder has the resolved scenario, requests.csv (every request's
    timeline), metrics.json, trace.json (open it in ui.perfetto.dev) and report.html.

    Example: ruyi-flow simulate configs/sim/factory.yaml --set load.requests=200
    --set nodes.box.hardware=l4 --out runs/sim/l4
    """
    from ruyi_flow.sim.run import simulate as run
    from ruyi_flow.sim.scenario import Scenario

    seeds = [] if seed is None else [f"seed={seed}"]
    asked = Scenario.read(scenario, [*(changes or ()), *seeds])
    folder = folder or Path("runs/sim") / scenario.stem
    check_target(folder, "--out", folder=True)
    with _interruptible(), counting_bar(quiet=as_json) as bar:
        result = run(asked, folder, where=str(scenario), progress=lambda done, total: bar("requests", done, total))
    if as_json:
        print_json(result.metrics)
        return
    show(result.metrics)
    err.print(f"[dim]{folder}/report.html, metrics.json, requests.csv, trace.json (ui.perfetto.dev)[/]")


@app.command(rich_help_panel=Panel.SIMULATE)
def profile(
    family: Annotated[str, typer.Argument(help="A folder, or a name in the store.")] = "smollm2",
    out_file: Annotated[Path, typer.Option("--out", "-o", help="The profile.")] = Path("profile.msgpack"),
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    weights: Annotated[Weights | None, typer.Option(help="How products hold their weights.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of a node.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Of every measurement; the median counts.")] = 7,
    nodes: Annotated[
        Path | None,
        typer.Option("--nodes", help="Measure the running nodes of this topology file instead, from outside."),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            "--link",
            help="Measure the link to the node at host:port instead: round trip, jitter and the bandwidth "
            "upwards (not downwards, nor losses); writes nothing.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what a family's stages cost on this machine, for `ruyi-flow simulate`.

    A scenario names the file as its profile, or as that of one node. docs/simulation.md
    goes on from there.

    Examples: ruyi-flow profile smollm2 --weights int8 --out here.msgpack

    ruyi-flow profile --nodes topology.yaml --out nodes.msgpack

    ruyi-flow profile --link 192.168.1.20:7102
    """
    from ruyi_flow.bench.profile.family import profile_family
    from ruyi_flow.bench.profile.link import measure_link
    from ruyi_flow.bench.profile.nodes import profile_nodes

    if link is not None:
        try:
            check_address(link)
        except ValueError as error:
            raise ConfigError(f"--link {link}: {error}") from None
        figures = asyncio.run(measure_link(link))
        if as_json:
            print_json(asdict(figures))
        else:
            out.print(
                f"round_trip_ms: {figures.round_trip_ms:.2f}\njitter_ms: {figures.jitter_ms:.2f}\n"
                f"up_mbit: {figures.up_mbit:.1f}"
            )
        return
    check_target(out_file, "--out")
    with counting_bar(quiet=as_json) as bar:
        if nodes is not None:
            found = asyncio.run(profile_nodes(load_topology(nodes), rounds=rounds, report=bar))
        else:
            found = profile_family(family, dtype=dtype, weights=weights, threads=threads, rounds=rounds, report=bar)
    found.save(out_file)
    if as_json:
        print_json({**asdict(found), "file": str(out_file)})
        return
    table = Table(title=f"{out_file}: milliseconds a step", title_justify="left")
    table.add_column("stage")
    for n in found.stages[0].rows:
        table.add_column(f"{n} rows" if n > 1 else "1 row", justify="right")
    for stage in found.stages:
        for name, times in (("trunk", stage.trunk_s), ("branch, all read", stage.head_s)):
            table.add_row(f"exit {stage.exit}: {name}", *(f"{1e3 * t:.2f}" for t in times))
    out.print(table)
    out.print(
        f"around: {1e3 * found.round_s:.2f} ms a round, {1e3 * found.exchange_s:.2f} ms an exchange between nodes, "
        f"{1e3 * found.step_s:.2f} ms to the compute thread and back; nodes share "
        f"{found.machine.get('cores_for_nodes', 1)} cores",
        highlight=False,
    )


@app.command(rich_help_panel=Panel.SIMULATE)
def sweep(
    scenario: ScenarioArgument,
    grid: Annotated[
        list[str],
        typer.Option("--grid", help="A key and its values: nodes.edge.count=1,2,4 or policy.threshold=0.5:0.9:0.1."),
    ],
    changes: SetOption = None,
    repeat: Annotated[int, typer.Option(min=1, help="Seeds of each point, from 0 on.")] = 5,
    jobs: Annotated[int | None, typer.Option(min=1, help="Simulations at a time; left out: as many as cores.")] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Run on a Ray cluster (extra 'ray') where the scenario's files are at the same paths: its address, "
            "'auto' to find one, 'local' to start one here."
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="Sweep folder; runs/sweep/<scenario> when left out.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Simulate a scenario at every point of a grid; say which points nothing beats.

    Several --grid give the product of their values. Every point runs with seeds
    0, 1, …; figures are means, with the half-width of their 95 % confidence
    interval (Student's t). The folder keeps each run that has ended: the same
    command goes on where it was broken off, and simulates only what is new.

    In the folder: results.csv; pareto.csv, the points that no other one beats in
    p95 time per token, bytes up, agreement and cost at once (* in the table);
    pareto.png. Points where more than 1 % of the requests failed are not compared.

    Example: ruyi-flow sweep scenario.yaml --grid nodes.edge.count=1,2,4
    --grid policy.threshold=0.5:0.9:0.1
    """
    from ruyi_flow.sim import sweep as sweeps

    folder = folder or Path("runs/sweep") / scenario.stem
    check_target(folder, "--out", folder=True)
    axes = [sweeps.Axis.parse(text) for text in grid]
    with _interruptible(), counting_bar(quiet=as_json) as bar:
        points = sweeps.sweep(
            scenario,
            axes,
            folder,
            overrides=changes or (),
            repeat=repeat,
            jobs=jobs,
            ray=ray,
            progress=lambda done, total: bar("runs", done, total),
        )
    written = sweeps.write(folder, points)
    try:
        written.append(sweeps.draw(folder, points))
    except ConfigError as error:  # the figures are there without it
        err.print(f"[dim]{escape(str(error))}[/]")
    best = sweeps.front(points)
    if as_json:
        rows = [asdict(point) | {"front": is_best} for point, is_best in zip(points, best, strict=True)]
        print_json({"folder": str(folder), "repeat": repeat, "points": rows})
        return
    table = Table()
    for axis in axes:
        table.add_column(axis.key.replace(".", ".\u200b"), overflow="fold")
    shown = [name for name in _SWEPT if name != "failed" or any(point.figures[name].mean for point in points)]
    for column in (*(_SWEPT[name] for name in shown), ""):
        table.add_column(column, justify="right")
    for point, is_best in zip(points, best, strict=True):
        cells = []
        for name in shown:
            figure = point.figures[name]
            cells.append(f"{figure.mean:.4g}" + ("" if figure.half is None else f"\n±{figure.half:.2g}"))
        table.add_row(*map(str, point.keys.values()), *cells, "*" if is_best else "", style="bold" if is_best else None)
    out.print(table)
    err.print(f"[dim]{escape(', '.join(map(str, written)))}[/]", soft_wrap=True)


_SWEPT = {
    "first_token_p95_s": "first p95, s",
    "token_p95_s": "token p95, s",
    "tokens_per_s": "tokens/s",
    "bytes_up_per_token": "bytes up",
    "agreement": "agrees",
    "beyond_first": "beyond first",
    "joules_per_token": "J/token",
    "usd_per_million_tokens": "$/M",
    "failed": "failed",
}
"""Columns of a sweep's table; results.csv has the medians too."""


@app.command(rich_help_panel=Panel.SIMULATE)
def plan(
    scenario: ScenarioArgument,
    objective: Annotated[
        str,
        typer.Option(
            help="What must hold: mean, p50, p90, p95 or p99 of first_token_s, token_s or total_s; or agreement, "
            "bytes_up_per_token, joules_per_token, usd_per_million_tokens, tokens_per_s. Several with 'and' between."
        ),
    ],
    minimize: Annotated[
        str, typer.Option(help="Of what meets it, take the least bytes (upwards), cost, energy or latency.")
    ] = "bytes",
    min_agreement: Annotated[
        float, typer.Option(min=0, max=1, help="At least this share of the tokens is the last exit's.")
    ] = 0.95,
    finalists: Annotated[int, typer.Option(min=1, help="So many candidates are simulated.")] = 6,
    jobs: Annotated[int | None, typer.Option(min=1, help="Simulations at a time; left out: as many as cores.")] = None,
    changes: SetOption = None,
    out_file: Annotated[Path, typer.Option("--out", "-o", help="The topology file.")] = Path("topology.yaml"),
    as_json: JsonOption = False,
) -> None:
    """Search where to cut the family over a scenario's nodes, with which thresholds.

    The nodes, their links and the load are the scenario's. What is searched:
    which consecutive exits each node gets (all but the first may be left out),
    the thresholds, and whether to draft. Equations rank all candidates, the
    simulator decides among the finalists, and the best one becomes a topology
    that ruyi-flow up takes. Where none meets the objective, that is said,
    nothing is written, and the exit status is 1.

    Example: ruyi-flow plan scenario.yaml --objective "p95 token_s < 0.08"
    --minimize cost --out topology.yaml
    """
    from ruyi_flow.sim.plan import plan as search
    from ruyi_flow.sim.plan import write
    from ruyi_flow.sim.scenario import Scenario

    asked = Scenario.read(scenario, changes or ())
    check_target(out_file, "--out")
    with _interruptible(), counting_bar(quiet=as_json) as bar:
        found = search(
            asked,
            objective,
            minimize=minimize,
            min_agreement=min_agreement,
            finalists=finalists,
            jobs=jobs,
            where=str(scenario),
            progress=lambda done, total: bar("cuts and finalists", done, total),
        )
    names = [node.name for node in asked.nodes]
    if found.met:
        write(found, out_file, scenario.parent)
    if as_json:
        rows = [
            {
                "exits": {name: exits for name, exits in zip(names, one.cut, strict=True) if exits},
                "thresholds": one.thresholds,
                "draft": one.draft,
                "predicted": dict(zip(found.labels, one.predicted, strict=True)),
                "simulated": dict(zip(found.labels, one.simulated, strict=True)),
            }
            for one in found.finalists
        ]
        print_json({"met": found.met, "file": str(out_file) if found.met else None, "finalists": rows})
    else:
        _show_plan(found, names, out_file)
    if not found.met:
        raise typer.Exit(1)


def _show_plan(found: Plan, names: list[str], out_file: Path) -> None:
    """A table of the finalists, and which one it is to be."""
    columns = [*dict.fromkeys(found.labels)]
    table = Table("exits", "thresholds", "draft", *(f"{label}\n[dim]predicted[/]" for label in columns))
    for i, one in enumerate(found.finalists):
        exits = "\n".join(f"{name} {comma_list(held)}" for name, held in zip(names, one.cut, strict=True) if held)
        thresholds = "\n".join(f"{p}: {'never' if t > 1 else f'{t:.3f}'}" for p, t in one.thresholds.items())
        pairs = dict(zip(found.labels, zip(one.simulated, one.predicted, strict=True), strict=True))
        cells = (f"{pairs[label][0]:.4g}\n[dim]{pairs[label][1]:.4g}[/]" for label in columns)
        table.add_row(
            exits, thresholds, str(one.draft), *cells, style="bold" if found.met and i == 0 else None, end_section=True
        )
    out.print(table)
    best = found.finalists[0]
    cut = ", ".join(f"{name} {comma_list(held)}" for name, held in zip(names, best.cut, strict=True) if held)
    asked = ", ".join(str(bound) for bound in found.bounds)
    values = best.simulated
    if found.met:
        least = f"the least {found.labels[-2]} ({values[-2]:.4g})"
        out.print(f"chosen: {cut}: of the finalists that keep {asked}, it has {least}; written: {out_file}")
    else:
        missed = ", ".join(
            f"{bound.label} {value:.4g}"
            for bound, value in zip(found.bounds, values, strict=False)
            if bound.excess(value)
        )
        out.print(f"none of the finalists keeps {asked}; the nearest: {cut}, which has {missed}; nothing was written")
    left_out = f"; {len(found.impossible)} cuts cannot be, as {found.impossible[0][1]}" if found.impossible else ""
    err.print(f"[dim]{found.tried:,} candidates[/]{escape(left_out)}", soft_wrap=True)


def show(metrics: dict[str, Any]) -> None:
    """Tables of a simulation's figures."""
    times = Table(title="seconds", title_justify="left")
    times.add_column("")
    for column in ("mean", "p50", "p90", "p95", "p99"):
        times.add_column(column, justify="right")
    for name, key in (("to the first token", "first_token_s"), ("a token after it", "token_s"), ("in all", "total_s")):
        times.add_row(name, *(f"{value:.4g}" for value in metrics[key].values()))
    out.print(times)
    nodes = Table(title="nodes", title_justify="left")
    for column in ("node", "count", "busy", "busiest", "waiting", "energy", "cost"):
        nodes.add_column(column, justify="left" if column == "node" else "right")
    for name, node in metrics["nodes"].items():
        nodes.add_row(
            name,
            f"{node['count']:,}",
            f"{node['utilisation']:.1%}",
            f"{node['highest_utilisation']:.1%}",
            f"{node['queue']:.2f}",
            f"{node['energy_j']:,.0f} J",
            f"${node['cost_usd']:.4g}",
        )
    out.print(nodes)
    if metrics["links"]:
        links = Table(title="links", title_justify="left")
        for column in ("link", "up", "down", "up, mean", "down, mean"):
            links.add_column(column, justify="left" if column == "link" else "right")
        for name, link in metrics["links"].items():
            links.add_row(
                name,
                *(f"{link[key] / 1e6:,.2f} MB" for key in ("bytes_up", "bytes_down")),
                *(f"{link[key]:,.3f} Mbit/s" for key in ("up_mbit", "down_mbit")),
            )
        out.print(links)
    decided = ", ".join(f"{p}: {share:.1%}" for p, share in metrics["decided"].items())
    out.print(
        f"{metrics['requests']:,} requests, {metrics['tokens']:,} tokens, {metrics['tokens_per_s']:,.1f} a second; "
        f"decided at exit {decided}; {metrics['agreement']:.1%} the last exit's; "
        f"{metrics['bytes_up_per_token']:,.0f} bytes up a token; {metrics['joules_per_token']:.3g} J a token; "
        f"${metrics['usd_per_million_tokens']:.3g} a million tokens"
        + (f"; {metrics['failed']:,} failed: {metrics['errors']}" if metrics["failed"] else ""),
        highlight=False,
    )
