"""Example files are known by their names, in any folder, and a file of one's own wins."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ruyi_flow.client import AsyncClient, Client
from ruyi_flow.config.examples import Kind, examples, find, shortest
from ruyi_flow.config.policy_file import PolicyFile
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import ConfigError
from ruyi_flow.sim.scenario import Scenario
from tests.conftest import Command


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", examples("topology"))
def test_every_example_of_a_topology_loads_by_name(name: str) -> None:
    assert Topology.load(name).nodes and Client(name).topology == Topology.load(name)


@pytest.mark.parametrize("name", examples("scenario"))
def test_every_example_of_a_scenario_loads_by_name(name: str) -> None:
    assert Scenario.read(name).nodes


def test_an_example_of_a_policy_loads_by_name() -> None:
    assert list(examples("policy")) == ["smollm2-5-percent"]
    assert PolicyFile.load("smollm2-5-percent").thresholds


def test_the_examples_are_there() -> None:
    assert {"local", "two", "five", "one", "ruyi-7b"} <= set(examples("topology"))
    assert {"city", "factory", "phone-4g"} <= set(examples("scenario"))


def test_a_file_of_ones_own_wins_and_a_folder_does_not(empty_folder: Path) -> None:
    own = empty_folder / "local"
    own.mkdir()
    assert find("local", "topology") == examples("topology")["local"]
    own.rmdir()
    shutil.copy(find("two", "topology"), own)
    assert [node.name for node in Topology.load("local").nodes] == ["laptop", "server"]


def test_files_name_examples_too(empty_folder: Path) -> None:
    (empty_folder / "mine.yaml").write_text(
        "family: smollm2\nnodes: [{name: one, exits: [5, 11, 17, 23, 29]}]\npolicy: {file: smollm2-5-percent}\n"
    )
    assert Topology.load("mine.yaml").routing().thresholds == PolicyFile.load("smollm2-5-percent").thresholds
    (empty_folder / "load.yaml").write_text(
        "topology: two\nnodes: [{name: laptop, hardware: l4}, {name: server, hardware: l4}]\n"
        "policy: {file: smollm2-5-percent}\nbehaviour: {agreement: {5: 0.6, 11: 0.7, 17: 0.8, 23: 0.9}}\n"
        "load: {requests: 3}\n"
    )
    scenario = Scenario.read("load.yaml")
    assert [node.name for node in scenario.nodes] == ["laptop", "server"] and scenario.policy.file is not None
    assert scenario.policy.file.is_absolute()


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (
            "topology",
            "locl",
            "locl: no such topology file, and no example of this name; the examples are five, local, ",
        ),
        ("topology", "locl", "; did you mean 'local'?"),
        ("topology", "configs/local.yaml", "no such topology file; the example of this package is named 'local'"),
        ("topology", "other.yaml", "other.yaml: no such topology file"),
        ("topology", "city", "no such topology file, and no example of this name"),
        ("scenario", "cty", "no such scenario file, and no example of this name; the examples are city, "),
        ("policy", "smollm2-5-percnt", "did you mean 'smollm2-5-percent'"),
        ("policy", "x" * 5000, "cannot be the path of a policy file"),
    ],
)
def test_a_wrong_name_gets_the_list(kind: Kind, name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find(name, kind)
    assert message in str(caught.value) and len(str(caught.value)) < 300


def test_commands_use_the_topology_of_the_folder_or_else_the_example(run: Command, empty_folder: Path) -> None:
    assert '"device"' in run("status", "--json")[1]
    assert '"laptop"' in run("status", "--json", "--topology", "two")[1]
    shutil.copy(find("two", "topology"), empty_folder / "topology.yaml")
    assert '"laptop"' in run("status", "--json")[1]
    (empty_folder / "topology.yaml").unlink()
    code, _, error = run("status", "--topology", "topology.yaml")  # named, so no other takes its place
    assert code == 2 and error == "error: topology.yaml: no such topology file\n"


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_clients_use_the_topology_of_the_folder_or_else_the_example(
    kind: type[Client] | type[AsyncClient], empty_folder: Path
) -> None:
    assert kind().topology == Topology.load("local")
    shutil.copy(find("two", "topology"), empty_folder / "topology.yaml")
    assert kind().topology == Topology.load("two")
    (empty_folder / "topology.yaml").unlink()
    with pytest.raises(ConfigError, match="topology.yaml: no such topology file"):  # named, so no other takes its place
        kind("topology.yaml")
    with pytest.raises(ConfigError, match="topology.yaml: no such topology file"):
        kind(Path("topology.yaml"))


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("given", [None, 5, b"local", {"family": "smollm2"}, ["local"]], ids=repr)
def test_what_is_no_topology_gets_what_one_is(kind: type[Client] | type[AsyncClient], given: Any) -> None:
    message = f"{given!r} is no topology; give the path of a YAML file, the name of an example (five, local, "
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        kind(given)


@pytest.mark.parametrize("address", ["127.0.0.1:7101", "localhost:80", "[::1]:7101", "http://edge.example:7101/"])
def test_an_address_is_no_file(address: str, empty_folder: Path, run: Command) -> None:
    message = f"{address} is an address, and no topology; name a topology file (YAML) or an example: five, local, "
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        Client(address)
    code, _, error = run("status", "-t", address)
    assert code == 2 and "is an address, and no topology" in error
    (empty_folder / "a:1").write_text("family: smollm2\nnodes: [{name: one, exits: [5]}]\n")
    assert Client("a:1").topology.entry.name == "one"


def test_a_name_is_shown_as_a_name() -> None:
    assert shortest(find("two", "topology"), "topology") == "two"
    assert shortest(Path("mine.yaml"), "topology") == "mine.yaml"
