"""Conversion between this package's values and protobuf messages. `blocks.py` converts blocks, which carry tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from ruyi_flow.errors import WireError
from ruyi_flow.requests import MAX_LOGPROBS, GenerateRequest, Prompt, SamplingParams, SessionOpen
from ruyi_flow.routing.confidence import Curve, Scale, Score
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.routing.start import Start
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.checksum import check
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

__all__ = [
    "ENCODINGS",
    "PROTOCOL",
    "generate_from_bytes",
    "generate_to_pb",
    "tokenized_from_pb",
    "tokenized_to_pb",
    "open_from_pb",
    "open_to_pb",
    "parse",
    "parse_sealed",
    "reply_from_pb",
    "reply_to_pb",
    "status_from_pb",
    "status_to_pb",
    "verdict_from_pb",
    "verdict_to_pb",
]

PROTOCOL = 5
"""Version of the wire protocol; both sides of a hop must have the same."""

_MAX_HOPS = 64
"""Largest number of nodes that an answer may name."""

_MAX_KEY = 64
"""Longest key of a session, in bytes."""

_MAX_RECOVERIES = 4096
"""Largest number of recoveries that an answer may tell of."""

_MAX_NAME = 200
"""Longest name of a node in an answer."""

_MAX_EXITS = 1024
"""Largest number of exits that a status may name."""

_MAX_TEXT = 1000
"""Longest text in a status."""

_MAX_SECONDS = 1e9
"""Longest time in an answer; more could overflow in sums."""

_MAX_CONFIDENCE = 1.001
"""Largest confidence in an answer; a sum of rounded probabilities may exceed 1."""

M = TypeVar("M", bound=Message)
D = TypeVar("D")

ENCODINGS = dict(zip(Encoding, (pb.ENCODING_F32, pb.ENCODING_BF16, pb.ENCODING_F16, pb.ENCODING_INT8), strict=True))
_MODES = dict(zip(Mode, (pb.MODE_FIXED, pb.MODE_TOKEN, pb.MODE_EXACT, pb.MODE_CASCADE), strict=True))
_REASONS = dict(
    zip(
        Reason,
        (
            pb.REASON_CONFIDENT,
            pb.REASON_FIXED,
            pb.REASON_DEEPEST,
            pb.REASON_LIMIT,
            pb.REASON_BUDGET,
            pb.REASON_UNREACHABLE,
        ),
        strict=True,
    )
)
_FINISHES = dict(zip(FinishReason, (pb.FINISH_REASON_EOS, pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH), strict=True))
_SCORES = dict(
    zip(
        Score,
        (pb.SCORE_MAX_PROBABILITY, pb.SCORE_MARGIN, pb.SCORE_NEGATIVE_ENTROPY, pb.SCORE_PROBE),
        strict=True,
    )
)
_SCORE_OF: dict[int, Score] = {number: score for score, number in _SCORES.items()}
_ENCODING_OF: dict[int, Encoding] = {number: encoding for encoding, number in ENCODINGS.items()}
_MODE_OF: dict[int, Mode] = {number: mode for mode, number in _MODES.items()}
_REASON_OF: dict[int, Reason] = {number: reason for reason, number in _REASONS.items()}
_FINISH_OF: dict[int, FinishReason] = {number: finish for finish, number in _FINISHES.items()}


def parse(kind: type[M], data: bytes) -> M:
    """Parse a message.

    Raises:
        WireError: the bytes are not such a message.
    """
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise WireError(f"not a {kind.DESCRIPTOR.name} message: {error}") from None


def parse_sealed(kind: type[M], data: bytes) -> M:
    """Parse a message of a stream, which ends with its checksum.

    Raises:
        WireError: the checksum is wrong, or the bytes are not such a message.
    """
    return parse(kind, check(data))


# ---- sessions ----


def open_to_pb(opening: SessionOpen) -> pb.SessionRequest:
    """Encode a handshake."""
    policy = opening.policy
    routing = {f.name: getattr(policy.routing, f.name) for f in fields(policy.routing)}
    return pb.SessionRequest(
        open=pb.Open(
            protocol=PROTOCOL,
            family=opening.family,
            first_layer=opening.first_layer,
            node=opening.node,
            exits=opening.exits,
            key=opening.key,
            position=opening.position,
            hidden_size=opening.hidden_size,
            encoding=ENCODINGS[opening.encoding],
            max_positions=opening.max_positions,
            prompt_length=opening.prompt_length,
            sampling=_sampling_to_pb(opening.sampling),
            policy=pb.Policy(
                routing=_routing_to_pb(routing),
                thresholds=policy.thresholds,
                deepest=policy.deepest,
                limited=policy.limited,
            ),
        )
    )


def open_from_pb(message: pb.Open) -> SessionOpen:
    """Decode a handshake.

    Raises:
        WireError: this version does not know a value of an enum, or values contradict each other.
        RequestError: an option has a value that it cannot have.
    """
    policy = message.policy
    if not 1 <= message.prompt_length <= message.max_positions:
        raise WireError(f"a session of {message.max_positions} positions has a prompt of {message.prompt_length}")
    if len(message.key) > _MAX_KEY or message.position >= message.max_positions:
        raise WireError(f"a session has a key of {len(message.key)} bytes and begins at position {message.position}")
    if not all(value >= 0 for value in policy.thresholds.values()):  # false for NaN, too
        raise WireError("the policy's thresholds are not all numbers of 0 or more")
    if policy.routing.HasField("start"):
        raise WireError("the policy has a start rule, which only the entry node applies")
    return SessionOpen(
        family=message.family,
        first_layer=message.first_layer,
        node=message.node,
        exits=tuple(message.exits),
        key=message.key,
        position=message.position,
        hidden_size=message.hidden_size,
        encoding=_known(_ENCODING_OF, message.encoding, pb.Encoding),
        max_positions=message.max_positions,
        prompt_length=message.prompt_length,
        sampling=_sampling_from_pb(message.sampling),
        policy=Policy(
            Routing(**_routing_from_pb(policy.routing)), dict(policy.thresholds), policy.deepest, policy.limited
        ),
    )


def verdict_to_pb(verdict: Verdict, elapsed_s: float, position: int) -> pb.SessionReply:
    """Encode a verdict on a block that ends before `position`; `elapsed_s` counts from the arrival of the block."""
    reply = pb.SessionReply()
    message = reply.verdict  # filled in place, since a constructor copies the messages that it is given
    message.elapsed_s, message.position = elapsed_s, position
    for d in verdict.decisions:
        added = message.decisions.add(token=d.token, exit=d.exit, confidence=d.confidence, reason=_REASONS[d.reason])
        if d.likelihood is not None:
            _add_likelihoods((d.likelihood,), added.likelihood)
    for hop in verdict.hops:
        message.hops.append(_hop_to_pb(hop))
    if verdict.prompt:
        _add_likelihoods(verdict.prompt, message.prompt)
    return reply


def verdict_from_pb(message: pb.Verdict) -> Verdict:
    """Decode a verdict.

    Raises:
        WireError: this version does not know a value of an enum, or a number cannot be.
    """
    decisions = []
    for d in message.decisions:
        _check_confidence(d.confidence)
        likelihood = None
        if d.HasField("likelihood"):
            [likelihood] = _likelihoods(d.likelihood, 1)
        reason = _known(_REASON_OF, d.reason, pb.Reason)
        decisions.append(Decision(d.token, d.exit, d.confidence, reason, likelihood))
    _check_seconds(message.elapsed_s)
    prompt = _likelihoods(message.prompt, len(message.prompt.logprobs)) if message.HasField("prompt") else ()
    return Verdict(tuple(decisions), _hops(message.hops), prompt)


def _add_likelihoods(found: Sequence[Likelihood], message: pb.Likelihoods) -> None:
    message.logprobs.extend(one.logprob for one in found)
    message.top = len(found[0].top)
    for one in found:
        message.top_ids.extend(token for token, _ in one.top)
        message.top_logprobs.extend(logprob for _, logprob in one.top)


def _likelihoods(message: pb.Likelihoods, count: int) -> tuple[Likelihood, ...]:
    """Decode likelihoods of `count` tokens.

    Raises:
        WireError: they are of another number of tokens, or a number cannot be.
    """
    own, top, ids, logprobs = message.logprobs, message.top, message.top_ids, message.top_logprobs
    if len(own) != count or top > MAX_LOGPROBS or not len(ids) == len(logprobs) == count * top:
        raise WireError(f"likelihoods of {count} tokens have {len(own)}, {top}, {len(ids)} and {len(logprobs)} values")
    if not all(value <= 0 for value in own) or not all(value <= 0 for value in logprobs):  # false for NaN, too
        raise WireError("a log-probability in an answer is not a number of 0 or less")
    pairs = list(zip(ids, logprobs, strict=True))
    return tuple(Likelihood(value, tuple(pairs[i * top : (i + 1) * top])) for i, value in enumerate(own))


# ---- requests of users ----


def generate_to_pb(request: GenerateRequest) -> pb.GenerateRequest:
    """Encode a user's request."""
    message = pb.GenerateRequest(sampling=_sampling_to_pb(request.sampling), routing=_routing_to_pb(request.routing))
    if isinstance(request.prompt, str):
        setattr(message, "raw" if request.raw else "text", request.prompt)
    elif request.prompt and isinstance(request.prompt[0], int):
        message.token_ids.ids.extend(i for i in request.prompt if isinstance(i, int))
    else:
        message.messages.SetInParent()
        for turn in request.prompt:
            assert isinstance(turn, tuple)
            message.messages.messages.add(role=turn[0], content=turn[1])
    if request.resumed:
        message.resume.token_ids.extend(token for token, _ in request.resumed)
        message.resume.exits.extend(exit for _, exit in request.resumed)
    return message


