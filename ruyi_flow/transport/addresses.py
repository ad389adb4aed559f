"""Addresses that a node listens on: whether it can, and what stands in the way."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Sequence
from typing import Any

from ruyi_flow.errors import ConfigError, NodeError

__all__ = ["check_listen", "check_keyless", "listen_problem", "resolve", "split_address"]


def split_address(address: str) -> tuple[str, int]:
    """Split host:port, with an IPv6 host in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


async def check_listen(address: str, node: str, *, key: str = "address", in_use: str = "") -> None:
    """Check that a node can listen on host:port.

    Args:
        address: host:port.
        node: the node's name, for messages.
        key: the key of the topology that has the address.
        in_use: what to do about an address that is in use, other than to end the process there. Default: to give the
            node another one.

    Raises:
        NodeError: it cannot; the message says why, and what to do.
    """
    host, port = split_address(address)
    named = key if key == "address" else f"{key} address"
    try:
        found = await resolve(host, port)
    except OSError as error:
        raise NodeError(
            f"node {node!r} cannot listen on {address}: the name {host!r} cannot be resolved ({error.strerror}); "
            f"correct the node's {named} in the topology",
            node=node,
        ) from None
    problem = listen_problem(found)
    if problem == errno.EADDRINUSE:
        raise NodeError(
            f"{address} is in use already; node {node!r} cannot listen there: end that process, "
            + (in_use or f"or give the node another {named}"),
            node=node,
        )
    if problem == errno.EADDRNOTAVAIL:
        raise NodeError(
            f"node {node!r} cannot listen on {address}: no network interface of this machine has this address; "
            f"start the node on its own machine, or correct its {named} in the topology",
            node=node,
        )
    if problem == errno.EACCES:
        raise NodeError(
            f"node {node!r} cannot listen on {address}: this user may not use the port; "
            "give the node a port from 1024 on",
            node=node,
        )


async def check_keyless(node: str, address: str, metrics: str | None = None) -> None:
    """Check that a node without keys is reached from this machine only, and its metrics too.

    Args:
        node: the node's name, for the error message.
        address: host:port where the node listens.
        metrics: host:port of its metrics. Default: none.

    Raises:
        ConfigError: other machines reach it.
    """
    await _check_loopback(address, f"node {node!r}")
    if metrics is not None:
        await _check_loopback(metrics, f"the metrics page of node {node!r}")


async def _check_loopback(address: str, what: str) -> None:
    try:
        found = await resolve(*split_address(address))
    except OSError:
        return  # whoever listens there reports it
    outside = next((host for host in _hosts(found) if not ipaddress.ip_address(host).is_loopback), None)
    if outside is not None:
        raise ConfigError(
            f"{what} would listen on {address}, which other machines can reach, and the topology has no keys: make "
            "them with ruyi-flow keys init, or add --insecure in a network in which you trust everyone"
        )


def _hosts(found: Sequence[Any]) -> list[str]:
    return [str(one[4][0]).partition("%")[0] for one in found]


async def resolve(host: str, port: int) -> Sequence[Any]:
    """Return the socket addresses of a host, as `socket.getaddrinfo` gives them.

    Raises:
        OSError: there is no such host.
    """
    return await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)


def listen_problem(found: Sequence[Any]) -> int | None:
    """Return the error number of listening on a host's addresses, or None if nothing stands in the way.

    A port of one address is also in use where something listens on all addresses. Of a name with several addresses,
    one that this machine has is enough, as it is for gRPC.
    """
    foreign = 0
    for family, kind, _, _, address in found:
        try:
            with socket.socket(family, kind) as probe:
                # As servers do, after an earlier one. On Windows, SO_REUSEADDR would take over a port in use.
                probe.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR), 1)
                probe.bind(address)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return error.errno
            foreign += error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    return errno.EADDRNOTAVAIL if found and foreign == len(found) else None
