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


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_yaml_file_loads(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    assert documents and all(isinstance(document, dict) for document in documents)


def test_compose_runs_every_node_and_lets_it_drain() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert {node.name for node in TOPOLOGY.nodes} == set(services) - {"pull", "server", "prometheus", "grafana"}
    for name, service in services.items():
        if service["image"] == "ruyi-flow":
            check_command(service["command"])
        if service["image"] == "ruyi-flow" and name != "pull":
            assert name == "server" or TOPOLOGY.node(name).address == f"{name}:7101"
            assert int(service["stop_grace_period"].removesuffix("s")) > STOP_S
            assert "./compose-topology.yaml:/etc/ruyi-flow/topology.yaml:ro" in service["volumes"]
        for volume in service["volumes"]:
            assert not volume.startswith("./") or (DEPLOY / volume.split(":")[0]).exists(), volume
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), "nothing is published beyond this machine"


def test_the_server_in_kubernetes_is_probed_where_it_listens() -> None:
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes-server.yaml").read_text()))
    pods = {d["metadata"]["name"]: d["spec"]["template"]["spec"] for d in documents if d["kind"] == "Deployment"}
    ports = {d["metadata"]["name"]: d["spec"]["ports"][0]["port"] for d in documents if d["kind"] == "Service"}
    assert pods.keys() == ports.keys() == {"server", "prometheus", "grafana"}
    for name, pod in pods.items():
        [container] = pod["containers"]
        assert container["readinessProbe"]["httpGet"]["port"] == container["ports"][0]["containerPort"] == ports[name]
    [server] = pods["server"]["containers"]
    check_command(server["args"])
    assert server["args"][server["args"].index("--port") + 1] == str(ports["server"])
    for mount in pods["grafana"]["containers"][0]["volumeMounts"]:
        assert (DEPLOY / "grafana" / mount["subPath"]).exists(), mount
    datasource = yaml.safe_load((DEPLOY / "grafana/datasource.yaml").read_text())["datasources"][0]
    assert datasource["url"] == f"http://prometheus:{ports['prometheus']}"


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


@pytest.mark.parametrize("name", ["ruyi-flow@.service", "ruyi-flow-server.service"])
def test_systemd_runs_a_command_and_lets_it_drain(name: str) -> None:
    unit = (DEPLOY / name).read_text()
    [line] = re.findall(r"^ExecStart=\S+ (.*)$", unit, re.M)
    check_command(line.split())
    assert int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.M)[0]) > STOP_S
    assert re.findall(r"^RestartPreventExitStatus=2$", unit, re.M)  # 2 is what the command line ends with on our errors
