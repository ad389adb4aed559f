"""How a chat reads messages: line editing with prompt_toolkit, and lines of a pipe."""

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from ruyi_flow.cli.chat_input import CommandCompleter, history_file, piped_messages, piped_reader, typed_reader
from ruyi_flow.cli.conversation import COMMANDS
from ruyi_flow.errors import RequestError


@contextmanager
def typing(history: Path | None = None) -> Iterator[tuple[PipeInput, Callable[[], str]]]:
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        yield keys, typed_reader(history, input=keys, output=DummyOutput())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("hi\r", "hi"),
        ("ho\x7fi\r", "hi"),
        ("i\x1b[Dh\r", "hi"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        ("one\\\rtwo\r", "one\ntwo"),
        ("one\\\x1b[D\r", "one\\"),
        ("\x1b[200~one\r\ntwo\n/three\x1b[201~\r", "one\ntwo\n/three"),
        ("away\x03hi\r", "hi"),
    ],
)
def test_keys_make_a_message(keys: str, message: str) -> None:
    with typing() as (pipe, read):
        pipe.send_text(keys)
        assert read() == message


@pytest.mark.parametrize(
    ("text", "completed"),
    [
        ("/", [f"/{name}" for name in COMMANDS]),
        ("/thr", ["/threshold"]),
        ("/mode ", ["fixed", "token", "exact", "cascade", "default"]),
        ("/mode ca", ["cascade"]),
        ("/tokens c", []),
        ("some /mo", []),
        ("/mode\n", []),
    ],
)
def test_commands_and_modes_are_completed(text: str, completed: list[str]) -> None:
    found = list(CommandCompleter().get_completions(Document(text), CompleteEvent()))
    assert sorted(c.text for c in found) == sorted(completed)
    assert all((text[: len(text) + c.start_position] + c.text).startswith(text) for c in found)


def test_save_completes_names_of_files(tmp_path: Path) -> None:
    (tmp_path / "conversation.jsonl").touch()
    text = f"/save {tmp_path}/conv"
    [found] = CommandCompleter().get_completions(Document(text), CompleteEvent())
    assert text[: len(text) + found.start_position] + found.text == f"/save {tmp_path}/conversation.jsonl"


def test_ctrl_d_ends_the_input_and_ctrl_c_on_an_empty_line_interrupts() -> None:
    with typing() as (pipe, read):
        pipe.send_text("\x03")
        with pytest.raises(KeyboardInterrupt):
            read()
        pipe.send_text("\x04")
        with pytest.raises(EOFError):
            read()


def test_history_goes_over_chats_in_a_private_file(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "history"
    with typing(file) as (pipe, read):
        pipe.send_text("first\x1b\rline\r")
        assert read() == "first\nline"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    with typing(file) as (pipe, read):
        pipe.send_text("\x1b[A\r")
        assert read() == "first\nline"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with typing(None) as (pipe, read):
        pipe.send_text("\x1b[Anew\r")
        assert read() == "new"
    assert b"new" not in file.read_bytes()


def test_a_history_that_cannot_be_kept_does_not_end_the_chat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with typing(tmp_path / "file" / "history") as (pipe, read):
        pipe.send_text("hi\r")
        assert read() == "hi"
    assert "There is no history of earlier chats" in capsys.readouterr().err
    with typing(tmp_path / "history") as (pipe, read):
        (tmp_path / "history").unlink()
        (tmp_path / "history").mkdir()
        pipe.send_text("hi\r")
        assert read() == "hi"


def test_the_history_is_in_the_users_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUYI_FLOW_HOME", "~/somewhere")
    assert history_file() == Path.home() / "somewhere" / "chat-history"
    monkeypatch.delenv("RUYI_FLOW_HOME")
    assert history_file() == Path(platformdirs.user_state_dir("ruyi-flow")) / "chat-history"


def test_lines_of_a_pipe_are_messages() -> None:
    assert list(piped_messages(["a\n", "\n", "  \n", "b\\\n", "c\r\n", " d\n", "e\\\n"])) == ["a", "b\nc", " d", "e"]
    read = piped_reader(["a\n"])
    assert read() == "a"
    for _ in range(2):
        with pytest.raises(EOFError):
            read()


def test_lines_that_are_no_text_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b"a\xff\n")
    with (tmp_path / "lines").open(encoding="utf-8") as lines, pytest.raises(RequestError, match="not text in utf-8"):
        list(piped_messages(lines))
