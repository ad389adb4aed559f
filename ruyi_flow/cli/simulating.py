"""The commands of the simulator: profile, simulate, sweep and plan."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ruyi_flow.cli.app import Panel, app
from ruyi_flow.cli.display import comma_list, counting_bar, err, out, print_json
from ruyi_flow.cli.options import JsonOption, check_target, file_or_example, load_topology
from ruyi_flow.config.addresses import check_address
from ruyi_flow.config.examples import examples
from ruyi_flow.errors import ConfigError
from ruyi_flow.extras import is_installed
from ruyi_flow.types import Weights

if TYPE_CHECKING:
    from ruyi_flow.sim.plan import Plan

__all__ = ["plan", "profile", "simulate", "sweep"]

ScenarioArgument = Annotated[
    Path,
    typer.Argument(
        callback=file_or_example("scenario"),
        help=f"Scenario file (YAML), or the name of an example: {', '.join(examples('scenario'))}.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Set a key of the scenario to a YAML value: nodes.edge.count=4, links.phone-edge.round_trip_ms=80, "
        "nodes.edge.hardware=l4, behaviour=null, 'policy.thresholds={5: 0.9}'. Can be repeated.",
    ),
]

JobsOption = Annotated[int | None, typer.Option(min=1, help="Simulations at a time. Default: one per core.")]


@contextmanager
def _interruptible() -> Iterator[None]:
    """Exit at once on Ctrl-C.

    Otherwise Python would warn of thousands of coroutines that wait in virtual time, and a pool's thread might wait for
    a process that was killed while writing. Nothing needs to be cleaned up.
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
    seed: Annotated[int | None, typer.Option(help="Seed of all random draws. Default: the scenario's.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder. Default: runs/sim/<scenario>.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Simulate a deployment: predict its latency, traffic, energy, cost and quality before you buy it.

    A scenario is a topology and a load; relative paths in it refer to its own
    folder. city, factory, phone-4g and three-tiers are examples, and
    docs/guides/simulation-and-planning.md lists all keys.

    The run folder contains report.html, metrics.json, requests.csv (a row per
    request), trace.json (open it in ui.perfetto.dev) and the resolved scenario.

    Example: ruyi-flow simulate factory --set load.requests=200
    --set nodes.box.hardware=l4 --out runs/sim/l4
    """
    from ruyi_flow.sim.run import simulate as run
    from ruyi_flow.sim.scenario import Scenario

    seeds = [] if seed is None else [f"seed={seed}"]
    asked = Scenario.read(scenario, [*(changes or ()), *seeds])
    load = asked.workload
    counted = "requests" if load.requests or load.arrivals.kind == "replay" else "seconds of simulated time"
    folder = folder or Path("runs/sim") / scenario.stem
    check_target(folder, "--out", folder=True)
    with _interruptible(), counting_bar(quiet=as_json) as bar:
        result = run(asked, folder, where=str(scenario), progress=lambda done, total: bar(counted, done, total))
    if as_json:
        print_json(result.metrics)
        return
    show(result.metrics)
    files = f"{escape(str(folder))}/report.html, metrics.json, requests.csv, trace.json (ui.perfetto.dev)"
    err.print(f"[dim]{files}[/]", soft_wrap=True)


@app.command(rich_help_panel=Panel.SIMULATE)
def profile(
    family: Annotated[str, typer.Argument(help="Family to measure: a folder, or a name in the store.")] = "smollm2",
    out_file: Annotated[Path, typer.Option("--out", "-o", help="Profile file to write.")] = Path("profile.msgpack"),
    dtype: Annotated[str, typer.Option(help="Data type to compute in: bfloat16, float32 or float16.")] = "bfloat16",
    weights: Annotated[Weights | None, typer.Option(help="Format of the weights. Default: as in the family.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads per node.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions of each measurement; the median is used.")] = 7,
    nodes: Annotated[
        Path | None,
        typer.Option(
            "--nodes", help="Measure the running nodes of this topology file from outside, instead of this machine."
        ),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            "--link",
            help="Only measure the link to the node at host:port: round trip, jitter and bandwidth upwards "
            "(not downwards, nor losses). Prints the result and writes no file.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast this machine runs a family's stages, for `ruyi-flow simulate`.

    This takes some minutes; standard error tells what is measured and how much
    of it is done. Other work on the machine makes the times wrong.

    A scenario uses the file as its `profile`, or as the `profile` of one node;
    see docs/guides/simulation-and-planning.md.

    Examples: ruyi-flow profile smollm2 --weights int8 --out here.msgpack

    ruyi-flow profile --nodes topology.yaml --out nodes.msgpack

    ruyi-flow profile --link 192.168.1.20:7102
    """
    from ruyi_flow.bench.profile.family import profile_family
    from ruyi_flow.bench.profile.nodes import profile_nodes
    from ruyi_flow.transport.link import measure_link

    if link is not None:
        try:
            check_address(link)
        except ValueError as error:
            raise ConfigError(f"--link {link}: {error}") from None
        measured = asyncio.run(measure_link(link))
        if as_json:
            print_json(asdict(measured))
        else:
            out.print(
                f"round_trip_ms: {measured.round_trip_ms:.2f}\njitter_ms: {measured.jitter_ms:.2f}\n"
                f"up_mbit: {measured.up_mbit:.1f}"
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
    rows = [
        (f"exit {stage.exit}: {name}", *(f"{1e3 * t:.2f}" for t in times))
        for stage in found.stages
        for name, times in (("trunk", stage.trunk_s), ("head, all rows read", stage.head_s))
    ]
    columns = ("stage", *(f"{n} rows" if n > 1 else "1 row" for n in found.stages[0].rows))
    out.print(_table(f"{out_file}: milliseconds per step", columns, rows))
    out.print(
        f"overhead: {1e3 * found.round_s:.2f} ms per round, {1e3 * found.exchange_s:.2f} ms per message between nodes "
        f"and its answer, {1e3 * found.step_s:.2f} ms to the compute thread and back; nodes on this machine share "
        f"{found.machine.get('cores_for_nodes', 1)} cores",
        highlight=False,
    )


@app.command(rich_help_panel=Panel.SIMULATE)
def sweep(
    scenario: ScenarioArgument,
    grid: Annotated[
        list[str],
        typer.Option(
            "--grid",
            help="A key and its values: nodes.edge.count=1,2,4 or policy.threshold=0.5:0.9:0.1. Can be repeated.",
        ),
    ],
    changes: SetOption = None,
    repeat: Annotated[int, typer.Option(min=1, help="Number of seeds per point, from 0 on.")] = 5,
    jobs: JobsOption = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster to run on (needs the extra 'ray' and the scenario's files at the same "
            "paths): 'auto' finds a running one, 'local' starts one here. Default: processes of this machine."
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="Sweep folder. Default: runs/sweep/<scenario>.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Simulate a scenario at every point of a grid, and list the Pareto-optimal points.

    Several --grid options give all combinations of their values. Every point runs
    with several seeds; the results are means, with the half-width of their 95 %
    confidence interval (Student's t). Finished runs stay in the folder, so the same
    command resumes an interrupted sweep, and a larger grid only simulates new points.

    The folder contains results.csv, pareto.csv and pareto.png. Points (* in the
    table) are Pareto-optimal in p95 time per token, bytes up, agreement and cost.
    Points where more than 1 % of the requests failed are not compared.

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
    written = sweeps.write_tables(folder, points)
    if is_installed("matplotlib"):
        written.append(sweeps.plot_front(folder, points))
    else:
        err.print("[dim]pareto.png is not written: it needs matplotlib, pip install 'ruyi-flow\\[sim]'[/]")
    best = sweeps.pareto_front(points)
    if as_json:
        rows = [asdict(point) | {"front": is_best} for point, is_best in zip(points, best, strict=True)]
        print_json({"folder": str(folder), "repeat": repeat, "points": rows})
        return
    table = Table()
    for axis in axes:
        table.add_column(axis.key.replace(".", ".\u200b"), overflow="fold")
    shown = [name for name in _COLUMNS if name != "failed" or any(point.statistics[name].mean for point in points)]
    for column in (*(_COLUMNS[name] for name in shown), ""):
        table.add_column(column, justify="right")
    for point, is_best in zip(points, best, strict=True):
        cells = []
        for name in shown:
            found = point.statistics[name]
            cells.append(f"{found.mean:.4g}" + ("" if found.half is None else f"\n±{found.half:.2g}"))
        table.add_row(*map(str, point.keys.values()), *cells, "*" if is_best else "", style="bold" if is_best else None)
    out.print(table)
    err.print(f"[dim]{escape(', '.join(map(str, written)))}[/]", soft_wrap=True)


_COLUMNS = {
    "first_token_p95_s": "TTFT p95, s",
    "token_p95_s": "TPOT p95, s",
    "tokens_per_s": "tokens/s",
    "bytes_up_per_token": "bytes up/token",
    "agreement": "agreement",
    "beyond_first": "decided deeper",
    "joules_per_token": "J/token",
    "usd_per_million_tokens": "$/M tokens",
    "failed": "failed",
}
"""Columns of a sweep's table; results.csv also has medians."""


@app.command(rich_help_panel=Panel.SIMULATE)
def plan(
    scenario: ScenarioArgument,
    objective: Annotated[
        str,
        typer.Option(
            help="Requirements, joined by 'and', such as 'p95 token_s < 0.08'. Metrics: mean, p50, p90, p95 or p99 of "
            "first_token_s, token_s or total_s; agreement, bytes_up_per_token, joules_per_token, "
            "usd_per_million_tokens, tokens_per_s."
        ),
    ],
    minimize: Annotated[
        str, typer.Option(help="What to minimize among plans that meet the objective: bytes, cost, energy or latency.")
    ] = "bytes",
    min_agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Smallest share of tokens that agree with the last exit's.")
    ] = 0.95,
    finalists: Annotated[int, typer.Option(min=1, help="Number of candidates to simulate.")] = 6,
    jobs: JobsOption = None,
    changes: SetOption = None,
    out_file: Annotated[Path, typer.Option("--out", "-o", help="Topology file to write.")] = Path("topology.yaml"),
    as_json: JsonOption = False,
) -> None:
    """Search for the best way to cut a family over a scenario's nodes, and for the thresholds.

    The nodes, links and load are the scenario's. The search chooses which
    consecutive exits each node gets (all nodes but the first may get none), the
    thresholds, and whether to draft. Equations rank all candidates, simulations
    the finalists. The best one is written as a topology file for ruyi-flow up.
    If none meets the objective, nothing is written and the exit status is 1.

    Example: ruyi-flow plan scenario.yaml --objective "p95 token_s < 0.08"
    --minimize cost --out topology.yaml
    """
    from ruyi_flow.sim.plan import plan as search
    from ruyi_flow.sim.plan import write_topology
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
        write_topology(found, out_file, scenario.parent)
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
    """Print a table of the finalists, and which one was chosen."""
    columns = [*dict.fromkeys(found.labels)]
    table = Table("exits", "thresholds", "draft", *(f"{label}\nsimulated\n[dim]predicted[/]" for label in columns))
    for i, one in enumerate(found.finalists):
        exits = "\n".join(f"{name} {comma_list(own)}" for name, own in zip(names, one.cut, strict=True) if own)
        thresholds = "\n".join(f"{p}: {'never' if t > 1 else f'{t:.3f}'}" for p, t in one.thresholds.items())
        pairs = dict(zip(found.labels, zip(one.simulated, one.predicted, strict=True), strict=True))
        cells = (f"{pairs[label][0]:.4g}\n[dim]{pairs[label][1]:.4g}[/]" for label in columns)
        table.add_row(
            exits, thresholds, str(one.draft), *cells, style="bold" if found.met and i == 0 else None, end_section=True
        )
    out.print(table)
    best = found.finalists[0]
    cut = ", ".join(f"{name} {comma_list(own)}" for name, own in zip(names, best.cut, strict=True) if own)
    asked = ", ".join(str(one) for one in found.constraints)
    values = best.simulated
    if found.met:
        least = f"the least {found.labels[-2]} ({values[-2]:.4g})"
        out.print(f"chosen: {cut}; it has {least} of the finalists that meet {asked}; written: {out_file}")
    else:
        missed = ", ".join(
            f"{one.label} {value:.4g}"
            for one, value in zip(found.constraints, values, strict=False)
            if one.excess(value)
        )
        out.print(f"no finalist meets {asked}; nothing was written. The closest: {cut}, with {missed}")
    skipped = f"; {len(found.impossible)} cuts are not possible: {found.impossible[0][1]}" if found.impossible else ""
    err.print(f"[dim]{found.tried:,} candidates[/]{escape(skipped)}", soft_wrap=True)


def show(metrics: dict[str, Any]) -> None:
    """Print tables of a simulation's metrics."""
    from ruyi_flow.sim.report import counts_text, dollars

    usd = metrics["usd_per_million_tokens"]
    labels = {"time to first token": "first_token_s", "time per output token": "token_s", "total": "total_s"}
    times = [(name, *(f"{value:.4g}" for value in metrics[key].values())) for name, key in labels.items()]
    out.print(_table("latency in seconds", ("", "mean", "p50", "p90", "p95", "p99"), times))
    nodes = [
        (
            name,
            f"{node['count'] * node['replicas']:,}",
            f"{node['utilisation']:.1%}",
            f"{node['highest_utilisation']:.1%}",
            f"{node['queue']:.2f}",
            f"{node['energy_j']:,.0f}",
            dollars(node["cost_usd"]),
        )
        for name, node in metrics["nodes"].items()
    ]
    out.print(_table("nodes", ("node", "count", "busy", "busiest", "tasks\nwaiting", "energy\nJ", "cost"), nodes))
    links = [
        (
            name,
            *(f"{link[key] / 1e6:,.2f}" for key in ("bytes_up", "bytes_down")),
            *(f"{link[key]:,.3f}" for key in ("up_mbit", "down_mbit")),
        )
        for name, link in metrics["links"].items()
    ]
    if links:
        out.print(_table("links", ("link", "up\nMB", "down\nMB", "mean up\nMbit/s", "mean down\nMbit/s"), links))
    decided = ", ".join(f"{p}: {share:.1%}" for p, share in metrics["decided"].items())
    out.print(
        f"{metrics['requests']:,} requests, {metrics['tokens']:,} tokens, {metrics['tokens_per_s']:,.1f} tokens/s; "
        f"decided at exit {decided}; {metrics['agreement']:.1%} agree with the last exit; per token "
        f"{metrics['bytes_up_per_token']:,.0f} bytes up and {metrics['joules_per_token']:.3g} J; "
        f"{f'${usd:.3g} per million tokens' if usd else 'the scenario has no prices'}"
        + (f"; {metrics['failed']:,} failed: {counts_text(metrics['errors'])}" if metrics["failed"] else ""),
        highlight=False,
    )
    if metrics["reused_tokens"]:
        share = metrics["reused_tokens"] / metrics["prompt_tokens"]
        out.print(f"{share:.1%} of the prompts' tokens were reused from parked sessions", highlight=False)
    if metrics["losses"]:
        recoveries, gap = metrics["recoveries"], metrics["gap_s"]
        took = ", ".join(f"{name} {recoveries['seconds'][name]:.3g}" for name in ("p50", "p95", "worst"))
        pauses = ", ".join(f"{name} {gap[name]:.3g}" for name in ("p50", "p99", "worst"))
        outages = sum(node["outages"] for node in metrics["nodes"].values())
        out.print(
            f"{outages:,} outages; {recoveries['count']:,} recoveries ({counts_text(recoveries['causes'])}) in "
            f"{recoveries['requests']:,} answers, in seconds {took}; longest pause in an answer: {pauses}",
            highlight=False,
        )


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """Return a table of text on the left and numbers on the right."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table
