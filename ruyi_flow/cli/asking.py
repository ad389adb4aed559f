"""Commands that ask running nodes one prompt: demo, generate, explain."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ruyi_flow.cli.answer import AnswerPrinter
from ruyi_flow.cli.app import Panel, app
from ruyi_flow.cli.display import (
    beside_answers,
    counting_bar,
    err,
    fallback_note,
    log_writer,
    out,
    print_json,
    print_text,
    progress_bar,
    stats_table,
    status_tables,
    step_printer,
    summary_line,
    token_label,
    token_summary,
    token_table,
)
from ruyi_flow.cli.nodes import ENDING, start_nodes
from ruyi_flow.cli.options import (
    JsonOption,
    MaxOption,
    PromptArgument,
    PromptOption,
    RawOption,
    TimeoutOption,
    TokensOption,
    TopologyOption,
    answer_options,
    check_target,
    load_topology,
    networked,
    on_signals,
    prompt_text,
)
from ruyi_flow.config.examples import DEFAULT_TOPOLOGY, shortest
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import RequestError
from ruyi_flow.extras import require
from ruyi_flow.requests import SamplingParams
from ruyi_flow.types import Mode, Stats, Token

if TYPE_CHECKING:
    from ruyi_flow.client import AsyncClient, Reply

__all__ = ["DEMO_PROMPT", "ask", "demo", "describe_gain", "explain_", "generate", "warn_of_fallback"]

DEMO_PROMPT = "What is the capital of France?"
"""What the demo asks when no prompt is given."""


@app.command(rich_help_panel=Panel.RUN)
def demo(
    prompt: PromptArgument = None,
    prompt_option: PromptOption = None,
    topology: TopologyOption = DEFAULT_TOPOLOGY,
    max_new_tokens: MaxOption = 48,
    tokens: TokensOption = False,
) -> None:
    """Start all nodes of a topology, answer one prompt with them, and end them.

    In a terminal each token has the colour of the node that decided it; --tokens
    lists them in a table as well. Without a prompt it asks for the capital of
    France. If the topology names the demo family, it is fetched first.

    Example: ruyi-flow demo "What is rain?"
    """
    require("torch")  # here rather than in every node's process
    from ruyi_flow.family import store

    text = prompt_text(prompt, prompt_option, default=DEMO_PROMPT)
    loaded, beside, named = networked(topology), beside_answers(), shortest(topology, "topology")
    if loaded.family == store.DEMO:
        store.pull(store.DEMO, say=step_printer(), bars=counting_bar if err.is_terminal else None)

    async def run() -> None:
        from ruyi_flow.client import AsyncClient
        from ruyi_flow.serving.supervisor import supervise

        async with supervise(
            topology, loaded, log_writer(loaded), named=named, options=["--no-request-log"]
        ) as supervisor:
            stop = on_signals(supervisor.kill)
            await start_nodes(supervisor, stop)
            async with AsyncClient(loaded) as client:
                beside.print(status_tables(await client.status()))
                print_text(beside, f"> {text}", "bold")
                with AnswerPrinter(loaded) as printer:
                    asked = ask(client, text, {"max_new_tokens": max_new_tokens}, printer)
                    answer = asyncio.ensure_future(asked)
                    stopping = asyncio.ensure_future(stop.wait())
                    await asyncio.wait({answer, stopping}, return_when=asyncio.FIRST_COMPLETED)
                    stopping.cancel()
                    if not answer.done():
                        answer.cancel()
                        printer.end()
                        err.print(ENDING)
                        raise typer.Exit(130)
                    reply = answer.result()
        warn_of_fallback(loaded, reply.tokens)
        _print_figures(loaded, reply, max_new_tokens, tokens=tokens)
        print_text(beside, describe_gain(loaded, list(reply.tokens), reply.stats))

    asyncio.run(run())


@app.command(rich_help_panel=Panel.ASK)
@answer_options()
def generate(
    options: dict[str, Any],
    prompt: PromptArgument = None,
    prompt_option: PromptOption = None,
    topology: TopologyOption = DEFAULT_TOPOLOGY,
    raw: RawOption = False,
    timeout_s: TimeoutOption = 600.0,
    tokens: TokensOption = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing but the answer, also in a terminal.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer one prompt with the running nodes of a topology; each token has the colour of the tier that decided it.

    The answer alone goes to standard output when that is a file or a pipe; the
    statistics go to standard error. In a terminal both are shown.

    Example: ruyi-flow generate "Why is the sky blue?" > answer.txt
    """
    options["raw"] = raw
    if quiet and tokens:
        raise RequestError("--tokens cannot be combined with --quiet, which prints nothing but the answer")
    loaded, text = load_topology(topology), prompt_text(prompt, prompt_option)

    async def run() -> None:
        from ruyi_flow.client import AsyncClient

        with AnswerPrinter(loaded, quiet=quiet) as printer:
            async with AsyncClient(loaded, timeout_s=timeout_s) as client:
                if as_json:
                    reply = await client.generate(text, **options)
                else:
                    reply = await ask(client, text, options, printer)
        if as_json:
            print_json(reply.to_dict())
        if not quiet:
            warn_of_fallback(loaded, reply.tokens)
        if not (quiet or as_json):
            limit = options.get("max_new_tokens", SamplingParams().max_new_tokens)
            _print_figures(loaded, reply, limit, tokens=tokens)

    asyncio.run(run())


