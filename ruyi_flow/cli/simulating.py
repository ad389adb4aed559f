"""Commands that ask "what if": profiles, simulations, sweeps, plans."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ruyi_flow.cli.app import app
from ruyi_flow.cli.options import JsonOption, load_topology
from ruyi_flow.display import counting_bar, err, out, print_json
from ruyi_flow.types import Weights

__all__ = ["profile", "simulate"]

ScenarioArgument = Annotated[Path, typer.Argument(help="Scenario file (YAML): a topology with a load.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Replace a key, as in nodes.edge.count=4 or links.phone-edge.round_trip_ms=80."),
]


@app.command()
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

    The run folder has the resolved scenario, requests.csv (every request's timeline), metrics.json, trace.json (open it
    in ui.perfetto.dev) and report.html.
    """
    from ruyi_flow.sim.run import simulate as run
    from ruyi_flow.sim.scenario import Scenario

    seeds = [] if seed is None else [f"seed={seed}"]
    asked = Scenario.read(scenario, [*(changes or ()), *seeds])
    folder = folder or Path("runs/sim") / scenario.stem
    with counting_bar(quiet=as_json) as bar:
        result = run(asked, folder, where=str(scenario), progress=lambda done, total: bar("requests", done, total))
    if as_json:
        print_json(result.metrics)
        return
    show(result.metrics)
    err.print(f"[dim]{folder}/report.html, metrics.json, requests.csv, trace.json (ui.perfetto.dev)[/]")


@app.command()
def profile(
    family: Annotated[str, typer.Argument(help="A folder, or a name in the store.")] = "smollm2",
    out_file: Annotated[Path, typer.Option("--out", "-o", help="The profile.")] = Path("profile.msgpack"),
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    weights: Annotated[Weights | None, typer.Option(help="How products hold their weights.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of a node.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Of every measurement; the median counts.")] = 7,
    nodes: Annotated[
        Path | None, typer.Option("--nodes", help="Measure the running nodes of this topology instead, from outside.")
    ] = None,
    link: Annotated[
        str | None, typer.Option("--link", help="Measure the link to the node at host:port instead; writes nothing.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what a family's stages cost on this machine, for `ruyi-flow simulate`."""
    from ruyi_flow.bench import profiling

    if link is not None:
        figures = asyncio.run(profiling.measure_link(link))
        if as_json:
            print_json(asdict(figures))
        else:
            out.print(
                f"round_trip_ms: {figures.round_trip_ms:.2f}\njitter_ms: {figures.jitter_ms:.2f}\n"
                f"up_mbit: {figures.up_mbit:.1f}"
            )
        return
    with counting_bar(quiet=as_json) as bar:
        if nodes is not None:
            found = asyncio.run(profiling.profile_nodes(load_topology(nodes), rounds=rounds, report=bar))
        else:
            found = profiling.profile_family(
                family, dtype=dtype, weights=weights, threads=threads, rounds=rounds, report=bar
            )
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
        f"{1e3 * found.step_s:.2f} ms to the compute thread and back; two nodes at once do "
        f"{found.machine.get('steps_of_two_nodes', 0)} times the steps of one",
        highlight=False,
    )


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
