"""Replicas of a node, as its topology lists them."""

from __future__ import annotations

from typing import Any

import pytest

from ruyi_flow.config.replicas import Replica, node_of, replicas_of
from ruyi_flow.config.topology import Topology


def topology_of(**node: Any) -> Topology:
    edge = {"name": "edge", "address": "192.0.2.9:7101", "exits": [2]}
    nodes = [edge, {"name": "cloud", "exits": [4], **node}]
    return Topology.parse({"family": "x", "nodes": nodes, "links": [{"from": "edge", "to": "cloud"}]})


def replicas(**node: Any) -> list[Replica]:
    return replicas_of(topology_of(**node).node("cloud"))


def test_replicas_are_called_by_their_place_in_the_list() -> None:
    [one] = replicas(address="192.0.2.1:7101")
    assert (one.name, one.address, one.listen, one.metrics) == ("cloud", "192.0.2.1:7101", "192.0.2.1:7101", None)
    two = replicas(address=["192.0.2.1:7101", "192.0.2.2:7101"], metrics="0.0.0.0:9101")
    assert [(r.name, r.listen, r.metrics) for r in two] == [
        ("cloud/1", "192.0.2.1:7101", "0.0.0.0:9101"),
        ("cloud/2", "192.0.2.2:7101", "0.0.0.0:9101"),
    ]
    assert {node_of(replica.name) for replica in (one, *two)} == {"cloud"}


def test_each_replica_listens_where_its_address_says_it() -> None:
    listens = ["0.0.0.0:7103", "0.0.0.0:7104"]
    first, second = replicas(address=["192.0.2.1:7101", "192.0.2.1:7102"], listen=listens)
    assert (first.address, first.listen) == ("192.0.2.1:7101", "0.0.0.0:7103")
    assert (second.address, second.listen) == ("192.0.2.1:7102", "0.0.0.0:7104")


@pytest.mark.parametrize(
    ("listen", "local"),
    [
        (None, "192.0.2.1:7101"),
        ("0.0.0.0:7103", "127.0.0.1:7103"),
        ("[::]:7103", "[::1]:7103"),
        ("127.0.0.1:7103", "127.0.0.1:7103"),
    ],
)
def test_a_node_is_reached_from_its_own_machine(listen: str | None, local: str) -> None:
    [one] = replicas(address="192.0.2.1:7101", listen=listen)
    assert one.local_address == local


def test_a_replica_runs_the_topology_with_its_own_places() -> None:
    topology = topology_of(
        address=["192.0.2.1:7101", "192.0.2.2:7101"],
        listen=["0.0.0.0:1", "0.0.0.0:2"],
        metrics=["0.0.0.0:3", "0.0.0.0:4"],
    )
    alone = replicas_of(topology.node("cloud"))[1].alone(topology)
    assert (alone.node("cloud").listen, alone.node("cloud").metrics) == ("0.0.0.0:2", "0.0.0.0:4")
    assert alone.node("cloud").addresses == topology.node("cloud").addresses and alone.nodes[0] == topology.nodes[0]
    assert replicas_of(topology.node("cloud"))[0].alone(topology, listen="[::1]:9").node("cloud").listen == "[::1]:9"
