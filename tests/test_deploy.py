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
from ruyi_flow.serving import supervisor

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
            assert name == "server" or TOPOLOGY.node(name).addresses == (f"{name}:7101",)
            assert name == "server" or TOPOLOGY.node(name).listen == "0.0.0.0:7101"
            assert int(service["stop_grace_period"].removesuffix("s")) > STOP_S
            assert "./compose-topology.yaml:/etc/ruyi-flow/topology.yaml:ro" in service["volumes"]
        for volume in service["volumes"]:
            assert not volume.startswith("./") or (DEPLOY / volume.split(":")[0]).exists(), volume
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), "nothing is published beyond this machine"
        replicas = service.get("deploy", {}).get("replicas", 1)
        assert replicas == (2 if name == "cloud" else 1)
        assert replicas == 1 or not {"ports", "container_name", "hostname"} & set(service), "two cannot share them"


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


KUBERNETES = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def of_kind(kind: str) -> dict[str, Any]:
    """The objects of a kind in kubernetes.yaml, by their names."""
    return {d["metadata"]["name"]: d for d in KUBERNETES if d["kind"] == kind}


def test_kubernetes_has_the_topology_of_compose() -> None:
    [config] = of_kind("ConfigMap").values()
    topology = Topology.parse(yaml.safe_load(config["data"]["topology.yaml"]), where="kubernetes.yaml")
    assert topology == TOPOLOGY  # written twice, because a ConfigMap cannot include a file
    names = [node.name for node in topology.nodes]
    assert list(of_kind("Deployment")) == list(of_kind("Service")) == names


@pytest.mark.parametrize("name", [node.name for node in TOPOLOGY.nodes])
def test_kubernetes_finds_every_replica_under_the_address_of_its_node(name: str) -> None:
    deployment, service, node = (
        of_kind("Deployment")[name]["spec"],
        of_kind("Service")[name]["spec"],
        TOPOLOGY.node(name),
    )
    pod, labels = deployment["template"]["spec"], deployment["template"]["metadata"]["labels"]
    [container] = pod["containers"]
    check_command(container["args"])
    check_command(pod["initContainers"][0]["args"])
    assert container["args"][1] == name == labels["node"]
    port, metrics = (one["containerPort"] for one in container["ports"])
    assert node.addresses == (f"{name}:{port}",) and service["clusterIP"] == "None", "the name resolves to each pod"
    assert (node.listen, node.metrics) == (f"0.0.0.0:{port}", f"0.0.0.0:{metrics}")
    assert [one["port"] for one in service["ports"]] == [port, metrics]
    assert service["selector"] == deployment["selector"]["matchLabels"] == labels
    [spread] = pod["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels


@pytest.mark.parametrize("name", [node.name for node in TOPOLOGY.nodes])
def test_kubernetes_lets_a_node_drain_and_ends_one_that_hangs(name: str) -> None:
    deployment = of_kind("Deployment")[name]["spec"]
    pod = deployment["template"]["spec"]
    [container] = pod["containers"]
    probes = {kind: container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
    assert {probe["grpc"]["port"] for probe in probes.values()} == {container["ports"][0]["containerPort"]}
    assert pod["terminationGracePeriodSeconds"] > STOP_S
    hangs_s = probes["liveness"]["failureThreshold"] * probes["liveness"]["periodSeconds"]
    assert hangs_s == supervisor._HANG_CHECKS * supervisor._CHECK_S, "as long as up waits for a node that hangs"
    assert probes["liveness"]["terminationGracePeriodSeconds"] < pod["terminationGracePeriodSeconds"]
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_kubernetes_keeps_a_replica_of_the_deeper_nodes() -> None:
    replicas = {name: d["spec"]["replicas"] for name, d in of_kind("Deployment").items()}
    assert replicas == {"device": 1, "edge": 2, "cloud": 2}
    budgets = of_kind("PodDisruptionBudget")
    assert set(budgets) == {name for name, count in replicas.items() if count > 1}
    for name, budget in budgets.items():
        assert budget["spec"]["minAvailable"] < replicas[name]
        assert budget["spec"]["selector"] == of_kind("Deployment")[name]["spec"]["selector"]


@pytest.mark.parametrize("name", ["ruyi-flow@.service", "ruyi-flow-cloud@.service", "ruyi-flow-server.service"])
def test_systemd_runs_a_command_and_lets_it_drain(name: str) -> None:
    unit = (DEPLOY / name).read_text()
    [line] = re.findall(r"^ExecStart=\S+ (.*)$", unit, re.M)
    check_command(line.split())
    assert ("--replica %i" in line) == (name == "ruyi-flow-cloud@.service")
    hangs_s = supervisor._HANG_CHECKS * supervisor._CHECK_S
    watched = "ruyi-flow-server" not in name
    assert (f"Type=notify\nTimeoutStartSec=300\nWatchdogSec={hangs_s:g}\nWatchdogSignal=SIGKILL\n" in unit) == watched
    assert int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.M)[0]) > STOP_S
    assert re.findall(r"^RestartPreventExitStatus=2$", unit, re.M)  # 2 is what the command line ends with on our errors
