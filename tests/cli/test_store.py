"""The commands pull, list and rm."""

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ruyi_flow.family import store
from ruyi_flow.testing import tiny_family
from tests.cli.conftest import Terminal
from tests.conftest import Command
from tests.test_extras import plain as plain_python

COMMAND = [sys.executable, "-m", "ruyi_flow.cli"]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """An ordinary checkpoint of seven layers."""
    return tiny_family(tmp_path / "plain", base="llama", ordinary=True)


def test_an_empty_store_says_what_to_do(run: Command, home: Path) -> None:
    code, out, _ = run("list")
    assert code == 0 and f"the store at {home} has no families yet" in out and "ruyi-flow pull smollm2" in out
    assert json.loads(run("list", "--json")[1]) == {"store": str(home), "families": []}


def test_list_shows_every_family(run: Command, home: Path, plain: Path, tiny: Path) -> None:
    run("pull", str(plain), "--exits", "2,4", "--name", "copied")
    run("pull", str(tiny), "--dtype", "bfloat16")
    (home / "families" / "odd\x1b[31m").mkdir()
    (home / "families" / "odd\x1b[31m" / "config.json").write_text("{")
    code, out, _ = run("list")
    rows = [re.split(r"\s*│\s*", line.strip("│ ")) for line in out.splitlines() if line.startswith("│")]
    assert code == 0 and [row[:5] for row in rows] == [
        ["copied", "2, 4, 6", "no", "0M", "float32"],
        ["odd\ufffd[31m", "damaged", "", "", ""],
        ["tiny", "2, 4, 6", "yes", "0M", "bfloat16"],
    ]
    assert "\x1b[31m" not in out and "config.json: cannot be read as JSON" in out
    listed = {family["name"]: family for family in json.loads(run("list", "--json")[1])["families"]}
    assert listed["copied"]["untrained"] == [2, 4] and listed["copied"]["source"] == str(plain)
    assert listed["tiny"]["dtype"] == "bfloat16" and listed["tiny"]["problem"] is None
    assert set(listed["tiny"]["parameters"]) == {"2", "4", "6"}


def test_list_shows_all_facts_of_a_family(run: Command, home: Path, plain: Path, tiny: Path) -> None:
    run("pull", str(plain), "--exits", "2,4", "--name", "copied")
    run("pull", str(tiny))
    code, out, _ = run("list", "copied")
    assert code == 0 and "tiny" not in out.replace(str(home), "").replace(str(plain), "")
    for fact, value in (("untrained exits", "2, 4"), ("layers", "7"), ("tokenizer", "none: prompts must be token ids")):
        assert re.search(rf"│ {fact} +│ {value} +│", out), out
    assert [f["name"] for f in json.loads(run("list", "tiny", "--json")[1])["families"]] == ["tiny"]
    code, out, err = run("list", "tinny")
    assert code == 2 and out == "" and "no family 'tinny' in the store" in err and "did you mean 'tiny'?" in err


def test_list_fits_into_a_terminal_of_80_columns(home: Path, tmp_path: Path, terminal: Callable[..., Terminal]) -> None:
    exits = (5, 11, 17, 23, 29)
    shape: dict[str, Any] = {"num_hidden_layers": 30, "early_exit_branch_layers": [1, 1, 1, 1, 1]}
    family = tiny_family(tmp_path / "family", exits=exits, **shape)
    store.pull(str(family), name="smollm2")
    lines = listed(terminal, home)
    assert re.search(r"│ smollm2 │ 5, 11, 17, 23, 29 │ yes     │ 0M         │ float32 │ [\d.]+ +│", lines[3]), lines
    store.pull(str(family), name="a-family-of-a-long-name-that-is-trained")
    lines = listed(terminal, home)
    assert all(word in "\n".join(lines) for word in ("trained", "parameters", "size, MB", "float32"))
    assert not any("…" in line for line in lines), lines


def listed(terminal: Callable[..., Terminal], home: Path) -> list[str]:
    """What `list` prints in a terminal of 80 columns, whose lines all fit but the last one, a path."""
    shown = terminal("list", columns=80, RUYI_FLOW_HOME=str(home))
    assert shown.end() == 0, shown.text
    lines = shown.text.splitlines()
    assert all(len(line) <= 80 for line in lines[:-1]), shown.text
    return lines


def test_list_and_rm_work_in_a_plain_install(home: Path, tiny: Path, tmp_path: Path) -> None:
    store.pull(str(tiny))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = f"sys.argv = ['ruyi-flow', *{list(arguments)}]; from ruyi_flow.cli import main; main()"
        return plain_python(code, tmp_path)

    listed = run("list", "--json")
    assert listed.returncode == 0, listed.stderr
    assert json.loads(listed.stdout)["families"][0]["exits"] == [2, 4, 6]
    assert "float32" in run("list").stdout and "source" in run("list", "tiny").stdout
    removed = run("rm", "tiny", "--yes", "--json")
    assert removed.returncode == 0 and store.names() == []


