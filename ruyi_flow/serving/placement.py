"""The places of a node's replicas: which addresses a name stands for, and which replicas belong on this machine."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Sequence
from typing import Any

import psutil

from ruyi_flow.config.replicas import Replica, replica_name, replicas_of
from ruyi_flow.config.topology import Node
from ruyi_flow.errors import ConfigError, NodeError
from ruyi_flow.transport.addresses import listen_problem, resolve, split_address

__all__ = ["choose", "each_host", "is_here", "local_replicas", "look_up"]

_LOOK_UP_S = 2.0
"""Seconds that a name server may take before a name is left as it is."""


async def look_up(node: Node) -> dict[str, str]:
    """Return the name and the address of each replica; a DNS name may stand for several.

    A name that cannot be resolved stays: whoever dials it reports it.
    """
    addresses: list[str] = []
    for address in node.addresses:
        try:
            async with asyncio.timeout(_LOOK_UP_S):
                addresses += each_host(address, await resolve(*split_address(address)))
        except OSError:  # also TimeoutError
            addresses.append(address)
    return {replica_name(node.name, i, len(addresses)): address for i, address in enumerate(addresses, 1)}


def each_host(address: str, found: Sequence[Any]) -> list[str]:
    """Return the addresses that a looked-up one stands for: one for each IPv4 address of a name with several, sorted.

    Args:
        address: host:port.
        found: its socket addresses, as `socket.getaddrinfo` gives them.
    """
    hosts = {str(one[4][0]) for one in found if ":" not in str(one[4][0])}
    if len(hosts) < 2:
        return [address]
    return [f"{host}:{split_address(address)[1]}" for host in sorted(hosts, key=ipaddress.IPv4Address)]


def is_here(found: Sequence[Any]) -> bool:
    """Return whether all socket addresses of a host are addresses of this machine."""
    own = {a.address.partition("%")[0] for addresses in psutil.net_if_addrs().values() for a in addresses}
    hosts = [str(one[4][0]).partition("%")[0] for one in found]
    return all(host in own or _is_any_or_loopback(host) for host in hosts)


def _is_any_or_loopback(host: str) -> bool:
    parsed = ipaddress.ip_address(host)
    return parsed.is_loopback or parsed.is_unspecified


async def local_replicas(node: Node) -> list[Replica]:
    """Return the replicas whose addresses are on this machine; the only one of a node belongs to every machine."""
    replicas = replicas_of(node)
    if len(replicas) == 1:
        return replicas
    there = await asyncio.gather(*(_is_replica_here(replica) for replica in replicas))
    return [replica for replica, here in zip(replicas, there, strict=True) if here]


async def _is_replica_here(replica: Replica) -> bool:
    try:
        return is_here(await resolve(*split_address(replica.address)))
    except OSError:  # a name that is known elsewhere
        return False


async def choose(node: Node, number: int | None) -> Replica:
    """Return the replica that a process is to be: the one of this number, or the first one here whose port is free.

    Args:
        node: the node.
        number: its number, from 1, if the user gives it.

    Raises:
        ConfigError: there is no such replica, or the user must say which one it is.
        NodeError: all replicas of this machine run already.
    """
    replicas = replicas_of(node)
    if number is not None:
        if number > len(replicas):
            raise ConfigError(
                f"--replica {number}: node {node.name!r} has {len(replicas)} "
                f"address{'es' if len(replicas) > 1 else ''}: {', '.join(node.addresses)}; give a number up to "
                f"{len(replicas)}, or add an address to the topology"
            )
        return replicas[number - 1]
    here = await local_replicas(node)
    if not here:
        raise ConfigError(
            f"cannot tell which replica of node {node.name!r} this is: no network interface of this machine has one of "
            f"its addresses {', '.join(node.addresses)}; start it on its own machine, or give its number in that list: "
            "--replica 1, with listen in the topology or --listen where it is reached through NAT"
        )
    if len(here) == 1:
        return here[0]
    for replica in here:
        if await _is_free(replica):
            return replica
    raise NodeError(
        f"all addresses of node {node.name!r} on this machine are in use: {', '.join(r.listen for r in here)}; its "
        "replicas may be running already: ruyi-flow status",
        node=node.name,
    )


async def _is_free(replica: Replica) -> bool:
    try:
        return listen_problem(await resolve(*split_address(replica.listen))) is None
    except OSError:
        return False
