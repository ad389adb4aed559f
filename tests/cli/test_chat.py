"""`chat` through the real command: piped, and in a terminal with Ctrl-C and Ctrl-D."""

import json
import re
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ruyi_flow.client import Client
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.tokenizer import load_tokenizer
from ruyi_flow.testing import free_ports
from ruyi_flow.training.corpus import read_prompts
from tests.cli.conftest import COMMAND, SHELL, Nodes, Terminal, wait_for

OPTIONS = ("--max-new-tokens", "12", "--min-new-tokens", "12")


def piped(nodes: Nodes, said: bytes, *options: str) -> tuple[int, bytes, str]:
    command = [*COMMAND, "chat", "-t", str(nodes.file), *OPTIONS, *options]
    done = subprocess.run(command, input=said, capture_output=True, env=SHELL | {"PYTHONIOENCODING": "utf-8"})
    return done.returncode, done.stdout, done.stderr.decode()


def test_each_line_of_a_pipe_is_answered_in_one_conversation(nodes: Nodes, tmp_path: Path, spoken: Path) -> None:
    saved = tmp_path / "chat.jsonl"
    said = f"hi\n\n/etc/hosts says\\\nwho?\n/mode exact\n/save {saved}\nlast"
    code, out, err = piped(nodes, said.encode(), "--system", "be short")
    messages = [{"role": "system", "content": "be short"}]
    answers = []
    with Client(nodes.file) as client:
        for text in ("hi", "/etc/hosts says\nwho?", "last"):
            messages.append({"role": "user", "content": text})
            answers.append(client.generate(messages, max_new_tokens=12, min_new_tokens=12).text)
            messages.append({"role": "assistant", "content": answers[-1]})
    assert (code, out.decode()) == (0, "".join(answer.rstrip("\n") + "\n" for answer in answers))
    assert err.count("12 tokens, first after") == err.count(" · ended at --max-new-tokens 12") == 3
    assert "The mode is exact." in err and "seed" not in err
    assert json.loads(saved.read_text()) == {"messages": messages[:-2]}
    tokenizer = load_tokenizer(Checkpoint(spoken))
    [ids] = read_prompts(saved, tokenizer)
    with Client(nodes.file) as client:
        assert len(ids) == client.generate(messages[:-3], max_new_tokens=1).stats.prompt_tokens


def test_an_error_is_one_line_and_the_conversation_goes_on(nodes: Nodes) -> None:
    code, out, err = piped(nodes, b"a" * 3000 + b"\nhi\n/nothing\n/quit\nhi\n")
    with Client(nodes.file) as client:
        answer = client.generate("hi", max_new_tokens=12, min_new_tokens=12).text
    assert (code, out.decode()) == (2, answer.rstrip("\n") + "\n"), "the failed message is not in the conversation"
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "; /reset begins a new conversation" in errors[0] and errors[1].startswith("error: /nothing is no command")
    assert len(errors) == 2 and "Traceback" not in err


def test_input_that_is_no_text_is_one_line(nodes: Nodes) -> None:
    code, out, err = piped(nodes, b"\xff\n")
    assert (
        (code, out) == (2, b"")
        and err.startswith("error: standard input is not text in utf-8")
        and err.count("\n") == 1
    )


def test_a_chat_without_a_node_that_runs_says_so_before_a_message_is_typed(
    tmp_path: Path, spoken: Path, terminal: Callable[..., Terminal]
) -> None:
    file, names = tmp_path / "two.yaml", ("a", "b")
    ports = zip(names, free_ports(2), ((2,), (4, 6)), strict=True)
    made = [{"name": name, "address": f"127.0.0.1:{port}", "exits": list(exits)} for name, port, exits in ports]
    file.write_text(yaml.safe_dump({"family": str(spoken), "nodes": made, "links": [{"from": "a", "to": "b"}]}))
    shown = terminal("chat", "-t", str(file), columns=400)
    assert shown.end() == 2 and shown.echoes()
    assert shown.text.startswith("error: no node runs: node 'a' at ") and shown.text.count("\n") == 1
    assert shown.text.endswith(f"; start them: ruyi-flow up {file}\n")


def test_a_chat_says_when_no_deeper_node_was_asked(spent: Nodes) -> None:
    _, _, err = piped(spent, b"hi\n", "--mode", "exact")
    assert "12 of 12 tokens were decided by n0 because it had used up its bytes per minute" in err


