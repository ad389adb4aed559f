"""Commands that measure speed: one a bench."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ruyi_flow.bench import Against
from ruyi_flow.cli.app import Panel, app
from ruyi_flow.cli.display import counting_bar, err, out, print_json, say
from ruyi_flow.cli.options import JsonOption
from ruyi_flow.errors import ConfigError
from ruyi_flow.types import Weights

if TYPE_CHECKING:
    from ruyi_flow.bench.report import Measured, Report, Setup

__all__ = ["decode", "exits", "fidelity", "hop", "prefill", "serve", "wan"]

bench = typer.Typer(no_args_is_help=True, help="Measure how fast a family answers on this machine.")
app.add_typer(bench, name="bench", rich_help_panel=Panel.TRAIN)

DEMO_POLICY = Path("configs/policies/smollm2-5-percent.yaml")

FamilyOption = Annotated[str, typer.Option(help="A folder, or a name in the store; smollm2 is fetched when missing.")]
WeightsOption = Annotated[Weights | None, typer.Option(help="How products hold their weights; left out: as they are.")]
DtypeOption = Annotated[str, typer.Option(help="bfloat16, float32 or float16.")]
ThreadsOption = Annotated[int, typer.Option(min=1, max=1024, help="CPU threads of every process that computes.")]
DeviceOption = Annotated[str, typer.Option(help="A torch device: cpu, cuda, cuda:1.")]
TokensOption = Annotated[int, typer.Option(min=2, help="New tokens an answer.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Rounds that count; one more warms up.")]
AgainstOption = Annotated[
    list[Against] | None, typer.Option(help="An engine to compare with, in turn; may be given several times.")
]
GgufOption = Annotated[
    Path | None, typer.Option(help="For llama.cpp: the same model; for smollm2 it is fetched when left out.")
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder for the plot.")]
_OUT = Path("runs/bench")


@bench.command()
def decode(
    family: FamilyOption = "smollm2",
    weights: WeightsOption = None,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 2,
    tokens: TokensOption = 128,
    rounds: RoundsOption = 5,
    against: AgainstOption = None,
    early_exit: Annotated[
        int | None,
        typer.Option(help="For transformers-early-exit: how many layers draft; left out: up to the second exit."),
    ] = None,
    gguf: GgufOption = None,
    output: OutOption = _OUT,
    as_json: JsonOption = False,
) -> None:
    """Time a token: the whole family in this process, batch 1, greedy, at its last exit."""
    with _prepared(family, output, as_json) as report:
        from ruyi_flow.bench import in_process

        setup = _setup(family, weights, dtype, threads, tokens, rounds, device)
        found = in_process.decode(setup, against=against or (), early_exit=early_exit, gguf=gguf, report=report)
    _show(found, output, as_json)


@bench.command()
def prefill(
    family: FamilyOption = "smollm2",
    weights: WeightsOption = None,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 2,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    rounds: RoundsOption = 5,
    against: AgainstOption = None,
    gguf: GgufOption = None,
    output: OutOption = _OUT,
    as_json: JsonOption = False,
) -> None:
    """Time to take in a prompt: the whole family in this process, batch 1, up to the first new token."""
    with _prepared(family, output, as_json) as report:
        from ruyi_flow.bench import in_process

        setup = _setup(family, weights, dtype, threads, 1, rounds, device)
        found = in_process.prefill(setup, prompt_tokens=prompt_tokens, against=against or (), gguf=gguf, report=report)
    _show(found, output, as_json)


@bench.command()
def hop(
    family: FamilyOption = "smollm2",
    weights: WeightsOption = None,
    dtype: DtypeOption = "bfloat16",
    threads: ThreadsOption = 1,
    tokens: TokensOption = 48,
    rounds: RoundsOption = 5,
    output: OutOption = _OUT,
    as_json: JsonOption = False,
) -> None:
    """What a hop costs a token: three node processes on this machine against one process and one node."""
    with _prepared(family, output, as_json) as report:
        from ruyi_flow.bench import over_links

        setup = _setup(family, weights, dtype, threads, tokens, rounds)
        found = asyncio.run(over_links.hop(setup, report=report))
    _show(found, output, as_json)


@bench.command()
def wan(
    family: FamilyOption = "smollm2",
    weights: WeightsOption = None,
    dtype: DtypeOption = "bfloat16",
    threads: ThreadsOption = 1,
    tokens: TokensOption = 48,
    rounds: RoundsOption = 5,
    round_trip: Annotated[float, typer.Option(min=0, max=60_000, help="Of the link, in milliseconds.")] = 50,
    policy: Annotated[
        Path | None,
        typer.Option(
            help="File of ruyi-flow calibrate, for adaptive drafts; left out: the demo family's, where it is here."
        ),
    ] = None,
    output: OutOption = _OUT,
    as_json: JsonOption = False,
) -> None:
    """What drafts are worth over a slow link, which is emulated between two node processes; mode exact."""
    with _prepared(family, output, as_json) as report:
        from ruyi_flow.bench import over_links
        from ruyi_flow.family import store

        if policy is None and family == store.DEMO and DEMO_POLICY.exists():
            policy = DEMO_POLICY
        if policy is None:
            say(as_json)("no --policy, so there are no adaptive drafts")
        setup = _setup(family, weights, dtype, threads, tokens, rounds)
        found = asyncio.run(over_links.wan(setup, round_trip_ms=round_trip, policy=policy, report=report))
    _show(found, output, as_json)


@bench.command()
def exits(
    family: FamilyOption = "smollm2",
    weights: WeightsOption = None,
    dtype: DtypeOption = "bfloat16",
    threads: ThreadsOption = 2,
    tokens: TokensOption = 48,
    rounds: RoundsOption = 5,
    policy: Annotated[Path, typer.Option(help="File of ruyi-flow calibrate.")] = DEMO_POLICY,
    output: OutOption = _OUT,
    as_json: JsonOption = False,
) -> None:
    """What early exits gain where all nodes share this machine: mode token at a policy against the whole family."""
    with _prepared(family, output, as_json) as report:
        from ruyi_flow.bench import over_links

        setup = _setup(family, weights, dtype, threads, tokens, rounds)
        found = asyncio.run(over_links.exits(setup, policy=policy, report=report))
    _show(found, output, as_json)


@bench.command()
def serve(
    family: FamilyOption = "smollm2",
    weights: WeightsOption = None,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 2,
    tokens: TokensOption = 128,
    rounds: RoundsOption = 3,
    sessions: Annotated[int, typer.Option(min=1, max=4096, help="Sessions at once.")] = 16,
    rate: Annotated[
        float,
        typer.Option(min=0, max=1e6, help="Sessions that come in a second, as a Poisson process; 0: all at once."),
    ] = 0.0,
    output: OutOption = _OUT,
    as_json: JsonOption = False,
) -> None:
    """Many sessions at once on one node process with the whole family, against one session alone."""
    with _prepared(family, output, as_json) as report:
        from ruyi_flow.bench import serving

        setup = _setup(family, weights, dtype, threads, tokens, rounds, device)
        found = asyncio.run(serving.serve(setup, sessions=sessions, rate=rate, report=report))
    _show(found, output, as_json)


@bench.command()
def fidelity(
    family: FamilyOption = "smollm2",
    dtype: DtypeOption = "bfloat16",
    threads: ThreadsOption = 1,
    tokens: TokensOption = 32,
    requests: Annotated[
        int, typer.Option(min=1, help="Answers of each setting; a third for each session at the least.")
    ] = 24,
    profile: Annotated[
        Path | None, typer.Option(help="Of this machine (ruyi-flow profile); left out: measured first.")
    ] = None,
    policy: Annotated[Path, typer.Option(help="File of ruyi-flow calibrate.")] = DEMO_POLICY,
    table: Annotated[Path | None, typer.Option(help="Write the table here, as Markdown.")] = None,
    output: OutOption = _OUT,
    as_json: JsonOption = False,
) -> None:
    """How true the simulator is: three node processes over emulated links against the same in virtual time."""
    with _prepared(family, output, as_json) as report:
        import torch

        from ruyi_flow.bench import fidelity as bench_of
        from ruyi_flow.bench.nodes import prompts
        from ruyi_flow.bench.profile.family import profile_family
        from ruyi_flow.bench.report import machine
        from ruyi_flow.evaluation.scorers import Question
        from ruyi_flow.evaluation.tracing import record_trace
        from ruyi_flow.local import load_family
        from ruyi_flow.sim.profile import Profile

        if profile is None:
            costs = profile_family(family, dtype=dtype, threads=threads, report=report)
            costs.save(output / "fidelity-profile.msgpack")
        else:
            costs = Profile.load(profile)
        torch.set_num_threads(2)
        whole = load_family(family, dtype=dtype)
        asked = prompts(whole.checkpoint, bench_of.questions())
        trace = output / "fidelity-trace.msgpack"
        trace.unlink(missing_ok=True)
        record_trace(
            whole,
            [Question(tuple(ids)) for ids in asked],
            trace,
            max_new_tokens=tokens,
            report=lambda done, total: report("trace", done, total),
        )
        del whole
        cores = float(costs.machine.get("cores_for_nodes") or 1)
        found = asyncio.run(
            bench_of.compare(
                family, costs, trace, asked, policy, requests=requests, cores=max(1.0, cores), report=report
            )
        )
    here = machine(threads)
    text = bench_of.markdown(found, here)
    if table is not None:
        table.write_text(text, encoding="utf-8")
    if not as_json:
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    rows = [{**asdict(one.setting), "measured": one.measured, "simulated": one.simulated} for one in found]
    print_json({"bench": "fidelity", "errors": bench_of.summary(found), "settings": rows, "machine": here})


def _setup(
    family: str, weights: Weights | None, dtype: str, threads: int, tokens: int, rounds: int, device: str = "cpu"
) -> Setup:
    from ruyi_flow.bench.report import Setup

    return Setup(family, weights, dtype, threads, tokens, rounds, device)


@contextmanager
def _prepared(family: str, folder: Path, as_json: bool) -> Iterator[Report]:
    """All that a bench needs is there before it begins; a bar for it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("bench needs the extra: pip install 'ruyi-flow[bench]'") from None
    from ruyi_flow.family import store

    folder.mkdir(parents=True, exist_ok=True)
    if family == store.DEMO:
        store.pull(store.DEMO, say=say(as_json), bars=err.is_terminal and not as_json)
    with counting_bar(quiet=as_json) as report:
        yield report


def _show(found: Measured, folder: Path, as_json: bool) -> None:
    """The table, the plot, and last the line of JSON."""
    from ruyi_flow.bench.plot import draw
    from ruyi_flow.bench.report import machine

    here, plot = machine(found.settings["threads"], found.settings["device"]), folder / f"{found.bench}.png"
    draw(found, here["processor"], plot)
    if not as_json:
        columns = list(dict.fromkeys(key for row in found.results.values() for key in row))
        table = Table("", *(key.replace("_", " ") for key in columns))
        for name, row in found.results.items():
            table.add_row(name, *(f"{row[key]:,.2f}" if key in row else "" for key in columns))
        out.print(table)
        out.print(f"written: {escape(str(plot))}", soft_wrap=True)
    print_json(found.to_dict() | {"machine": here, "plot": str(plot)})
