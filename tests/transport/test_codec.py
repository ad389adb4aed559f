"""Messages: what goes in comes out."""

from dataclasses import replace
from typing import Any

import pytest

from ruyi_flow.errors import WireError
from ruyi_flow.requests import GenerateRequest, SamplingParams, SessionOpen
from ruyi_flow.routing.confidence import Curve, Scale, Score
from ruyi_flow.routing.policy import NEVER, Policy, Routing
from ruyi_flow.routing.start import Start
from ruyi_flow.transport import codec
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.types import (
    Decision,
    Encoding,
    Final,
    FinishReason,
    Hop,
    Likelihood,
    LinkMeasurement,
    Logprobs,
    Mode,
    NodeStatus,
    PromptToken,
    PromptTokens,
    Reason,
    Recovery,
    Stats,
    Token,
    Tokenized,
    TopToken,
    Verdict,
)

SCALE = Scale(Score.MARGIN, {5: Curve(1.5, (0.1, 0.2), (0.25, 0.5)), 11: Curve(0.7, (0.3,), (1.0,))})


EVERY_OPTION: dict[str, Any] = {
    "mode": Mode.CASCADE,
    "exit": 11,
    "threshold": 0.5,
    "thresholds": {5: 0.25, 11: NEVER},
    "window": 3,
    "back": 0.75,
    "start": Start({5: (0.5,) * 5}, 0.25),
    "fallback": True,
    "draft": 2,
    "scale": SCALE,
    "family": "f",
}
"""A value of every routing option."""


def test_a_curve_that_is_none_is_refused() -> None:
    nan = float("nan")
    for curve, text in (
        (pb.Curve(temperature=1), "its points must be"),
        (pb.Curve(temperature=1, scores=[nan], chances=[0.5]), "its scores must be numbers"),
        (pb.Curve(temperature=1, scores=[0.5, float("inf")], chances=[0.5, 0.6]), "its scores must be numbers"),
        (pb.Curve(temperature=1, scores=[0.5, 0.1], chances=[0.5, 0.6]), "its points must ascend"),
        (pb.Curve(temperature=1, scores=[0.1, 0.5], chances=[0.5, nan]), "its points must be"),
        (pb.Curve(temperature=nan, scores=[0.1], chances=[0.5]), "its temperature must be above 0"),
    ):
        message = handshake()
        message.policy.routing.scale.MergeFrom(pb.Scale(score=pb.SCORE_MAX_PROBABILITY, curves={5: curve}))
        with pytest.raises(WireError, match=f"the policy's scale is not valid: {text}"):
            codec.open_from_pb(message)


def handshake() -> pb.Open:
    """The least that a handshake must have."""
    sampling = pb.SamplingParams(top_p=1, repetition_penalty=1, max_new_tokens=1)
    return pb.Open(encoding=pb.ENCODING_F32, max_positions=2, prompt_length=1, sampling=sampling)


def test_a_handshake_whose_numbers_cannot_be_is_refused() -> None:
    codec.open_from_pb(handshake())
    for change, text in (
        (pb.Open(prompt_length=3), "a session of 2 positions has a prompt of 3"),
        (pb.Open(policy=pb.Policy(thresholds={2: float("nan")})), "thresholds are not all numbers of 0 or more"),
        (pb.Open(policy=pb.Policy(thresholds={2: -1.0})), "thresholds are not all numbers of 0 or more"),
        (pb.Open(policy=pb.Policy(routing=pb.Routing(start=pb.Start()))), "only the entry node applies"),
    ):
        message = handshake()
        message.MergeFrom(change)
        with pytest.raises(WireError, match=text):
            codec.open_from_pb(message)
    for name in ("max_positions", "prompt_length"):
        message = handshake()
        message.ClearField(name)
        with pytest.raises(WireError, match="has a prompt of"):
            codec.open_from_pb(message)