def test_an_answer_that_the_deadline_ends_stays_as_far_as_it_came(nodes: Nodes, tmp_path: Path) -> None:
    nodes.relay.delay_s = 0.05
    saved = tmp_path / "chat.jsonl"
    slow = ("--mode", "exact", "--draft", "0", "--max-new-tokens", "1500", "--min-new-tokens", "1500")
    code, out, err = piped(nodes, f"hi\n/save {saved}\n".encode(), *slow, "--timeout-s", "2")
    kept = json.loads(saved.read_text())["messages"]
    assert [m["role"] for m in kept] == ["user", "assistant"] and kept[1]["content"] == out.decode().removesuffix("\n")
    sentence = "The answer stays in the conversation as far as it came."
    assert code == 2 and re.search(rf"\(--timeout-s\).*; \d+ tokens? had arrived before\. {sentence}\n", err)
    assert err.count("had arrived before") == 1


@pytest.fixture
def chat(nodes: Nodes, tmp_path: Path, terminal: Callable[..., Terminal]) -> Callable[..., Terminal]:
    """Start a chat in a terminal."""

    def start(*options: str) -> Terminal:
        shown = terminal("chat", "-t", str(nodes.file), *options, columns=200, RUYI_FLOW_HOME=str(tmp_path))
        shown.shows("Ctrl-D ends the chat.")
        shown.shows(">")
        return shown

    return start


def test_ctrl_c_ends_an_answer_and_ctrl_d_the_chat(nodes: Nodes, tmp_path: Path, chat: Callable[..., Terminal]) -> None:
    nodes.relay.delay_s = 0.02
    slow = ("--mode", "exact", "--draft", "0", "--max-new-tokens", "1500", "--min-new-tokens", "1500")
    shown = chat(*slow)
    before = len(shown.output)
    shown.press("hi\r")
    shown.until(lambda: "\x1b[33m" in shown.output[before:])  # a token of the second node
    shown.press("\x03")
    shown.shows("(interrupted)")
    shown.shows(">")
    wait_for(lambda: nodes.sessions() == 0)
    shown.press("/save kept.jsonl")
    shown.shows("kept.jsonl")
    shown.press(f"\x03/save {tmp_path / 'other.jsonl'}\r")  # at the prompt Ctrl-C clears the line
    shown.shows("eval --chats")
    nodes.relay.frozen = True
    shown.press("a\r")
    wait_for(lambda: nodes.sessions() > 0)
    shown.press("\x03")
    shown.shows("(interrupted)")
    shown.shows(">")
    nodes.relay.frozen = False
    wait_for(lambda: nodes.sessions() == 0)
    shown.press(f"/save {tmp_path / 'other.jsonl'}\r")  # the message without an answer is not in it
    shown.shows("eval --chats")
    shown.shows(">")
    shown.press("\x03")  # on an empty line it ends nothing
    shown.shows("Ctrl-D or /quit ends the chat.")
    shown.shows(">")
    shown.press("\x04")
    assert shown.end() == 0 and "Traceback" not in shown.text and "^C" not in shown.text
    assert shown.echoes()
    [line] = (tmp_path / "other.jsonl").read_text().splitlines()
    roles = [message["role"] for message in json.loads(line)["messages"]]
    assert roles == ["user", "assistant"] and not Path("kept.jsonl").exists()


def test_keys_that_are_typed_during_an_answer_are_not_printed_into_it(
    nodes: Nodes, chat: Callable[..., Terminal]
) -> None:
    nodes.relay.delay_s = 0.02
    shown = chat("--mode", "exact", "--draft", "0", "--max-new-tokens", "100", "--min-new-tokens", "100")
    before = len(shown.output)
    shown.press("hi\r")
    shown.until(lambda: "\x1b[33m" in shown.output[before:])  # a token of the second node
    shown.press("/qqzqqzq")
    shown.shows("100 tokens, first after")
    assert "qqz" not in shown.text[: shown.text.index("100 tokens, first after")] and not shown.echoes()
    shown.shows("/qqzqqzq")  # at the prompt
    shown.press("\x03\x04")
    assert shown.end() == 0 and shown.echoes()


def test_history_is_kept_over_chats_and_is_private(nodes: Nodes, tmp_path: Path, chat: Callable[..., Terminal]) -> None:
    shown = chat()
    shown.press("/mo")
    shown.shows("/mode")  # a completion
    shown.press("de exact\r")
    shown.shows("The mode is exact.")
    shown.shows(">")
    shown.press("\x04")
    assert shown.end() == 0
    [history] = tmp_path.glob("chat-history")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600 and "/mode exact" in history.read_text()
    shown = chat()
    shown.press("\x1b[A\r")
    shown.shows("The mode is exact.")
    shown.shows(">")
    shown.press("/quit\r")
    assert shown.end() == 0
    before = history.read_text()
    shown = chat("--no-history")
    shown.press("\x1b[A/tokens\r")
    shown.shows("there is no answer yet")
    shown.shows(">")
    shown.press("/exit\r")
    assert shown.end() == 0 and history.read_text() == before
