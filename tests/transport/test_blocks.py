"""Blocks on the wire: what goes in comes out, sizes are the design's, and what contradicts itself is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ruyi_flow.errors import WireError
from ruyi_flow.transport import codec
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.blocks import BlockCodec, row_bytes, rows_in
from ruyi_flow.types import Block, Encoding

LIKE = torch.zeros(1)


def states(rows: int, hidden: int = 576) -> torch.Tensor:
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(rows)) * 10


def block(given_states: torch.Tensor, start: int = 0) -> Block:
    rows = len(given_states)
    return Block(start, given_states, (49151,) * rows, tuple(range(start, start + rows)))


def there_and_back(given: Block, encoding: Encoding, like: torch.Tensor = LIKE) -> Block:
    blocks = BlockCodec(given.states.shape[1], encoding, like)
    message = codec.parse(pb.SessionRequest, blocks.to_pb(given).SerializeToString())
    return blocks.from_pb(message.block)


@pytest.mark.parametrize(
    ("encoding", "error"), [(Encoding.F32, 0.0), (Encoding.BF16, 2**-8), (Encoding.F16, 2**-11), (Encoding.INT8, None)]
)
@pytest.mark.parametrize("rows", [1, 7])
def test_states_survive_an_encoding(encoding: Encoding, error: float | None, rows: int) -> None:
    sent = states(rows)
    back = there_and_back(block(sent), encoding).states
    if error is None:  # half a step of each row's own scale
        assert ((back - sent).abs() <= sent.abs().amax(-1, keepdim=True) / 127 / 2 + 1e-6).all()
    else:
        assert ((back - sent).abs() <= error * sent.abs()).all()
    message = BlockCodec(576, encoding).to_pb(block(sent)).block.states
    assert len(message.data) + 4 * len(message.scales) == rows * row_bytes(576, encoding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("encoding", Encoding)
def test_states_come_back_in_the_receivers_format(encoding: Encoding, dtype: torch.dtype) -> None:
    sent = states(3, 8)[1:].to(torch.bfloat16)
    assert there_and_back(block(sent), encoding, torch.zeros(1, dtype=dtype)).states.dtype is dtype
    if encoding is not Encoding.INT8:  # all of these hold such numbers exactly, but for f16's range
        assert torch.equal(there_and_back(block(sent), encoding).states, sent.float())


def test_int8_keeps_zero_rows() -> None:
    assert torch.equal(there_and_back(block(torch.zeros(2, 8)), Encoding.INT8).states, torch.zeros(2, 8))


@pytest.mark.parametrize(("encoding", "most"), [(Encoding.BF16, 2 * 576 + 64), (Encoding.INT8, 576 + 32)])
def test_a_position_costs_at_most_its_state_and_a_little(encoding: Encoding, most: int) -> None:
    blocks = BlockCodec(576, encoding)
    assert blocks.to_pb(block(states(1), 8191)).ByteSize() <= most
    assert blocks.to_pb(block(states(9), 8000)).ByteSize() <= 9 * most


@pytest.mark.parametrize("encoding", Encoding)
def test_as_many_rows_as_a_message_has_room_for_fit(encoding: Encoding) -> None:
    rows = rows_in(64 * 1024, 576, encoding)
    assert 60 * 1024 < BlockCodec(576, encoding).to_pb(block(states(rows), 1_000_000)).ByteSize() <= 64 * 1024
    assert rows_in(100, 576, encoding) == 1


def test_blocks_come_back() -> None:
    sent = Block(5, states(3, 8), (1, 2, 60000), (5, 7))
    back = there_and_back(sent, Encoding.F32)
    assert (back.start, back.token_ids, back.wants) == (5, (1, 2, 60000), (5, 7))
    assert torch.equal(back.states, sent.states)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_message_or_a_wire_error(data: bytes) -> None:
    try:
        message = codec.parse(pb.SessionRequest, data)
        if message.WhichOneof("message") == "block":
            BlockCodec(8, Encoding.F32, LIKE).from_pb(message.block)
    except WireError:
        pass


def tensor(**changes: object) -> pb.Block:
    message = BlockCodec(8, Encoding.INT8).to_pb(block(states(2, 8))).block
    for name, value in changes.items():
        if name == "scales":
            del message.states.scales[:]
            message.states.scales.extend(value)  # type: ignore[arg-type]
        else:
            setattr(message.states, name, value)
    return message


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (tensor(rows=0, data=b""), "0 bytes of states for 0 positions"),
        (tensor(rows=3), "16 bytes of states for 3 positions"),
        (tensor(data=b"x" * 15), "15 bytes of states"),
        (tensor(encoding=pb.ENCODING_F32), "encoded as ENCODING_F32; the handshake said int8"),
        (tensor(scales=[1.0]), "1 scales for 2 positions"),
    ],
)
def test_states_that_contradict_themselves_are_refused(message: pb.Block, text: str) -> None:
    with pytest.raises(WireError, match=text):
        BlockCodec(8, Encoding.INT8, LIKE).from_pb(message)


def test_wants_must_ascend() -> None:
    message = BlockCodec(8, Encoding.F32).to_pb(block(states(3, 8))).block
    message.wants[:] = [2, 1]
    with pytest.raises(WireError, match="do not ascend"):
        BlockCodec(8, Encoding.F32, LIKE).from_pb(message)
