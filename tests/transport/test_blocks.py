"""Blocks on the wire: what goes in comes out, sizes are the design's, and what contradicts itself is refused."""

from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from ruyi_flow.errors import WireError
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.loading import load_slice
from ruyi_flow.loop.chain import Chain
from ruyi_flow.requests import SamplingParams
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.runtime.stage import Shard
from ruyi_flow.runtime.worker import InlineWorker
from ruyi_flow.testing import open_session
from ruyi_flow.transport import codec
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.blocks import BlockCodec, rows_in
from ruyi_flow.types import Block, Encoding, Mode

LIKE = torch.zeros(1)


def states(rows: int, hidden: int = 576) -> torch.Tensor:
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(rows)) * 10


def block(given_states: torch.Tensor, start: int = 0) -> Block:
    rows = len(given_states)
    return Block(start, given_states, (49151,) * rows, tuple(range(start, start + rows)))


def sent(given: Block, encoding: Encoding) -> pb.Block:
    message = codec.parse(pb.SessionRequest, BlockCodec(given.states.shape[1], encoding).to_bytes(given))
    assert message.WhichOneof("message") == "block"
    return message.block


def there_and_back(given: Block, encoding: Encoding, like: torch.Tensor = LIKE) -> Block:
    return BlockCodec(given.states.shape[1], encoding, like.dtype, like.device).from_pb(sent(given, encoding))


@pytest.mark.parametrize(
    ("encoding", "error"), [(Encoding.F32, 0.0), (Encoding.BF16, 2**-8), (Encoding.F16, 2**-11), (Encoding.INT8, None)]
)
@pytest.mark.parametrize("rows", [1, 7])
def test_states_survive_an_encoding(encoding: Encoding, error: float | None, rows: int) -> None:
    given = states(rows)
    back = there_and_back(block(given), encoding).states
    if error is None:  # half a step of each row's own scale
        assert ((back - given).abs() <= given.abs().amax(-1, keepdim=True) / 127 / 2 + 1e-6).all()
    else:
        assert ((back - given).abs() <= error * given.abs()).all()
    message = sent(block(given), encoding).states
    assert len(message.data) + 4 * len(message.scales) == rows * encoding.row_bytes(576)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("encoding", Encoding)
def test_states_come_back_in_the_receivers_format(encoding: Encoding, dtype: torch.dtype) -> None:
    given = states(3, 8)[1:].to(torch.bfloat16)
    assert there_and_back(block(given), encoding, torch.zeros(1, dtype=dtype)).states.dtype is dtype
    if encoding is not Encoding.INT8:  # all of these hold such numbers exactly, but for f16's range
        assert torch.equal(there_and_back(block(given), encoding).states, given.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("rows", [1, 7, 300])  # the last is large in every encoding
def test_what_goes_on_the_wire_is_the_message_that_protobuf_would_write(
    rows: int, encoding: Encoding, dtype: torch.dtype
) -> None:
    given = states(rows, 600).to(dtype)[:, 12:588]  # and not contiguous
    values, scales = given.to({"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}.get(encoding)), []
    if encoding is Encoding.INT8:
        scales = (given.float().abs().amax(-1) / 127).tolist()
        values = (given.float() / torch.tensor(scales)[:, None]).round().to(torch.int8)
    asked = Block(5, given, tuple(range(60_000, 60_000 + rows)), (5, 4 + rows) if rows > 1 else ())
    wants = [0, rows - 1] if rows > 1 else []
    data = values.contiguous().view(torch.uint8).numpy().tobytes()
    tensor = pb.Tensor(encoding=codec.ENCODINGS[encoding], rows=rows, data=data, scales=scales)
    ordinary = pb.SessionRequest(block=pb.Block(start=5, token_ids=asked.token_ids, wants=wants, states=tensor))
    on_the_wire = BlockCodec(576, encoding).to_bytes(asked)
    assert codec.parse(pb.SessionRequest, on_the_wire) == ordinary
    assert len(on_the_wire) <= ordinary.ByteSize() + 8


def test_states_that_are_rows_of_a_view_are_sent_as_they_read() -> None:
    given = states(2, 64)
    assert torch.equal(there_and_back(block(given[:, 8:16]), Encoding.F32).states, given[:, 8:16])


@pytest.mark.parametrize("encoding", [Encoding.F32, Encoding.INT8])
async def test_a_node_does_not_write_to_the_states_that_came_in(tiny: Path, encoding: Encoding) -> None:
    shard = Shard(load_slice(Checkpoint(tiny), (4, 6), dtype=torch.float32), max_positions=64, max_sessions=1)
    session = open_session(
        shard, Policy(Routing(Mode.TOKEN, draft=0), {4: 0.5}, 6), SamplingParams(), prompt_length=3, max_positions=16
    )
    came = there_and_back(Block(0, states(3, 32), (1, 2, 3), (2,)), encoding)
    before = came.states.clone()
    await Chain(session, InlineWorker(), "n1").advance(came)
    assert torch.equal(came.states, before)


def test_int8_keeps_zero_rows() -> None:
    assert torch.equal(there_and_back(block(torch.zeros(2, 8)), Encoding.INT8).states, torch.zeros(2, 8))


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -(2.0**60), 2.0**60])
def test_states_that_no_layer_can_have_made_are_refused(encoding: Encoding, bad: float) -> None:
    given = states(3, 8)
    given[1, 3] = bad
    with pytest.raises(WireError, match="not finite or far too large"):
        there_and_back(block(given), encoding)


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_states_are_finite_in_the_receivers_format(encoding: Encoding, dtype: torch.dtype) -> None:
    for value in (6e4, -6e4, 1e6, -1e6):
        given = states(3, 8)
        given[2, 5] = value
        try:
            assert there_and_back(block(given), encoding, torch.zeros(1, dtype=dtype)).states.isfinite().all()
        except WireError:
            assert (encoding is Encoding.F16 or dtype is torch.float16) and abs(value) > 65504


@pytest.mark.parametrize(("encoding", "most"), [(Encoding.BF16, 2 * 576 + 64), (Encoding.INT8, 576 + 32)])
def test_a_position_costs_at_most_its_state_and_a_little(encoding: Encoding, most: int) -> None:
    blocks = BlockCodec(576, encoding)
    for rows in (1, 9, 300):
        assert len(blocks.to_bytes(block(states(rows), 8191))) <= rows * most


@pytest.mark.parametrize("encoding", Encoding)
def test_as_many_rows_as_a_message_has_room_for_fit(encoding: Encoding) -> None:
    for kib in (64, 1024):
        rows = rows_in(kib * 1024, 576, encoding)
        size = len(BlockCodec(576, encoding).to_bytes(block(states(rows), 1_000_000)))
        assert 0.93 * kib * 1024 < size <= kib * 1024
    assert rows_in(100, 576, encoding) == 1


def test_blocks_come_back() -> None:
    given = Block(5, states(3, 8), (1, 2, 60000), (5, 7))
    back = there_and_back(given, Encoding.F32)
    assert (back.start, back.token_ids, back.wants) == (5, (1, 2, 60000), (5, 7))
    assert torch.equal(back.states, given.states)


VALID = pb.SessionRequest(block=sent(Block(5, states(3, 8), (1, 2, 60000), (5, 7)), Encoding.INT8)).SerializeToString()
CHANGED = st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4).map(
    lambda changes: bytes(dict(changes).get(i, byte) for i, byte in enumerate(VALID))
)