def test_the_command_that_a_pull_suggests_works(run: Command, home: Path, plain: Path) -> None:
    code, out, err = run("pull", str(plain), "--name", "mine")
    assert code == 0 and "mine pulled to" in out
    [suggested] = re.findall(r"for instance: ruyi-flow (pull .*)$", err, re.MULTILINE)
    assert "note: it has one exit, 6, so it cannot be split" in err
    code, out, err = run(*shlex.split(suggested))
    assert code == 0 and store.stored("mine").exits == (2, 4, 5, 6)
    assert "note: its exits 2, 4, 5 are untrained" in err and "cannot be split" not in err


def test_a_pull_of_what_is_there_names_the_choices(run: Command, home: Path, plain: Path) -> None:
    run("pull", str(plain))
    code, out, err = run("pull", str(plain), "--exits", "2,4")
    assert code == 2 and out == "" and "with exits [6], not [2, 4, 6]; replace it with --force, or give" in err
    code, out, _ = run("pull", str(plain), "--exits", "2,4", "--force", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["new"] and facts["exits"] == [2, 4, 6] and facts["untrained"] == [2, 4]
    assert not json.loads(run("pull", str(plain), "--exits", "2,4", "--json")[1])["new"]


def test_rm_removes_all_names_or_none(run: Command, home: Path, tiny: Path, plain: Path) -> None:
    for name in ("a", "b"):
        run("pull", str(tiny), "--name", name)
    code, out, err = run("rm", "a", "bb", "--yes")
    assert code == 2 and out == "" and "no family 'bb' in the store" in err and "did you mean 'b'?" in err
    code, _, err = run("rm", "a")
    assert code == 2 and "add --yes, since this is no terminal" in err and store.names() == ["a", "b"]
    size = store.stored("a").size_bytes
    removed = json.loads(run("rm", "a", "b", "a", "--yes", "--json")[1])
    assert removed == {"removed": ["a", "b"], "freed_bytes": 2 * size}
    assert store.names() == []


@pytest.mark.parametrize(("typed", "code", "left"), [(b"y\n", 0, []), (b"n\n", 1, ["tiny"]), (None, 130, ["tiny"])])
def test_rm_asks_in_a_terminal(home: Path, tiny: Path, typed: bytes | None, code: int, left: list[str]) -> None:
    store.pull(str(tiny))
    terminal, inside = pty.openpty()
    with subprocess.Popen([*COMMAND, "rm", "tiny"], stdin=inside, stdout=inside, stderr=inside) as removing:
        os.close(inside)
        shown = b""
        while b"[y/N]" not in shown:
            shown += os.read(terminal, 1000)
        if typed is None:
            time.sleep(
                0.5
            )  # Python does not see a signal that comes between the prompt and the call that waits for a line
            removing.send_signal(signal.SIGINT)
        else:
            os.write(terminal, typed)
        try:
            while more := os.read(terminal, 1000):
                shown += more
        except OSError:
            pass  # the terminal's end, once the process has ended
    os.close(terminal)
    assert removing.returncode == code, shown
    assert b"Remove tiny (0.4 MB) from" in shown and b"Traceback" not in shown
    assert store.names() == left


@pytest.mark.parametrize("step", ["loading torch", "reading the checkpoint"])
def test_ctrl_c_ends_a_pull_without_a_trace(home: Path, tiny: Path, plain: Path, step: str) -> None:
    store.pull(str(tiny), name="mine")
    before = (home / "families" / "mine" / "model.safetensors").read_bytes()
    with subprocess.Popen(
        [*COMMAND, "pull", str(plain), "--name", "mine", "--force"], stderr=subprocess.PIPE, text=True
    ) as pulling:
        assert pulling.stderr is not None
        while step not in pulling.stderr.readline():
            assert pulling.poll() is None
        pulling.send_signal(signal.SIGINT)
        said = pulling.stderr.read()
        assert pulling.wait() == 130 and "Traceback" not in said and "interrupted" in said
    assert (home / "families" / "mine" / "model.safetensors").read_bytes() == before
    assert [path for path in (home / "partial").iterdir() if path.is_dir()] == []


def test_two_pulls_at_the_same_time_leave_one_family(home: Path, plain: Path) -> None:
    def pull() -> subprocess.Popen[str]:
        arguments = [*COMMAND, "pull", str(plain), "--exits", "2,4", "--json"]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    first = pull()
    while not (home / "partial" / "plain").is_dir():
        assert first.poll() is None
        time.sleep(0.01)
    second = pull()
    outputs = [process.communicate() for process in (first, second)]
    assert [json.loads(out)["new"] for out, _ in outputs] == [True, False]