BAD_SECONDS = [float("nan"), float("inf"), -1.0, 1e30]
BAD_CONFIDENCES = [float("nan"), float("inf"), -0.5, 1.5]


def test_an_answer_whose_numbers_cannot_be_is_refused() -> None:
    replies = [
        pb.Verdict(decisions=[pb.Decision(confidence=bad, reason=pb.REASON_CONFIDENT)]) for bad in BAD_CONFIDENCES
    ]
    replies += [pb.Verdict(elapsed_s=bad) for bad in BAD_SECONDS]
    for bad in BAD_SECONDS:
        replies += [pb.Verdict(hops=[hop]) for hop in (pb.Hop(compute_s=bad), pb.Hop(queue_s=bad), pb.Hop(wire_s=bad))]
    replies += [pb.Verdict(hops=[pb.Hop(node=name)]) for name in ("x" * 1000, "\x1b[2J", "a\nb")]
    replies.append(pb.Verdict(hops=[pb.Hop(node="n")] * 1000))
    for reply in replies:
        with pytest.raises(WireError):
            codec.verdict_from_pb(reply)
    events = [pb.GenerateReply(token=pb.Token(confidence=bad, reason=pb.REASON_CONFIDENT)) for bad in BAD_CONFIDENCES]
    events += [pb.GenerateReply(token=pb.Token(after_s=bad, reason=pb.REASON_CONFIDENT)) for bad in BAD_SECONDS]
    for bad in BAD_SECONDS:
        stats = pb.Stats(total_s=bad)
        events.append(pb.GenerateReply(final=pb.Final(finish_reason=pb.FINISH_REASON_EOS, stats=stats)))
    for event in events:
        with pytest.raises(WireError):
            codec.reply_from_pb(event)
    for bad in BAD_SECONDS:
        with pytest.raises(WireError):
            codec.status_from_pb(pb.StatusReply(uptime_s=bad))


def test_sums_of_counts_that_deeper_nodes_sent_fit_into_their_fields() -> None:
    hop, other = Hop("n"), Hop("n", messages=2**32 - 1, positions=2**32 - 1, bytes_up=2**64 - 1, bytes_down=2**64 - 1)
    for _ in range(3):
        hop.add(other)
    [back] = codec.verdict_from_pb(codec.verdict_to_pb(Verdict((), (hop,)), 0.0, 1).verdict).hops
    assert (back.messages, back.positions, back.bytes_up, back.bytes_down) == (2**32 - 1, 2**32 - 1, *[2**64 - 1] * 2)


def test_a_start_that_is_none_is_refused() -> None:
    message = pb.GenerateRequest(raw="x", sampling=pb.SamplingParams(top_p=1, repetition_penalty=1, max_new_tokens=1))
    start = pb.Start(weights={5: pb.Weights(values=[1.0])}, chance=0.5)
    message.routing.MergeFrom(pb.Routing(mode=pb.MODE_CASCADE, threshold=0.5, start=start))
    with pytest.raises(WireError, match="start rule is not valid: the weights of a start must be 5 numbers"):
        codec.generate_from_bytes(message.SerializeToString())


def test_handshakes_come_back() -> None:
    sampling = SamplingParams(temperature=0.6, top_k=30, stop=("a", "b"), eos_token_ids=(2, 5), seed=2**62)
    opening = SessionOpen(
        family="abc",
        first_layer=11,
        node="cloud",
        exits=(17, 29),
        hidden_size=576,
        encoding=Encoding.INT8,
        max_positions=100,
        prompt_length=20,
        sampling=sampling,
        policy=Policy(Routing(Mode.TOKEN, scale=SCALE), {5: NEVER, 11: 0.5}, 29),
    )
    cascade = Policy(Routing(Mode.CASCADE, window=3, back=0.75, fallback=True), {5: 0.5}, 11, True)
    for policy in (opening.policy, cascade):
        opening = replace(opening, policy=policy)
        message = codec.parse(pb.SessionRequest, codec.open_to_pb(opening).SerializeToString())
        assert codec.open_from_pb(message.open) == opening


