"""Commands that run nodes: shard, node, up, status."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from contextlib import AsyncExitStack
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ruyi_flow.cli.app import Panel, app
from ruyi_flow.cli.display import (
    comma_list,
    counting_bar,
    err,
    log_writer,
    out,
    print_json,
    progress_bar,
    status_tables,
)
from ruyi_flow.cli.options import (
    JsonOption,
    TopologyArgument,
    TopologyOption,
    is_given,
    load_topology,
    networked,
    on_end_of_input,
    on_signals,
)
from ruyi_flow.cli.serving import PolicyOption, PortOption, ServerOptions, announce, serving
from ruyi_flow.cli.systemd import watched_by_systemd
from ruyi_flow.cli.telemetry import (
    LogJsonOption,
    NoRequestLogOption,
    OtlpOption,
    TraceOption,
    TraceShareOption,
    Tracing,
    log_to_stderr,
)
from ruyi_flow.config.addresses import check_address, has_port_0
from ruyi_flow.config.examples import DEFAULT_TOPOLOGY, default_topology, shortest
from ruyi_flow.config.replicas import node_of
from ruyi_flow.errors import ConfigError, NodeError
from ruyi_flow.extras import require
from ruyi_flow.types import NodeStatus, Weights

if TYPE_CHECKING:
    from ruyi_flow.config.replicas import Replica
    from ruyi_flow.config.topology import Node
    from ruyi_flow.evaluation.quality import Quality
    from ruyi_flow.family.checkpoint import Checkpoint

__all__ = ["ENDING", "LogLevel", "node", "shard", "start_nodes", "status", "up"]


InsecureOption = Annotated[
    bool,
    typer.Option(
        "--insecure",
        help="Listen also on addresses that other machines reach, without keys: everyone there can use the node and "
        "read what it sends. A topology with the section security needs no such option.",
    ),
]
INSECURE = "--insecure: everyone who reaches this node can use it, and what it sends and receives is not encrypted"

ENDING = "ending the nodes"
"""What is said when Ctrl-C ends nodes that this process runs."""


class LogLevel(StrEnum):
    """The least severe messages that a daemon logs."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@app.command(rich_help_panel=Panel.RUN)