@app.command("explain", rich_help_panel=Panel.ASK)
@answer_options(sampling=["max_new_tokens"], max_new_tokens=64)
def explain_(
    options: dict[str, Any],
    prompt: PromptArgument = None,
    prompt_option: PromptOption = None,
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

    Example: ruyi-flow explain "Why is the sky blue?" --policy policy.yaml
    --html answer.html
    """
    options["raw"] = raw
    if html is not None:
        check_target(html, "--html")
    loaded, text = load_topology(topology), prompt_text(prompt, prompt_option)

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
        cells = (
            token_label(reply.tokens, i, reply.finish_reason),
            row.node,
            str(row.exit),
            *numbers,
            row.reason,
            last,
            f"{row.bytes_up:,}",
        )
        table.add_row(str(i), *map(escape, cells), f"{row.ms:.1f}", style=None if row.agrees else "yellow")
    out.print(table)
    warn_of_fallback(loaded, reply.tokens)
    print_text(out, summary_line(reply.stats, reply.finish_reason, options["max_new_tokens"]))
    same = sum(row.agrees for row in rows)
    out.print(f"{same} of {len(rows)} tokens are those that the last branch predicts after the same text")
    if html is not None:
        out.print(f"report: {escape(str(html))}", soft_wrap=True)


async def ask(client: AsyncClient, prompt: str, options: dict[str, Any], printer: AnswerPrinter) -> Reply:
    """Print an answer as it arrives, and return it."""
    async with client.stream(prompt, **options) as stream:
        async for token in stream:
            printer.push(token)
        printer.end()
        return stream.reply


def _print_figures(topology: Topology, reply: Reply, max_new_tokens: int, *, tokens: bool) -> None:
    """Print what an answer took, and how its tokens were decided if `tokens` is set."""
    console = beside_answers()
    if tokens:
        console.print(token_table(topology, reply.tokens, reply.finish_reason))
        print_text(console, token_summary(topology, reply.tokens))
    console.print(stats_table(reply.stats))
    print_text(console, summary_line(reply.stats, reply.finish_reason, max_new_tokens))


def warn_of_fallback(topology: Topology, tokens: Sequence[Token]) -> None:
    """Say on standard error how many tokens no deeper node could be asked for, and why, if there are any."""
    if note := fallback_note(topology, tokens):
        print_text(err, note, "yellow")


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
        saved_bytes += avoided * hop.bytes_down / max(1, hop.messages)
        saved_bytes += (positions - hop.positions) * hop.bytes_up / max(1, hop.positions)
    saved.append(f"{max(0, round(saved_bytes)):,} bytes")
    return f"Of {total} tokens, {' and '.join(decided)}. That avoided {', '.join(saved[:-1])} and {saved[-1]}."
