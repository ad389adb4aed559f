"""Commands that ask "what if": profiles, simulations, sweeps, plans."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ruyi_flow.cli.app import app
from ruyi_flow.cli.options import JsonOption
from ruyi_flow.display import counting_bar, err, out, print_json

__all__ = ["simulate"]

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
