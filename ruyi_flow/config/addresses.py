"""Addresses in files: host:port, one or a list of them, to dial or to listen on, and whether those of all nodes fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from ipaddress import ip_address
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator

from ruyi_flow.errors import ConfigError

if TYPE_CHECKING:
    from ruyi_flow.config.topology import Link, Node

__all__ = [
    "Dialled",
    "Listened",
    "as_tuple",
    "check_address",
    "check_addresses",
    "check_ports",
    "has_port_0",
    "is_everywhere",
    "split_host",
]

_MOST = 1024
"""Most addresses of one node."""


def check_address(value: str) -> str:
    """Return an address that has the form host:port; otherwise raise a ValueError that says how to write it."""
    match = re.fullmatch(r"(?:[\w.-]+|\[[0-9a-fA-F:.]+\]):(\d{1,5})", value, re.ASCII)
    if match is None or int(match[1]) > 65535:
        raise ValueError("write it as host:port, for instance 127.0.0.1:7101 or [::1]:7101")
    return value


def split_host(address: str) -> str:
    """Return the host of host:port, without the brackets of an IPv6 address."""
    return address.rpartition(":")[0].strip("[]")


def has_port_0(address: str) -> bool:
    """Return whether the system picks the port when a node listens there."""
    return int(address.rpartition(":")[2]) == 0


def is_everywhere(address: str) -> bool:
    """Return whether an address stands for all addresses of a machine: 0.0.0.0 or [::]."""
    with suppress(ValueError):
        return ip_address(split_host(address)).is_unspecified
    return False


def as_tuple(addresses: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the addresses of a key that has one, several or none."""
    return () if addresses is None else (addresses,) if isinstance(addresses, str) else addresses


def _one_or_several(check: Callable[[str], object]) -> Callable[[object], str | tuple[str, ...]]:
    """Return the validator of a key that has one address or a list; a list of one is that address."""

    def validate(value: object) -> str | tuple[str, ...]:
        several = isinstance(value, (list, tuple))
        items = value if isinstance(value, (list, tuple)) else (value,)
        if not items:
            raise ValueError("the list is empty; name at least one host:port, or remove the key")
        if len(items) > _MOST:
            raise ValueError(f"must be at most {_MOST} addresses")
        for number, item in enumerate(items, 1):
            if not isinstance(item, str):
                raise ValueError("must be a text of the form host:port, or a list of such texts")
            try:
                check(item)
            except ValueError as error:
                raise ValueError(
                    f"address {number} of the list, {item!r}: {error}" if several else str(error)
                ) from None
        return items[0] if len(items) == 1 else tuple(items)

    return validate


def _check_dialled(value: str) -> None:
    if is_everywhere(check_address(value)):
        raise ValueError(
            f"nothing can be reached at {split_host(value)}, which stands for all addresses of a machine; write the "
            f"address that callers dial, and listen: {value!r} beside it"
        )


Dialled = Annotated[str | tuple[str, ...], BeforeValidator(_one_or_several(_check_dialled))]
"""One address or several at which a node is reached."""

Listened = Annotated[str | tuple[str, ...], BeforeValidator(_one_or_several(check_address))]
"""One address or several to listen on."""


def check_addresses(nodes: Sequence[Node], links: Sequence[Link], where: str) -> None:
    """Check that each node of a topology can be reached, and that no two would listen at one place.

    Raises:
        ConfigError: with the key's path, the value and the fix; `where` names the file.
    """
    seen: dict[str, str] = {}
    for i, node in enumerate(nodes):
        key = f"{where}: nodes.{i}"
        if node.address is None and len(nodes) > 1:
            raise ConfigError(f"{key}.address: node {node.name!r} needs an address (host:port)")
        if node.address is None and node.metrics is not None:
            raise ConfigError(
                f"{key}.metrics: a node without an address runs inside its clients and serves no metrics; add an "
                "address, or remove the key"
            )
        if node.address is None and node.listen is not None:
            raise ConfigError(f"{key}.listen: a node without an address runs inside its clients; add an address")
        _check_listen(node, key)
        for name, addresses in (("address", node.addresses), ("metrics", as_tuple(node.metrics))):
            for address in addresses:
                if has_port_0(address) or is_everywhere(address):
                    continue
                if seen.get(address) == f"nodes.{i}.{name}":
                    raise ConfigError(f"{key}.{name}: {address} is listed twice; remove one, or correct it")
                if address in seen:
                    raise ConfigError(f"{key}.{name}: {address} is already used by {seen[address]}; pick another port")
                seen[address] = f"nodes.{i}.{name}"
    for i, link in enumerate(links):
        for address in link.addresses:
            if link.addresses.count(address) > 1:
                raise ConfigError(f"{where}: links.{i}.address: {address} is listed twice; remove one, or correct it")


def _check_listen(node: Node, key: str) -> None:
    """Check that each replica of a node knows where to listen."""
    hosts = [split_host(address) for address in node.addresses]
    twice = next((host for host in hosts if hosts.count(host) > 1), None)
    for name, addresses in (("listen", as_tuple(node.listen)), ("metrics", as_tuple(node.metrics))):
        if len(addresses) > 1 and len(addresses) != len(hosts):
            raise ConfigError(
                f"{key}.{name}: names {len(addresses)} places and address names {len(hosts)}; list one for each "
                "address, in the same order"
            )
        if len(addresses) == 1 and twice is not None:
            raise ConfigError(
                f"{key}.{name}: several replicas of node {node.name!r} are at {twice}, and only one of them can listen "
                f"on {addresses[0]}; list one for each address, in the same order"
            )


def check_ports(nodes: Sequence[Node], links: Sequence[Link], where: str) -> None:
    """Check that callers can know every port. A file has no port 0, which the nodes of a test may have.

    Raises:
        ConfigError: one is 0; `where` names the file.
    """
    keys = [(f"nodes.{i}.{key}", getattr(node, key)) for i, node in enumerate(nodes) for key in ("address", "listen")]
    keys += [(f"links.{i}.address", link.address) for i, link in enumerate(links)]
    for key, addresses in keys:
        if any(has_port_0(address) for address in as_tuple(addresses)):
            raise ConfigError(
                f"{where}: {key}: port 0 picks a random port that clients cannot know; choose a fixed one"
            )
