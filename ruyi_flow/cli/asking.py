"""Commands that ask running nodes: demo, generate, chat, explain."""

from __future__ import annotations

import asyncio
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ruyi_flow.cli.app import Panel, app
from ruyi_flow.cli.display import (
    counting_bar,
    err,
    log_writer,
    node_legend,
    out,
    print_json,
    progress_bar,
    stats_line,
    stats_table,
    status_table,
    step_printer,
    token_table,
    token_text,
)
from ruyi_flow.cli.nodes import start_nodes
from ruyi_flow.cli.options import (
    DEFAULT_TOPOLOGY,
    JsonOption,
    MaxOption,
    PromptOption,
    RawOption,
    TimeoutOption,
    TopologyOption,
    answer_options,
    check_target,
    load_topology,
    networked,
    on_signals,
    prompt_text,
)
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import NodeError, RuyiFlowError
from ruyi_flow.types import Final, Mode, Stats, Token

__all__ = ["chat", "demo", "describe_gain", "explain_", "generate", "show"]


@app.command(rich_help_panel=Panel.RUN)
def demo(
    topology: TopologyOption = DEFAULT_TOPOLOGY,
    prompt: PromptOption = "What is the capital of France, and what is it famous for?",
    max_new_tokens: MaxOption = 48,
) -> None:
    """Start all nodes of a topology, answer one prompt with them, show which node decided every token, and end them.

    If the topology names the demo family, it is fetched first.
    """
    from ruyi_flow.family import store

    loaded, text = networked(topology), prompt_text(prompt)
    if loaded.family == store.DEMO:
        store.pull(store.DEMO, say=step_printer(), bars=counting_bar if err.is_terminal else None)

    async def run() -> None:
        from ruyi_flow.client import AsyncClient
        from ruyi_flow.serving.supervisor import supervise

        stop = on_signals()
        async with supervise(topology, loaded, log_writer(loaded)) as supervisor:
            await start_nodes(supervisor, stop)
            async with AsyncClient(loaded) as client:
                out.print(status_table(await client.status()))
                out.print(f"[bold]> {escape(text)}[/bold]")
                answer = asyncio.ensure_future(show(client, loaded, text, {"max_new_tokens": max_new_tokens}))
                stopping = asyncio.ensure_future(stop.wait())
                await asyncio.wait({answer, stopping}, return_when=asyncio.FIRST_COMPLETED)
                stopping.cancel()
                if not answer.done():
                    answer.cancel()
                    raise typer.Exit(130)
                tokens, final = answer.result()
        out.print(token_table(loaded, tokens))
        out.print(stats_table(final.stats))
        out.print(describe_gain(loaded, tokens, final.stats), soft_wrap=True)

    asyncio.run(run())


