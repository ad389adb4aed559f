"""A chat's conversation, and the commands that show and change it. What is printed here is no answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ruyi_flow.cli.display import beside_answers, comma_list, err, print_text, printable, token_summary, token_table
from ruyi_flow.cli.options import check_target, parse_threshold
from ruyi_flow.client import make_request
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import RequestError, RuyiFlowError, did_you_mean
from ruyi_flow.routing.policy import Policy
from ruyi_flow.types import FinishReason, Mode, Token, parse_mode

__all__ = ["COMMANDS", "Command", "Conversation", "command_of", "print_error", "run_command"]

_OF_MODES = {
    Mode.FIXED: ("exit",),
    Mode.TOKEN: ("threshold", "thresholds"),
    Mode.CASCADE: ("threshold", "thresholds", "window", "back"),
    Mode.EXACT: (),
}
"""The options that a mode has."""

_ROUTING = {"mode", "policy", *(name for names in _OF_MODES.values() for name in names)}


class Conversation:
    """The messages of a chat, the options of its answers, and the tokens of the last answer.

    Args:
        topology: the topology of the nodes.
        options: the options of an answer, as the command line gave them.
        system: the system message, or None.
    """

    def __init__(self, topology: Topology, options: dict[str, Any], system: str | None) -> None:
        self.topology, self.options, self.system = topology, options, system
        self.turns: list[dict[str, str]] = []
        """The messages of the user and their answers."""
        self.tokens: Sequence[Token] = ()
        """The tokens of the last answer."""
        self.finish_reason: FinishReason | None = None
        """Why the last answer ended; None if it was interrupted."""
        self._saved: set[Path] = set()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The whole conversation, with the system message if there is one."""
        start = [{"role": "system", "content": self.system}] if self.system else []
        return start + self.turns

    def policy(self, options: dict[str, Any] | None = None) -> Policy:
        """Return what decides tokens under these options, or under the chat's own.

        Raises:
            RequestError: the options contradict each other, or the family does not have an exit.
            ConfigError: a policy file cannot be read.
        """
        request = make_request("", self.options if options is None else options)
        return Policy.resolve(self.topology.routing().updated(request.routing), self.topology.all_exits)

    def set_mode(self, words: str) -> None:
        """Change the mode: `cascade`, `cascade 0.8`, or `default` for the topology's policy."""
        name, _, threshold = words.partition(" ")
        kept = {option: value for option, value in self.options.items() if option not in _ROUTING}
        if name == "default" and not threshold:
            self.options = kept
            return
        mode = parse_mode(name)
        own = {option: self.options[option] for option in _OF_MODES[mode] if option in self.options}
        if threshold:
            own = {option: value for option, value in own.items() if option not in ("threshold", "thresholds")}
            own |= parse_threshold(threshold, "/mode THRESHOLD")
        self._change(kept | own | {"mode": mode})

    def set_threshold(self, value: str) -> None:
        """Change the threshold of mode token or cascade; another mode becomes token."""
        mode = self.policy().routing.mode
        mode = mode if mode is Mode.CASCADE else Mode.TOKEN
        kept = {option: v for option, v in self.options.items() if option not in _ROUTING}
        own = {option: self.options[option] for option in ("window", "back") if option in self.options}
        own = own if mode is Mode.CASCADE else {}
        self._change(kept | own | {"mode": mode} | parse_threshold(value, "/threshold"))

    def _change(self, options: dict[str, Any]) -> None:
        self.policy(options)
        self.options = options

    def save(self, path: Path) -> None:
        """Write the conversation as one JSON line, {"messages": …}, to a new file or one that it has written before.

        Raises:
            RequestError: there is no answer yet, or the file exists.
            ConfigError: the path cannot be written.
        """
        if not self.turns:
            raise RequestError("there is nothing to save yet")
        check_target(path, "/save")
        path = path.absolute()
        if path.exists() and path not in self._saved:
            raise RequestError(f"/save {path}: exists already; choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n", encoding="utf-8")
        self._saved.add(path)


def _show_help(conversation: Conversation, rest: str) -> None:
    table = Table.grid(padding=(0, 2))
    for name, command in COMMANDS.items():
        table.add_row(Text(f"/{name} {command.takes}".rstrip()), Text(command.help))
    console = beside_answers()
    console.print(table)
    print_text(
        console,
        "Alt-Enter, or a backslash at the end of a line, begins a new line of the message; a paste of several lines is "
        "one message. Ctrl-C ends an answer, which stays as far as it came, or clears the line. Ctrl-D ends the chat.",
    )


def _reset(conversation: Conversation, rest: str) -> None:
    count = len(conversation.turns)
    conversation.turns, conversation.tokens = [], ()
    _say(f"The conversation begins anew; {count} message{'' if count == 1 else 's'} forgotten.")