def generate_from_bytes(data: bytes) -> GenerateRequest:
    """Decode a user's request.

    Raises:
        WireError: the bytes are not such a message, or this version does not know a value of an enum.
        RequestError: an option has a value that it cannot have.
    """
    message = parse(pb.GenerateRequest, data)
    if message.HasField("checksum"):
        check(data)
    kind = message.WhichOneof("prompt")
    prompt: Prompt
    if kind == "messages":
        prompt = tuple((turn.role, turn.content) for turn in message.messages.messages)
    elif kind == "token_ids":
        prompt = tuple(message.token_ids.ids)
    else:
        prompt = message.raw if kind == "raw" else message.text
    routing = _routing_from_pb(message.routing)
    resume = message.resume
    if len(resume.token_ids) != len(resume.exits):
        raise WireError(f"{len(resume.token_ids)} tokens of an answer have {len(resume.exits)} exits")
    resumed = tuple(zip(resume.token_ids, resume.exits, strict=True))
    return GenerateRequest(prompt, kind == "raw", _sampling_from_pb(message.sampling), routing, resumed)


def _routing_to_pb(options: Mapping[str, Any]) -> pb.Routing:
    """Encode routing options by their names; None stands for an option that is not set."""
    message = pb.Routing()
    for name, value in options.items():
        if value is None:
            continue
        if name in _ROUTING_MESSAGES:
            getattr(message, name).CopyFrom(_ROUTING_MESSAGES[name][0](value))
        elif name == "thresholds":
            message.thresholds.update(value)
        else:
            setattr(message, name, _MODES[value] if name == "mode" else value)
    return message


