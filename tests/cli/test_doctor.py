"""The command doctor: what it prints, its exit statuses, and that it ends at once; with nodes as processes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from ruyi_flow.testing import free_ports
from tests.conftest import Command

pytestmark = pytest.mark.timeout(180)

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "ruyi_flow.cli"]
NAMES = ["device", "edge", "cloud"]


@pytest.fixture
def topology(tmp_path: Path, tiny: Path) -> Path:
    """Three nodes as a file."""
    nodes = [
        {"name": name, "address": f"127.0.0.1:{port}", "exits": [p], "dtype": "float32", "threads": 1}
        for name, port, p in zip(NAMES, free_ports(3), (2, 4, 6), strict=True)
    ]
    links = [{"from": a, "to": b, "encoding": "f32"} for a, b in zip(NAMES, NAMES[1:], strict=False)]
    path = tmp_path / "three.yaml"
    path.write_text(yaml.safe_dump({"family": str(tiny), "nodes": nodes, "links": links}))
    return path


@pytest.fixture
def nodes(topology: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """The three nodes as processes that serve."""
    with ExitStack() as stack:
        running = {}
        for name in NAMES:
            log = stack.enter_context((topology.parent / f"{name}.log").open("wb"))
            process = subprocess.Popen([*COMMAND, "node", name, "-t", str(topology)], stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            running[name] = process
        for name, process in running.items():
            while f"{name} serves exits" not in (text := (topology.parent / f"{name}.log").read_text()):
                assert process.poll() is None, text
                time.sleep(0.05)
        yield running


def ask(topology: Path | None, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Run doctor, and give its exit status and checks."""
    given = [] if topology is None else [str(topology)]
    done = subprocess.run([*COMMAND, "doctor", *given, "--json", *arguments], capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_nodes_that_serve_hang_and_are_ended(
    topology: Path, nodes: dict[str, subprocess.Popen[bytes]], run: Command
) -> None:
    code, checks = ask(topology)
    assert code == 0 and {check["mark"] for check in checks} <= {"ok", "warning"}
    links = {c["name"]: c["mark"] for c in checks if c["group"] == "links"}
    assert links == dict.fromkeys([*(f"here → {n}" for n in NAMES), "device → edge", "edge → cloud"], "ok")
    assert {check["group"] for check in checks} == {"this machine", "topology", "nodes", "links"}

    os.kill(nodes["edge"].pid, signal.SIGSTOP)
    try:
        code, checks = ask(topology)
    finally:
        os.kill(nodes["edge"].pid, signal.SIGCONT)
    found = {check["name"]: check for check in checks}
    assert code == 1 and "it hangs" in found["edge"]["text"]
    assert found["edge"]["fix"] and found["device → edge"]["mark"] == "failed"
    assert found["cloud"]["mark"] == "ok"

    other = yaml.safe_load(topology.read_text())
    other["nodes"][1]["exits"], other["nodes"][2]["exits"] = [4, 5], [6]
    disagreeing = topology.with_name("other.yaml")
    disagreeing.write_text(yaml.safe_dump(other))
    code, shown, _ = run("status", "-t", str(disagreeing))
    assert code == 0
    assert f"Node 'edge' serves exits [4]; {disagreeing} gives it [4, 5]. What to do: ruyi-flow doctor" in shown

    nodes["cloud"].kill()
    nodes["cloud"].wait()
    code, shown, _ = run("doctor", str(topology))
    assert code == 1 and "✗ Node 'cloud' does not run; its port" in shown
    lost = r"✗ Node 'edge' does not reach node 'cloud': 127\.0\.0\.1:\d+: no answer: Connection refused \(111\)\.$"
    assert re.search(lost, shown, re.MULTILINE), shown
    assert re.search(rf"^ +fix: start it: ruyi-flow node cloud --topology {topology}", shown, re.MULTILINE)
    code, shown, _ = run("status", "-t", str(topology))
    assert code == 1
    assert re.search(
        r"^node 'cloud' at \S+ cannot be reached: connection refused; is it running\? \(.*\)$", shown, re.MULTILINE
    )


def test_nodes_that_are_not_started_yet_are_a_warning(topology: Path, run: Command) -> None:
    code, shown, _ = run("doctor", str(topology))
    assert code == 0 and "! No node runs yet; 127.0.0.1:" in shown
    assert f"fix: start them: ruyi-flow up {topology}" in shown and "with a warning" in shown


def test_a_wrong_file_is_a_failed_check_and_no_file_a_usage_error(topology: Path, run: Command) -> None:
    code, _, said = run("doctor", str(topology.with_name("none.yaml")))
    assert code == 2 and said.endswith("none.yaml: no such topology file\n")
    topology.write_text(topology.read_text().replace("float32", "float99"))
    code, checks = ask(topology)
    [found] = [check for check in checks if check["group"] == "topology"]
    assert code == 1 and found["mark"] == "failed" and "nodes.0.dtype: 'float99'" in found["text"]
    assert any(check["name"] == "memory" for check in checks)  # the machine is looked at all the same


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> Path:
    """An empty current folder and an empty store."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return folder


def test_machine_checks_no_topology(empty: Path, run: Command) -> None:
    code, checks = ask(None, "--machine")
    assert code == 0 and {check["group"] for check in checks} == {"this machine"}
    assert {"python", "packages", "processor", "memory", "torch", "store"} <= {check["name"] for check in checks}
    for named in (("two",), ("-t", "two")):
        code, _, said = run("doctor", "--machine", *named)
        assert code == 2 and said == "error: --machine checks no topology; remove it, or name no topology\n"


def test_without_a_topology_the_default_one_is_checked(empty: Path, topology: Path) -> None:
    code, checks = ask(None)
    found = {check["name"]: check for check in checks if check["group"] != "this machine"}
    assert found["file"]["text"] == "local describes device, edge, cloud of family smollm2."
    assert found["family"]["text"] == "The demo family smollm2 is not in the store yet."
    assert (found["family"]["mark"], found["family"]["fix"]) == ("warning", "fetch it: ruyi-flow pull smollm2")
    assert code == int(any(check["mark"] == "failed" for check in checks))
    if found.get("all"):  # unless other nodes run on this machine
        assert code == 0 and found["all"]["fix"] == "start them: ruyi-flow up local"
    (empty / "topology.yaml").write_text(topology.read_text())
    code, checks = ask(None)
    assert code == 0 and any(check["text"].startswith("topology.yaml describes device, edge") for check in checks)


@pytest.mark.parametrize(
    ("family", "text", "fix"),
    [
        ("smolm2", "has no families yet; did you mean 'smollm2'?", ", or fetch it: ruyi-flow pull SOURCE --name NAME"),
        ("qwen", "has no families yet.", ", or fetch it: ruyi-flow pull SOURCE --name NAME"),
        ("./gone", "gone: no such folder.", ""),
    ],
)
def test_a_family_that_is_not_there_is_told_with_what_to_do(
    empty: Path, topology: Path, family: str, text: str, fix: str
) -> None:
    topology.write_text(yaml.safe_dump(yaml.safe_load(topology.read_text()) | {"family": family}))
    code, checks = ask(topology)
    [found] = [check for check in checks if check["name"] == "family"]
    assert code == 1 and found["text"].startswith("The family cannot be read: ") and found["text"].endswith(text)
    assert found["fix"] == f"correct family in {topology}{fix}"


@pytest.mark.parametrize("named", [("two",), ("-t", "two"), ("--topology", "two")])
def test_an_example_is_checked_by_its_name(empty: Path, named: tuple[str, ...]) -> None:
    _, checks = ask(None, *named)
    [file] = [check for check in checks if check["name"] == "file"]
    assert file["mark"] == "ok" and file["text"].startswith("two describes ")


def test_ctrl_c_ends_it_at_once(topology: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        data = yaml.safe_load(topology.read_text())
        data["nodes"][0]["address"] = f"127.0.0.1:{silent.getsockname()[1]}"
        topology.write_text(yaml.safe_dump(data))
        done = subprocess.Popen([*COMMAND, "doctor", str(topology)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        held, _ = silent.accept()  # from here on it waits for an answer
        with held:
            done.send_signal(signal.SIGINT)
            _, said = done.communicate(timeout=60)
    assert done.returncode == 130 and said.decode().strip() == "interrupted"


def test_a_machine_without_torch_can_be_a_client(tmp_path: Path, topology: Path) -> None:
    """Everything that is installed here but torch and what needs it, as in the base installation."""
    [packages] = [Path(p) for p in sys.path if p.endswith("site-packages") and (Path(p) / "torch").exists()]
    left = re.compile(
        r"torch|functorch|triton|transformers|accelerate|safetensors|tokenizers|gguf|ruyi_flow|__editable__"
    )
    site = tmp_path / "site"
    site.mkdir()
    for entry in packages.iterdir():
        if not left.match(entry.name):
            (site / entry.name).symlink_to(entry)
    own = site / "ruyi_flow-0.1.0.dist-info"
    own.mkdir()
    requires = ["grpcio>=1.85", "pydantic>=2.14", "torch>=2.13; extra == 'node'", "safetensors; extra == 'node'"]
    lines = ["Metadata-Version: 2.1", "Name: ruyi-flow", "Version: 0.1.0", "Provides-Extra: node"]
    (own / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {r}" for r in requires), ""]))
    done = subprocess.run(
        [sys.executable, "-S", "-m", "ruyi_flow.cli", "doctor", str(topology), "--json"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{site}", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = {check["name"]: check for check in json.loads(done.stdout)}
    assert found["node packages"]["mark"] == "warning"
    assert (
        "This machine can be a client, but it cannot run a node: it does not have torch, safetensors."
        in (found["node packages"]["text"])
    )
    assert found["node packages"]["fix"] == "to run a node here: pip install 'ruyi-flow[node]'"
    assert "torch" not in found and found["packages"]["mark"] == "ok" and found["all"]["mark"] == "warning"


def test_a_node_that_cannot_listen_says_why_in_one_line(topology: Path) -> None:
    data = yaml.safe_load(topology.read_text())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        data["nodes"][1]["address"] = address = f"127.0.0.1:{taken.getsockname()[1]}"
        data["nodes"][2]["address"] = "192.0.2.7:7101"
        topology.write_text(yaml.safe_dump(data))
        said = {
            name: subprocess.run([*COMMAND, "node", name, "-t", str(topology)], capture_output=True, text=True)
            for name in ("edge", "cloud")
        }
    assert [done.returncode for done in said.values()] == [2, 2]
    assert said["edge"].stderr == (
        f"error: {address} is in use already; node 'edge' cannot listen there: end that process, "
        "or give the node another address\n"
    )
    assert said["cloud"].stderr == (
        "error: node 'cloud' cannot listen on 192.0.2.7:7101: no network interface of this machine has this address; "
        "start the node on its own machine, or correct its address in the topology\n"
    )
