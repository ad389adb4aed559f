"""Addresses in files: host:port, one or a list of them, to dial or to listen on."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from typing import Annotated

from pydantic import BeforeValidator

__all__ = ["Dialled", "Listened", "as_tuple", "check_address", "has_port_0", "is_everywhere", "split_host"]

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
