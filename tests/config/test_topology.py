"""Topology files: every mistake is one clear message with the key's path, the value and the fix."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ruyi_flow.config.topology import Limits, Link, Node, Topology
from ruyi_flow.errors import ConfigError
from ruyi_flow.routing.policy import Routing
from ruyi_flow.serving.engine import Engine
from ruyi_flow.testing import cut_topology
from ruyi_flow.types import MIN_UPLOAD_POSITIONS, Encoding, Mode, Upload

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))


def three() -> dict[str, Any]:
    return {
        "family": "smollm2",
        "nodes": [
            {"name": "device", "address": "127.0.0.1:7101", "exits": [5, 11]},
            {"name": "edge", "address": "127.0.0.1:7102", "exits": [17, 23]},
            {"name": "cloud", "address": "127.0.0.1:7103", "exits": [29]},
        ],
        "links": [{"from": "device", "to": "edge"}, {"from": "edge", "to": "cloud"}],
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_topologies_load(path: Path) -> None:
    topology = Topology.load(path)
    assert topology.all_exits == tuple(sorted(topology.all_exits))
    for node in topology.nodes[:-1]:
        assert topology.next_of(node.name) is not None
    if topology.family == "smollm2":
        topology.check_family((5, 11, 17, 23, 29))


def test_a_topology_knows_its_chain() -> None:
    topology = Topology.parse(three())
    assert topology.entry.name == "device"
    assert topology.next_of("cloud") is None
    target, link = topology.next_of("device") or (None, None)
    assert target is not None and target.name == "edge" and link is not None and link.encoding is Encoding.BF16
    assert topology.routing().mode is Mode.EXACT


def change(path: str, value: Any) -> dict[str, Any]:
    """`three()` with one key set; a key `-` of a list appends, and value None removes."""
    data: Any = three()
    *parents, last = path.split(".")
    target = data
    for part in parents:
        target = target[int(part) if part.isdigit() else part]
    key: Any = int(last) if last.isdigit() else last
    if key == "-":
        target.append(value)
    elif value is None:
        del target[key]
    else:
        target[key] = value
    result: dict[str, Any] = data
    return result


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        ("nodse", [], ["nodse", "did you mean 'nodes'?"]),
        ("nodes.0.thread", 1, ["nodes.0.thread", "did you mean 'threads'?"]),
        ("links.0.encodng", "bf16", ["links.0.encodng", "did you mean 'encoding'?"]),
        (
            "nodes.0.limits",
            {"deepest": 3},
            ["nodes.0.limits.deepest", "3 must be an exit of this node or a deeper one"],
        ),
        ("nodes.2.limits", {"bytes_up_per_minute": 9}, ["nodes.2.limits.bytes_up_per_minute", "sends nothing"]),
        ("policy", {"mode": "exact", "back": 0.5}, ["policy", "back requires mode 'cascade'"]),
        ("nodes.1.limits", {"max_session": 3}, ["nodes.1.limits.max_session", "did you mean 'max_sessions'?"]),
        ("policy", {"mod": "exact"}, ["policy", "'mod'", "did you mean 'mode'?"]),
        ("nodes.1.exits", [11, 17], ["nodes.1.exits", "[11, 17] does not continue after exit 11"]),
        ("nodes.1.exits", [23, 17], ["nodes.1.exits", "from shallow to deep"]),
        ("nodes.1.exits", [], ["nodes.1.exits", "at least one"]),
        ("nodes.2.address", "127.0.0.1:7101", ["nodes.2.address", "7101 is already used by nodes.0.address"]),
        ("nodes.2.address", "localhost", ["nodes.2.address", "'localhost'", "host:port"]),
        ("nodes.2.address", None, ["nodes.2.address", "'cloud' needs an address"]),
        ("nodes.2.name", "edge", ["nodes.2.name", "'edge' is already the name of nodes.1"]),
        ("nodes.2.address", "http://127.0.0.1:7103", ["nodes.2.address", "host:port"]),
        ("nodes.2.address", "127.0.0.1: 7103", ["nodes.2.address", "host:port"]),
        ("nodes.0.dtype", "bf16", ["nodes.0.dtype", "'bf16'", "bfloat16"]),
        ("nodes.0.dtype", "bfloat", ["nodes.0.dtype", "must be one of", "did you mean 'bfloat16'?"]),
        ("nodes.0.threads", True, ["nodes.0.threads", "must be a number"]),
        ("nodes.0.threads", "two", ["nodes.0.threads", "must be a whole number"]),
        ("nodes.0.cores", [], ["nodes.0.cores", "at least one"]),
        ("nodes.0.exits", 5, ["nodes.0.exits", "must be a list"]),
        ("nodes.0.limits", 5, ["nodes.0.limits", "must be a mapping"]),
        ("links.0.timeout_s", float("inf"), ["links.0.timeout_s", "must be at most 1000000.0"]),
        ("family", "~nosuchuser/x", ["family", "cannot be a path"]),
        ("family", "x" * 5000, ["family", "cannot be a path"]),
        ("nodes.0.threads", 0, ["nodes.0.threads", "0", "1 or more"]),
        ("links.0.to", "edg", ["links.0.to", "no node 'edg'", "did you mean 'edge'?"]),
        ("links.0.to", "cloud", ["links.0", "device → cloud skips"]),
        ("links.1", None, ["links", "'cloud' cannot be reached from 'edge'", "{from: edge, to: cloud}"]),
        ("links.-", {"from": "edge", "to": "cloud"}, ["links.2", "is listed twice"]),
        ("links.0.encoding", "int4", ["links.0.encoding", "'int4'"]),
        ("links.0.timeout_s", -1, ["links.0.timeout_s", "-1"]),
        ("links.0.ahead_bytes", 4096, ["links.0.ahead_bytes", "requires upload: ahead"]),
        (
            "links.0",
            {"from": "device", "to": "edge", "upload": "ahead", "ahead_bytes": 0},
            ["links.0.ahead_bytes", "0: must be 1 or more"],
        ),
        ("family", None, ["family", "required"]),
        ("policy", {"mode": "token"}, ["policy", "requires a threshold"]),
        (
            "policy",
            {"mode": "fixed", "exit": 6},
            ["policy: the policy names exit 6, which no node has: nodes.0 (device) has"],
        ),
        ("policy", {"mode": "exact", "threshold": 0.5}, ["policy", "threshold requires mode 'token' or 'cascade'"]),
        ("policy", {"draft": -1}, ["policy", "draft is -1"]),
    ],
)
def test_a_mistake_names_file_key_and_fix(tmp_path: Path, path: str, value: Any, parts: list[str]) -> None:
    file = tmp_path / "topology.yaml"
    file.write_text(yaml.safe_dump(change(path, value)))
    with pytest.raises(ConfigError) as caught:
        Topology.load(file)
    for part in (str(file), *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("cut", "mistake"),
    [
        ([[5, 11], [17, 22], [29]], "the policy names exit 23, which no node has"),
        ([[5, 11], [17], [23]], "the policy takes exit 23 for an early one, and it is the last"),
    ],
    ids=["a typing error", "a missing end"],
)
def test_a_policy_file_of_other_exits_than_the_nodes(tmp_path: Path, cut: list[list[int]], mistake: str) -> None:
    data = change("policy", {"file": "smollm2-5-percent"})
    for node, exits in zip(data["nodes"], cut, strict=True):
        node["exits"] = exits
    file = tmp_path / "topology.yaml"
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError) as caught:
        Topology.load(file)
    have = f"nodes.0 (device) has {cut[0]}, nodes.1 (edge) has {cut[1]}, nodes.2 (cloud) has {cut[2]}"
    assert str(caught.value) == f"{file}: policy.file: {mistake}: {have}; correct the exits of a node, or the policy"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just text",
        "- a\n- b",
        "a: [",
        "\x00",
        "[" * 5000,
        "a: 1\na: 2",
        "? [a]\n: 1",
        "? {a: 1}\n: 1",
        "a: 2020-13-45",
        "a: 1:05",
    ],
)
def test_a_file_that_is_no_topology_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        Topology.load(file)


SEVERAL = ["docs/guides/several-devices.md"]


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        (
            "nodes.1",
            {"name": "tablet", "address": "127.0.0.1:7104", "exits": [5, 11]},
            [
                "nodes.1.exits: [5, 11] begins with the same exit as node 'device'",
                "write one file per device",
                "for devices that are alike, write one node with address: [127.0.0.1:7101, 127.0.0.1:7104]",
            ],
        ),
        ("nodes.1", {"name": "device", "address": "127.0.0.1:7104", "exits": [5]}, ["nodes.1.exits", "per device"]),
        (
            "nodes.2",
            {"name": "edge-2", "address": "127.0.0.1:7104", "exits": [17, 23]},
            [
                "nodes.2.exits: [17, 23] begins with the same exit as node 'edge'",
                "for replicas, write one node with address: [127.0.0.1:7102, 127.0.0.1:7104]",
                "remove one of the two",
            ],
        ),
        ("nodes.2", {"name": "edge", "exits": [17, 23]}, ["one node whose key address is a list"]),
    ],
)
def test_the_natural_file_of_several_devices_is_refused_with_what_to_write(
    path: str, value: Any, parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        Topology.parse(change(path, value))
    for part in (*parts, *SEVERAL):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (FOLDER.parent / "docs/guides/several-devices.md").exists()


@pytest.mark.parametrize(("key", "value"), [("to", ["edge", "edge-2"]), ("from", ["device", "tablet"])])
def test_a_link_names_a_node_and_no_replicas(key: str, value: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"links\.0\.{key}: .*: must be one name, not a list: replicas share"):
        Topology.parse(change(f"links.0.{key}", value))


def test_a_node_has_one_address_or_several() -> None:
    data = change("nodes.1.address", ["192.0.2.1:7102", "edge.example:7102"])
    data["nodes"][2]["address"] = ["127.0.0.1:7103"]
    data["links"][1]["address"] = ["10.8.0.1:7103", "10.8.0.2:7103"]
    topology = Topology.parse(data)
    assert topology.node("device").addresses == ("127.0.0.1:7101",)
    assert topology.node("edge").addresses == ("192.0.2.1:7102", "edge.example:7102")
    assert topology.node("cloud").address == "127.0.0.1:7103", "a list of one is that one"
    assert topology.next_addresses("device") == topology.node("edge").addresses
    assert topology.next_addresses("edge") == topology.links[1].addresses == ("10.8.0.1:7103", "10.8.0.2:7103")
    assert topology.next_addresses("cloud") == topology.links[0].addresses == ()
    again = Topology.parse(topology.model_dump(mode="json", by_alias=True, exclude_none=True))
    assert again == topology


def test_a_node_listens_elsewhere_than_it_is_reached() -> None:
    data = change("nodes.1.listen", "0.0.0.0:7101")
    data["nodes"][2] |= {
        "address": ["192.0.2.1:7103", "192.0.2.1:7104", "192.0.2.2:7103"],
        "listen": ["0.0.0.0:7103", "0.0.0.0:7104", "0.0.0.0:7103"],
    }
    data["nodes"][0]["metrics"] = data["nodes"][1]["metrics"] = "0.0.0.0:9101"  # of two machines
    topology = Topology.parse(data)
    assert topology.node("edge").listen == "0.0.0.0:7101" and topology.node("cloud").listen is not None
    replicas = change("nodes.2.address", ["192.0.2.1:7103", "192.0.2.2:7103"])
    replicas["nodes"][2]["listen"] = "[::]:7103"  # each on its own machine
    assert Topology.parse(replicas).node("cloud").listen == "[::]:7103"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("nodes.1.address", [], "nodes.1.address: []: the list is empty; name at least one host:port, or remove"),
        (
            "nodes.1.address",
            ["127.0.0.1:7102", "edge"],
            "nodes.1.address: ['127.0.0.1:7102', 'edge']: address 2 of the list, 'edge': write it as host:port",
        ),
        ("nodes.1.address", 7102, "nodes.1.address: 7102: must be a text of the form host:port, or a list"),
        ("nodes.1.address", [7102], "must be a text of the form host:port, or a list of such texts"),
        ("nodes.1.address", {"a": 1}, "must be a text of the form host:port, or a list of such texts"),
        ("nodes.1.address", ["127.0.0.1:7102"] * 2, "nodes.1.address: 127.0.0.1:7102 is listed twice; remove one"),
        ("nodes.1.address", [f"127.0.0.1:{p}" for p in range(1, 1100)], "must be at most 1024 addresses"),
        (
            "nodes.1.address",
            ["127.0.0.1:7102", "127.0.0.1:7101"],
            "nodes.1.address: 127.0.0.1:7101 is already used by nodes.0.address; pick another port",
        ),
        (
            "nodes.1.address",
            "0.0.0.0:7102",
            "nodes.1.address: '0.0.0.0:7102': nothing can be reached at 0.0.0.0, which stands for all addresses of a "
            "machine; write the address that callers dial, and listen: '0.0.0.0:7102' beside it",
        ),
        ("nodes.1.address", ["127.0.0.1:7102", "[::]:7102"], "nothing can be reached at ::, which stands for all"),
        ("links.0.address", "0.0.0.0:7102", "links.0.address: '0.0.0.0:7102': nothing can be reached at 0.0.0.0"),
        ("links.0.address", ["10.8.0.1:1", "10.8.0.1:1"], "links.0.address: 10.8.0.1:1 is listed twice"),
        ("nodes.1.listen", "0.0.0.0", "nodes.1.listen: '0.0.0.0': write it as host:port"),
        (
            "nodes.1.listen",
            ["0.0.0.0:1", "0.0.0.0:2"],
            "nodes.1.listen: names 2 places and address names 1; list one for each address, in the same order",
        ),
        ("links.0.recover_s", -1, "links.0.recover_s: -1: must be 0.0 or more"),
        ("links.0.recover_s", True, "links.0.recover_s: True: must be a number"),
        ("nodes.1.limits", {"park_s": -0.5}, "nodes.1.limits.park_s: -0.5: must be 0.0 or more"),
        ("nodes.1.limits", {"park_s": float("inf")}, "nodes.1.limits.park_s: inf: must be at most 1000000.0"),
    ],
)
def test_a_mistake_in_addresses_names_the_fix(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Topology.parse(change(path, value))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["listen", "metrics"])
def test_replicas_of_one_machine_cannot_all_listen_at_one_place(key: str) -> None:
    data = change("nodes.2.address", ["192.0.2.1:7103", "192.0.2.1:7104", "192.0.2.2:7103"])
    data["nodes"][2][key] = "0.0.0.0:9103"
    with pytest.raises(ConfigError) as caught:
        Topology.parse(data)
    assert str(caught.value) == (
        f"topology: nodes.2.{key}: several replicas of node 'cloud' are at 192.0.2.1, and only one of them can listen "
        "on 0.0.0.0:9103; list one for each address, in the same order"
    )


def test_a_node_in_its_clients_listens_nowhere() -> None:
    data = {"family": "x", "nodes": [{"name": "whole", "exits": [3], "listen": "127.0.0.1:7101"}]}
    with pytest.raises(ConfigError, match=r"nodes\.0\.listen: a node without an address runs inside its clients"):
        Topology.parse(data)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("nodes.1.address", "127.0.0.1:0"),
        ("nodes.1.address", ["127.0.0.1:7102", "127.0.0.1:00"]),
        ("nodes.1.listen", "0.0.0.0:0"),
        ("links.0.address", "10.8.0.1:0"),
    ],
)
def test_a_file_has_no_port_0(tmp_path: Path, path: str, value: Any) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(yaml.safe_dump(change(path, value)))
    with pytest.raises(ConfigError) as caught:
        Topology.load(file)
    assert str(caught.value) == (
        f"{file}: {path}: port 0 picks a random port that clients cannot know; choose a fixed one"
    )
    Topology.parse(change(path, value))  # nodes in the process of a test may have one


def test_the_devices_of_the_example_share_all_deeper_nodes() -> None:
    phone, tablet = (Topology.load(name) for name in ("phone", "tablet"))
    assert phone.nodes[1:] == tablet.nodes[1:] and phone.links[1:] == tablet.links[1:]
    assert phone.entry.name != tablet.entry.name and phone.entry.address != tablet.entry.address


def test_only_what_is_wrong_is_said() -> None:
    with pytest.raises(ConfigError) as caught:
        Topology.parse(change("nodes.1.threads", "two"))
    assert len(str(caught.value).splitlines()) == 1


def test_a_policy_key_without_a_value_is_not_given() -> None:
    data = three() | {"policy": {"mode": "token", "threshold": 0.5, "exit": None}}
    assert Topology.parse(data).policy.routing() == Routing(Mode.TOKEN, threshold=0.5)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such topology file"):
        Topology.load(tmp_path / "none.yaml")


def test_exits_are_checked_against_the_family() -> None:
    topology = Topology.parse(three())
    with pytest.raises(ConfigError, match=r"nodes\.0\.exits: 5 is not an exit of family 'smollm2'.*\[7, 11"):
        topology.check_family((7, 11, 17, 23, 29))
    with pytest.raises(ConfigError, match="no node has exit 3"):
        topology.check_family((3, 5, 11, 17, 23, 29))


def test_bytes_that_let_nothing_up_are_refused_where_the_familys_size_is_known() -> None:
    data = three()
    data["links"][0] |= {"encoding": "int8", "upload": "ahead", "ahead_bytes": 8 * (32 + 4 + 16)}
    data["nodes"][1]["limits"] = {"bytes_up_per_minute": 2 * 32 + 16}
    topology = Topology.parse(data)
    topology.check_bytes(32)
    assert topology.ahead_of("device", 32 + 4 + 16) == MIN_UPLOAD_POSITIONS
    data["links"][0]["ahead_bytes"] -= 1
    with pytest.raises(ConfigError, match=r"links\.0\.ahead_bytes: 415 is less than 8 positions \(416 bytes\)"):
        Topology.parse(data).check_bytes(32)
    data["links"][0] |= {"ahead_bytes": 416}
    data["nodes"][1]["limits"]["bytes_up_per_minute"] -= 1
    with pytest.raises(ConfigError, match=r"limits\.bytes_up_per_minute: 79 is less than one position \(80 bytes\)"):
        Topology.parse(data).check_bytes(32)


def test_a_node_refuses_bytes_that_let_nothing_up(tiny: Path) -> None:
    [link] = cut_topology(tiny, [[2], [4, 6]]).links
    few = link.model_copy(update={"upload": Upload.AHEAD, "ahead_bytes": 100})
    topology = cut_topology(tiny, [[2], [4, 6]]).model_copy(update={"links": (few,)})
    with pytest.raises(ConfigError, match=r"t\.yaml: links\.0\.ahead_bytes: 100 is less than"):
        Engine.load(topology, "n0", where="t.yaml")


def test_an_unknown_node_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cloud'"):
        Topology.parse(three()).node("clod")


def test_one_node_needs_no_address() -> None:
    topology = Topology.parse({"family": "x", "nodes": [{"name": "whole", "exits": [3]}]})
    assert topology.entry.address is None


def test_a_relative_family_folder_is_meant_from_the_file(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "f").symlink_to(tiny)
    file = tmp_path / "t.yaml"
    file.write_text("family: f\nnodes: [{name: n, exits: [2, 4, 6]}]\n")
    assert Path(Topology.load(file).family) == tmp_path / "f"


def test_the_reference_has_every_key() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reference" / "topology.md").read_text()
    for name in {"file"} | Routing.names() - {"start", "scale", "family"}:
        assert f"`{name}`" in text, name
    for model, prefix in ((Topology, ""), (Node, ""), (Link, ""), (Limits, "limits.")):
        for name, field in model.model_fields.items():
            if name != "limits":
                assert f"`{prefix}{field.alias or name}`" in text, name


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    file = tmp_path / "topology.yaml"
    file.write_text("family: ~/f\nnodes: [{name: a, exits: [2], shard: ~/shards/a}]\n")
    topology = Topology.load(file)
    assert topology.family == str(tmp_path / "me/f") and topology.nodes[0].shard == tmp_path / "me/shards/a"
    file.write_text("family: f\nnodes: [{name: a, exits: [2], shard: ~nosuchuser/a}]\n")
    with pytest.raises(ConfigError, match=r"nodes\.0\.shard: '~nosuchuser/a' cannot be a path"):
        Topology.load(file)
    file.write_text("family: f\nnodes: [{name: a, exits: [2]}]\npolicy: {file: ~nosuchuser/a}\n")
    with pytest.raises(ConfigError, match=r"policy\.file: '~nosuchuser/a' cannot be a path"):
        Topology.load(file)