def shard(
    output: Annotated[Path, typer.Option("--out", "-o", help="Folder for the shards; each node gets a folder in it.")],
    topology: TopologyOption = DEFAULT_TOPOLOGY,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts (JSON lines, as for trace) on which the quality loss of quantized weights is measured."
        ),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text file to measure the perplexity on.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="CPU threads of torch. Default: all cores.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Cut a family into one folder per node: one safetensors file, config.json, and the tokenizer for the entry node.

    Copy each folder to its machine, and name it there as the node's 'shard' in
    the topology. For nodes with 'weights: int8' or 'int4' the weights are
    quantized here, and the loss of quality of the whole family is measured:
    how often its last exit predicts the same token as in bfloat16, and its
    perplexity.
    """
    import torch

    from ruyi_flow.family import store
    from ruyi_flow.family.checkpoint import Checkpoint, cut
    from ruyi_flow.family.tokenizer import load_tokenizer

    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_topology(topology)
    checkpoint = Checkpoint(store.locate(loaded.family), loaded.exits)
    loaded.check_family(checkpoint.config.exits, where=str(topology))
    rounded = {node.weights for node in loaded.nodes} if checkpoint.weights is None else set()
    formats = tuple(w for w in (Weights.INT8, Weights.INT4) if w in rounded)
    tokenizer = load_tokenizer(checkpoint) if formats else None
    if prompts is not None or text is not None:
        if not formats:
            raise ConfigError("--prompts and --text require a node with weights: int8 or int4")
        _check_questions(checkpoint, tokenizer, prompts, text)
    shards = []
    with progress_bar("cutting", total=len(loaded.nodes), quiet=as_json) as progress:
        for i, node in enumerate(loaded.nodes):
            folder = cut(checkpoint, node.exits, output / node.name, weights=node.weights, companions=i == 0)
            size = (folder / "model.safetensors").stat().st_size
            shards.append({"node": node.name, "folder": str(folder), "exits": list(node.exits), "bytes": size})
            progress(i + 1)
    cost: list[Quality] = []
    if tokenizer is not None:
        from ruyi_flow.evaluation.quality import measure_quality

        with counting_bar(quiet=as_json) as report:
            cost = measure_quality(checkpoint, formats, prompts=prompts, text=text, report=report)
    if as_json:
        quality = [asdict(q) for q in cost]
        print_json({"family": checkpoint.fingerprint, "shards": shards, **({"quality": quality} if cost else {})})
        return
    table = Table("node", "exits", "MB", "folder")
    for item in shards:
        table.add_row(item["node"], comma_list(item["exits"]), f"{item['bytes'] / 1e6:.1f}", item["folder"])  # type: ignore[arg-type,operator]
    out.print(table)
    if cost:
        table = Table("weights", "same tokens", "of", "perplexity", title="loss of quality", title_justify="left")
        for q in cost:
            shown = "-" if q.perplexity is None else f"{q.perplexity:.2f}"
            table.add_row(q.weights, f"{q.agreement:.3f}", str(q.tokens), shown)
        out.print(table)
        if text is None:
            out.print("add --text FILE to measure the perplexity on a text")
    elif formats:
        out.print("the loss of quality was not measured: the family has no tokenizer.json")


def _check_questions(checkpoint: Checkpoint, tokenizer: Any, prompts: Path | None, text: Path | None) -> None:
    """Check that the files to measure quality on can be read, before anything is cut.

    Raises:
        ConfigError: a file cannot be read, or the family has no tokenizer.
    """
    from ruyi_flow.calibration.trace import Scorer
    from ruyi_flow.evaluation.scorers import read_questions

    if tokenizer is None:
        raise ConfigError(f"{checkpoint.folder}: has no tokenizer.json, which --prompts and --text need")
    if prompts is not None and not list(read_questions(prompts, tokenizer, Scorer.AGREEMENT)):
        raise ConfigError(f"{prompts}: contains no prompts")
    if text is not None:
        try:
            text.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{text}: cannot be read as text: {error}") from None


@app.command(rich_help_panel=Panel.RUN)
def node(
    name: Annotated[str, typer.Argument(help="The node's name in the topology.")],
    topology: TopologyOption = DEFAULT_TOPOLOGY,
    replica: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=False,
            help="Run this replica of a node with several addresses: its place in their list, from 1. Default: the "
            "first one whose address is on this machine and not in use.",
        ),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            show_default=False,
            help="Listen here, for instance on 0.0.0.0:7101 in a container. Default: the node's listen or address in "
            "the topology.",
        ),
    ] = None,
    insecure: InsecureOption = False,
    log_level: Annotated[LogLevel, typer.Option(help="Least severe messages to log.")] = LogLevel.INFO,
    log_json: LogJsonOption = False,
    no_request_log: NoRequestLogOption = False,
    trace: TraceOption = None,
    otlp: OtlpOption = None,
    trace_share: TraceShareOption = None,
    supervised: Annotated[bool, typer.Option(hidden=True, help="Drain the node when standard input ends.")] = False,
) -> None:
    """Run one node of a topology, or one replica of it, as a daemon on this machine.

    SIGTERM or Ctrl-C drains the node: it takes no new sessions, its callers move
    theirs to another replica if there is one, and those that stay get its grace
    time; a second signal ends it at once. The standard gRPC health service
    answers for '' and 'ruyi_flow.v1.Node'.
    """
    began = time.monotonic()
    loaded = load_topology(topology)
    if not loaded.node(name).addresses:
        raise ConfigError(f"{topology}: node {name!r} has no address to listen on; add address: 127.0.0.1:7101")
    require("torch")
    keyless = loaded.security is None
    here = asyncio.run(  # before torch and the weights are loaded
        _this_replica(loaded.node(name), replica, listen, may_open=not keyless or insecure)
    )
    log_to_stderr(log_level, as_json=log_json, requests=not no_request_log, brief=supervised, node=here.name)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tracing = Tracing(trace, otlp, trace_share)
    loaded = here.alone(loaded, listen=listen)
    from ruyi_flow.serving.engine import Engine
    from ruyi_flow.serving.heap import tidy_heap
    from ruyi_flow.serving.node import serve, stay_on_cores

    stay_on_cores(here.node, str(topology))
    tracer = tracing.tracer(here.name)
    logger = logging.getLogger("ruyi_flow.serving.node")
    if keyless and insecure:
        logger.warning(INSECURE)
    with tidy_heap():
        engine = Engine.load(loaded, name, where=str(topology))
    engine.is_insecure = keyless and insecure

    async def run() -> None:
        stop = on_signals()
        if supervised:
            on_end_of_input(stop)
        watched = watched_by_systemd(lambda: engine.worker.is_stuck)
        async with watched as tell_systemd, serve(engine, tracer=tracer, insecure=insecure) as server:
            gc.collect()
            gc.freeze()  # a full collection over all that is loaded by now would stop the event loop for 0.1 s
            status = engine.status()
            logger.info(
                "%s serves exits %s (trunk layers %d-%d, %.1f M parameters, %s) on %s after %.1f s; %.0f MB resident%s",
                here.name,
                list(status.exits),
                status.first_layer,
                status.last_layer - 1,
                status.parameters / 1e6,
                status.dtype,
                server.address,
                time.monotonic() - began,
                status.resident_bytes / 1e6,
                "; insecure" if engine.is_insecure else "",
            )
            tell_systemd("READY=1")
            await stop.wait()
            tell_systemd("STOPPING=1")
            logger.info("draining: %d sessions are running", len(engine.shard.capacity.leases))
        logger.info("stopped")

    try:
        asyncio.run(run())
    finally:
        tracer.close()


async def _this_replica(node: Node, number: int | None, listen: str | None, *, may_open: bool) -> Replica:
    """Return the replica of a node that this process is to be, and check that it can listen, before anything is loaded.

    Raises:
        ConfigError: the options do not fit the topology, or it would listen beyond loopback and may not.
        NodeError: it cannot listen.
    """
    from ruyi_flow.serving.placement import choose
    from ruyi_flow.transport.addresses import check_keyless, check_listen

    if listen is not None:
        try:
            if has_port_0(check_address(listen)):
                raise ValueError("port 0 picks a random port that callers cannot know; choose a fixed one")
        except ValueError as error:
            raise ConfigError(f"--listen {listen}: {error}") from None
    here = await choose(node, number)
    key = "address" if listen is None and node.listen is None else "listen"
    await check_listen(listen or here.listen, here.name, key=key)
    if here.metrics is not None:
        require("prometheus_client")
        await check_listen(here.metrics, here.name, key="metrics")
    if not may_open:
        await check_keyless(here.name, listen or here.listen, here.metrics)
    return here


@app.command(rich_help_panel=Panel.RUN)
def up(
    context: typer.Context,
    file: TopologyArgument = None,
    topology: TopologyOption = DEFAULT_TOPOLOGY,
    serve: Annotated[
        bool, typer.Option("--serve", help="Also run the HTTP server of ruyi-flow serve, in this process.")
    ] = False,
    port: PortOption = 8000,
    policy: PolicyOption = None,
    insecure: InsecureOption = False,
    log_json: LogJsonOption = False,
    no_request_log: NoRequestLogOption = False,
    trace: TraceOption = None,
    otlp: OtlpOption = None,
    trace_share: TraceShareOption = None,
) -> None:
    """Run all nodes of a topology on this machine, each in a supervised process. Ctrl-C ends them.

    A process that crashes, hangs or has drained is started again. Of a node with
    several addresses, all replicas whose addresses are on this machine are
    started; the log calls them cloud/1, cloud/2 and so on, in the list's order.
    """
    require("torch")  # here rather than in every node's process
    for name in ("port", "policy"):
        if is_given(context, name) and not serve:
            raise ConfigError(f"--{name} is for the HTTP server; add --serve")
    server = ServerOptions(port=port, policies=policy) if serve else None
    tracing = Tracing(trace, otlp, trace_share)
    if serve:  # whose log this is; those of the nodes are printed as they come
        log_to_stderr("info", as_json=log_json, requests=not no_request_log, brief=True, node="server")
    topology = file or topology
    loaded, named = networked(topology), shortest(topology, "topology")
    is_default = topology == default_topology()
    options = tracing.begin()
    options += ["--insecure"] * insecure
    options += ["--log-json"] * log_json + ["--no-request-log"] * no_request_log

    def log_as_is(name: str, line: str) -> None:
        err.print(Text(line), soft_wrap=True)

    log = log_as_is if log_json else log_writer(loaded)

    async def run() -> None:
        from ruyi_flow.serving.supervisor import supervise

        async with AsyncExitStack() as stack:
            supervisor = await stack.enter_async_context(supervise(topology, loaded, log, named=named, options=options))
            stop = on_signals(supervisor.kill)
            if server is not None:  # first: a port in use is told at once, and /ready tells which node still starts
                tracer = tracing.tracer("server")
                stack.push_async_callback(asyncio.to_thread, tracer.close)
                listening = await stack.enter_async_context(serving(loaded, server, tracer))
            await start_nodes(supervisor, stop)
            if server is not None:
                await listening.reach_nodes()
            asked = "" if is_default else f" --topology {named}"
            for replica in supervisor.elsewhere:
                err.print(
                    f"{replica.name} at {replica.address} belongs on another machine; start it there: "
                    f"ruyi-flow node {replica.node.name}",
                    soft_wrap=True,
                    highlight=False,
                )
            number = len(supervisor.replicas)
            processes = f" in {number} processes" if number > len(loaded.nodes) else ""
            err.print(
                f"all {len(loaded.nodes)} nodes serve{processes}; ask them: "
                f"[bold]ruyi-flow generate{asked} --prompt 'Why is the sky blue?'[/bold]",
                soft_wrap=True,
            )
            if server is not None:
                announce(listening)
            waits = [asyncio.ensure_future(stop.wait()), asyncio.ensure_future(supervisor.wait())]
            done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in pending:
                wait.cancel()
            for wait in done:
                wait.result()
            err.print(ENDING)

    asyncio.run(run())


@app.command(rich_help_panel=Panel.RUN)
def status(topology: TopologyOption = DEFAULT_TOPOLOGY, as_json: JsonOption = False) -> None:
    """Show the layers, sessions, memory and health of every node. The exit status is 1 when a node is down.

    Each replica of a node has an entry of its own, cloud/1, cloud/2 and so on, in
    the order of the addresses in the topology, or in DNS.
    """
    loaded = load_topology(topology)
    if loaded.entry.address is None:
        raise ConfigError(f"{topology}: its one node has no address, so it runs inside its clients and has no status")

    async def run() -> tuple[dict[str, NodeStatus | NodeError], dict[str, str]]:
        from ruyi_flow.client import AsyncClient
        from ruyi_flow.serving.placement import look_up

        async with AsyncClient(loaded) as client:
            answers = await client.status()
        return answers, {name: address for node in loaded.nodes for name, address in (await look_up(node)).items()}

    answers, addresses = asyncio.run(run())
    if as_json:
        said = {n: asdict(a) if isinstance(a, NodeStatus) else {"error": str(a)} for n, a in answers.items()}
        print_json({n: {"node": node_of(n), "address": addresses.get(n, "")} | one for n, one in said.items()})
    else:
        from ruyi_flow.doctor.agreement import disagreements

        out.print(status_tables(answers, addresses))
        whole = not out.is_terminal  # a pipe gets whole lines, a terminal whole words
        for answer in answers.values():
            if isinstance(answer, NodeError):
                out.print(Text(str(answer), style="red"), soft_wrap=whole)
        named = shortest(topology, "topology")
        reached = {name: answer for name, answer in answers.items() if isinstance(answer, NodeStatus)}
        if found := disagreements(loaded, reached, where=named):
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            line = f"{found[0].text}{more} What to do: ruyi-flow doctor {named}"
            out.print(Text(line, style="yellow"), soft_wrap=whole)
    if any(isinstance(answer, NodeError) for answer in answers.values()):
        raise typer.Exit(1)


async def start_nodes(supervisor: Any, stop: asyncio.Event) -> None:
    """Start the nodes and show a spinner, until they serve or a signal arrives."""
    starting = asyncio.ensure_future(supervisor.start())
    stopping = asyncio.ensure_future(stop.wait())
    try:
        with progress_bar("starting nodes"):
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            err.print(ENDING)
            raise typer.Exit(130)
    finally:
        stopping.cancel()
        starting.cancel()
        await asyncio.wait({starting})  # so that it starts no process after the others have been ended
    err.print(f"[dim]nodes serve after {starting.result():.1f} s[/dim]")
