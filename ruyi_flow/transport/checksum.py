"""The checksum that ends every message of a stream: a changed byte is an error, and never a wrong token.

A sealed message is an ordinary protobuf message whose last field is `checksum`, number 15: the CRC-32 of the bytes
before that field.
"""

from __future__ import annotations

from zlib import crc32

from ruyi_flow.errors import WireError

__all__ = ["SEAL_BYTES", "check", "seal"]

_TAG = bytes([15 << 3 | 5])
"""The field's number and type; 5 is a fixed number of 4 bytes."""

SEAL_BYTES = len(_TAG) + 4
"""Bytes that a checksum adds to a message."""


def seal(data: bytes) -> bytes:
    """Return a serialized message with its checksum."""
    return b"".join((data, _TAG, crc32(data).to_bytes(4, "little")))


def check(data: bytes) -> bytes:
    """Return a sealed message, whose checksum is right.

    Raises:
        WireError: it is not.
    """
    if data[-SEAL_BYTES : 1 - SEAL_BYTES] != _TAG:
        raise WireError("a message does not end with a checksum")
    if crc32(memoryview(data)[:-SEAL_BYTES]) != int.from_bytes(data[-4:], "little"):
        raise WireError("a message was changed on its way: its checksum is wrong")
    return data
