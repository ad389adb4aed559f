"""The command that runs an HTTP server with OpenAI's API: serve."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ruyi_flow.cli.app import Panel, app
from ruyi_flow.cli.display import err, progress_bar
from ruyi_flow.cli.options import TopologyArgument, TopologyOption, load_topology, on_signals
from ruyi_flow.cli.telemetry import (
    LogJsonOption,
    NoRequestLogOption,
    OtlpOption,
    TraceOption,
    TraceShareOption,
    Tracing,
    log_to_stderr,
)
from ruyi_flow.config.examples import DEFAULT_TOPOLOGY, find
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import ConfigError
from ruyi_flow.extras import require
from ruyi_flow.telemetry.spans import NO_TRACER, Tracer

if TYPE_CHECKING:
    from ruyi_flow.http.serving import Listening

__all__ = ["PolicyOption", "PortOption", "ServerOptions", "announce", "serve", "serving"]

PortOption = Annotated[
    int, typer.Option(min=0, max=65535, help="Port of the HTTP server; 0 picks a free one and prints it.")
]
PolicyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        metavar="NAME=FILE",
        show_default=False,
        help="Policy file of ruyi-flow calibrate, or an example, that clients can ask for as the model FAMILY@NAME. "
        "May be given several times.",
    ),
]


@app.command(rich_help_panel=Panel.RUN)
def serve(
    file: TopologyArgument = None,
    topology: TopologyOption = DEFAULT_TOPOLOGY,
    host: Annotated[str, typer.Option(help="Name or address of this machine to listen on.")] = "127.0.0.1",
    port: PortOption = 8000,
    policy: PolicyOption = None,
    default_max_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Largest number of new tokens of a request that sets none. KV cache is reserved for all of them.",
        ),
    ] = 1024,
    timeout: Annotated[float, typer.Option(min=0.001, max=1e9, help="Seconds that an answer may take.")] = 600.0,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Listen also on an address that other machines reach. Everyone there may ask."),
    ] = False,
    log_json: LogJsonOption = False,
    no_request_log: NoRequestLogOption = False,
    trace: TraceOption = None,
    otlp: OtlpOption = None,
    trace_share: TraceShareOption = None,
) -> None:
    """Serve OpenAI's API for a topology over HTTP, to applications, chat windows and scripts.

    The server asks the entry node of a topology whose nodes run, and needs no
    torch. A topology of one node without an address is loaded into the server.
    Each exit, mode and policy is a model of its own: GET /v1/models lists them.
    GET /health says that the server is alive, GET /ready that every node serves.

    SIGTERM or Ctrl-C drains the server: new requests are answered with status
    503, and running ones get 10 s; a second signal ends it at once.
    """
    loaded = load_topology(file or topology)
    if loaded.entry.address is None:
        require("torch")
    log_to_stderr("info", as_json=log_json, requests=not no_request_log)
    tracer = Tracing(trace, otlp, trace_share).tracer("server")
    logging.getLogger("transformers").setLevel(logging.ERROR)

    async def run() -> None:
        stop = on_signals()
        given = ServerOptions(host, port, policy, default_max_tokens, timeout, insecure)
        async with serving(loaded, given, tracer) as listening:
            announce(listening)
            await stop.wait()
            err.print("ending the server")

    try:
        asyncio.run(run())
    finally:
        tracer.close()


class ServerOptions:
    """The options of an HTTP server on the command line; the arguments are those of `serve`."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8000,
        policies: list[str] | None = None,
        default_max_tokens: int = 1024,
        timeout_s: float = 600.0,
        insecure: bool = False,
    ) -> None:
        require("fastapi")
        require("uvicorn")
        self.host, self.port, self.insecure = host, port, insecure
        self.default_max_tokens, self.timeout_s = default_max_tokens, timeout_s
        self.policies = dict(_policy(one) for one in policies or ())
        if len(self.policies) < len(policies or ()):
            raise ConfigError("--policy: two policies have the same name; name each of them differently")


@asynccontextmanager
async def serving(topology: Topology, options: ServerOptions, tracer: Tracer = NO_TRACER) -> AsyncIterator[Listening]:
    """Run an HTTP server for a topology while the block lasts; `announce` says where it listens.

    Args:
        topology: the topology.
        options: the server's options.
        tracer: records what asks for answers; the caller closes it.

    Raises:
        RuyiFlowError: it cannot listen, or a policy or the one node of the topology cannot be loaded.
    """
    from ruyi_flow.http import serving as http

    if options.insecure:
        err.print(
            "[yellow]warning:[/yellow] --insecure: everyone who reaches this address can use the models and read the "
            "metrics, without a password and without encryption",
            soft_wrap=True,
        )
    async with AsyncExitStack() as stack:
        with progress_bar("starting the server"):
            listening = await stack.enter_async_context(
                http.serve(
                    topology,
                    host=options.host,
                    port=options.port,
                    policies=options.policies,
                    default_max_tokens=options.default_max_tokens,
                    timeout_s=options.timeout_s,
                    insecure=options.insecure,
                    tracer=tracer,
                )
            )
        yield listening


def announce(listening: Listening) -> None:
    """Say where a server listens, and how it is asked."""
    model = listening.site.models.family
    asked = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Why is the sky blue?"}}]}}'
    for line in (
        f"OpenAI's API for {model} is at {listening.url}/v1; ask it:",
        f"curl {listening.url}/v1/chat/completions -d '{asked}'",
    ):
        err.print(line, soft_wrap=True, markup=False, highlight=False)


def _policy(given: str) -> tuple[str, Path]:
    name, equals, file = given.partition("=")
    if not equals or not name or not file:
        raise ConfigError(f"--policy is {given!r}; write NAME=FILE, for instance careful=policy.yaml")
    return name, find(file, "policy")