def _mode(conversation: Conversation, rest: str) -> None:
    if rest:
        conversation.set_mode(rest)
    policy = conversation.policy()
    decides = f", exit {policy.deepest}" if policy.routing.mode is Mode.FIXED else ""
    thresholds = f", threshold {_thresholds(policy)}" if policy.routing.mode in (Mode.TOKEN, Mode.CASCADE) else ""
    _say(f"The mode is {policy.routing.mode}{decides}{thresholds}.")


def _threshold(conversation: Conversation, rest: str) -> None:
    if rest:
        conversation.set_threshold(rest)
    policy = conversation.policy()
    if policy.routing.mode in (Mode.TOKEN, Mode.CASCADE):
        _say(f"The threshold is {_thresholds(policy)}, in mode {policy.routing.mode}.")
    else:
        _say(f"Mode {policy.routing.mode} has no threshold; /threshold 0.8 sets mode token.")


def _thresholds(policy: Policy) -> str:
    given = {exit: value for exit, value in policy.thresholds.items() if value <= 1}
    if not given or len(set(policy.thresholds.values())) == 1:
        return f"{next(iter(policy.thresholds.values()), 1.0):.3g} for all early exits" if given else "never reached"
    return comma_list(f"{exit}={value:.3g}" for exit, value in given.items())


def _tokens(conversation: Conversation, rest: str) -> None:
    if not conversation.tokens:
        raise RequestError("there is no answer yet")
    console = beside_answers()
    console.print(token_table(conversation.topology, conversation.tokens, conversation.finish_reason))
    print_text(console, token_summary(conversation.topology, conversation.tokens))


def _save(conversation: Conversation, rest: str) -> None:
    if not rest:
        raise RequestError("/save needs the name of a file, for instance /save chat.jsonl")
    conversation.save(Path(rest).expanduser())
    _say(f"The conversation is in {rest}; ruyi-flow trace, and eval --chats, read it.")


def _system(conversation: Conversation, rest: str) -> None:
    if rest:
        conversation.system = rest
    if conversation.system:
        _say(f"The system message is: {conversation.system}")
    else:
        _say("There is no system message; /system TEXT sets one.")


def _quit(conversation: Conversation, rest: str) -> None:
    raise EOFError


@dataclass(frozen=True, slots=True)
class Command:
    """A command of the chat."""

    run: Callable[[Conversation, str], None]
    """What it does with the conversation and the words after its name; it raises EOFError to end the chat."""
    help: str
    """What it does, for /help."""
    takes: str = ""
    """What may stand after its name; empty if nothing may."""


COMMANDS = {
    "help": Command(_show_help, "Show this list."),
    "mode": Command(
        _mode, "Show or set what decides tokens; 'default' is the topology's policy.", "[MODE [THRESHOLD]]"
    ),
    "threshold": Command(
        _threshold, "Show or set the confidence that early exits need: 0.8, or 5=0.9,11=0.8.", "[VALUE]"
    ),
    "system": Command(_system, "Show or set the system message.", "[TEXT]"),
    "tokens": Command(_tokens, "List the last answer's tokens, with the node that decided each, and why."),
    "save": Command(_save, "Write the conversation as a JSON line that trace and eval --chats read.", "FILE"),
    "reset": Command(_reset, "Forget the conversation; the system message stays."),
    "quit": Command(_quit, "End the chat, as /exit and Ctrl-D do."),
}
"""The commands of the chat, by name. They are typed with a slash before the name."""

_ALIASES = {"exit": "quit"}


def command_of(text: str) -> tuple[str, str] | None:
    """Return the name and the rest of a text that has the form of a command, /name or /name …; else None.

    A text such as /etc/hosts has another form, and one that begins with a space is always a message.
    """
    match = re.fullmatch(r"/([a-z]+)(?:\s+(.*))?", text.rstrip(), re.DOTALL)
    return (_ALIASES.get(match[1], match[1]), match[2] or "") if match else None


def run_command(conversation: Conversation, name: str, rest: str) -> None:
    """Run a command; an error is one line.

    Raises:
        EOFError: the command ends the chat.
    """
    try:
        if name not in COMMANDS:
            hint = did_you_mean(f"/{name}", [f"/{one}" for one in (*COMMANDS, *_ALIASES)]) or "; /help lists them."
            raise RequestError(f"/{name} is no command{hint} To send it as a message, type a space before it")
        if rest and not COMMANDS[name].takes:
            raise RequestError(f"/{name} takes nothing after its name; there is {printable(rest)[:60]!r}")
        COMMANDS[name].run(conversation, rest)
    except (RuyiFlowError, OSError) as error:
        print_error(str(error))


def print_error(message: str) -> None:
    """Print an error to standard error as one red line."""
    print_text(err, f"error: {message}", "red")


def _say(text: str) -> None:
    print_text(beside_answers(), text, "dim")
