"""The serving end of the wire: turns gRPC calls into calls of a `Service`, and exceptions into statuses."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from secrets import token_bytes
from typing import TYPE_CHECKING, Any, Protocol

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from ruyi_flow.config.security import Keys
from ruyi_flow.errors import (
    CacheMiss,
    HandshakeError,
    NodeError,
    NodeFault,
    PermissionDenied,
    RuyiFlowError,
    Unauthenticated,
    WireError,
)
from ruyi_flow.loop.replicas import SIGN_S
from ruyi_flow.requests import GenerateRequest, SessionOpen
from ruyi_flow.telemetry.spans import NO_TRACER, NODE, TRACEPARENT, Tracer, current_span
from ruyi_flow.transport import codec
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.batches import SHORT_BYTES, Outbox, items_of
from ruyi_flow.transport.blocks import BlockCodec
from ruyi_flow.transport.checksum import check, seal
from ruyi_flow.transport.peer import CALL_KEY, METHODS
from ruyi_flow.transport.security import listen, names_of_caller
from ruyi_flow.transport.status import NODE_KEY, short_text, status_of
from ruyi_flow.types import Event, NodeStatus, PromptTokens, Stage, Tokenized

if TYPE_CHECKING:
    import torch

__all__ = ["HEALTH_CALLS", "NEEDS", "SERVICE", "Access", "Role", "Server", "Service"]

SERVICE = "ruyi_flow.v1.Node"

_PARTING_S = 5.0
"""Seconds that a caller may take to end the stream after a failure was sent to it."""

_OPEN_BYTES = 256 * 1024
"""Largest handshake: it has a policy and some token ids, and its options are checked on the event loop."""

_MOST_OWED = 4096
"""Largest number of answers that a caller may ask after at once, since the event loop looks them up without a pause."""

logger = logging.getLogger(__name__)


HEALTH_CALLS = ("Check", "List", "Watch")
"""The calls of the standard health service."""


class Role(StrEnum):
    """What a caller is to a node."""

    BEFORE = "a node that the topology places before this one"
    SELF = "this node itself or its supervisor"
    USER = "a user of the deployment"


NEEDS: dict[str, tuple[frozenset[Role], frozenset[Role]]] = {
    "Session": (frozenset({Role.BEFORE}), frozenset()),
    "Together": (frozenset({Role.BEFORE}), frozenset()),
    "Generate": (frozenset(), frozenset({Role.USER})),
    "Tokenize": (frozenset(), frozenset({Role.USER})),
    "Alive": (frozenset({Role.BEFORE, Role.SELF}), frozenset({Role.USER, Role.SELF})),
    "Owed": (frozenset({Role.BEFORE}), frozenset({Role.USER})),
    "Status": (frozenset(Role), frozenset({Role.USER, Role.SELF})),
    **{call: (frozenset(Role), frozenset({Role.USER, Role.SELF})) for call in HEALTH_CALLS},
}
"""Who may make each call, and each of the health service: at a deeper node, and at the entry node."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may call a node.

    The names are those of certificates; see `config.security.node_identity`.
    """

    keys: Keys
    """The node's keys."""
    own: str
    """The node's own name, which its replicas have too."""
    before: frozenset[str]
    """Names of the nodes before it."""
    is_entry: bool
    """Whether it is the entry node."""

    def check(self, call: str, context: Any, node: str) -> None:
        """Check that a caller may make a call.

        Args:
            call: the call, a key of `NEEDS`.
            context: gRPC's context of it.
            node: the node's name, for messages.

        Raises:
            Unauthenticated: the caller's certificate names nobody of this deployment.
            PermissionDenied: the caller is known, and this call is not for it.
        """
        names = names_of_caller(context)
        roles = {Role.BEFORE} if names & self.before else set()
        roles |= {Role.SELF} if self.own in names else set()
        users = f".users.{self.keys.deployment}.ruyi-flow"
        roles |= {Role.USER} if any(name.endswith(users) for name in names) else set()
        if roles & NEEDS[call][self.is_entry]:
            return
        shown = ", ".join(sorted(name for name in names if name.endswith(".ruyi-flow"))) or "nobody"
        if not any(name.endswith(f".{self.keys.deployment}.ruyi-flow") for name in names):
            raise Unauthenticated(
                f"node {node!r} belongs to deployment {self.keys.deployment!r}; the certificate of this TLS 1.3 "
                f"connection names {shown}; ruyi-flow keys check tells which files are in use",
                node=node,
            )
        allowed = " or ".join(sorted(NEEDS[call][self.is_entry])) or "nobody"
        raise PermissionDenied(f"node {node!r} answers {call} to {allowed}; the caller is {shown}", node=node)


