"""How a chat reads messages: with line editing and history from a terminal, line by line from a file or a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from ruyi_flow.cli.conversation import COMMANDS
from ruyi_flow.cli.display import err
from ruyi_flow.errors import RequestError
from ruyi_flow.types import Mode

__all__ = [
    "CommandCompleter",
    "history_file",
    "input_is_terminal",
    "keys_not_echoed",
    "piped_messages",
    "piped_reader",
    "typed_reader",
]


def history_file() -> Path:
    """Return the file of the history: in `RUYI_FLOW_HOME`, or in the user's folder for the state of programs."""
    named = os.environ.get("RUYI_FLOW_HOME")
    folder = Path(named).expanduser() if named else Path(platformdirs.user_state_dir("ruyi-flow"))
    return folder / "chat-history"


def input_is_terminal() -> bool:
    """Return whether a person types the messages and sees the line that is typed."""
    return sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())


@contextmanager
def keys_not_echoed() -> Iterator[None]:
    """Keep keys that are typed during the block out of what is printed; the next line that is read begins with them.

    Standard input is a terminal. On Windows, which has no termios, this does nothing.
    """
    try:
        import termios
    except ModuleNotFoundError:
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = termios.tcgetattr(sys.stdin)
    silent[3] &= ~(termios.ECHO | termios.ECHOCTL)  # index 3 is the local modes
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def piped_messages(lines: Iterable[str]) -> Iterator[str]:
    """Yield one message a line; a line that ends with a backslash goes on in the next one.

    Raises:
        RequestError: the input is no text.
    """
    begun = ""
    try:
        for line in lines:
            line = line.rstrip("\r\n")
            if line.endswith("\\"):
                begun += line[:-1] + "\n"
                continue
            message, begun = begun + line, ""
            if message.strip():
                yield message
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not text in {error.encoding}: {error.reason}") from None
    if begun.strip():
        yield begun.rstrip("\n")


def piped_reader(lines: Iterable[str]) -> Callable[[], str]:
    """Return a function that returns the next of the piped messages, and raises EOFError after the last one."""
    messages = piped_messages(lines)

    def read() -> str:
        for message in messages:
            return message
        raise EOFError

    return read


class CommandCompleter(Completer):
    """Completes the names of commands, of modes after /mode, and of files after /save."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Yield what the text before the cursor may become."""
        text = document.text_before_cursor
        name, space, rest = text.partition(" ")
        if not name.startswith("/") or "\n" in text:
            return
        if name == "/save" and space:
            yield from PathCompleter(expanduser=True).get_completions(Document(rest), complete_event)
            return
        words = [f"/{command}" for command in COMMANDS]
        if space:
            words = [*Mode, "default"] if name == "/mode" else []
        typed = rest if space else name
        yield from (Completion(word, -len(typed)) for word in words if word.startswith(typed))


class _SafeHistory(FileHistory):
    """A history whose file may become full or be removed without ending the chat."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def typed_reader(history: Path | None, **io: Any) -> Callable[[], str]:
    """Return a function that reads a message from the terminal with prompt_toolkit.

    It raises EOFError at Ctrl-D, and KeyboardInterrupt at Ctrl-C on an empty line.

    Args:
        history: the file of the history, or None for a history of this chat only.
        io: input and output of prompt_toolkit. Default: the terminal's.
    """
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    past: History = InMemoryHistory()
    if history is not None and _is_private(history):
        past = _SafeHistory(str(history))
    io.setdefault("output", create_output(always_prefer_tty=True))
    session: PromptSession[str] = PromptSession(
        [("bold", "> ")],
        multiline=True,
        prompt_continuation="  ",
        history=past,
        completer=CommandCompleter(),
        key_bindings=keys,
        **io,
    )
    return session.prompt


def _is_private(path: Path) -> bool:
    """Make a file that only the user may read; return whether that went well."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.chmod(0o600)
    except OSError as error:
        err.print(f"[dim]There is no history of earlier chats: {error}[/dim]", soft_wrap=True)
        return False
    return True
