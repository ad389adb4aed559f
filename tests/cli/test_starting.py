"""`ruyi-flow init`: files to start from, which load, and which real nodes run."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ruyi_flow.config.examples import examples
from ruyi_flow.config.policy_file import PolicyFile
from ruyi_flow.config.topology import Topology
from ruyi_flow.sim.scenario import Scenario
from ruyi_flow.testing import free_ports
from tests.conftest import Command

EVERY = [*examples("topology"), *examples("scenario"), *examples("policy")]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_it_writes_a_topology_with_its_policy_and_says_what_to_do(run: Command, empty_folder: Path) -> None:
    code, out, _ = run("init")
    assert code == 0 and Topology.load("topology.yaml") == Topology.load("local").model_copy(
        update={"policy": Topology.load("topology.yaml").policy}
    )
    assert Topology.load("topology.yaml").routing() == Topology.load("local").routing()
    assert sorted(str(file.relative_to(empty_folder)) for file in empty_folder.rglob("*.yaml")) == [
        "policies/smollm2-5-percent.yaml",
        "topology.yaml",
    ]
    assert re.search(r"ruyi-flow up +run its nodes", out) and "give each node in topology.yaml its machine's" in out


def test_it_writes_to_a_folder(run: Command) -> None:
    code, out, _ = run("init", "a/b", "--json")
    assert code == 0 and json.loads(out) == {"files": ["a/b/topology.yaml", "a/b/policies/smollm2-5-percent.yaml"]}
    assert "cd c" in run("init", "c")[1]


def test_it_replaces_nothing_unless_forced(run: Command, empty_folder: Path) -> None:
    own = empty_folder / "topology.yaml"
    own.write_text("mine")
    code, _, err = run("init")
    assert code == 2 and "topology.yaml: exists already" in err and "--force" in err
    assert own.read_text() == "mine" and not (empty_folder / "policies").exists()
    assert run("init", "--force")[0] == 0 and own.read_text() != "mine"


@pytest.mark.parametrize("name", EVERY)
def test_it_writes_every_example(run: Command, name: str) -> None:
    code, out, _ = run("init", "--from", name)
    assert code == 0 and f"{name}.yaml" in out
    file = Path(f"{name}.yaml")
    if name in examples("topology"):
        assert Topology.load(file).nodes
        assert ("ruyi-flow up" in out) is (name != "one")
    elif name in examples("scenario"):
        assert Scenario.read(file).nodes and f"ruyi-flow simulate {name}.yaml" in out
    else:
        assert PolicyFile.load(file).thresholds and f"--policy {name}.yaml" in out


def test_a_wrong_example_gets_the_list(run: Command) -> None:
    code, _, err = run("init", "--from", "cty")
    assert code == 2 and "--from cty: no such example; the examples are " in err and "did you mean 'city'?" in err


@pytest.mark.model
@pytest.mark.timeout(300)
def test_real_nodes_run_what_it_writes(run: Command, empty_folder: Path, smollm2: Path) -> None:
    assert run("init")[0] == 0
    file = empty_folder / "topology.yaml"
    text = file.read_text()
    for port, free in zip(("7101", "7102", "7103"), free_ports(3), strict=True):  # others may use these ports
        text = text.replace(f":{port}", f":{free}")
    file.write_text(text)
    command = [sys.executable, "-m", "ruyi_flow.cli"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([*command, "up"], stderr=subprocess.PIPE, text=True, env=env) as nodes:
        try:
            assert nodes.stderr is not None
            assert any("all 3 nodes serve" in line for line in nodes.stderr)
            done = subprocess.run(
                [*command, "generate", "-p", "Hi", "--max-new-tokens", "4", "--json"], capture_output=True, text=True
            )
        finally:
            nodes.send_signal(signal.SIGINT)
            nodes.communicate(timeout=60)
    reply = json.loads(done.stdout)
    assert len(reply["token_ids"]) == 4 and {token["node"] for token in reply["tokens"]} <= {"device", "edge", "cloud"}
