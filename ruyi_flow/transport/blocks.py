"""Blocks of boundary states, to the wire and back: docs/design/0002-wire.md has the reasons."""

from __future__ import annotations

import warnings
from ctypes import string_at

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ruyi_flow.errors import WireError
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.codec import ENCODINGS
from ruyi_flow.types import Block, Encoding

__all__ = ["BlockCodec", "rows_in"]

_DTYPES = {
    Encoding.F32: torch.float32,
    Encoding.BF16: torch.bfloat16,
    Encoding.F16: torch.float16,
    Encoding.INT8: torch.int8,
}

_LARGE = 64 * 1024
"""Bytes of states from which on it pays to keep them out of protobuf's hands, which copy them twice (docs/log.md)."""

with warnings.catch_warnings():
    # That bytes must not be written to is what torch says once in a process, and here nobody does.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


class BlockCodec:
    """The blocks of one session on one hop.

    `to_bytes` and `from_pb` run once a token, with caches that the layers' weights have just swept: there each call of
    torch or Python costs 10 to 40 µs, those that do nothing included (docs/log.md). So what a session fixes is looked
    up once, and a conversion that is none is not called.

    Args:
        hidden: width of a state.
        encoding: of the states on this link.
        like: states come back in this tensor's number format and on its device; None for one that only sends.
    """

    def __init__(self, hidden: int, encoding: Encoding, like: Tensor | None = None) -> None:
        self._hidden, self._encoding, self._like = hidden, encoding, like
        self._number, self._dtype = ENCODINGS[encoding], _DTYPES[encoding]
        self._row_bytes = hidden * self._dtype.itemsize
        self._int8 = encoding is Encoding.INT8
        self._ready = like is not None and like.is_cpu and like.dtype is self._dtype

    def to_bytes(self, block: Block) -> bytes:
        """A block, its states in any number format and on any device, as the `SessionRequest` that goes on the wire."""
        states, start = block.states, block.start
        if not states.is_cpu:
            states = states.cpu()
        message = pb.SessionRequest()
        sent = message.block  # filled in place: a message that is given to another's constructor is copied
        sent.start = start
        sent.token_ids.extend(block.token_ids)
        sent.wants.extend([p - start for p in block.wants])
        tensor = sent.states
        tensor.encoding, tensor.rows = self._number, len(block.token_ids)
        large = len(block.token_ids) * self._row_bytes >= _LARGE
        data: bytes | memoryview
        if self._int8:
            steps, scales = _in_8_bits(states.float().numpy())
            tensor.scales.extend(scales)
            data = steps.data if large else steps.tobytes()
        else:
            if states.dtype is not self._dtype:
                states = states.to(self._dtype)
            states = states if states.is_contiguous() else states.contiguous()
            data = states.view(torch.uint8).numpy().data if large else string_at(states.data_ptr(), states.nbytes)
        if isinstance(data, memoryview):
            return b"".join((message.SerializeToString(), _opening(data.nbytes), data))
        tensor.data = data
        return message.SerializeToString()

    def from_pb(self, message: pb.Block) -> Block:
        """A block off the wire. Its states may be the received bytes themselves, which nobody may write to.

        Raises:
            WireError: another encoding than the handshake's, or sizes that contradict each other.
        """
        given, start = message.states, message.start
        rows, data = given.rows, given.data
        if given.encoding != self._number:
            name = pb.Encoding.Name(given.encoding) if given.encoding in pb.Encoding.values() else given.encoding
            raise WireError(f"states are encoded as {name}; the handshake said {self._encoding.value}")
        if rows == 0 or len(data) != rows * self._row_bytes:
            raise WireError(
                f"{len(data)} bytes of states for {rows} positions of {self._hidden} values as {self._encoding.value}"
            )
        if self._int8:
            if len(given.scales) != rows:
                raise WireError(f"{len(given.scales)} scales for {rows} positions")
            states = torch.from_numpy(_from_8_bits(data, np.array(given.scales, np.float32)))
        else:
            states = torch.frombuffer(data, dtype=self._dtype).view(rows, self._hidden)
        if not self._ready:
            assert self._like is not None
            states = states.to(self._like.device, self._like.dtype)
        token_ids = tuple(message.token_ids)
        if not token_ids:
            raise WireError("a block without positions")
        wants = tuple([start + offset for offset in message.wants])
        if len(wants) > 1 and any(b <= a for a, b in zip(wants, wants[1:], strict=False)):
            raise WireError(f"wanted positions {wants} do not ascend")
        return Block(start, states, token_ids, wants)


@np.errstate(invalid="ignore")  # a row with what is not a number becomes one of such
def _in_8_bits(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], list[float]]:
    """(rows, hidden) values as whole steps of a scale a row, halves to the even one; and the scales.

    numpy, since a call of it costs half of one of torch's, and two arrays, since making one costs as much as a pass.
    """
    steps = np.abs(values)
    scales = np.maximum(steps.max(-1, keepdims=True), np.float32(1e-30))
    scales /= np.float32(127.0)
    np.divide(values, scales, out=steps)
    return np.rint(steps, out=steps).astype(np.int8), scales.ravel().tolist()


@np.errstate(invalid="ignore")
def _from_8_bits(data: bytes, scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """(rows, hidden) values from whole steps and a scale a row."""
    return np.frombuffer(data, np.int8).reshape(len(scales), -1) * scales[:, None]


def _opening(size: int) -> bytes:
    """What a block's message, without states, is followed by so that the next `size` bytes are its states.

    A message in a message that occurs twice is one whose fields are those of both
    (https://protobuf.dev/programming-guides/encoding/#last-one-wins), so protobuf writes all else.
    """
    opening = b""
    for kind, name in ((pb.Tensor, "data"), (pb.Block, "states"), (pb.SessionRequest, "block")):
        tag = kind.DESCRIPTOR.fields_by_name[name].number << 3 | 2  # 2: its length comes first
        opening = _varint(tag) + _varint(len(opening) + size) + opening
    return opening


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have the eighth set."""
    digits = bytearray()
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    digits.append(number)
    return bytes(digits)


def rows_in(message_bytes: int, hidden: int, encoding: Encoding) -> int:
    """How many positions a message of that size has room for; 1 at the least."""
    a_row = encoding.row_bytes(hidden) + 16  # its token id, its wanted offset and its part of the frame
    return max(1, (message_bytes - 1024) // a_row)
