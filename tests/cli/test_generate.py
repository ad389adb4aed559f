"""`generate` in a terminal and in pipes: what goes where, and how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import wcwidth
import yaml

from ruyi_flow.client import Client
from ruyi_flow.requests import SamplingParams
from tests.cli.conftest import COMMAND, SHELL, Nodes, Terminal
from tests.conftest import Command

ASK = ("-p", "hi", "--max-new-tokens", "48", "--min-new-tokens", "48", "--temperature", "1", "--seed", "5")
"""A request with a long answer of many kinds of characters."""


def expected(nodes: Nodes) -> str:
    with Client(nodes.file) as client:
        return client.generate("hi", max_new_tokens=48, min_new_tokens=48, temperature=1, seed=5).text


def call(*arguments: str, **options: str) -> "subprocess.CompletedProcess[str]":
    environment = SHELL | {"PYTHONIOENCODING": "utf-8"} | options
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, env=environment)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1", "TERM": "xterm-256color"}], ids=["plain", "forced"])
def test_a_pipe_gets_the_answer_alone(nodes: Nodes, environment: dict[str, str]) -> None:
    text = expected(nodes)
    done = call("generate", "-t", str(nodes.file), *ASK, "--tokens", **environment)
    assert (done.returncode, done.stdout) == (0, text.rstrip("\n") + "\n")
    for word in (
        "confidence",
        "48 tokens: n1 decided 48",
        "bytes returned",
        "48 tokens, first after",
        "seed 5 · ended at --max-new-tokens 48",
    ):
        assert word in done.stderr
    done = call("generate", "-t", str(nodes.file), *ASK, "--quiet", **environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, text.rstrip("\n") + "\n", "")


def test_a_terminal_gets_colours_the_legend_and_the_table(nodes: Nodes, terminal: Callable[..., Terminal]) -> None:
    text = expected(nodes)
    shown = terminal("generate", "-t", str(nodes.file), *ASK, columns=60)
    assert shown.end() == 0
    lines = shown.text.splitlines()
    assert lines[0] == "n0 (exits 2)  n1 (exits 4, 6)" and "\x1b[33m" in shown.output
    assert "bytes returned" in shown.text and "seed 5" in shown.text
    assert all(wcwidth.wcswidth(line) <= 60 for line in lines)
    readable = [word for word in re.findall(r"[!-~]+", text.replace("\r", ""))]
    assert readable and all(word in shown.text for word in readable)
    quiet = terminal("generate", "-t", str(nodes.file), *ASK, "-q", columns=60)
    assert quiet.end() == 0
    assert "n0" not in quiet.text and "seed" not in quiet.text and "\x1b[3" not in quiet.output
    assert quiet.text.split() == shown.text[shown.text.index("\n") : shown.text.index("┏")].split()


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_a_terminal_without_colours_gets_none(
    nodes: Nodes, terminal: Callable[..., Terminal], environment: dict[str, str]
) -> None:
    shown = terminal("generate", "-t", str(nodes.file), *ASK, **environment)
    assert shown.end() == 0
    assert "n0 (exits 2)" in shown.text and not re.search(r"\x1b\[[0-9;]*[34][0-7]", shown.output)


def test_a_pipe_gets_tokens_as_they_come(nodes: Nodes) -> None:
    nodes.relay.delay_s = 0.02
    command = [*COMMAND, "generate", "-t", str(nodes.file), "-p", "hi", "-q", "--mode", "exact", "--draft", "0"]
    length = ["--max-new-tokens", "1500", "--min-new-tokens", "1500"]
    with subprocess.Popen([*command, *length], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=SHELL) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(8), "text arrives before the answer, which takes a minute, is complete"
        process.send_signal(signal.SIGINT)
        assert (process.wait(), process.stderr.read()) == (130, b"interrupted\n")


def test_an_error_after_the_first_tokens_says_once_how_many_there_were(nodes: Nodes) -> None:
    nodes.relay.delay_s = 0.05
    length = ["--max-new-tokens", "1500", "--min-new-tokens", "1500"]
    done = call("generate", "-t", str(nodes.file), "-p", "hi", "--mode", "exact", *length, "--timeout-s", "2")
    assert done.returncode == 2 and done.stderr.count("had arrived before") == 1
    assert re.search(r"^error: .*; \d+ tokens? had arrived before$", done.stderr, re.MULTILINE)


@pytest.mark.parametrize("options", [[], ["-q"], ["--json", "--max-new-tokens", "1", "--min-new-tokens", "1"]], ids=str)
def test_a_closed_pipe_ends_the_command_quietly(nodes: Nodes, options: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [*COMMAND, "generate", "-t", str(nodes.file), *ASK, *options]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=SHELL)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")
    assert nodes.sessions() == 0


def test_json_is_one_object_and_names_the_seed_of_a_sampled_answer_only(nodes: Nodes) -> None:
    for options, seed in ((ASK, 5), (ASK[:-4], None)):
        done = call("generate", "-t", str(nodes.file), *options, "--json")
        answer = json.loads(done.stdout)
        assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
        assert answer["stats"]["seed"] == seed and len(answer["tokens"]) == 48


def test_tokens_that_no_deeper_node_was_asked_for_are_told_on_standard_error(
    spent: Nodes, terminal: Callable[..., Terminal]
) -> None:
    note = "8 of 8 tokens were decided by n0 because it had used up its bytes per minute (limits.bytes_up_per_minute)."
    asked = (
        "generate",
        "-t",
        str(spent.file),
        "-p",
        "hi",
        "--mode",
        "exact",
        "--max-new-tokens",
        "8",
        "--min-new-tokens",
    )
    done = call(*asked, "8")
    assert note in done.stderr.splitlines() and note not in done.stdout
    done = call(*asked, "8", "--json")
    assert done.stderr == note + "\n" and {t["reason"] for t in json.loads(done.stdout)["tokens"]} == {"budget"}
    assert call(*asked, "8", "-q").stderr == ""
    shown = terminal(*asked, "8", columns=200)
    assert shown.end() == 0 and f"\x1b[33m{note}" in shown.output


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that accepts connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_terminal_shows_that_the_first_token_is_waited_for(
    spoken: Path, tmp_path: Path, silent: int, terminal: Callable[..., Terminal]
) -> None:
    file, node = tmp_path / "one.yaml", {"name": "n0", "exits": [2, 4, 6], "address": f"127.0.0.1:{silent}"}
    file.write_text(yaml.safe_dump({"family": str(spoken), "nodes": [node]}))
    shown = terminal("generate", "-t", str(file), "-p", "hi")
    shown.until(lambda: "waiting for the first token" in shown.text)
    shown.press("\x03")
    assert shown.end() == 130 and shown.text.rstrip().endswith("interrupted")
    assert "\x1b[?25h" in shown.output, "the cursor is shown again"


def test_errors_name_options_as_they_are_typed(run: Command, nodes: Nodes) -> None:
    for option, value, said in (
        ("--top-k", "-1", "error: --top-k is -1; "),
        ("--top-p", "2", "error: --top-p is 2.0; "),
        ("--no-repeat-ngram-size", "99", "error: --no-repeat-ngram-size is 99; "),
        ("--min-new-tokens", "300", "error: --min-new-tokens (300) is more than --max-new-tokens (256)"),
        ("--temperature", "-1", "error: --temperature is -1"),
        ("--exit", "3", "error: exit 3 is not one of "),
        ("--window", "4", "error: --window requires mode 'cascade'"),
        ("--timeout-s", "0.001", "(--timeout-s)"),
        ("--timeout-s", "-1", "error: --timeout-s is -1"),
    ):
        code, out, err = run("generate", "-t", str(nodes.file), "-p", "hi", option, value)
        assert (code, out, err.count("\n")) == (2, "", 1) and said in err


def test_every_option_of_an_answer_has_its_dashes() -> None:
    from ruyi_flow.cli.options import dashed

    for name in SamplingParams.__dataclass_fields__:
        typed = f"--{name.replace('_', '-')}"
        assert dashed(f"{name} is 3; it must be less") == f"{typed} is 3; it must be less"
    for message in ("nodes.0.top_k_x: no", "the prompt is empty", "exit 3 is not one of 2, 4, 6", "stop strings need"):
        assert dashed(message) == message


def test_a_terminal_that_knows_few_characters_gets_every_answer(nodes: Nodes) -> None:
    command = [*COMMAND, "generate", "-t", str(nodes.file), *ASK]
    printed = []
    for encoding, options in (("ascii", []), ("ascii", ["--json"]), ("utf-8", ["--json"])):
        done = subprocess.run([*command, *options], env=SHELL | {"PYTHONIOENCODING": encoding}, capture_output=True)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.decode(encoding))
    assert "?" in printed[0]
    texts = [json.loads(text)["text"] for text in printed[1:]]
    assert texts[0] == texts[1] and not texts[0].isascii()


def test_a_prompt_that_is_no_text_is_one_line(nodes: Nodes) -> None:
    command = [*COMMAND, "generate", "-t", str(nodes.file), "-p", "-"]
    done = subprocess.run(command, input=b"\xff\xfe", capture_output=True, env=SHELL | {"PYTHONIOENCODING": "utf-8"})
    assert (done.returncode, done.stdout) == (2, b"") and done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"error: the prompt on standard input is not text in utf-8")


@pytest.mark.parametrize("command", ["generate", "explain", "demo"])
def test_a_prompt_is_an_argument_or_an_option_and_not_both(run: Command, nodes: Nodes, command: str) -> None:
    code, out, err = run(command, "hi", "-p", "hi", "-t", str(nodes.file))
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: the prompt is given twice, ")
    if command != "demo":
        code, out, err = run(command, "-t", str(nodes.file))
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: no prompt is given; write it after the command, in quotation marks: ")


def test_a_prompt_as_an_argument_and_on_standard_input_gets_the_same_answer(nodes: Nodes) -> None:
    text, rest = expected(nodes), ("-t", str(nodes.file), "-q", *ASK[2:])
    command = [*COMMAND, "generate"]
    for given, said in (("hi", None), ("-", "hi")):
        done = subprocess.run(
            [*command, given, *rest], input=said and said.encode(), capture_output=True, env=SHELL | {"PYTHONUTF8": "1"}
        )
        assert (done.returncode, done.stderr, done.stdout.decode()) == (0, b"", text.rstrip("\n") + "\n")


def test_quiet_and_a_list_of_tokens_contradict_each_other(run: Command, nodes: Nodes) -> None:
    code, _, err = run("generate", "-t", str(nodes.file), "-p", "hi", "-q", "--tokens")
    assert code == 2 and err == "error: --tokens cannot be combined with --quiet, which prints nothing but the answer\n"


def test_an_error_cannot_steer_the_terminal() -> None:
    done = call("status", "--topology", "\x1b[31mred\x07")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr and "\x07" not in done.stderr and "\u241b[31mred" in done.stderr
