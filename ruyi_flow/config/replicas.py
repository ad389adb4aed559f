"""The replicas of a node, as its topology lists them: what each is called, and where it is reached and listens."""

from __future__ import annotations

from dataclasses import dataclass

from ruyi_flow.config.addresses import as_tuple, is_everywhere, split_host
from ruyi_flow.config.topology import Node, Topology

__all__ = ["Replica", "node_of", "replica_name", "replicas_of"]


@dataclass(frozen=True, slots=True)
class Replica:
    """One process of a node."""

    node: Node
    """The node."""
    number: int
    """Its place in the node's list of addresses, from 1."""

    @property
    def name(self) -> str:
        """The name of the node, or `cloud/2` for the second one of several."""
        return replica_name(self.node.name, self.number, len(self.node.addresses))

    @property
    def address(self) -> str:
        """host:port at which it is reached."""
        return self.node.addresses[self.number - 1]

    @property
    def listen(self) -> str:
        """host:port where it listens."""
        return _of(as_tuple(self.node.listen), self.number) or self.address

    @property
    def metrics(self) -> str | None:
        """host:port of its metrics."""
        return _of(as_tuple(self.node.metrics), self.number)

    @property
    def local_address(self) -> str:
        """host:port at which it is reached from its own machine."""
        if not is_everywhere(self.listen):
            return self.listen
        loopback = "[::1]" if ":" in split_host(self.listen) else "127.0.0.1"
        return f"{loopback}:{self.listen.rpartition(':')[2]}"

    def alone(self, topology: Topology, *, listen: str | None = None) -> Topology:
        """Return the topology as this replica runs it: its node listens where the replica does.

        Args:
            topology: the topology.
            listen: host:port to listen on instead.
        """
        update = {"listen": listen or self.listen, "metrics": self.metrics}
        nodes = [n.model_copy(update=update) if n.name == self.node.name else n for n in topology.nodes]
        return topology.model_copy(update={"nodes": tuple(nodes)})


def _of(several: tuple[str, ...], number: int) -> str | None:
    """Return what a key has for a replica: a key with one value has it for all."""
    return None if not several else several[number - 1] if len(several) > 1 else several[0]


def replica_name(node: str, number: int, count: int) -> str:
    """Return the name of one of `count` replicas."""
    return node if count == 1 else f"{node}/{number}"


def node_of(replica: str) -> str:
    """Return the node of a replica, by their names."""
    return replica.partition("/")[0]  # the name of a node has no slash


def replicas_of(node: Node) -> list[Replica]:
    """Return the replicas that a topology lists."""
    return [Replica(node, number) for number in range(1, len(node.addresses) + 1)]