@hypothesis.given(st.one_of(st.binary(max_size=200), CHANGED, st.integers(0, len(VALID)).map(lambda n: VALID[:n])))
def test_arbitrary_bytes_are_a_sound_block_or_a_wire_error(data: bytes) -> None:
    try:
        message = codec.parse(pb.SessionRequest, data)
        if message.WhichOneof("message") != "block":
            return
        found = BlockCodec(8, Encoding.INT8, LIKE.dtype, LIKE.device).from_pb(message.block)
    except WireError:
        return
    assert found.states.shape[1:] == (8,) and len(found.states) > 0 and len(found.token_ids) > 0
    assert list(found.wants) == sorted(set(found.wants))


def test_a_changed_message_can_still_be_a_block() -> None:
    assert hypothesis.find(CHANGED, lambda data: data != VALID and _is_block(data))


def _is_block(data: bytes) -> bool:
    try:
        message = codec.parse(pb.SessionRequest, data)
        BlockCodec(8, Encoding.INT8, LIKE.dtype, LIKE.device).from_pb(message.block)
    except WireError:
        return False
    return True


def tensor(**changes: Any) -> pb.Block:
    message = sent(block(states(2, 8)), Encoding.INT8)
    for name, value in changes.items():
        if name == "scales":
            del message.states.scales[:]
            message.states.scales.extend(value)
        else:
            setattr(message.states, name, value)
    return message


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (tensor(rows=0, data=b""), "0 bytes of states for 0 positions"),
        (tensor(rows=3), "16 bytes of states for 3 positions"),
        (tensor(data=b"x" * 15), "15 bytes of states"),
        (tensor(encoding=pb.ENCODING_F32), "encoded as ENCODING_F32; the handshake set int8"),
        (tensor(scales=[1.0]), "1 scales for 2 positions"),
    ],
)
def test_states_that_contradict_themselves_are_refused(message: pb.Block, text: str) -> None:
    with pytest.raises(WireError, match=text):
        BlockCodec(8, Encoding.INT8, LIKE.dtype, LIKE.device).from_pb(message)


def test_wants_must_ascend() -> None:
    message = sent(block(states(3, 8)), Encoding.F32)
    message.wants[:] = [2, 1]
    with pytest.raises(WireError, match="do not ascend"):
        BlockCodec(8, Encoding.F32, LIKE.dtype, LIKE.device).from_pb(message)