def _routing_from_pb(message: pb.Routing) -> dict[str, Any]:
    """Decode the routing options that are set."""
    options: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.name in _ROUTING_MESSAGES:
            value = _ROUTING_MESSAGES[field.name][1](value)
        elif field.name == "thresholds":
            value = dict(value)
        elif field.name == "mode":
            value = _known(_MODE_OF, value, pb.Mode)
        options[field.name] = value
    return options


def _scale_to_pb(scale: Scale) -> pb.Scale:
    curves = {
        p: pb.Curve(temperature=c.temperature, scores=c.scores, chances=c.chances) for p, c in scale.curves.items()
    }
    return pb.Scale(score=_SCORES[scale.score], curves=curves)


def _scale_from_pb(message: pb.Scale) -> Scale:
    try:
        curves = {p: Curve(c.temperature, tuple(c.scores), tuple(c.chances)) for p, c in message.curves.items()}
    except ValueError as error:
        raise WireError(f"the policy's scale is not valid: {error}") from None
    return Scale(_known(_SCORE_OF, message.score, pb.Score), curves)


def _start_to_pb(start: Start) -> pb.Start:
    return pb.Start(weights={p: pb.Weights(values=w) for p, w in start.weights.items()}, chance=start.chance)


def _start_from_pb(message: pb.Start) -> Start:
    try:
        return Start({p: tuple(w.values) for p, w in message.weights.items()}, message.chance)
    except ValueError as error:
        raise WireError(f"the policy's start rule is not valid: {error}") from None


