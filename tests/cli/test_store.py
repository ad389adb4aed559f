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
from pathlib import Path

import pytest

from ruyi_flow.family import store
from ruyi_flow.testing import tiny_family
from tests.conftest import Command

COMMAND = [sys.executable, "-m", "ruyi_flow.cli"]

WITHOUT_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Refuse())
sys.argv[0] = "ruyi-flow"
from ruyi_flow.cli import main
main()
"""
"""The command line on a machine without torch."""


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
    assert code == 0 and [row[:4] for row in rows] == [
        ["copied", "2, 4, 6", "2, 4", "7"],
        ["odd\ufffd[31m", "damaged", "", ""],
        ["tiny", "2, 4, 6", "none", "7"],
    ]
    assert rows[2][5] == "bfloat16" and "\x1b[31m" not in out and "config.json: cannot be read as JSON" in out
    listed = {family["name"]: family for family in json.loads(run("list", "--json")[1])["families"]}
    assert listed["copied"]["untrained"] == [2, 4] and listed["copied"]["source"] == str(plain)
    assert listed["tiny"]["dtype"] == "bfloat16" and listed["tiny"]["problem"] is None
    assert set(listed["tiny"]["parameters"]) == {"2", "4", "6"}


def test_list_and_rm_need_no_torch(home: Path, tiny: Path) -> None:
    store.pull(str(tiny))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True)

    listed = run("list", "--json")
    assert listed.returncode == 0, listed.stderr
    assert json.loads(listed.stdout)["families"][0]["exits"] == [2, 4, 6]
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
