"""Systems that are not at hand, emulated: nodes serve and end there, and compute what they compute here."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast

from ruyi_flow.local import load_family
from ruyi_flow.testing import free_ports
from tests.portability.systems import environment

pytestmark = pytest.mark.timeout(240)

COMMAND = [sys.executable, "-m", "ruyi_flow.cli"]
PROMPT = "Warum ist Zürich schön?"


@pytest.fixture
def place(tmp_path: Path, even: Path) -> Path:
    """A folder with a family, whose paths have spaces and letters beyond ASCII."""
    shutil.copytree(even, tmp_path / "ein schöner Ort" / "Familie ü")
    return tmp_path / "ein schöner Ort"


def write_topology(place: Path, cuts: list[list[int]], **settings: Any) -> Path:
    """Write a topology of nodes in float32 for a place's family."""
    names = ["device", "cloud"][: len(cuts)]
    nodes = [
        {"name": name, "exits": exits, "address": f"127.0.0.1:{port}", "dtype": "float32", "threads": 1, **settings}
        for name, exits, port in zip(names, cuts, free_ports(len(cuts)), strict=True)
    ]
    if (place / "Stücke").exists():
        nodes = [node | {"shard": str(place / "Stücke" / node["name"])} for node in nodes]
    links = [{"from": a, "to": b, "encoding": "f32"} for a, b in zip(names, names[1:], strict=False)]
    data = {"family": str(place / "Familie ü"), "nodes": nodes, "links": links}
    file = place / "Knoten ö.yaml"
    file.write_text(f"# für Zürich\n{yaml.safe_dump(data, allow_unicode=True)}", encoding="utf-8")
    return file


def expected(place: Path, weights: str | None = None) -> list[int]:
    """Token ids of the answer, by the whole family in this process, where nothing is missing."""
    prompt = PreTrainedTokenizerFast.from_pretrained(place / "Familie ü")(PROMPT, return_tensors="pt").input_ids
    family = load_family(place / "Familie ü", dtype="float32", weights=weights)
    answer: list[int] = family.generate(prompt, max_new_tokens=12)[0].tolist()
    return answer


def command(system: str, *arguments: object) -> bytes:
    """Run a command on a system to its end; returns what it printed."""
    done = subprocess.run([*COMMAND, *map(str, arguments)], env=environment(system), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


def ask(system: str, topology: Path) -> list[int]:
    """Token ids of the answer, asked for by a client on a system."""
    options = ("--mode", "exact", "--max-new-tokens", 12, "--raw", "--json")
    answer = json.loads(command(system, "generate", "-t", topology, "--prompt", PROMPT, *options))
    ids: list[int] = answer["token_ids"]
    return ids


class Running:
    """A command that runs on a system, and what it has printed."""

    def __init__(self, system: str, log: Path, *arguments: object) -> None:
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*COMMAND, *map(str, arguments)],
                env=environment(system),
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def text(self) -> str:
        """What the command has printed."""
        return self._log.read_bytes().decode(errors="replace")

    def wait_for(self, text: str) -> None:
        """Wait until the command has printed a text."""
        deadline = time.monotonic() + 120
        while text not in self.text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.1)

    def ends(self, status: int) -> None:
        """Check that the command ends with this exit status, and without a traceback."""
        assert self.process.wait(60) == status, self.text()
        assert "Traceback" not in self.text() and "EncodingWarning" not in self.text(), self.text()


@contextmanager
def running(system: str, log: Path, *arguments: object) -> Iterator[Running]:
    """Run a command on a system while the block lasts; its processes have ended by then."""
    before = psutil.Process().children()  # of other tests in this process
    started = Running(system, log, *arguments)
    try:
        yield started
        ours = [child for child in psutil.Process().children() if child not in before]
        assert not psutil.wait_procs(ours, timeout=30)[1]
    finally:
        started.process.kill()
        started.process.communicate()


@pytest.mark.parametrize("system", ["apple", pytest.param("windows", marks=pytest.mark.slow)])
def test_up_serves_the_same_tokens_and_ends_with_ctrl_c(system: str, place: Path, tmp_path: Path) -> None:
    command(system, "shard", "-t", write_topology(place, [[2], [4, 6]]), "--out", place / "Stücke")
    topology = write_topology(place, [[2], [4, 6]])
    with running(system, tmp_path / "log", "up", topology) as up:
        up.wait_for("nodes serve")
        nodes = psutil.Process(up.process.pid).children()
        assert ask(system, topology) == expected(place)
        up.process.send_signal(signal.SIGINT)
        up.ends(0)
        assert len(nodes) == 2 and not psutil.wait_procs(nodes, timeout=30)[1]


@pytest.mark.parametrize(
    ("system", "weights", "end"),
    [
        ("bare", "int4", "input"),
        pytest.param("old", "int8", "SIGTERM", marks=pytest.mark.slow),
        ("windows", "int8", "SIGINT"),
        pytest.param("windows", None, "SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_node_serves_the_same_tokens_and_drains(
    system: str, weights: str | None, end: str, place: Path, tmp_path: Path
) -> None:
    topology = write_topology(place, [[2, 4, 6]], weights=weights)
    with running(system, tmp_path / "log", "node", "device", "-t", topology, "--supervised") as node:
        node.wait_for("serves exits")
        assert ask("here", topology) == expected(place, weights)
        assert ("they run as float32" in node.text()) == (system == "bare")
        if end == "input":
            assert node.process.stdin is not None
            node.process.stdin.close()
        else:
            node.process.send_signal(getattr(signal, end))
        node.ends(0)
        assert "stopped" in node.text()


def test_demo_ends_with_ctrl_c_in_an_answer(place: Path, tmp_path: Path) -> None:
    topology = write_topology(place, [[2, 4, 6]])
    with running("windows", tmp_path / "log", "demo", "-t", topology, "--max-new-tokens", 400) as demo:
        demo.wait_for("nodes serve")
        [node] = psutil.Process(demo.process.pid).children()
        demo.process.send_signal(signal.SIGINT)
        demo.ends(130)
        assert not psutil.wait_procs([node], timeout=30)[1]


LOGITS = """
import sys, torch
from ruyi_flow import load_family

ids = torch.arange(3, 40)[None]
formats = [{"dtype": "float32"}, {"dtype": "float32", "weights": "int4"}, {}, {"weights": "int8"}, {"dtype": "float16"}]
torch.save([load_family(sys.argv[1], **format).logits(ids).float() for format in formats], sys.argv[2])
"""


@pytest.fixture(scope="module")
def here(even: Path, tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """Logits in every number format, with nothing missing."""
    return logits("here", even, tmp_path_factory.mktemp("logits"))


def logits(system: str, family: Path, folder: Path) -> list[torch.Tensor]:
    """Compute logits in every number format on a system."""
    line = [sys.executable, "-c", LOGITS, str(family), str(folder / "logits")]
    done = subprocess.run(line, env=environment(system), capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr.decode()
    found: list[torch.Tensor] = torch.load(folder / "logits")
    return found


@pytest.mark.parametrize("system", ["apple", "bare"])
def test_every_number_format_gives_nearly_the_same_logits(
    system: str, here: list[torch.Tensor], even: Path, tmp_path: Path
) -> None:
    for ours, theirs, error in zip(here, logits(system, even, tmp_path), (1e-5, 1e-5, 5e-2, 5e-2, 1e-2), strict=True):
        assert (theirs - ours).norm() < error * ours.norm()