_ROUTING_MESSAGES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "scale": (_scale_to_pb, _scale_from_pb),
    "start": (_start_to_pb, _start_from_pb),
}
"""The routing options that are messages of their own, and how they are encoded and decoded."""


def tokenized_to_pb(tokenized: Tokenized) -> pb.Tokenized:
    """Encode a prompt's tokens."""
    return pb.Tokenized(token_ids=tokenized.token_ids, texts=tokenized.texts, context=tokenized.context)


def tokenized_from_pb(message: pb.Tokenized) -> Tokenized:
    """Decode a prompt's tokens.

    Raises:
        WireError: they do not have one text each.
    """
    if len(message.token_ids) != len(message.texts):
        raise WireError(f"{len(message.token_ids)} tokens have {len(message.texts)} texts")
    return Tokenized(tuple(message.token_ids), tuple(message.texts), message.context)


def _logprobs_to_pb(logprobs: Logprobs) -> pb.Logprobs:
    top = [pb.TopToken(id=one.id, text=one.text, logprob=one.logprob) for one in logprobs.top]
    return pb.Logprobs(text=logprobs.text, logprob=logprobs.logprob, top=top)


def _logprobs_from_pb(message: pb.Logprobs) -> Logprobs:
    top = tuple(TopToken(one.id, one.text, one.logprob) for one in message.top)
    if not all(value <= 0 for value in (message.logprob, *(one.logprob for one in top))):  # false for NaN, too
        raise WireError("a log-probability in an answer is not a number of 0 or less")
    return Logprobs(message.text, message.logprob, top)


def reply_to_pb(event: PromptTokens | Token | Final) -> pb.GenerateReply:
    """Encode one event of an answer."""
    if isinstance(event, PromptTokens):
        reply = pb.GenerateReply(prompt=pb.PromptTokens(text=event.text))
        for one in event.tokens:
            logprobs = None if one.logprobs is None else _logprobs_to_pb(one.logprobs)
            reply.prompt.tokens.add(id=one.id, text=one.text, logprobs=logprobs)
        return reply
    if isinstance(event, Token):
        token = pb.Token(
            id=event.id,
            text=event.text,
            exit=event.exit,
            node=event.node,
            confidence=event.confidence,
            reason=_REASONS[event.reason],
            after_s=event.after_s,
            bytes_up=event.bytes_up,
            logprobs=None if event.logprobs is None else _logprobs_to_pb(event.logprobs),
        )
        return pb.GenerateReply(token=token)
    stats = _copy(event.stats, pb.Stats(), skip=("hops", "recoveries"))
    stats.hops.extend(_hop_to_pb(hop) for hop in event.stats.hops)
    stats.recoveries.extend(_recovery_to_pb(recovery) for recovery in event.stats.recoveries)
    return pb.GenerateReply(final=pb.Final(finish_reason=_FINISHES[event.finish_reason], text=event.text, stats=stats))


