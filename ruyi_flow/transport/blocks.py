"""Blocks of boundary states on the wire; docs/design/0002-wire.md has the reasons."""

from __future__ import annotations

import warnings
from ctypes import string_at

import numpy as np
import torch
from numpy.typing import NDArray

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

_INTEGERS = {2: (torch.int16, np.int16, np.uint16), 4: (torch.int32, np.int32, np.uint32)}
"""Integers as wide as a value of so many bytes. The bits of floating point numbers of one sign are in their order."""

_LARGEST = 2.0**55
"""Largest value of a boundary state: RMSNorm adds up squares, which must not overflow float32."""

_BROKEN = (
    "the states contain values that are not finite or far too large; the weights or the number format of the node that "
    "computed them are broken"
)

_LARGE = 64 * 1024
"""States of at least so many bytes bypass protobuf, which would copy them twice (docs/log.md)."""

with warnings.catch_warnings():
    # torch warns once per process that the buffer must not be written to; nothing writes to it here.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


class BlockCodec:
    """Encodes and decodes the blocks of one session on one hop.

    `to_bytes` and `from_pb` run once per token, after the layers' weights have swept the processor's caches: there each
    call of torch or Python costs 10 to 40 µs, even one that does nothing (docs/log.md). So what is fixed for a session
    is looked up once, and a conversion to the same format is not called.

    Args:
        hidden: width of a boundary state.
        encoding: encoding of the states on this link.
        dtype: number format of decoded states; not needed to encode.
        device: device of decoded states; not needed to encode.
    """

    def __init__(
        self,
        hidden: int,
        encoding: Encoding,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._hidden, self._encoding, self._target = hidden, encoding, (device, dtype)
        self._number, self._dtype = ENCODINGS[encoding], _DTYPES[encoding]
        self._row_bytes = hidden * self._dtype.itemsize
        self._int8 = encoding is Encoding.INT8
        self._ready = dtype is self._dtype and device is not None and device.type == "cpu"
        narrow = torch.float16 in (dtype, self._dtype)
        self._largest = torch.finfo(torch.float16).max if narrow else _LARGEST
        if not self._int8:
            same_width, self._signed, self._unsigned = _INTEGERS[self._dtype.itemsize]
            self._largest_bits = int(torch.tensor(self._largest, dtype=self._dtype).view(same_width))
            self._sign_bit = 1 << (8 * self._dtype.itemsize - 1)

    def to_bytes(self, block: Block) -> bytes:
        """Encode a block, its states in any number format and on any device, as a serialized `SessionRequest`."""
        states, start = block.states, block.start
        if not states.is_cpu:
            states = states.cpu()
        message = pb.SessionRequest()
        sent = message.block  # filled in place, since a constructor copies the messages that it is given
        sent.start = start
        sent.token_ids.extend(block.token_ids)
        sent.wants.extend([p - start for p in block.wants])
        if block.decided:
            sent.decided.extend([p - start for p, _ in block.decided])
            sent.decided_exits.extend([exit for _, exit in block.decided])
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
        """Decode a block. Its states may be the received bytes themselves, which must not be written to.

        Raises:
            WireError: the encoding differs from the handshake's, or sizes contradict each other.
        """
        given, start = message.states, message.start
        rows, data = given.rows, given.data
        if given.encoding != self._number:
            name = pb.Encoding.Name(given.encoding) if given.encoding in pb.Encoding.values() else given.encoding
            raise WireError(f"states are encoded as {name}; the handshake set {self._encoding.value}")
        if rows == 0 or len(data) != rows * self._row_bytes:
            raise WireError(
                f"{len(data)} bytes of states for {rows} positions of {self._hidden} values as {self._encoding.value}"
            )
        if self._int8:
            if len(given.scales) != rows:
                raise WireError(f"{len(given.scales)} scales for {rows} positions")
            scales = np.array(given.scales, np.float32)
            if not (scales.min() >= 0 and scales.max() <= self._largest / 128):  # also true of NaN
                raise WireError(_BROKEN)
            states = torch.from_numpy(_from_8_bits(data, scales))
        else:
            self._check_numbers(data)
            states = torch.frombuffer(data, dtype=self._dtype).view(rows, self._hidden)
        if not self._ready:
            states = states.to(*self._target)
        if len(message.token_ids) != rows or len(message.wants) > rows:
            raise WireError(
                f"a block of {len(message.token_ids)} positions has {rows} states and {len(message.wants)} wants"
            )
        token_ids = tuple(message.token_ids)
        wants = tuple([start + offset for offset in message.wants])
        if len(wants) > 1 and any(b <= a for a, b in zip(wants, wants[1:], strict=False)):
            raise WireError(f"wanted positions {wants} do not ascend")
        if not message.decided and not message.decided_exits:
            return Block(start, states, token_ids, wants)
        if len(message.decided) != len(message.decided_exits) or len(message.decided) > rows:
            raise WireError(
                f"{len(message.decided)} decided positions of {rows} have {len(message.decided_exits)} exits"
            )
        positions = [start + offset for offset in message.decided]
        if any(b <= a for a, b in zip(positions, positions[1:], strict=False)):
            raise WireError(f"decided positions {positions} do not ascend")
        return Block(start, states, token_ids, wants, tuple(zip(positions, message.decided_exits, strict=True)))

    def _check_numbers(self, data: bytes) -> None:
        """Refuse what would make other values NaN; as integers, since a call of numpy costs less than one of torch."""
        bits = np.frombuffer(data, self._signed)
        positive, negative = int(bits.max()), int(bits.view(self._unsigned).max())
        if positive > self._largest_bits or negative > self._sign_bit + self._largest_bits:
            raise WireError(_BROKEN)


@np.errstate(invalid="ignore")  # a row that contains NaN becomes a row of NaN
def _in_8_bits(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], list[float]]:
    """Quantize (rows, hidden) values to whole steps of one scale per row, and return the steps and the scales.

    It uses numpy, whose calls cost half of torch's, and only two arrays, since making one costs as much as a pass.
    """
    steps = np.abs(values)
    scales = np.maximum(steps.max(-1, keepdims=True), np.float32(1e-30))
    scales /= np.float32(127.0)
    np.divide(values, scales, out=steps)
    return np.rint(steps, out=steps).astype(np.int8), scales.ravel().tolist()


@np.errstate(invalid="ignore")
def _from_8_bits(data: bytes, scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (rows, hidden) values from whole steps and one scale per row."""
    return np.frombuffer(data, np.int8).reshape(len(scales), -1) * scales[:, None]


def _opening(size: int) -> bytes:
    """Return the bytes after which the next `size` bytes are a block's states; they follow the message without states.

    An embedded message that occurs twice is merged (https://protobuf.dev/programming-guides/encoding/#last-one-wins),
    so protobuf writes everything else.
    """
    opening = b""
    for kind, name in ((pb.Tensor, "data"), (pb.Block, "states"), (pb.SessionRequest, "block")):
        tag = kind.DESCRIPTOR.fields_by_name[name].number << 3 | 2  # 2: its length comes first
        opening = _varint(tag) + _varint(len(opening) + size) + opening
    return opening


def _varint(number: int) -> bytes:
    """Encode a number with seven bits per byte, the lowest first; all bytes but the last have the eighth bit set."""
    digits = bytearray()
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    digits.append(number)
    return bytes(digits)


def rows_in(message_bytes: int, hidden: int, encoding: Encoding) -> int:
    """Return how many positions fit into a message of that size, at least 1."""
    a_row = encoding.row_bytes(hidden) + 16  # its token id, its wanted offset and its part of the frame
    return max(1, (message_bytes - 1024) // a_row)
