"""Messages: what goes in comes out, sizes are what the design says, and what contradicts itself is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ruyi_flow.errors import WireError
from ruyi_flow.requests import GenerateRequest, SessionOpen
from ruyi_flow.routing.policy import NEVER, Policy, Routing
from ruyi_flow.transport import codec
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.types import (
    Block,
    Decision,
    Encoding,
    Final,
    FinishReason,
    Hop,
    Mode,
    NodeStatus,
    Reason,
    SamplingParams,
    Stats,
    Token,
    Verdict,
)

LIKE = torch.zeros(1)


def states(rows: int, hidden: int = 576) -> torch.Tensor:
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(rows)) * 10


@pytest.mark.parametrize(
    ("encoding", "error"), [(Encoding.F32, 0.0), (Encoding.BF16, 2**-8), (Encoding.F16, 2**-11), (Encoding.INT8, None)]
)
@pytest.mark.parametrize("rows", [1, 7])
def test_states_survive_an_encoding(encoding: Encoding, error: float | None, rows: int) -> None:
    given_states = states(rows)
    message = codec.encode_states(given_states, encoding)
    back = codec.decode_states(message, 576, encoding, LIKE)
    if error is None:  # half a step of each row's own scale
        assert ((back - given_states).abs() <= given_states.abs().amax(-1, keepdim=True) / 127 / 2 + 1e-6).all()
    else:
        assert ((back - given_states).abs() <= error * given_states.abs()).all()
    assert len(message.data) + 4 * len(message.scales) == rows * codec.row_bytes(576, encoding)


def test_int8_keeps_zero_rows() -> None:
    back = codec.decode_states(codec.encode_states(torch.zeros(2, 8), Encoding.INT8), 8, Encoding.INT8, LIKE)
    assert torch.equal(back, torch.zeros(2, 8))


@pytest.mark.parametrize(("encoding", "most"), [(Encoding.BF16, 2 * 576 + 64), (Encoding.INT8, 576 + 32)])
def test_a_position_costs_at_most_its_state_and_a_little(encoding: Encoding, most: int) -> None:
    one = Block(8191, states(1), (49151,), (8191,))
    assert codec.block_to_pb(one, encoding).ByteSize() <= most
    many = Block(8000, states(9), (49151,) * 9, tuple(range(8000, 8009)))
    assert codec.block_to_pb(many, encoding).ByteSize() <= 9 * most


def test_blocks_come_back() -> None:
    block = Block(5, states(3, 8), (1, 2, 60000), (5, 7))
    message = codec.parse(pb.SessionRequest, codec.block_to_pb(block, Encoding.F32).SerializeToString())
    back = codec.block_from_pb(message.block, 8, Encoding.F32, LIKE)
    assert (back.start, back.token_ids, back.wants) == (5, (1, 2, 60000), (5, 7))
    assert torch.equal(back.states, block.states)


def test_handshakes_come_back() -> None:
    sampling = SamplingParams(temperature=0.6, top_k=30, stop=("a", "b"), eos_token_ids=(2, 5), seed=2**62)
    opening = SessionOpen(
        "abc", 11, 576, Encoding.INT8, 100, 20, sampling, Policy(Mode.TOKEN, {5: NEVER, 11: 0.5}, 29, 4)
    )
    message = codec.parse(pb.SessionRequest, codec.open_to_pb(opening).SerializeToString())
    assert codec.open_from_pb(message.open) == opening


def test_verdicts_come_back() -> None:
    decisions = (Decision(7, 11, 0.5, Reason.CONFIDENT), Decision(9, 29, 0.25, Reason.DEEPEST))
    verdict = Verdict(decisions, (Hop("edge", 0.5, 0.25, 0.125, 1, 2, 3, 4),))
    reply = codec.parse(pb.SessionReply, codec.verdict_to_pb(verdict, 1.5).SerializeToString())
    assert codec.verdict_from_pb(reply.verdict) == verdict
    assert reply.verdict.elapsed_s == 1.5


@pytest.mark.parametrize(
    "request_",
    [
        GenerateRequest("héllo"),
        GenerateRequest("raw text", raw=True, draft=0),
        GenerateRequest((("system", "be brief"), ("user", "hi"))),
        GenerateRequest((1, 2, 3), routing=Routing(Mode.FIXED, exit=11, draft=2), draft=2),
        GenerateRequest("x", routing=Routing(Mode.TOKEN, thresholds={5: 0.5}, draft=4), draft=4),
        GenerateRequest("x", sampling=SamplingParams(eos_token_ids=(), seed=0)),
    ],
    ids=str,
)
def test_requests_come_back(request_: GenerateRequest) -> None:
    message = codec.parse(pb.GenerateRequest, codec.generate_to_pb(request_).SerializeToString())
    assert codec.generate_from_pb(message) == request_


def test_answers_come_back() -> None:
    token = Token(5, " blue", 29, "cloud", 0.5, Reason.DEEPEST)
    final = Final(FinishReason.STOP, "blue", Stats(3, 4, 0.5, 1.5, 9, 8, 7, 6, (Hop("device", 1.0), Hop("edge", 0.5))))
    for event in (token, final):
        message = codec.parse(pb.GenerateReply, codec.reply_to_pb(event).SerializeToString())
        assert codec.reply_from_pb(message) == [event]


def test_statuses_come_back() -> None:
    status = NodeStatus(
        "edge",
        "edge",
        "serving",
        "abc",
        (17, 23),
        11,
        23,
        9,
        8,
        7,
        "float32",
        "cpu",
        1,
        2,
        3,
        4,
        5.5,
        "cloud",
        "idle",
        6,
    )
    assert codec.status_from_pb(codec.status_to_pb(status)) == status


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_message_or_a_wire_error(data: bytes) -> None:
    try:
        message = codec.parse(pb.SessionRequest, data)
        if message.WhichOneof("message") == "block":
            codec.block_from_pb(message.block, 8, Encoding.F32, LIKE)
    except WireError:
        pass


def tensor(**changes: object) -> pb.Tensor:
    message = codec.encode_states(states(2, 8), Encoding.INT8)
    for name, value in changes.items():
        if name == "scales":
            del message.scales[:]
            message.scales.extend(value)  # type: ignore[arg-type]
        else:
            setattr(message, name, value)
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
def test_states_that_contradict_themselves_are_refused(message: pb.Tensor, text: str) -> None:
    with pytest.raises(WireError, match=text):
        codec.decode_states(message, 8, Encoding.INT8, LIKE)


def test_wants_must_ascend() -> None:
    message = codec.block_to_pb(Block(0, states(3, 8), (1, 2, 3), (0, 1)), Encoding.F32).block
    message.wants[:] = [2, 1]
    with pytest.raises(WireError, match="do not ascend"):
        codec.block_from_pb(message, 8, Encoding.F32, LIKE)