def reply_from_pb(message: pb.GenerateReply) -> PromptTokens | Token | Final:
    """Decode one event of an answer.

    Raises:
        WireError: the message has no event, this version does not know a value of an enum, or a number cannot be.
    """
    if message.HasField("token"):
        t = message.token
        _check_confidence(t.confidence)
        _check_seconds(t.after_s)
        reason = _known(_REASON_OF, t.reason, pb.Reason)
        logprobs = _logprobs_from_pb(t.logprobs) if t.HasField("logprobs") else None
        return Token(t.id, t.text, t.exit, t.node, t.confidence, reason, t.after_s, t.bytes_up, logprobs)
    if message.HasField("final"):
        final = message.final
        _check_seconds(final.stats.first_token_s, final.stats.total_s)
        seed = final.stats.seed if final.stats.HasField("seed") else None
        recoveries = _recoveries(final.stats.recoveries)
        stats = _make(Stats, final.stats, hops=_hops(final.stats.hops), seed=seed, recoveries=recoveries)
        return Final(_known(_FINISH_OF, final.finish_reason, pb.FinishReason), final.text, stats)
    if message.HasField("prompt"):
        tokens = (
            PromptToken(t.id, t.text, _logprobs_from_pb(t.logprobs) if t.HasField("logprobs") else None)
            for t in message.prompt.tokens
        )
        return PromptTokens(tuple(tokens), message.prompt.text)
    raise WireError("a reply has neither a token nor the end of the answer")


def status_to_pb(status: NodeStatus) -> pb.StatusReply:
    """Encode a node's status."""
    message = _copy(status, pb.StatusReply(), skip=("next_encoding", "link"))
    if status.next_encoding is not None:
        message.next_encoding = ENCODINGS[status.next_encoding]
    if status.link is not None:
        message.link.CopyFrom(_copy(status.link, pb.Link()))
    return message


def status_from_pb(message: pb.StatusReply) -> NodeStatus:
    """Decode a node's status.

    Raises:
        WireError: a number cannot be.
    """
    _check_seconds(message.uptime_s)
    if len(message.exits) > _MAX_EXITS:
        raise WireError(f"a status names {len(message.exits)} exits; at most {_MAX_EXITS} are allowed")
    for field, value in message.ListFields():
        if isinstance(value, str) and (len(value) > _MAX_TEXT or not value.isprintable()):
            raise WireError(f"a status has {value[:_MAX_NAME]!r} as its {field.name}, which is no text of one line")
    link = message.link if message.HasField("link") else None
    if link is not None:
        for number in (link.round_trip_ms, link.jitter_ms, link.up_mbit):
            if not 0 <= number <= _MAX_SECONDS:
                raise WireError(f"a status says that {number} was measured on a link")
    return _make(
        NodeStatus,
        message,
        exits=tuple(message.exits),
        next_encoding=_ENCODING_OF.get(message.next_encoding),  # a newer node may have one that is not known here
        link=None if link is None else _make(LinkMeasurement, link),
    )


def _hop_to_pb(hop: Hop) -> pb.Hop:
    """Encode a hop; written out, like `_hops`, since it is on the path of every token."""
    return pb.Hop(
        node=hop.node,
        compute_s=hop.compute_s,
        queue_s=hop.queue_s,
        wire_s=hop.wire_s,
        # A sum of counts that deeper nodes have sent may be larger than its field.
        messages=min(hop.messages, 2**32 - 1),
        positions=min(hop.positions, 2**32 - 1),
        bytes_up=min(hop.bytes_up, 2**64 - 1),
        bytes_down=min(hop.bytes_down, 2**64 - 1),
        recoveries=[_recovery_to_pb(recovery) for recovery in hop.recoveries] if hop.recoveries else None,
    )


