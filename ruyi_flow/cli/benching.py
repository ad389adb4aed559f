"""Commands that measure speed, one for each benchmark."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ruyi_flow.atomic_file import atomic_file
from ruyi_flow.bench import Against
from ruyi_flow.bench.measurement import Report, Setup, describe_machine
from ruyi_flow.cli.app import Panel, app
from ruyi_flow.cli.display import counting_bar, err, out, print_json, step_printer
from ruyi_flow.cli.options import JsonOption, file_or_example, integers
from ruyi_flow.config.examples import find
from ruyi_flow.errors import ConfigError
from ruyi_flow.extras import require
from ruyi_flow.types import Weights

__all__ = ["decode", "exits", "fidelity", "hop", "http", "prefill", "serve", "wan"]

bench = typer.Typer(no_args_is_help=True)
app.add_typer(
    bench, name="bench", rich_help_panel=Panel.TRAIN, help="Measure how fast a family answers on this machine."
)

DEMO_POLICY = Path("smollm2-5-percent")

FamilyOption = Annotated[
    str, typer.Option(help="Folder of the family, or its name in the store; smollm2 is fetched when missing.")
]
WeightsOption = Annotated[
    Weights | None, typer.Option(help="Number format of the weight matrices. Default: as in the family.")
]
DtypeOption = Annotated[str, typer.Option(help="Number format of hidden states: bfloat16, float32 or float16.")]
ThreadsOption = Annotated[int, typer.Option(min=1, max=1024, help="CPU threads of each process that computes.")]
DeviceOption = Annotated[str, typer.Option(help="Torch device: cpu, cuda, cuda:1.")]
TokensOption = Annotated[int, typer.Option(min=2, help="New tokens per answer.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Measured rounds; one more round warms up.")]
AgainstOption = Annotated[
    list[Against] | None, typer.Option(help="Engine to compare with; may be given several times.")
]
GgufOption = Annotated[
    Path | None,
    typer.Option(help="GGUF file of the same model, for llama.cpp. Default for smollm2: fetched when missing."),
]
PolicyFileOption = Annotated[
    Path,
    typer.Option(
        callback=file_or_example("policy"), help="Policy file of ruyi-flow calibrate, or the name of an example."
    ),
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
        typer.Option(
            help="Number of layers that draft in transformers-early-exit. Default: up to the family's second exit."
        ),
    ] = None,
    gguf: GgufOption = None,
    output: OutOption = _OUT,
    as_json: JsonOption = False,
) -> None:
    """Measure the time per output token of the whole family in this process: batch 1, greedy, last exit."""
    from ruyi_flow.bench import in_process

    setup = Setup(family, weights=weights, dtype=dtype, threads=threads, tokens=tokens, rounds=rounds, device=device)
    _run(in_process.decode, setup, output, as_json, against=against or (), early_exit=early_exit, gguf=gguf)


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
    """Measure the time to first token of one prompt with the whole family in this process."""
    from ruyi_flow.bench import in_process

    setup = Setup(family, weights=weights, dtype=dtype, threads=threads, tokens=1, rounds=rounds, device=device)
    _run(in_process.prefill, setup, output, as_json, prompt_tokens=prompt_tokens, against=against or (), gguf=gguf)


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
    """Measure the time per token that a hop adds: three node processes against one process and one node."""
    from ruyi_flow.bench import over_links

    setup = Setup(family, weights=weights, dtype=dtype, threads=threads, tokens=tokens, rounds=rounds)
    _run(over_links.hop, setup, output, as_json)


@bench.command()
def wan(
    family: FamilyOption = "smollm2",
    weights: WeightsOption = None,
    dtype: DtypeOption = "bfloat16",
    threads: ThreadsOption = 1,
    tokens: TokensOption = 48,
    rounds: RoundsOption = 5,
    round_trip: Annotated[
        float, typer.Option(min=0, max=60_000, help="Round trip of the emulated link, in milliseconds.")
    ] = 50,
    policy: Annotated[
        Path | None,
        typer.Option(help="Policy file of ruyi-flow calibrate, for adaptive drafts. Default for smollm2: its own."),
    ] = None,
    output: OutOption = _OUT,
    as_json: JsonOption = False,
) -> None:
    """Measure how much drafts speed up mode exact over a slow link, emulated between two node processes."""
    from ruyi_flow.bench import over_links
    from ruyi_flow.family import store

    if policy is None and family == store.DEMO:
        policy = find(DEMO_POLICY, "policy")
    if policy is None:
        step_printer(as_json)("adaptive drafts are not measured: they need --policy")
    setup = Setup(family, weights=weights, dtype=dtype, threads=threads, tokens=tokens, rounds=rounds)
    _run(over_links.wan, setup, output, as_json, round_trip_ms=round_trip, policy=policy)


@bench.command()
def exits(
    family: FamilyOption = "smollm2",
    weights: WeightsOption = None,
    dtype: DtypeOption = "bfloat16",
    threads: ThreadsOption = 2,
    tokens: TokensOption = 48,
    rounds: RoundsOption = 5,
    policy: PolicyFileOption = DEMO_POLICY,
    output: OutOption = _OUT,
    as_json: JsonOption = False,
) -> None:
    """Measure the gain of early exits on one machine: mode token on three nodes against the whole family."""
    from ruyi_flow.bench import over_links

    setup = Setup(family, weights=weights, dtype=dtype, threads=threads, tokens=tokens, rounds=rounds)
    _run(over_links.exits, setup, output, as_json, policy=policy)


@bench.command()
def serve(
    family: FamilyOption = "smollm2",
    weights: WeightsOption = None,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 2,
    tokens: TokensOption = 128,
    rounds: RoundsOption = 3,
    sessions: Annotated[int, typer.Option(min=1, max=4096, help="Number of concurrent sessions.")] = 16,
    rate: Annotated[
        float,
        typer.Option(min=0, max=1e6, help="Mean session arrivals per second (Poisson process). 0: all arrive at once."),
    ] = 0.0,
    output: OutOption = _OUT,
    as_json: JsonOption = False,
) -> None:
    """Measure many concurrent sessions on one node process with the whole family, against one session alone."""
    from ruyi_flow.bench import serving

    setup = Setup(family, weights=weights, dtype=dtype, threads=threads, tokens=tokens, rounds=rounds, device=device)
    _run(serving.serve, setup, output, as_json, sessions=sessions, rate=rate)


@bench.command()
def http(
    family: FamilyOption = "smollm2",
    weights: WeightsOption = None,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 1,
    tokens: TokensOption = 48,
    rounds: RoundsOption = 3,
    clients: Annotated[str, typer.Option(help="Numbers of clients at once, with commas.")] = "1,4,16,64",
    output: OutOption = _OUT,
    as_json: JsonOption = False,
) -> None:
    """Measure what the HTTP server adds to the SDK: requests a second, time to first token, time per token."""
    require("uvicorn")
    from ruyi_flow.bench import http as measured

    counts = integers(clients, "--clients") or ()
    if not all(1 <= count <= 1024 for count in counts):
        raise ConfigError(f"--clients is {clients!r}; each number must be from 1 to 1024")
    setup = Setup(family, weights=weights, dtype=dtype, threads=threads, tokens=tokens, rounds=rounds, device=device)
    _run(measured.http, setup, output, as_json, clients=counts)


@bench.command()
def fidelity(
    family: FamilyOption = "smollm2",
    dtype: DtypeOption = "bfloat16",
    threads: ThreadsOption = 1,
    tokens: TokensOption = 32,
    requests: Annotated[
        int,
        typer.Option(
            min=1,
            help="Requests of each setting; with many sessions, at least a third of this number for each session.",
        ),
    ] = 24,
    profile: Annotated[
        Path | None, typer.Option(help="Profile of this machine (ruyi-flow profile). Default: measured first.")
    ] = None,
    policy: PolicyFileOption = DEMO_POLICY,
    table: Annotated[Path | None, typer.Option(help="Markdown file to write the table to.")] = None,
    output: OutOption = _OUT,
    as_json: JsonOption = False,
) -> None:
    """Measure the simulator's error: three node processes over emulated links against their simulation, and the pauses
    in answers when a process of two replicas is killed or hangs."""
    with _prepared(family, output, as_json) as report:
        import torch

        from ruyi_flow.bench.fidelity import compare, compare_failures, example_prompts, markdown, summary
        from ruyi_flow.bench.nodes import tokenize_prompts
        from ruyi_flow.bench.profile.family import profile_family
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
        report("loading the family", 0, 0)
        whole = load_family(family, dtype=dtype)
        prompts = tokenize_prompts(whole.checkpoint, example_prompts())
        trace = output / "fidelity-trace.msgpack"
        trace.unlink(missing_ok=True)
        record_trace(
            whole,
            [Question(tuple(ids)) for ids in prompts],
            trace,
            max_new_tokens=tokens,
            report=lambda done, total: report("trace", done, total),
        )
        del whole
        cores = max(1.0, float(costs.machine.get("cores_for_nodes") or 1))
        found = asyncio.run(
            compare(family, costs, trace, prompts, policy=policy, requests=requests, cores=cores, report=report)
        )
        failures = asyncio.run(compare_failures(family, costs, sum(prompts, []), cores=cores, report=report))
    machine = describe_machine(threads)
    text = markdown(found, failures, machine)
    if table is not None:
        with atomic_file(table) as new:
            new.write_text(text, encoding="utf-8")
    if not as_json:
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    rows = [{**asdict(one.setting), "measured": one.measured, "simulated": one.simulated} for one in found]
    lost = [{**asdict(one), "error": one.error} for one in failures]
    print_json({"bench": "fidelity", "errors": summary(found), "settings": rows, "failures": lost, "machine": machine})


@contextmanager
def _prepared(family: str, folder: Path, as_json: bool) -> Iterator[Report]:
    """Check that matplotlib is installed, make the folder, fetch the demo family, and show a progress bar."""
    require("matplotlib")
    from ruyi_flow.family import store

    folder.mkdir(parents=True, exist_ok=True)
    if family == store.DEMO:
        store.pull(store.DEMO, say=step_printer(as_json), bars=None if as_json or not err.is_terminal else counting_bar)
    with counting_bar(quiet=as_json) as report:
        yield report


def _run(measure: Callable[..., Any], setup: Setup, output: Path, as_json: bool, **options: Any) -> None:
    """Run a benchmark; write its plot; print its table and, as the last line, its JSON object."""
    with _prepared(setup.family, output, as_json) as report:
        report("loading the family", 0, 0)
        found = measure(setup, report=report, **options)
        if inspect.iscoroutine(found):
            found = asyncio.run(found)
    from ruyi_flow.bench.plot import draw

    machine = describe_machine(setup.threads, setup.device)
    plot = output / f"{found.bench}.png"
    draw(found, machine["processor"], plot)
    if not as_json:
        columns = list(dict.fromkeys(key for row in found.results.values() for key in row))
        table = Table("", *(_HEADERS.get(key, key).replace("_per_", "/").replace("_", " ") for key in columns))
        for name, row in found.results.items():
            table.add_row(name, *(f"{row[key]:,.2f}" if key in row else "" for key in columns))
        out.print(table)
        out.print(f"written: {escape(str(plot))}", soft_wrap=True)
    print_json(found.to_dict() | {"machine": machine, "plot": str(plot)})


_HEADERS = {
    "beyond_process_ms_per_hop": "added to process, ms/hop",
    "beyond_node_ms_per_hop": "added to node, ms/hop",
    "held": "accepted drafts, share",
    "compute": "compute, share",
    "ratio": "speed of ruyi-flow, ratio",
}
"""Column titles of results whose JSON keys do not explain themselves."""
