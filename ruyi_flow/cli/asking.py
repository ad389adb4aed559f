"""Commands that ask running nodes."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ruyi_flow.cli.app import app
from ruyi_flow.cli.display import (
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
    BackOption,
    DraftOption,
    ExitOption,
    FallbackOption,
    JsonOption,
    MaxOption,
    MinOption,
    ModeOption,
    NgramOption,
    PenaltyOption,
    PolicyOption,
    PromptOption,
    RawOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    ThresholdOption,
    TimeoutOption,
    TopKOption,
    TopologyOption,
    TopPOption,
    WindowOption,
    check_target,
    keywords,
    load_topology,
    networked,
    on_signals,
    prompt_text,
)
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import NodeError, RuyiFlowError
from ruyi_flow.types import Final, Mode, Token

__all__ = ["chat", "demo", "explain_", "generate", "show"]


@app.command()
def demo(
    topology: TopologyOption = DEFAULT_TOPOLOGY,
    prompt: PromptOption = "Why is the sky blue?",
    max_new_tokens: MaxOption = 48,
) -> None:
    """The main job in one command: start all nodes of a topology, answer a prompt together, end them."""
    from ruyi_flow.family import store

    loaded, text = networked(topology), prompt_text(prompt)
    if loaded.family == store.DEMO:
        store.pull(store.DEMO, say=step_printer(), bars=err.is_terminal)

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
    window: WindowOption = None,
    back: BackOption = None,
    draft: DraftOption = None,
    fallback: FallbackOption = None,
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
    options = keywords(locals())
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


@app.command("explain")
def explain_(
    topology: TopologyOption,
    prompt: PromptOption,
    mode: ModeOption = None,
    exit: ExitOption = None,
    threshold: ThresholdOption = None,
    policy: PolicyOption = None,
    window: WindowOption = None,
    back: BackOption = None,
    draft: DraftOption = None,
    fallback: FallbackOption = None,
    max_new_tokens: MaxOption = 64,
    raw: RawOption = False,
    timeout_s: TimeoutOption = 600.0,
    html: Annotated[Path | None, typer.Option(help="Also write it as one HTML file, which needs no network.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Explain one answer of running nodes, token by token: who decided it, why, and what the last branch says.

    What the last branch would have said is computed here, so the whole family
    must be in this machine's store; it is held as the last node holds it. What
    confidence is made of, before calibration, is computed with it too. In mode
    cascade the mean over the window decides, so that is shown beside it.

    Example: ruyi-flow explain -t configs/local.yaml --policy policy.yaml
    --prompt "Why is the sky blue?" --html answer.html
    """
    given = keywords(locals())
    if html is not None:
        check_target(html, "--html")
    loaded, text = load_topology(topology), prompt_text(prompt)

    from ruyi_flow.client import Client, make_request
    from ruyi_flow.evaluation import explaining
    from ruyi_flow.routing.policy import Policy

    request = make_request(text, dict(given))
    resolved = Policy.resolve(request.routing or loaded.policy.routing(str(topology)), loaded.all_exits)
    with progress_bar("asking, and loading the family", quiet=as_json):
        family = explaining.like_the_last_node(loaded)
        with Client(loaded, timeout_s=timeout_s) as client:
            reply = client.generate(text, **given)
        rows = explaining.explain(family, loaded, request, resolved, reply.tokens)
    if html is not None:
        explaining.write_html(html, text, rows, reply.stats, resolved)
    if as_json:
        print_json({"text": reply.text, "tokens": [asdict(row) for row in rows], "stats": asdict(reply.stats)})
        return
    cascade = resolved.mode is Mode.CASCADE
    sure = ("confidence", "mean", "needs") if cascade else ("confidence", "needs")
    own = explaining.score_name(resolved)
    table = Table("#", "token", "node", "exit", own, *sure, "why", "last branch", "bytes up", "ms")
    for i, row in enumerate(rows):
        last = "the same" if row.agrees else repr(row.last)
        values = (row.own, row.confidence, *([row.mean] if cascade else []), row.threshold)
        numbers = ["" if value is None else f"{value:.3f}" for value in values]
        cells = (repr(row.text), row.node, str(row.exit), *numbers, row.reason, last, f"{row.bytes_up:,}")
        table.add_row(str(i), *map(escape, cells), f"{row.ms:.1f}", style=None if row.agrees else "yellow")
    out.print(table)
    out.print(stats_line(reply.stats), soft_wrap=True)
    same = sum(row.agrees for row in rows)
    out.print(f"{same} of {len(rows)} tokens are what the last branch would have said after the same text")
    if html is not None:
        out.print(f"written: {escape(str(html))}", soft_wrap=True)


@app.command()
def chat(
    topology: TopologyOption = DEFAULT_TOPOLOGY,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    mode: ModeOption = None,
    exit: ExitOption = None,
    threshold: ThresholdOption = None,
    policy: PolicyOption = None,
    window: WindowOption = None,
    back: BackOption = None,
    draft: DraftOption = None,
    fallback: FallbackOption = None,
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
    options = keywords(locals())
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
    """Print an answer as it comes, coloured by tier."""
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
    raise NodeError("the answer ended in the middle")
