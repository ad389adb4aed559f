"""The command chat: a conversation with running nodes."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ruyi_flow.cli.answer import AnswerPrinter
from ruyi_flow.cli.app import Panel, app
from ruyi_flow.cli.asking import warn_of_fallback
from ruyi_flow.cli.conversation import Conversation, command_of, print_error, run_command
from ruyi_flow.cli.display import beside_answers, err, node_legend, print_text, summary_line
from ruyi_flow.cli.options import TimeoutOption, TopologyOption, answer_options, dashed, load_topology
from ruyi_flow.config.examples import DEFAULT_TOPOLOGY, shortest
from ruyi_flow.errors import ContextLengthError, NodeError, RuyiFlowError
from ruyi_flow.types import Final, Token

if TYPE_CHECKING:
    from ruyi_flow.client import Client

__all__ = ["chat"]


@app.command(rich_help_panel=Panel.ASK)
@answer_options(skip=("logprobs", "prompt_logprobs"), max_new_tokens=512)
def chat(
    options: dict[str, Any],
    topology: TopologyOption = DEFAULT_TOPOLOGY,
    system: Annotated[str | None, typer.Option(help="System message at the start of the conversation.")] = None,
    timeout_s: TimeoutOption = 600.0,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Neither read nor write the history of earlier chats.")
    ] = False,
) -> None:
    """Chat with the running nodes of a topology; type /help for commands.

    The arrow keys bring back what was typed before, also in earlier chats. The
    history is a file that only you can read: chat-history in RUYI_FLOW_HOME, or
    in your folder for the state of programs.

    When standard input is a file or a pipe, each line is a message. The answers
    alone go to standard output, and the exit status is 2 if one failed.

    Example: ruyi-flow chat --mode exact --system "You answer in one sentence."
    """
    conversation = Conversation(load_topology(topology), options, system)
    from ruyi_flow.cli.chat_input import history_file, input_is_terminal, keys_not_echoed, piped_reader, typed_reader
    from ruyi_flow.client import Client

    typed = input_is_terminal()
    read = typed_reader(None if no_history else history_file()) if typed else piped_reader(sys.stdin)
    failed = False
    silence = keys_not_echoed() if typed else nullcontext()
    with Client(conversation.topology, timeout_s=timeout_s) as client, silence:
        _check_that_a_node_runs(client, topology)
        if typed:
            beside_answers().print(node_legend(conversation.topology))
            print_text(beside_answers(), "/help lists the commands, Ctrl-D ends the chat.", "dim")
        while True:
            try:
                text = read()
                if command := command_of(text):
                    run_command(conversation, *command)
                elif text.strip():
                    failed |= not _answer(client, conversation, text.strip(), typed)
            except EOFError:
                break
            except KeyboardInterrupt:  # on an empty line, or between an answer and the next line
                if not typed:
                    raise
                print_text(err, "Ctrl-D or /quit ends the chat.", "dim")
    if failed and not typed:
        raise typer.Exit(2)


def _check_that_a_node_runs(client: Client, topology: Path) -> None:
    """Check before the first message that there are nodes to ask; one without an address runs in this process.

    Raises:
        NodeError: no node answers.
    """
    if client.topology.entry.address is None:
        return
    answers = client.status()
    if all(isinstance(answer, NodeError) for answer in answers.values()):
        cause = next(iter(answers.values()))  # the entry node's
        raise NodeError(f"no node runs: {cause}; start them: ruyi-flow up {shortest(topology, 'topology')}")


def _answer(client: Client, conversation: Conversation, text: str, typed: bool) -> bool:
    """Answer a message, and return whether that went well.

    An answer that ends early, by Ctrl-C, the deadline or a lost node, stays in the conversation as far as it came. A
    message that got no answer at all does not.
    """
    message = {"role": "user", "content": text}
    tokens: list[Token] = []
    final: Final | None = None
    problem: RuyiFlowError | None = None
    with AnswerPrinter(conversation.topology, legend=False) as printer:
        events = client.events([*conversation.messages, message], **conversation.options)
        try:
            for event in events:
                if isinstance(event, Final):
                    final = event
                    break
                assert isinstance(event, Token)
                tokens.append(event)
                printer.push(event)
        except KeyboardInterrupt:
            if not typed:
                raise
            printer.end("(interrupted)")
        except RuyiFlowError as error:
            problem = error
        finally:
            events.close()
    answer = "".join(token.text for token in tokens) if final is None else final.text
    if answer or final is not None:
        conversation.turns += [message, {"role": "assistant", "content": answer}]
        conversation.tokens, conversation.finish_reason = tokens, None if final is None else final.finish_reason
    warn_of_fallback(conversation.topology, tokens)
    if problem is not None:
        hint = ". The answer stays in the conversation as far as it came." if answer else ""
        if isinstance(problem, ContextLengthError):
            hint = "; /reset begins a new conversation"
        print_error(dashed(str(problem)) + hint)
    if final is not None:
        limit = conversation.options["max_new_tokens"]
        print_text(beside_answers(), summary_line(final.stats, final.finish_reason, limit), "dim")
    return problem is None
