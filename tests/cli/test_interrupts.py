"""Ctrl-C during any command: one line, exit status 130, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ruyi_flow.testing import free_ports, tiny_family
from tests.families import MIN_VOCAB, add_tokenizer
from tests.sim.small import scenario

pytestmark = [pytest.mark.timeout(180), pytest.mark.skipif(os.name != "posix", reason="signals")]

_DRIVER = """
import os, signal, sys
event, text = sys.argv.pop(1), sys.argv.pop(1)
fired = []
def hook(name, arguments):
    if not fired and name == event and any(text in str(argument) for argument in arguments):
        fired.append(name)
        os.killpg(os.getpgrp(), signal.SIGINT)
sys.addaudithook(hook)
from ruyi_flow.cli import main
main()
"""
"""Runs the command line, and interrupts its process group as a terminal does, at the first such audit event."""


@dataclass(frozen=True)
class At:
    """A moment of a command: an audit event of Python and a text in its arguments."""

    event: str
    text: str


CHILD = At("child", "")
"""The moment when a child process has started, which is then loading its modules."""
SERVES = At("serves", "")
"""The moment when nodes have started."""

_SWEEP = ("--set", "load.requests=30", "--jobs", "2", "--out", "{work}/out")
COMMANDS: dict[str, tuple[tuple[str, ...], tuple[At, ...]]] = {
    "pull": (
        ("pull", "{base}/plain", "--name", "mine", "--exits", "2,4"),
        (At("import", "torch"), At("open", "model.safetensors"), At("os.rename", "mine")),
    ),
    "shard": (
        ("shard", "-t", "{base}/int8.yaml", "--out", "{work}/shards", "--prompts", "{base}/prompts.jsonl"),
        (At("import", "torch"), At("open", "config.json"), At("os.rename", "shards/b")),
    ),
    "status": (("status", "-t", "{base}/three.yaml"), (At("import", "grpc"), At("import", "ruyi_flow.transport.peer"))),
    "node": (
        ("node", "device", "-t", "{base}/three.yaml"),
        (At("import", "torch"), At("import", "ruyi_flow.serving.node")),
    ),
    "up": (("up", "-t", "{base}/three.yaml"), (At("import", "ruyi_flow.serving.supervisor"), CHILD)),
    "demo": (
        ("demo", "-t", "{base}/three.yaml", "--max-new-tokens", "400"),
        (At("import", "ruyi_flow.serving.supervisor"), CHILD, SERVES),
    ),
    "generate": (
        ("generate", "-t", "{base}/one.yaml", "-p", "hi"),
        (At("import", "torch"), At("import", "ruyi_flow.serving.engine"), At("open", "tokenizer.json")),
    ),
    "explain": (
        ("explain", "-t", "{base}/one.yaml", "-p", "hi", "--html", "{work}/e.html"),
        (At("import", "torch"), At("import", "ruyi_flow.serving.engine"), At("os.rename", "e.html")),
    ),
    "trace": (
        ("trace", "{base}/prompts.jsonl", "--family", "{base}/family", "--out", "{work}/t.msgpack"),
        (At("import", "torch"), At("open", "t.msgpack"), At("import", "transformers")),
    ),
    "calibrate": (
        ("calibrate", "{base}/t.msgpack", "--max-escalation", "0.9", "--report", "{work}/r", "--out", "{work}/p.yaml"),
        (At("import", "numpy"), At("import", "matplotlib"), At("os.rename", "p.yaml")),
    ),
    "calibrate cascade": (
        ("calibrate", "{base}/t.msgpack", "--mode", "cascade", "--max-loss", "0.9", "--out", "{work}/p.yaml"),
        (At("import", "numpy"), At("import", "ruyi_flow.calibration.cascade"), At("os.rename", "p.yaml")),
    ),
    "train": (
        ("train", "{work}/recipe.yaml"),
        (At("import", "accelerate"), At("os.rename", "state"), At("os.rename", "branches.safetensors")),
    ),
    "eval": (
        ("eval", "--family", "{base}/family", "--chats", "{base}/prompts.jsonl", "--out", "{work}/ev"),
        (At("import", "lm_eval"), At("open", "{work}/ev"), At("os.rename", "evaluation.json")),
    ),
    "bench decode": (
        ("bench", "decode", "--family", "{base}/family", "--tokens", "2", "--rounds", "1", "-o", "{work}/b"),
        (At("import", "matplotlib"), At("import", "ruyi_flow.bench.plot"), At("os.rename", "decode.png")),
    ),
    "bench hop": (
        ("bench", "hop", "--family", "{base}/family", "--tokens", "2", "--rounds", "1", "-o", "{work}/b"),
        (At("import", "torch"), CHILD),
    ),
    "profile": (
        ("profile", "{base}/family", "--rounds", "1", "--out", "{work}/p.msgpack"),
        (At("import", "torch"), At("open", "config.json"), CHILD),
    ),
    "simulate": (
        ("simulate", "{base}/sim/scenario.yaml", "--out", "{work}/out"),
        (At("import", "simpy"), At("open", "requests.csv"), At("os.rename", "metrics.json")),
    ),
    "sweep": (
        ("sweep", "{base}/sim/scenario.yaml", "--grid", "nodes.edge.count=1,2", "--repeat", "1", *_SWEEP),
        (At("import", "simpy"), CHILD, At("os.rename", "results.csv")),
    ),
    "plan": (
        ("plan", "{base}/sim/scenario.yaml", "--objective", "p95 token_s < 9", "--min-agreement", "0", *_SWEEP),
        (At("import", "simpy"), CHILD, At("os.rename", "{work}/out")),
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small inputs for all commands."""
    folder = tmp_path_factory.mktemp("interrupts")
    shape: dict[str, Any] = {
        "vocab_size": MIN_VOCAB,
        "eos_token_id": 258,
        "intermediate_size": 64,
        "max_position_embeddings": 2048,
    }
    family = add_tokenizer(tiny_family(folder / "family", **shape))
    tiny_family(folder / "plain", base="llama", ordinary=True)
    names, ports = ("device", "edge", "cloud"), free_ports(3)
    nodes: list[dict[str, Any]] = [
        {"name": name, "address": f"127.0.0.1:{port}", "exits": [p], "dtype": "float32"}
        for name, port, p in zip(names, ports, (2, 4, 6), strict=True)
    ]
    links = [{"from": a, "to": b} for a, b in zip(names, names[1:], strict=False)]
    two: list[dict[str, Any]] = [{"name": "a", "address": "127.0.0.1:1", "exits": [2], "weights": "int8"}]
    two += [{"name": "b", "address": "127.0.0.1:2", "exits": [4, 6], "weights": "int8"}]
    whole = [{"name": "whole", "exits": [2, 4, 6], "dtype": "float32"}]
    files: dict[str, dict[str, Any]] = {
        "three": {"nodes": nodes, "links": links},
        "int8": {"nodes": two, "links": [{"from": "a", "to": "b"}]},
        "one": {"nodes": whole},
    }
    for name, data in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"family": str(family), **data}))
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "some answer " * 8}]
    (folder / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 40)
    prompts = [{"prompt": f"question {i}"} for i in range(40)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    trace = ("trace", folder / "prompts.jsonl", "--family", family, "--out", folder / "t.msgpack")
    subprocess.run([*_COMMAND, *map(str, trace), "--max-new-tokens", "8"], check=True, capture_output=True)
    (folder / "sim").mkdir()
    scenario(folder / "sim")
    return folder


_COMMAND = [sys.executable, "-m", "ruyi_flow.cli"]


CASES = [
    pytest.param(name, at, id=f"{name}-{at.event}-{at.text}", marks=() if at == moments[-1] else pytest.mark.slow)
    for name, (_, moments) in COMMANDS.items()
    for at in moments
]


@pytest.mark.parametrize(("name", "at"), CASES)
def test_ctrl_c_is_one_line_and_leaves_nothing_behind(base: Path, tmp_path: Path, name: str, at: At) -> None:
    work, scratch, mark = tmp_path / "work", tmp_path / "scratch", uuid.uuid4().hex
    work.mkdir()
    scratch.mkdir()
    recipe: dict[str, Any] = {
        "family": str(base / "family"),
        "data": [{"path": str(base / "chats.jsonl")}],
        "out": str(work / "trained"),
    }
    recipe |= {"steps": 6, "length": 32, "batch": 2, "save_every": 2, "validate_every": 2}
    recipe["precision"] = "no"
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    places = {"base": base, "work": work}
    arguments = [argument.format(**places) for argument in COMMANDS[name][0]]
    polled = at in (CHILD, SERVES)
    start = _COMMAND if polled else [sys.executable, "-c", _DRIVER, at.event, at.text.format(**places)]
    given = {"TMPDIR": str(scratch), "RUYI_FLOW_HOME": str(tmp_path / "home"), "TEST_MARK": mark}
    errors = tmp_path / "errors"
    with errors.open("wb") as file:
        running = subprocess.Popen(
            [*start, *arguments],
            cwd=work,
            env=os.environ | given,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,
            # As on a terminal: what a shell starts in the background, these tests perhaps, ignores Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        if polled:
            while not _reached(at, running.pid, errors):
                assert running.poll() is None, errors.read_text()
                time.sleep(0.02)
            os.killpg(running.pid, signal.SIGINT)
        code = running.wait(90)
    finally:
        running.kill()
    said = errors.read_text()
    assert (code, said.splitlines()[-1:]) == (130, ["interrupted"]), said
    assert said.count("interrupted") == 1
    assert [word for word in ("Traceback", "Exception", "Error", "Warning", "leaked") if word in said] == [], said
    if name in ("demo", "up") and polled:
        assert said.count("ending the nodes") == 1
    left = [process for process in psutil.process_iter() if _has_mark(process, mark)]
    assert psutil.wait_procs(left, timeout=10)[1] == []
    # Torch keeps a cache there, after any training.
    assert [path for path in scratch.iterdir() if not path.name.startswith("torchinductor_")] == []
    for path in work.rglob("*"):
        assert "new" not in path.name, path
        if path.is_file():
            _check_whole(path)


@pytest.mark.parametrize("at", [CHILD, SERVES], ids=["starting", "answering"])
def test_ctrl_c_pressed_twice_ends_the_nodes_before_the_command_ends(base: Path, tmp_path: Path, at: At) -> None:
    mark, errors = uuid.uuid4().hex, tmp_path / "errors"
    command = [*_COMMAND, "demo", "-t", str(base / "three.yaml"), "--max-new-tokens", "400"]
    with errors.open("wb") as file:
        running = subprocess.Popen(
            command,
            env=os.environ | {"TEST_MARK": mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        while not _reached(at, running.pid, errors):
            assert running.poll() is None, errors.read_text()
            time.sleep(0.02)
        os.killpg(running.pid, signal.SIGINT)
        while "ending the nodes" not in errors.read_text():
            assert running.poll() is None, errors.read_text()
            time.sleep(0.001)
        os.killpg(running.pid, signal.SIGINT)
        code = running.wait(60)
        left = [process for process in psutil.process_iter() if _has_mark(process, mark)]
    finally:
        running.kill()
    said = errors.read_text()
    assert (code, said.splitlines()[-1:], left) == (130, ["interrupted"], []), said
    assert "Traceback" not in said


def _reached(at: At, pid: int, errors: Path) -> bool:
    if at == SERVES:
        return "nodes serve" in errors.read_text()
    return any("resource_tracker" not in " ".join(child.cmdline()) for child in psutil.Process(pid).children())


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get("TEST_MARK") == mark
    except psutil.Error:
        return False


def _check_whole(path: Path) -> None:
    """Check that a file is complete, by its end."""
    content = path.read_bytes()
    if path.suffix == ".json":
        json.loads(content)
    elif path.suffix == ".yaml":
        assert yaml.safe_load(content)
    ends = {".png": b"IEND\xaeB`\x82", ".html": b"</html>", ".csv": b"\n"}
    assert content.rstrip(b"\n " if path.suffix == ".html" else b"").endswith(ends.get(path.suffix, b"")), path
