"""What nodes do not agree on, from their statuses; test_nodes.py has nodes that really differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ruyi_flow.config.topology import Topology
from ruyi_flow.doctor.agreement import disagreements
from ruyi_flow.testing import cluster, cut_topology
from ruyi_flow.types import Encoding, NodeStatus


@pytest.fixture
async def agreed(tiny: Path) -> tuple[Topology, dict[str, NodeStatus]]:
    """A topology, and what its three real nodes say."""
    async with cluster(cut_topology(tiny, [[2], [4], [6]])) as nodes:
        return nodes.topology, {name: engine.status() for name, engine in nodes.engines.items()}


def test_real_nodes_agree(agreed: tuple[Topology, dict[str, NodeStatus]]) -> None:
    topology, statuses = agreed
    assert disagreements(topology, statuses) == []
    assert disagreements(topology, statuses, fingerprint=statuses["n0"].family) == []
    assert disagreements(topology, {}) == []


@pytest.mark.parametrize(
    ("node", "changes", "is_fatal", "text"),
    [
        ("n1", {"node": "edge"}, True, "is called 'edge'; t.yaml calls it 'n1'."),
        ("n1", {"exits": (4, 5)}, True, "Node 'n1' serves exits [4, 5]; t.yaml gives it [4]."),
        ("n2", {"family": "f" * 16}, True, "Node 'n2' has family fingerprint ffffffffffffffff, and node 'n0' has "),
        ("n0", {"next_node": "other"}, True, "Node 'n0' sends to node 'other'; in t.yaml it sends to 'n1'."),
        ("n0", {"next_node": ""}, True, "Node 'n0' is the deepest node of its topology; in t.yaml it sends to 'n1'."),
        ("n2", {"next_node": "more"}, True, "Node 'n2' sends to node 'more'; in t.yaml it is the deepest node."),
        ("n1", {"next_address": "10.0.0.9:1"}, False, "Node 'n1' reaches node 'n2' at 10.0.0.9:1; t.yaml says 127."),
        ("n1", {"next_encoding": Encoding.INT8}, False, "Node 'n1' sends int8 to 'n2'; t.yaml says f32."),
        ("n2", {"version": "0.0.9"}, False, "Node 'n2' runs ruyi-flow 0.0.9, and this machine runs "),
    ],
)
def test_each_difference_is_said_once_with_a_fix(
    agreed: tuple[Topology, dict[str, NodeStatus]], node: str, changes: dict[str, object], is_fatal: bool, text: str
) -> None:
    topology, statuses = agreed
    statuses[node] = replace(statuses[node], **changes)  # type: ignore[arg-type]
    [found] = disagreements(topology, statuses, where="t.yaml")
    assert found.node == node and found.is_fatal is is_fatal and text in found.text
    assert found.fix and "{" not in found.fix


def test_the_family_of_this_machine_is_compared_too(agreed: tuple[Topology, dict[str, NodeStatus]]) -> None:
    topology, statuses = agreed
    [found] = disagreements(topology, statuses, fingerprint="0" * 16)
    assert not found.is_fatal and "this machine's copy has 0000" in found.text  # the nodes agree with each other


def test_what_is_unknown_is_no_difference(agreed: tuple[Topology, dict[str, NodeStatus]]) -> None:
    topology, statuses = agreed
    old = {name: replace(s, version="", next_address="", next_encoding=None) for name, s in statuses.items()}
    assert disagreements(topology, old) == []
    assert disagreements(topology, statuses | {"n0": old["n0"]}) == []


def test_a_link_has_an_address_of_its_own(agreed: tuple[Topology, dict[str, NodeStatus]]) -> None:
    topology, statuses = agreed
    tunnel = topology.links[0].model_copy(update={"address": "10.8.0.12:7101"})
    other = topology.model_copy(update={"links": (tunnel, *topology.links[1:])})
    [found] = disagreements(other, statuses)
    assert "10.8.0.12:7101" in found.text
    dials = replace(statuses["n0"], next_address="10.8.0.12:7101")
    assert disagreements(other, statuses | {"n0": dials}) == []


def test_replicas_are_compared_one_by_one(agreed: tuple[Topology, dict[str, NodeStatus]]) -> None:
    topology, statuses = agreed
    replicas = topology.nodes[1].model_copy(update={"address": (topology.nodes[1].addresses[0], "10.0.0.9:7101")})
    topology = topology.model_copy(update={"nodes": (topology.nodes[0], replicas, topology.nodes[2])})
    both = ", ".join(replicas.addresses)
    said = {
        "n0": replace(statuses["n0"], next_address=both),
        "n1/1": statuses["n1"],
        "n1/2": replace(statuses["n1"], exits=(4, 5), node="n1"),
        "n2": statuses["n2"],
    }
    [found] = disagreements(topology, said, where="t.yaml")
    assert found.node == "n1/2" and found.text == "Node 'n1/2' serves exits [4, 5]; t.yaml gives it [4]."
    assert "copy t.yaml to the machine of node 'n1/2'" in found.fix
    [renamed] = disagreements(topology, {"n1/2": replace(statuses["n1"], node="edge")}, where="t.yaml")
    assert renamed.text == "The node at 10.0.0.9:7101 is called 'edge'; t.yaml calls it 'n1'."
    other = said | {"n1/2": replace(statuses["n1"], version="0.0.9", family="f" * 16)}
    assert {d.node for d in disagreements(topology, other)} == {"n1/2"}
    [dials] = disagreements(topology, {"n0": statuses["n0"]}, where="t.yaml")
    assert dials.text.endswith(f"t.yaml says {both}.") and not dials.is_fatal


def test_replicas_that_differ_from_each_other_are_told(agreed: tuple[Topology, dict[str, NodeStatus]]) -> None:
    topology, statuses = agreed
    first = statuses["n1"]
    [found] = disagreements(topology, {"n1/1": first, "n1/2": replace(first, dtype="bfloat16")}, where="t.yaml")
    assert found.is_fatal and found.node == "n1/2"
    assert found.text == "Node 'n1/2' computes in bfloat16, and its replica 'n1/1' in float32."
    [found] = disagreements(topology, {"n1/1": first, "n1/3": replace(first, max_positions=64)}, where="t.yaml")
    assert (
        not found.is_fatal and "'n1/3' has room for 16 sessions and 64 positions, and its replica 'n1/1'" in found.text
    )
    assert "the same t.yaml" in found.fix


async def test_another_device_with_a_topology_of_its_own_is_no_disagreement(tiny: Path) -> None:
    topology = cut_topology(tiny, [[2], [4], [6]])
    async with cluster(topology) as nodes:
        second = Topology.parse(
            {
                "family": str(tiny),
                "nodes": [
                    {"name": "phone2", "address": "127.0.0.1:7999", "exits": [2]},
                    *(n.model_dump(mode="json", exclude_none=True) for n in nodes.topology.nodes[1:]),
                ],
                "links": [{"from": "phone2", "to": "n1"}, {"from": "n1", "to": "n2", "encoding": "f32"}],
            }
        )
        statuses = {name: nodes.engines[name].status() for name in ("n1", "n2")}
    assert disagreements(second, statuses) == []