def _recovery_to_pb(recovery: Recovery) -> pb.Recovery:
    return pb.Recovery(cause=recovery.cause, seconds=recovery.seconds, positions=min(recovery.positions, 2**32 - 1))


def _recoveries(messages: Collection[pb.Recovery]) -> tuple[Recovery, ...]:
    if len(messages) > _MAX_RECOVERIES:
        raise WireError(f"an answer tells of {len(messages)} recoveries; at most {_MAX_RECOVERIES} are allowed")
    for one in messages:
        _check_seconds(one.seconds)
        if len(one.cause) > _MAX_NAME or not one.cause.isprintable():
            raise WireError(f"{one.cause[:_MAX_NAME]!r} is not the cause of a loss")
    return tuple(Recovery(one.cause, one.seconds, one.positions) for one in messages)


def _hops(messages: Collection[pb.Hop]) -> tuple[Hop, ...]:
    if len(messages) > _MAX_HOPS:
        raise WireError(f"an answer names {len(messages)} nodes; at most {_MAX_HOPS} are allowed")
    hops = []
    for h in messages:
        if len(h.node) > _MAX_NAME or not h.node.isprintable():
            raise WireError(f"{h.node[:_MAX_NAME]!r} is not the name of a node")
        _check_seconds(h.compute_s, h.queue_s, h.wire_s)
        hop = Hop(h.node, h.compute_s, h.queue_s, h.wire_s, h.messages, h.positions, h.bytes_up, h.bytes_down)
        if h.recoveries:
            hop.recoveries = _recoveries(h.recoveries)
        hops.append(hop)
    return tuple(hops)


def _check_seconds(*values: float) -> None:
    for value in values:
        if not 0 <= value <= _MAX_SECONDS:  # NaN is not, either
            raise WireError(f"an answer says that something took {value} s")


def _check_confidence(value: float) -> None:
    if not 0 <= value <= _MAX_CONFIDENCE:
        raise WireError(f"an answer says that a branch's confidence was {value}")


_OPTIONAL = ("seed", "logprobs", "prompt_logprobs")
"""Sampling options that need not have a value."""


def _sampling_to_pb(params: SamplingParams) -> pb.SamplingParams:
    message = _copy(params, pb.SamplingParams(), skip=("eos_token_ids",))
    if params.eos_token_ids is not None:
        message.eos_token_ids.SetInParent()
        message.eos_token_ids.ids.extend(params.eos_token_ids)
    return message


def _sampling_from_pb(message: pb.SamplingParams) -> SamplingParams:
    return _make(
        SamplingParams,
        message,
        stop=tuple(message.stop),
        eos_token_ids=tuple(message.eos_token_ids.ids) if message.HasField("eos_token_ids") else None,
        **{name: getattr(message, name) if message.HasField(name) else None for name in _OPTIONAL},
    )


def _copy(value: Any, message: M, skip: tuple[str, ...] = ()) -> M:
    """Copy a dataclass into a message with fields of the same names."""
    for f in fields(value):
        item = getattr(value, f.name)
        if f.name in skip or item is None:
            continue
        if isinstance(item, tuple):
            getattr(message, f.name).extend(item)
        else:
            setattr(message, f.name, item)
    return message


def _make(kind: Callable[..., D], message: Message, **other: Any) -> D:
    """Make a dataclass from a message with fields of the same names."""
    names = [f.name for f in fields(kind) if f.name not in other]  # type: ignore[arg-type]
    return kind(**{name: getattr(message, name) for name in names}, **other)


def _known(table: Mapping[int, D], value: int, enum: Any) -> D:
    try:
        return table[value]
    except KeyError:
        raise WireError(f"{enum.DESCRIPTOR.name} is {value}, which this version does not know") from None