def test_verdicts_come_back() -> None:
    decisions = (Decision(7, 11, 0.5, Reason.CONFIDENT), Decision(9, 29, 0.25, Reason.DEEPEST))
    verdict = Verdict(decisions, (Hop("edge", 0.5, 0.25, 0.125, 1, 2, 3, 4, (Recovery("silent", 1.5, 300),)),))
    reply = codec.parse(pb.SessionReply, codec.verdict_to_pb(verdict, 1.5, 21).SerializeToString())
    assert codec.verdict_from_pb(reply.verdict) == verdict
    assert (reply.verdict.elapsed_s, reply.verdict.position) == (1.5, 21)
    likely = Likelihood(-0.5, ((7, -0.5), (9, -2.0)))
    for rated in (
        Verdict((decisions[0]._replace(likelihood=likely), decisions[1]), verdict.hops),
        Verdict(decisions, verdict.hops, (likely, Likelihood(-3.0, ((1, -0.25), (2, -0.5))))),
        Verdict(decisions, verdict.hops, (Likelihood(-3.0, ()),) * 3),
    ):
        reply = codec.parse(pb.SessionReply, codec.verdict_to_pb(rated, 1.5, 21).SerializeToString())
        assert codec.verdict_from_pb(reply.verdict) == rated


def test_log_probabilities_that_cannot_be_are_refused() -> None:
    nan = float("nan")
    for likelihoods in (
        pb.Likelihoods(logprobs=[0.5]),
        pb.Likelihoods(logprobs=[nan]),
        pb.Likelihoods(logprobs=[-1], top=2, top_ids=[1], top_logprobs=[-1]),
        pb.Likelihoods(logprobs=[-1], top=1, top_ids=[1], top_logprobs=[nan]),
        pb.Likelihoods(logprobs=[-1], top=2**31, top_ids=[1], top_logprobs=[-1]),
        pb.Likelihoods(logprobs=[-1], top=21, top_ids=[1] * 21, top_logprobs=[-1] * 21),
        pb.Likelihoods(logprobs=[-1], top=0, top_ids=[1], top_logprobs=[-1]),
    ):
        with pytest.raises(WireError):
            codec.verdict_from_pb(pb.Verdict(prompt=likelihoods))
        decision = pb.Decision(reason=pb.REASON_FIXED, likelihood=likelihoods)
        with pytest.raises(WireError):
            codec.verdict_from_pb(pb.Verdict(decisions=[decision]))
    two = pb.Decision(reason=pb.REASON_FIXED, likelihood=pb.Likelihoods(logprobs=[-1, -1]))
    with pytest.raises(WireError, match="likelihoods of 1 tokens"):
        codec.verdict_from_pb(pb.Verdict(decisions=[two]))
    token = pb.Token(reason=pb.REASON_FIXED)
    for logprobs in (pb.Logprobs(logprob=nan), pb.Logprobs(top=[pb.TopToken(logprob=1)])):
        token.logprobs.CopyFrom(logprobs)
        with pytest.raises(WireError, match="log-probability"):
            codec.reply_from_pb(pb.GenerateReply(token=token))
    with pytest.raises(WireError, match="2 tokens have 1 texts"):
        codec.tokenized_from_pb(pb.Tokenized(token_ids=[1, 2], texts=["a"]))