@app.command(rich_help_panel=Panel.ASK)
@answer_options()
def generate(
    prompt: PromptOption,
    options: dict[str, Any],
    topology: TopologyOption = DEFAULT_TOPOLOGY,
    raw: RawOption = False,
    timeout_s: TimeoutOption = 600.0,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Also list every token with the node that decided it, and why.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer one prompt with the running nodes of a topology; each token has the colour of the tier that decided it."""
    options["raw"] = raw
    loaded = load_topology(topology)

    async def run() -> None:
        from ruyi_flow.client import AsyncClient

        async with AsyncClient(loaded, timeout_s=timeout_s) as client:
            if as_json:
                print_json((await client.generate(prompt_text(prompt), **options)).to_dict())
                return
            answered, final = await show(client, loaded, prompt_text(prompt), options)
            if tokens:
                out.print(token_table(loaded, answered))
            out.print(stats_table(final.stats))

    asyncio.run(run())


@app.command("explain", rich_help_panel=Panel.ASK)
@answer_options(sampling=["max_new_tokens"], max_new_tokens=64)
def explain_(
    prompt: PromptOption,
    options: dict[str, Any],
    topology: TopologyOption = DEFAULT_TOPOLOGY,
    raw: RawOption = False,
    timeout_s: TimeoutOption = 600.0,
    html: Annotated[
        Path | None, typer.Option(help="Also write a report as one HTML file that needs no network.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Explain one answer token by token: which exit decided, why, and what the last branch predicts.

    The predictions of the last branch are computed in this process, so the whole
    family must be in this machine's store; it is loaded as the last node has it.
    In mode cascade the mean over the window decides, so it is shown as well.

    Example: ruyi-flow explain --policy policy.yaml --prompt "Why is the sky blue?"
    --html answer.html
    """
    options["raw"] = raw
    if html is not None:
        check_target(html, "--html")
    loaded, text = load_topology(topology), prompt_text(prompt)

    from ruyi_flow.client import Client, make_request
    from ruyi_flow.evaluation import explaining
    from ruyi_flow.routing.policy import Policy

    request = make_request(text, options)
    resolved = Policy.resolve(loaded.routing().updated(request.routing), loaded.all_exits)
    with progress_bar("loading the family and asking the nodes", quiet=as_json):
        family = explaining.load_like_last_node(loaded)
        with Client(loaded, timeout_s=timeout_s) as client:
            reply = client.generate(text, **options)
        rows = explaining.explain(family, loaded, request, resolved, reply.tokens)
    if html is not None:
        explaining.write_html(html, text, rows, reply.stats, resolved)
    if as_json:
        print_json({"text": reply.text, "tokens": [asdict(row) for row in rows], "stats": asdict(reply.stats)})
        return
    cascade = resolved.routing.mode is Mode.CASCADE
    judged = ("confidence", "mean", "threshold") if cascade else ("confidence", "threshold")
    own = explaining.score_name(resolved)
    table = Table("#", "token", "node", "exit", own, *judged, "reason", "last branch", "bytes up", "ms")
    for i, row in enumerate(rows):
        last = "the same" if row.agrees else repr(row.last)
        values = (row.own, row.confidence, *([row.mean] if cascade else []), row.threshold)
        numbers = ["" if value is None else f"{value:.3f}" for value in values]
        cells = (repr(row.text), row.node, str(row.exit), *numbers, row.reason, last, f"{row.bytes_up:,}")
        table.add_row(str(i), *map(escape, cells), f"{row.ms:.1f}", style=None if row.agrees else "yellow")
    out.print(table)
    out.print(stats_line(reply.stats), soft_wrap=True)
    same = sum(row.agrees for row in rows)
    out.print(f"{same} of {len(rows)} tokens are those that the last branch predicts after the same text")
    if html is not None:
        out.print(f"report: {escape(str(html))}", soft_wrap=True)


@app.command(rich_help_panel=Panel.ASK)
@answer_options(max_new_tokens=512)
def chat(
    options: dict[str, Any],
    topology: TopologyOption = DEFAULT_TOPOLOGY,
    system: Annotated[str | None, typer.Option(help="System message at the start of the conversation.")] = None,
    timeout_s: TimeoutOption = 600.0,
) -> None:
    """Chat with the running nodes of a topology; type /help for commands."""
    loaded = load_topology(topology)
    from ruyi_flow.client import Client

    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    with Client(loaded, timeout_s=timeout_s) as client:
        out.print(node_legend(loaded), "[dim]/help for help[/dim]")
        while True:
            try:
                text = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                out.print()
                return
            if text == "/reset":
                messages = list(start)
            elif text == "/help":
                out.print("[dim]/reset forgets the conversation · Ctrl-C ends an answer · Ctrl-D ends the chat[/dim]")
            elif re.fullmatch("/[a-z]+", text):
                out.print(f"[dim]unknown command {text}; /help lists them[/dim]")
            if not text or re.fullmatch("/[a-z]+", text):
                continue
            messages.append({"role": "user", "content": text})
            answer, final = "", None
            events = client.events(messages, **options)
            try:
                for event in events:
                    if isinstance(event, Final):
                        final = event
                        break
                    out.print(token_text(loaded, event), end="")
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
                out.print(f"[dim]{stats_line(final.stats)}[/dim]", soft_wrap=True)


async def show(client: Any, topology: Topology, prompt: str, options: dict[str, Any]) -> tuple[list[Token], Final]:
    """Print an answer as it arrives, and return its tokens and its end."""
    tokens: list[Token] = []
    try:
        async for event in client.events(prompt, **options):
            if isinstance(event, Final):
                return tokens, event
            if not tokens:
                out.print(node_legend(topology))
            tokens.append(event)
            out.print(token_text(topology, event), end="", soft_wrap=True)
    finally:
        if tokens:
            out.print()
    raise NodeError("the stream ended before the answer was complete")


def describe_gain(topology: Topology, tokens: list[Token], stats: Stats) -> str:
    """Return one sentence: what shallow nodes decided, and what was therefore not sent to deeper ones.

    The comparison is with a run in which the last exit decides every token, and every position is sent on every link.
    """
    total, positions = len(tokens), stats.prompt_tokens + len(tokens) - 1
    decided = [f"the {n.label} decided {sum(t.node == n.name for t in tokens)}" for n in topology.nodes[:-1]]
    if not decided:
        return f"The one node decided all {total} tokens."
    saved: list[str] = []
    saved_bytes = 0.0
    for hop in stats.hops[1:]:
        avoided = max(0, total - hop.messages)
        saved.append(f"{avoided} round trips to the {topology.label_of(hop.node)}")
        saved_bytes += avoided * hop.bytes_down / hop.messages
        saved_bytes += (positions - hop.positions) * hop.bytes_up / hop.positions
    saved.append(f"{max(0, round(saved_bytes)):,} bytes")
    return f"Of {total} tokens, {' and '.join(decided)}. That avoided {', '.join(saved[:-1])} and {saved[-1]}."
