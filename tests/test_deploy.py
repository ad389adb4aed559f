"""The files in deploy/: they load, name real commands, and leave a node the time that it asks for."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from ruyi_flow.cli.commands import app
from ruyi_flow.config.topology import Topology
from ruyi_flow.serving import node as daemon

DEPLOY = Path(__file__).parent.parent / "deploy"
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TOPOLOGY = Topology.load(DEPLOY / "compose-topology.yaml")
STOP_S = max(node.limits.grace_s for node in TOPOLOGY.nodes) + daemon._LAST_STEP_S
"""The longest that a node takes from SIGTERM to its end."""


def check_command(words: list[str]) -> None:
    """The words are a subcommand with options that it has, and a node that the topology has."""
    command = COMMANDS[words[0]]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known
    if words[0] == "node" and "%" not in words[1]:
        assert TOPOLOGY.node(words[1])


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("*.yaml")), ids=lambda path: path.name)
def test_every_yaml_file_loads(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    assert documents and all(isinstance(document, dict) for document in documents)


def test_compose_runs_every_node_and_lets_it_drain() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert {node.name for node in TOPOLOGY.nodes} == set(services) - {"pull"}
    for name, service in services.items():
        check_command(service["command"])
        if name != "pull":
            assert TOPOLOGY.node(name).address == f"{name}:7101"
            assert int(service["stop_grace_period"].removesuffix("s")) > STOP_S
            assert "./compose-topology.yaml:/etc/ruyi-flow/topology.yaml:ro" in service["volumes"]


def test_kubernetes_probes_the_port_that_the_node_listens_on() -> None:
    config, deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    topology = Topology.parse(yaml.safe_load(config["data"]["topology.yaml"]), where="kubernetes.yaml")
    assert topology == TOPOLOGY  # written twice, because a ConfigMap cannot include a file
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    check_command(container["args"])
    check_command(pod["initContainers"][0]["args"])
    port = container["ports"][0]["containerPort"]
    name = service["metadata"]["name"]
    assert topology.node(name).address == f"{pod['hostname']}:{port}" == f"{name}:{port}"
    assert container["startupProbe"]["grpc"]["port"] == container["readinessProbe"]["grpc"]["port"] == port
    assert service["spec"]["ports"][0]["port"] == port
    assert pod["terminationGracePeriodSeconds"] > STOP_S


def test_systemd_runs_a_node_and_lets_it_drain() -> None:
    unit = (DEPLOY / "ruyi-flow@.service").read_text()
    [line] = re.findall(r"^ExecStart=\S+ (.*)$", unit, re.M)
    check_command(line.split())
    assert int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.M)[0]) > STOP_S
    assert re.findall(r"^RestartPreventExitStatus=2$", unit, re.M)  # 2 is what the command line ends with on our errors
