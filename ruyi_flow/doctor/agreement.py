"""Do the nodes agree with a topology, and with each other? Their statuses are compared, and nothing is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ruyi_flow import __version__
from ruyi_flow.config.replicas import node_of
from ruyi_flow.config.topology import Node, Topology
from ruyi_flow.types import NodeStatus

__all__ = ["Disagreement", "disagreements"]


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Something on which a node differs from the topology or from another node."""

    node: str
    """The node, or its replica, as `Client.status` names it."""
    is_fatal: bool
    """Whether answers fail, or go another way than the topology says; otherwise it may be on purpose."""
    text: str
    """What differs, in one sentence."""
    fix: str
    """What to do about it."""


def disagreements(
    topology: Topology, statuses: Mapping[str, NodeStatus], *, where: str = "the topology", fingerprint: str = ""
) -> list[Disagreement]:
    """Compare the nodes' statuses with the topology and with each other.

    What a node does not report, since it runs an older version, is not compared.

    Args:
        topology: the topology.
        statuses: the status of each node and replica that answered, as `Client.status` names them.
        where: the topology's file, for the sentences.
        fingerprint: fingerprint of the family as this machine has it; empty if it has none.
    """
    found: list[Disagreement] = []
    same_file = f"copy {where} to the machine of node {{0!r}}, and start the node again with it"
    for name, status in statuses.items():
        node = topology.node(node_of(name))

        def differs(text: str, fix: str, *, is_fatal: bool = True, name: str = name) -> None:
            found.append(Disagreement(name, is_fatal, text, fix))

        if status.node != node.name:
            differs(
                f"The node at {_address(node, name)} is called {status.node!r}; {where} calls it {node.name!r}.",
                "correct the address or the name in the topology, or end the node that runs there",
            )
            continue
        if status.exits != node.exits:
            differs(
                f"Node {name!r} serves exits {list(status.exits)}; {where} gives it {list(node.exits)}.",
                f"{same_file.format(name)}; cut its shard again if its exits have changed: ruyi-flow shard",
            )
        following = topology.next_of(node.name)
        target, link = (None, None) if following is None else following
        if status.next_node != ("" if target is None else target.name):
            theirs = (
                f"sends to node {status.next_node!r}" if status.next_node else "is the deepest node of its topology"
            )
            ours = f"sends to {target.name!r}" if target is not None else "is the deepest node"
            differs(f"Node {name!r} {theirs}; in {where} it {ours}.", same_file.format(name))
        elif target is not None and link is not None:
            address = ", ".join(topology.next_addresses(node.name))
            if status.next_address not in ("", address):
                differs(
                    f"Node {name!r} reaches node {target.name!r} at {status.next_address}; {where} says {address}.",
                    f"if this is not on purpose (NAT, a tunnel): {same_file.format(name)}",
                    is_fatal=False,
                )
            if status.next_encoding not in (None, link.encoding):
                differs(
                    f"Node {name!r} sends {status.next_encoding} to {target.name!r}; {where} says {link.encoding}.",
                    same_file.format(name),
                    is_fatal=False,
                )
    return found + _replicas(statuses, where) + _families(statuses, fingerprint) + _versions(statuses)


def _address(node: Node, name: str) -> str:
    """Return the address at which a node or replica was asked, as far as the topology has it."""
    number = int(name.partition("/")[2] or 1)
    return node.addresses[number - 1] if number <= len(node.addresses) else name


def _replicas(statuses: Mapping[str, NodeStatus], where: str) -> list[Disagreement]:
    """Compare the replicas of each node with the first one of them that answered."""
    found, first = [], dict[str, str]()
    for name, status in statuses.items():
        other = first.setdefault(node_of(name), name)
        known, fix = statuses[other], f"start both replicas with the same {where}, and from the same shard"
        if status.dtype != known.dtype:
            text = f"Node {name!r} computes in {status.dtype}, and its replica {other!r} in {known.dtype}."
            found.append(Disagreement(name, True, text, fix))
        mine, theirs = ((s.max_sessions, s.max_positions) for s in (status, known))
        if mine != theirs:
            text = (
                f"Node {name!r} has room for {mine[0]} sessions and {mine[1]} positions, and its replica {other!r} for "
                f"{theirs[0]} and {theirs[1]}."
            )
            found.append(Disagreement(name, False, text, fix))
    return found


def _families(statuses: Mapping[str, NodeStatus], fingerprint: str) -> list[Disagreement]:
    """Compare the families with that of the first node that answered, and that one with this machine's copy."""
    names = list(statuses)
    found = []
    for name in names:
        theirs, first = statuses[name].family, statuses[names[0]].family
        if theirs != first:
            text = f"Node {name!r} has family fingerprint {theirs}, and node {names[0]!r} has {first}."
            fix = "cut the family once with ruyi-flow shard, copy the shards to all machines, and start the nodes again"
            found.append(Disagreement(name, True, text, fix))
        elif name == names[0] and fingerprint not in ("", first):
            text = f"Node {name!r} has family fingerprint {first}, and this machine's copy has {fingerprint}."
            fix = "if a node is to run here, or the family is to be measured here, replace this machine's copy"
            found.append(Disagreement(name, False, text, fix))
    return found


def _versions(statuses: Mapping[str, NodeStatus]) -> list[Disagreement]:
    """Compare the versions that the nodes report with the version of this machine."""
    return [
        Disagreement(
            name,
            False,
            f"Node {name!r} runs ruyi-flow {status.version}, and this machine runs {__version__}.",
            "install the same version of ruyi-flow on all machines",
        )
        for name, status in statuses.items()
        if status.version not in ("", __version__)
    ]
