"""Blocks of boundary states, to the wire and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ruyi_flow.errors import WireError
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.codec import ENCODINGS
from ruyi_flow.types import Block, Encoding

__all__ = ["BlockCodec", "row_bytes", "rows_in"]

_DTYPES = {
    Encoding.F32: torch.float32,
    Encoding.BF16: torch.bfloat16,
    Encoding.F16: torch.float16,
    Encoding.INT8: torch.int8,
}


class BlockCodec:
    """The blocks of one session on one hop.

    `to_pb` and `from_pb` run once a token, with caches that the layers' weights have just swept: there each call of
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

    def to_pb(self, block: Block) -> pb.SessionRequest:
        """A block, its states in any number format, as it goes on the wire."""
        states, start, scales = block.states, block.start, []
        if self._int8:
            values = states.float()
            scale = values.abs().amax(-1).clamp_(min=1e-30).div_(127.0)
            states, scales = (values / scale[:, None]).round_().to(torch.int8), scale.tolist()
        elif states.dtype is not self._dtype:
            states = states.to(self._dtype)
        if not states.is_cpu:
            states = states.cpu()
        data = states.view(torch.uint8).numpy().tobytes()
        return pb.SessionRequest(
            block=pb.Block(
                start=start,
                token_ids=block.token_ids,
                wants=[p - start for p in block.wants],
                states=pb.Tensor(encoding=self._number, rows=len(block.token_ids), data=data, scales=scales),
            )
        )

    def from_pb(self, message: pb.Block) -> Block:
        """A block off the wire.

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
        states = torch.frombuffer(bytearray(data), dtype=self._dtype).view(rows, self._hidden)
        if self._int8:
            if len(given.scales) != rows:
                raise WireError(f"{len(given.scales)} scales for {rows} positions")
            states = states.float() * torch.tensor(given.scales)[:, None]
        if not self._ready:
            assert self._like is not None
            states = states.to(self._like.device, self._like.dtype)
        token_ids = tuple(message.token_ids)
        if not token_ids:
            raise WireError("a block without positions")
        wants = tuple([start + offset for offset in message.wants])
        if any(b <= a for a, b in zip(wants, wants[1:], strict=False)):
            raise WireError(f"wanted positions {wants} do not ascend")
        return Block(start, states, token_ids, wants)


def row_bytes(hidden: int, encoding: Encoding) -> int:
    """Bytes of one boundary state on the wire, its scale included."""
    return hidden * _DTYPES[encoding].itemsize + 4 * (encoding is Encoding.INT8)


def rows_in(message_bytes: int, hidden: int, encoding: Encoding) -> int:
    """How many positions a message of that size has room for; 1 at the least."""
    a_row = row_bytes(hidden, encoding) + 16  # its token id, its wanted offset and its part of the frame
    return max(1, (message_bytes - 1024) // a_row)