@pytest.mark.parametrize(
    "request_",
    [
        GenerateRequest("héllo"),
        GenerateRequest("raw text", raw=True, routing={"draft": 0}),
        GenerateRequest((("system", "be brief"), ("user", "hi"))),
        GenerateRequest((1, 2, 3), routing={"exit": 11, "draft": 2}),
        GenerateRequest("x", routing={"fallback": False, "draft": 0}),
        *(GenerateRequest("x", routing={name: value}) for name, value in EVERY_OPTION.items()),
        GenerateRequest("x", routing=EVERY_OPTION),
        GenerateRequest("x", sampling=SamplingParams(eos_token_ids=(), seed=0)),
        GenerateRequest("x", sampling=SamplingParams(logprobs=0, prompt_logprobs=20)),
        GenerateRequest("x", sampling=SamplingParams(presence_penalty=-0.5, frequency_penalty=1.5)),
    ],
    ids=str,
)
def test_requests_come_back(request_: GenerateRequest) -> None:
    assert EVERY_OPTION.keys() == Routing.names(), "an option that this test does not know may be lost on the wire"
    message = codec.parse(pb.GenerateRequest, codec.generate_to_pb(request_).SerializeToString())
    assert codec.generate_from_bytes(message.SerializeToString()) == request_


def test_tokenized_prompts_come_back() -> None:
    tokenized = Tokenized((5, 6), (" blue", "\ufffd"), 8192)
    message = codec.parse(pb.Tokenized, codec.tokenized_to_pb(tokenized).SerializeToString())
    assert codec.tokenized_from_pb(message) == tokenized


@pytest.mark.parametrize("seed", [None, 0, 9, 2**63 - 1])
def test_answers_come_back(seed: int | None) -> None:
    token = Token(5, " blue", 29, "cloud", 0.5, Reason.UNREACHABLE, 0.25, 1200)
    hops = (Hop("device", 1.0), Hop("edge", 0.5))
    final = Final(FinishReason.STOP, "blue", Stats(3, 4, 0.5, 1.5, seed, 8, 7, 6, hops))
    logprobs = Logprobs(" blue", -0.5, (TopToken(5, " blue", -0.5), TopToken(6, " red", -2.0)))
    prompt = PromptTokens((PromptToken(3, "sky", None), PromptToken(5, " blue", logprobs)), "sky blue")
    for event in (token, replace(token, logprobs=logprobs), prompt, final):
        message = codec.parse(pb.GenerateReply, codec.reply_to_pb(event).SerializeToString())
        assert codec.reply_from_pb(message) == event


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
        10,
        3,
        4,
        5.5,
        "cloud",
        "idle",
        6,
    )
    assert codec.status_from_pb(codec.status_to_pb(status)) == status
    told = {"version": "0.2.0", "next_address": "10.0.0.3:7101", "next_encoding": Encoding.INT8}
    changes: list[dict[str, Any]] = [
        told,
        told | {"link": LinkMeasurement(20.5, 0.5, 95.0)},
        told | {"link_error": "no answer"},
    ]
    for more in changes:
        status = replace(status, **more)
        assert codec.status_from_pb(codec.status_to_pb(status)) == status


def test_what_a_status_does_not_say_is_unknown() -> None:
    old = codec.status_from_pb(pb.StatusReply(node="edge"))
    assert (old.version, old.next_address, old.next_encoding, old.link, old.link_error) == ("", "", None, None, "")
    newer = pb.StatusReply.FromString(pb.StatusReply(node="edge").SerializeToString() + b"\xc0\x01\x63")  # field 24: 99
    assert newer.next_encoding == 99 and codec.status_from_pb(newer).next_encoding is None


def test_a_status_that_cannot_be_is_refused() -> None:
    texts = ("x" * 2000, "\x1b[2J", "a\nb")
    replies = [reply for t in texts for reply in (pb.StatusReply(node=t), pb.StatusReply(version=t))]
    replies += [pb.StatusReply(link_error=text) for text in texts]
    replies += [pb.StatusReply(link=pb.Link(**{n: bad})) for n in ("round_trip_ms", "up_mbit") for bad in BAD_SECONDS]
    replies.append(pb.StatusReply(exits=range(5000)))
    for reply in replies:
        with pytest.raises(WireError):
            codec.status_from_pb(reply)
