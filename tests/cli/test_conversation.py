"""The commands of a chat: what each shows, sets and refuses."""

import json
from pathlib import Path

import pytest

from ruyi_flow.cli.conversation import COMMANDS, Conversation, command_of, run_command
from ruyi_flow.testing import cut_topology
from ruyi_flow.types import Mode, Reason, Token


@pytest.fixture
def talk(tiny: Path) -> Conversation:
    """A conversation with one answer."""
    talk = Conversation(cut_topology(tiny, [[2], [4, 6]]), {"max_new_tokens": 12, "draft": 2}, None)
    talk.turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    talk.tokens = [Token(1, "ho", 4, "n1", 0.25, Reason.CONFIDENT)]
    return talk


class Said:
    """What a command prints: its answers on standard error when standard output is not a terminal."""

    def __init__(self, talk: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
        self._talk, self._capsys = talk, capsys

    def __call__(self, line: str) -> str:
        command = command_of(line)
        assert command is not None
        run_command(self._talk, *command)
        out, err = self._capsys.readouterr()
        assert out == ""
        return err


@pytest.fixture
def say(talk: Conversation, capsys: pytest.CaptureFixture[str]) -> Said:
    return Said(talk, capsys)


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("/mode", ("mode", "")),
        ("/mode  exact ", ("mode", "exact")),
        ("/exit", ("quit", "")),
        ("/system one\ntwo", ("system", "one\ntwo")),
        ("/shrug", ("shrug", "")),
        ("/etc/hosts says 127.0.0.1", None),
        ("/Mode", None),
        ("/ mode", None),
        (" /mode", None),
        ("a /mode", None),
        ("/", None),
    ],
)
def test_a_command_has_its_form(text: str, command: tuple[str, str] | None) -> None:
    assert command_of(text) == command


def test_help_lists_every_command(say: Said) -> None:
    shown = say("/help")
    assert all(f"/{name}" in shown for name in COMMANDS)
    assert "Alt-Enter" in shown and "backslash" in shown and "Ctrl-D" in shown


def test_the_mode_is_shown_and_set(talk: Conversation, say: Said) -> None:
    assert say("/mode") == "The mode is exact.\n"
    assert say("/mode fixed") == "The mode is fixed, exit 6.\n"
    assert say("/mode token") == (
        "error: mode 'token' requires a threshold (0 … 1): one for all exits, or one per exit\n"
    )
    assert talk.policy().routing.mode is Mode.FIXED, "what is refused changes nothing"
    assert say("/mode cascade 2=0.5") == "The mode is cascade, threshold 2=0.5.\n"
    assert say("/mode token") == "The mode is token, threshold 2=0.5.\n"
    assert say("/mode token 0.25") == "The mode is token, threshold 0.25 for all early exits.\n"
    assert talk.options == {"max_new_tokens": 12, "draft": 2, "mode": Mode.TOKEN, "threshold": 0.25}
    assert say("/mode exact 0.5") == "error: threshold requires mode 'token' or 'cascade'; the mode is 'exact'\n"
    assert say("/mode quick") == "error: mode is 'quick'; known: fixed, token, exact, cascade\n"
    assert say("/mode default") == "The mode is exact.\n"
    assert talk.options == {"max_new_tokens": 12, "draft": 2}


def test_the_threshold_is_shown_and_set(talk: Conversation, say: Said) -> None:
    assert say("/threshold") == "Mode exact has no threshold; /threshold 0.8 sets mode token.\n"
    assert say("/threshold 2=0.9,4=0.8") == "The threshold is 2=0.9, 4=0.8, in mode token.\n"
    assert say("/threshold 1.5") == "The threshold is never reached, in mode token.\n"
    talk.options = {"mode": "cascade", "threshold": 0.5, "window": 3, "exit": None}
    assert say("/threshold 0.7") == "The threshold is 0.7 for all early exits, in mode cascade.\n"
    assert talk.policy().routing.window == 3
    assert say("/threshold high") == "error: /threshold is 'high'; write 0.8 for all exits, or 5=0.9,11=0.8\n"
    assert say("/threshold 3=0.5").startswith("error: exit 3 is not one of ")
    assert talk.options["threshold"] == 0.7


def test_a_mode_replaces_a_policy_file(talk: Conversation, say: Said, tmp_path: Path) -> None:
    talk.options = {"policy": tmp_path / "none.yaml"}
    assert say("/mode").startswith(f"error: {tmp_path / 'none.yaml'}") and say("/mode exact") == "The mode is exact.\n"


def test_tokens_are_listed_with_node_exit_confidence_and_reason(talk: Conversation, say: Said) -> None:
    shown = say("/tokens")
    assert all(word in shown for word in ("'ho'", "n1", "4", "0.25", "confident", "1 token: n1 decided 1"))
    talk.tokens = ()
    assert say("/tokens") == "error: there is no answer yet\n"
    assert say("/tokens all") == "error: /tokens takes nothing after its name; there is 'all'\n"


def test_a_conversation_is_saved_to_a_file_of_its_own(talk: Conversation, say: Said, tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "chat.jsonl"
    talk.system = "be brief"
    assert f"The conversation is in {file}" in say(f"/save {file}")
    for count in (3, 5):
        [line] = file.read_text().splitlines()
        assert json.loads(line) == {"messages": talk.messages} and len(talk.messages) == count
        talk.turns += [{"role": "user", "content": "日本"}, {"role": "assistant", "content": ""}]
        say(f"/save {file}")
    other = tmp_path / "other.jsonl"
    other.write_text("mine")
    assert say(f"/save {other}") == f"error: /save {other}: exists already; choose another name\n"
    assert other.read_text() == "mine"
    assert say(f"/save {tmp_path}") == f"error: /save {tmp_path}: is a folder; name a file\n"
    assert say("/save") == "error: /save needs the name of a file, for instance /save chat.jsonl\n"
    talk.turns = []
    assert say(f"/save {tmp_path / 'empty'}") == "error: there is nothing to save yet\n"


def test_the_system_message_is_shown_and_set_and_stays_after_a_reset(talk: Conversation, say: Said) -> None:
    assert say("/system") == "There is no system message; /system TEXT sets one.\n"
    assert say("/system Be brief.") == "The system message is: Be brief.\n"
    assert talk.messages[0] == {"role": "system", "content": "Be brief."} and len(talk.messages) == 3
    assert say("/reset") == "The conversation begins anew; 2 messages forgotten.\n"
    assert talk.messages == [{"role": "system", "content": "Be brief."}] and not talk.tokens


def test_an_unknown_command_is_one_line(say: Said) -> None:
    space = "To send it as a message, type a space before it\n"
    assert say("/shrug well") == f"error: /shrug is no command; /help lists them. {space}"
    assert say("/mod") == f"error: /mod is no command; did you mean '/mode'? {space}"
    assert say("/treshold 1") == f"error: /treshold is no command; did you mean '/threshold'? {space}"


@pytest.mark.parametrize("line", ["/quit", "/exit"])
def test_quit_ends_the_chat(say: Said, line: str) -> None:
    with pytest.raises(EOFError):
        say(line)