class Service(Protocol):
    """The calls that a node answers."""

    name: str
    """The node's name."""
    dtype: torch.dtype
    """Number format of the boundary states that its stages take."""
    device: torch.device
    """Device of the boundary states that its stages take."""

    async def open_session(self, opening: SessionOpen, timeout_s: float | None) -> Stage:
        """Open a session on this node's stages.

        Raises:
            HandshakeError, CapacityError, NodeUnavailable, RequestError: the session is refused.
        """
        ...

    def generate(self, request: GenerateRequest, timeout_s: float | None) -> AsyncGenerator[Event, None]:
        """Answer a user's request."""
        ...

    async def tokenize(self, request: GenerateRequest) -> Tokenized:
        """Return the tokens of a request's prompt."""
        ...

    def load(self) -> float | None:
        """Return the share of the KV cache that is reserved, 0 to 1; None while the node is stuck."""
        ...

    async def status(self, *, measure_link: bool) -> NodeStatus:
        """Return what the node contains and does, and how its link to the next node is if that is asked for."""
        ...


class Server:
    """The gRPC server of one node, with the standard health service.

    Args:
        service: the node.
        address: host:port to listen on; port 0 picks a free port.
        max_message_bytes: the largest message that is accepted.
        tracer: records requests and sessions.
        access: who may call it, and its keys. Default: everyone, and connections are not encrypted.

    Raises:
        NodeError: it cannot listen on the address.
        ConfigError: a file of its keys cannot be used.
    """

    def __init__(
        self,
        service: Service,
        address: str,
        *,
        max_message_bytes: int,
        tracer: Tracer = NO_TRACER,
        access: Access | None = None,
    ) -> None:
        logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_lost_call)
        self._service, self._tracer, self._access = service, tracer, access
        self._sessions: dict[tuple[str, int], _Session] = {}
        """The open sessions, by connection and number."""
        self._by_key: dict[bytes, _Session] = {}
        """The open sessions whose callers have named them."""
        self._beginning: set[bytes] = set()
        """Keys of the sessions that are being opened, and of the calls of users that are being served."""
        self._draining = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._numbers = itertools.count(1)
        self._instance = token_bytes(8)
        """What tells this process from other nodes, and from itself after a restart."""
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a second node on the same port must fail, not share it
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.ping_timeout_ms", 10_000),  # which counts where it is longer; its default is a minute
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ]
        )
        handlers = {
            "Session": grpc.stream_stream_rpc_method_handler(self._guarded("Session", self._session)),
            "Together": grpc.stream_stream_rpc_method_handler(self._guarded("Together", self._together)),
            "Generate": grpc.unary_stream_rpc_method_handler(self._guarded("Generate", self._generate)),
            "Alive": grpc.unary_stream_rpc_method_handler(self._guarded("Alive", self._alive)),
            "Owed": grpc.unary_unary_rpc_method_handler(self._guarded("Owed", self._owed)),
            "Tokenize": grpc.unary_unary_rpc_method_handler(self._guarded("Tokenize", self._tokenize)),
            "Status": grpc.unary_unary_rpc_method_handler(self._guarded("Status", self._status)),
        }
        assert handlers.keys() == METHODS.keys()
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self._health = HealthServicer()
        for call in HEALTH_CALLS:
            setattr(self._health, call, self._guarded(call, getattr(self._health, call)))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        host = address.rpartition(":")[0]
        try:
            self.address = f"{host}:{listen(self._server, address, None if access is None else access.keys)}"
        except RuntimeError as error:
            raise NodeError(f"node {service.name!r} cannot listen on {address}: {error}", node=service.name) from None

    def _guarded(self, call: str, answer: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        """Return a handler that answers a call only to who may make it."""
        access = self._access
        if access is None:
            return answer

        async def check_and_answer(request: Any, context: Any) -> Any:
            async with _Statuses(self._service.name, context):
                access.check(call, context, self._service.name)
            return await answer(request, context)

        return check_and_answer

    async def start(self) -> None:
        """Start to listen, and report SERVING."""
        await self._server.start()
        await self._report(health_pb2.HealthCheckResponse.SERVING)
        self._watching = asyncio.create_task(self._watch(), name=f"health of {self._service.name}")

    async def refuse(self) -> None:
        """Report NOT_SERVING, so that others choose another node, and ask callers to move their sessions there."""
        self._draining.set()
        if self._watching is not None:
            self._watching.cancel()
        await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
        leaving = seal(pb.SessionReply(leaving=pb.Leaving()).SerializeToString())
        await asyncio.gather(
            *(session.write(leaving) for session in list(self._sessions.values())), return_exceptions=True
        )

    async def stop(self) -> None:
        """Close the port, and cancel the calls that still run a moment later."""
        await self._server.stop(0.2)

    async def _watch(self) -> None:
        """Report NOT_SERVING as long as the compute thread is stuck."""
        was_stuck = False
        while True:
            await asyncio.sleep(SIGN_S)
            is_stuck = self._service.load() is None
            if is_stuck != was_stuck:
                was_stuck = is_stuck
                answer = health_pb2.HealthCheckResponse
                await self._report(answer.NOT_SERVING if is_stuck else answer.SERVING)

    async def _report(self, status: Any) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def _session(self, _: Any, context: Any) -> None:
        name = self._service.name
        async with _Statuses(name, context):
            try:
                with self._traced("session", context):
                    await self._converse(context)
            except grpc.aio.BaseError:
                raise
            except Exception as error:
                known = _known(error, name)
                await context.write(seal(_failure(known, name).SerializeToString()))
                with suppress(TimeoutError):
                    async with asyncio.timeout(_PARTING_S):
                        while await context.read() is not grpc.aio.EOF:
                            pass
                raise known from None

    async def _converse(self, context: Any) -> None:
        """Serve a session from its handshake to the end of its stream."""
        if (data := await context.read()) is grpc.aio.EOF:
            return
        service, key = self._service, (context.peer(), next(self._numbers))
        opening = _handshake(check(data), service.name)
        blocks = BlockCodec(opening.hidden_size, opening.encoding, service.dtype, service.device)
        with self._serving(opening.key):
            if opening.key:
                await self._end(opening.key)
            stage = await service.open_session(opening, context.time_remaining())
        session = self._sessions[key] = _Session(stage, blocks, context.write)
        if opening.key:
            self._by_key[opening.key] = session
        try:
            load = service.load() or 0.0
            opened = pb.Opened(node=service.name, session=key[1], load=load, instance=self._instance)
            await session.write(seal(pb.SessionReply(opened=opened).SerializeToString()))
            while (data := await context.read()) is not grpc.aio.EOF:
                began = time.perf_counter()
                session.accept()
                reply = await session.answer(check(data), began)
                await session.write(seal(reply.SerializeToString()))
        finally:
            del self._sessions[key]
            if self._by_key.get(opening.key) is session:
                del self._by_key[opening.key]
            await session.close()

    async def _end(self, key: bytes) -> None:
        """End the session that is still open under a key: its caller has lost the connection and comes back."""
        session = self._by_key.get(key)
        if session is not None:
            session.task.cancel()
            await asyncio.wait([session.task])

    async def _together(self, _: Any, context: Any) -> None:
        """Serve batches of messages of many sessions; each message is answered as soon as possible."""
        async with _Statuses(self._service.name, context):
            peer, outbox = context.peer(), Outbox()
            writing = asyncio.create_task(outbox.empty_into(context.write))
            answering: set[asyncio.Task[None]] = set()
            try:
                while (data := await context.read()) is not grpc.aio.EOF:
                    began = time.perf_counter()
                    for item in items_of(data):
                        if (session := self._sessions.get((peer, item.session))) is None:
                            outbox.put(item.session, b"")
                            continue
                        try:
                            session.accept()
                        except WireError as error:
                            outbox.put(item.session, _failure(error, self._service.name).SerializeToString())
                            continue
                        task = session.answering = asyncio.create_task(self._answer(session, item, began, outbox))
                        answering.add(task)
                        task.add_done_callback(answering.discard)
                    await outbox.room()  # a caller that does not read its answers is not read either
            finally:
                for task in answering:
                    task.cancel()
                outbox.close()
                await writing  # gRPC refuses to end a call with a status while a write is under way

    async def _answer(self, session: _Session, item: pb.Item, began: float, outbox: Outbox) -> None:
        """Answer one session's message in a batch; a failure concerns that session only."""
        try:
            reply = await session.answer(item.message, began)
        except Exception as error:
            reply = _failure(_known(error, self._service.name), self._service.name)
        outbox.put(item.session, reply.SerializeToString())

    async def _alive(self, data: bytes, context: Any) -> None:
        """Give signs of life until the caller ends the stream; a node that shuts down says so at once."""
        async with _Statuses(self._service.name, context):
            while True:
                if (load := self._service.load()) is not None:
                    sign = pb.Sign(draining=self._draining.is_set(), load=load)
                    await context.write(seal(sign.SerializeToString()))
                await asyncio.sleep(SIGN_S)

    async def _owed(self, data: bytes, context: Any) -> bytes:
        """Tell a caller whose answers are late what is done about them."""
        async with _Statuses(self._service.name, context):
            keys = codec.parse_sealed(pb.OwedRequest, data).keys
            if len(keys) > _MOST_OWED:
                raise WireError(f"a question after {len(keys)} answers; at most {_MOST_OWED} are allowed")
            reply = pb.OwedReply(work=[self._work(key) for key in keys], instance=self._instance)
            return seal(reply.SerializeToString())
        raise AssertionError("abort has raised")

    def _work(self, key: bytes) -> Any:
        if key in self._beginning:
            return pb.WORK_UNDER_WAY
        session = self._by_key.get(key)
        if session is None:
            return pb.WORK_UNKNOWN
        return pb.WORK_UNDER_WAY if session.is_answering else pb.WORK_NONE

    @contextmanager
    def _serving(self, key: bytes | str | None) -> Iterator[None]:
        """Know a session or a call by its key while the block lasts, if it has one."""
        if not isinstance(key, bytes) or not key:
            yield
            return
        self._beginning.add(key)
        try:
            yield
        finally:
            self._beginning.discard(key)

    async def _generate(self, data: bytes, context: Any) -> None:
        async with _Statuses(self._service.name, context):
            with self._traced("request", context), self._serving(_metadata(context, CALL_KEY)):
                request = await _request(data)
                async with aclosing(self._service.generate(request, context.time_remaining())) as events:
                    number = 0
                    async for event in events:
                        number += 1
                        # The tokens of a long prompt may be megabytes, and the event loop must not wait for them.
                        is_long = isinstance(event, PromptTokens)
                        instance = self._instance if number == 1 else b""
                        encode = partial(_encode, event, number, instance)
                        await context.write(await asyncio.to_thread(encode) if is_long else encode())

    async def _tokenize(self, data: bytes, context: Any) -> bytes:
        async with _Statuses(self._service.name, context):
            tokenized = await self._service.tokenize(await _request(data))
            return codec.tokenized_to_pb(tokenized).SerializeToString()
        raise AssertionError("abort has raised")

    async def _status(self, data: bytes, context: Any) -> bytes:
        async with _Statuses(self._service.name, context):
            request = codec.parse(pb.StatusRequest, data)
            status = await self._service.status(measure_link=request.measure_link)
            return codec.status_to_pb(status).SerializeToString()
        raise AssertionError("abort has raised")

    @contextmanager
    def _traced(self, name: str, context: Any) -> Iterator[None]:
        """Make a span the current one for the block. Callers end sessions by cancelling them, which is no error."""
        with self._tracer.start(name, _traceparent(context), **{NODE: self._service.name}) as span:
            token = current_span.set(span)
            try:
                yield
            except asyncio.CancelledError:
                if name == "session":
                    span.end()
                raise
            finally:
                current_span.reset(token)


def _traceparent(context: Any) -> str | None:
    """Return a caller's context of a trace, which is not checked yet."""
    value = _metadata(context, TRACEPARENT)
    return value if isinstance(value, str) else None


def _metadata(context: Any, name: str) -> str | bytes | None:
    """Return what a caller has sent under a name with a call."""
    return next((value for key, value in context.invocation_metadata() or () if key == name), None)


def _encode(event: Event, number: int, instance: bytes) -> bytes:
    reply = codec.reply_to_pb(event)
    reply.number, reply.instance = number, instance
    return seal(reply.SerializeToString())


async def _request(data: bytes) -> GenerateRequest:
    """Decode a user's request."""
    # A request of megabytes may have a million parts, and the event loop must not wait for their conversion.
    decode = codec.generate_from_bytes
    return decode(data) if len(data) <= SHORT_BYTES else await asyncio.to_thread(decode, data)


class _Session:
    """An open session.

    Args:
        stage: answers its blocks.
        blocks: decodes them.
        write: writes to its stream.
    """

    def __init__(self, stage: Stage, blocks: BlockCodec, write: Callable[[bytes], Awaitable[None]]) -> None:
        self._stage, self._blocks, self._ready = stage, blocks, True
        self._write, self._writing = write, asyncio.Lock()
        task = asyncio.current_task()
        assert task is not None
        self.task: asyncio.Task[Any] = task
        """The task that serves its stream."""
        self.answering: asyncio.Task[None] | None = None
        """The task that answers its message in a batch; there is never more than one."""

    async def write(self, data: bytes) -> None:
        """Write a message to the session's stream, which takes one at a time."""
        async with self._writing:
            await self._write(data)

    @property
    def is_answering(self) -> bool:
        """Whether a message has arrived that is not answered yet."""
        return not self._ready

    def accept(self) -> None:
        """Begin with a message; no other is accepted until `answer` has returned.

        A message whose answer fails or is cancelled is the last one: a step may still be running for it, and nobody
        knows which positions the session has by then.

        Raises:
            WireError: the session accepts no message now.
        """
        if not self._ready:
            raise WireError("a message arrived before the last message was answered, or after one that failed")
        self._ready = False

    async def answer(self, data: bytes, began: float) -> pb.SessionReply:
        """Return the reply to the accepted message.

        Args:
            data: the message.
            began: when it arrived.

        Raises:
            WireError: the message is not allowed here.
            NodeError: the stage fails.
        """
        message = codec.parse(pb.SessionRequest, data)
        kind = message.WhichOneof("message")
        if kind == "block":
            block = self._blocks.from_pb(message.block)
            verdict = await self._stage.advance(block)
            reply = codec.verdict_to_pb(verdict, time.perf_counter() - began, block.start + len(block.token_ids))
        elif kind == "rewind":
            await self._stage.rewind(message.rewind.position)
            reply = pb.SessionReply(rewound=pb.Rewound(position=message.rewind.position))
        else:
            raise WireError(f"{kind or 'an empty message'} is not allowed in the middle of a session")
        self._ready = True
        return reply

    async def close(self) -> None:
        """End the session and cancel its answer without waiting, since the caller may be cancelled meanwhile.

        The cancelled answer submits no more work, and the stage frees its KV cache after the step that may be running.
        """
        if self.answering is not None:
            self.answering.cancel()
        await self._stage.close()


class _Statuses:
    """Ends a call with the status of the exception that leaves its block."""

    def __init__(self, node: str, context: Any) -> None:
        self._node, self._context = node, context

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None or not isinstance(error, Exception) or isinstance(error, grpc.aio.AbortError):
            return  # there is nothing to report, or it is reported already
        try:
            if isinstance(error, grpc.aio.BaseError):
                raise error
            known = _known(error, self._node)
            await self._context.abort(status_of(known), short_text(known), ((NODE_KEY, _about(known, self._node)),))
        except grpc.aio.AbortError:
            raise
        except grpc.aio.BaseError:  # the connection is lost; gRPC would log a trace, but not of a cancellation
            raise asyncio.CancelledError from None


def _is_no_lost_call(record: logging.LogRecord) -> bool:
    """Leave two traces out of gRPC's log: of a call whose connection was lost when its status was to be sent, and of
    one that the end of the server cancelled before it began."""
    lost = (grpc.aio.InternalError, asyncio.CancelledError)
    return not (record.exc_info and isinstance(record.exc_info[1], lost))


def _known(error: Exception, node: str) -> RuyiFlowError:
    """Return an exception that callers know; a bug is logged with its trace, and the caller gets one line."""
    if isinstance(error, RuyiFlowError):
        return error
    logger.error("a call failed", exc_info=error)
    name = type(error).__name__
    return NodeFault(f"node {node!r} failed on this request with {name}; its log has the details", node=node)


def _failure(error: RuyiFlowError, node: str) -> pb.SessionReply:
    """Return the message that tells a caller why its session ends."""
    failure = pb.Failure(status=status_of(error).value[0], message=short_text(error), node=_about(error, node))
    if isinstance(error, CacheMiss):
        failure.position = error.position
    return pb.SessionReply(failure=failure)


def _about(error: RuyiFlowError, node: str) -> str:
    """Return the node that an error is about: a deeper one, or this one."""
    return error.node if isinstance(error, NodeError) and error.node else node


def _handshake(data: bytes, node: str) -> SessionOpen:
    """Parse the first message of a session.

    Raises:
        WireError: it is not a handshake.
        HandshakeError: the caller has another version of the protocol.
    """
    if len(data) > _OPEN_BYTES:
        raise WireError(f"a session must start with open; this message has {len(data)} bytes, more than {_OPEN_BYTES}")
    message = codec.parse(pb.SessionRequest, data)
    if not message.HasField("open"):
        raise WireError(f"a session must start with open, not with {message.WhichOneof('message')}")
    if message.open.protocol != codec.PROTOCOL:
        raise HandshakeError(
            f"node {node!r} has protocol version {codec.PROTOCOL}, the caller {message.open.protocol}; "
            "run the same version of ruyi-flow on both",
            node=node,
        )
    return codec.open_from_pb(message.open)
