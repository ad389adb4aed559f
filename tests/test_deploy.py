"""The files in deploy/: they load, name real commands, and leave a node the time that it asks for."""

import re
from pathlib import Path
from typing import Any

import typer
import yaml

from ruyi_flow.cli import app
from ruyi_flow.topology import Topology

DEPLOY = Path(__file__).parent.parent / "deploy"
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TOPOLOGY = Topology.load(DEPLOY / "topology.yaml")
GRACE_S = max(node.limits.grace_s for node in TOPOLOGY.nodes)


def check_command(words: list[str]) -> None:
    """The words are a subcommand with options that it has, and a node that the topology has."""
    command = COMMANDS[words[0]]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known
    if words[0] == "node" and "%" not in words[1]:
        assert TOPOLOGY.node(words[1])


def test_compose_runs_every_node_and_lets_it_drain() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert {node.name for node in TOPOLOGY.nodes} == set(services) - {"pull"}
    for name, service in services.items():
        check_command(service["command"])
        if name != "pull":
            assert TOPOLOGY.node(name).address == f"{name}:7101"
            assert int(service["stop_grace_period"].rstrip("s")) > GRACE_S


def test_kubernetes_probes_the_port_that_the_node_listens_on() -> None:
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    check_command(container["args"])
    check_command(pod["initContainers"][0]["args"])
    port = container["ports"][0]["containerPort"]
    assert str(TOPOLOGY.node(service["metadata"]["name"]).address).endswith(f":{port}")
    assert container["readinessProbe"]["grpc"]["port"] == service["spec"]["ports"][0]["port"] == port
    assert pod["terminationGracePeriodSeconds"] > GRACE_S


def test_systemd_runs_a_node_and_lets_it_drain() -> None:
    unit = (DEPLOY / "ruyi-flow@.service").read_text()
    [line] = re.findall(r"^ExecStart=\S+ (.*)$", unit, re.M)
    check_command(line.split())
    assert int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.M)[0]) > GRACE_S
