"""The calling end of the wire: a connection to one address of a node, and the calls over it. No torch."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from secrets import token_bytes
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ruyi_flow.config.security import Keys
from ruyi_flow.errors import NodeError, NodeUnavailable, RequestCancelled, RuyiFlowError, WireError
from ruyi_flow.loop.replicas import estimated_load
from ruyi_flow.requests import GenerateRequest
from ruyi_flow.telemetry.spans import TRACEPARENT, current_span
from ruyi_flow.transport import codec
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.batches import SHORT_BYTES, Batches
from ruyi_flow.transport.checksum import seal
from ruyi_flow.transport.lifeline import Asker, Lifeline
from ruyi_flow.transport.security import open_channel
from ruyi_flow.transport.status import error_of_call, is_of_connection, wrong_answer
from ruyi_flow.types import Event, NodeStatus, Tokenized

__all__ = ["CALL_KEY", "METHODS", "NEVER", "Peer", "trace_metadata"]

METHODS = {
    name: f"/ruyi_flow.v1.Node/{name}"
    for name in ("Session", "Together", "Generate", "Tokenize", "Alive", "Owed", "Status")
}
"""Full names of the calls in protos/ruyi_flow/v1/node.proto."""

CALL_KEY = "ruyi-key-bin"
"""Metadata of a call of `Generate`: random bytes, by which the caller may ask after its answer."""

NEVER = -math.inf
"""The time of what has not happened."""

_MAX_REPLY_BYTES = 64 * 1024 * 1024
"""Largest reply that is read; the longest is the text of a whole answer."""

_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_REPLY_BYTES),
    ("grpc.max_send_message_length", -1),
    # Pings detect a dead link without a reset; a node that comes back is found within a second.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # which counts where it is longer; its default is a minute
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 10_000),  # also how long one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),  # http_proxy is for the web; nodes are dialled at the addresses of the topology
]


def _never() -> bool:
    return False


class Peer:
    """One channel to one node, shared by sessions and calls. It must be made inside a running event loop.

    Args:
        name: the node's name, for messages.
        address: host:port.
        max_message_bytes: the largest message that the node accepts.
        keys: the caller's keys. Default: the connection is not encrypted.

    Raises:
        ConfigError: a file of the keys cannot be used.
    """

    def __init__(self, name: str, address: str, *, max_message_bytes: int, keys: Keys | None = None) -> None:
        self.name, self.address, self.max_message_bytes = name, address, max_message_bytes
        self._channel = open_channel(address, _CHANNEL_OPTIONS, node=name, keys=keys)
        self.session_call = self._channel.stream_stream(METHODS["Session"])
        self.sessions: set[Asker] = set()
        """The sessions and the answers to users that are open over this connection."""
        self.is_lost = False
        """Whether the connection is given up; it takes no new sessions."""
        self.heard_at: float | None = None
        """When the node was last heard."""
        self.avoided_at = NEVER
        """When the connection last failed, or the node was full; it has not been heard since."""
        self.is_draining = False
        """Whether the node has said that it shuts down."""
        self._told_load, self._sessions_then = 0.0, 0
        self.has_others: Callable[[], bool] = _never
        """Returns whether another replica can take over the sessions."""
        self._alive = self._channel.unary_stream(METHODS["Alive"])
        self._lifeline = Lifeline(
            self._alive,
            self._channel.unary_unary(METHODS["Owed"]),
            self.sessions,
            heard=self._heard,
            dropped=self._dropped,
        )
        self._closing: asyncio.Task[None] | None = None
        self.batches = Batches(
            name, address, self._channel.stream_stream(METHODS["Together"]), max_bytes=max_message_bytes
        )
        self._generate = self._channel.unary_stream(METHODS["Generate"])
        self._tokenize = self._channel.unary_unary(METHODS["Tokenize"])
        self._status = self._channel.unary_unary(METHODS["Status"])

    @property
    def state(self) -> str:
        """State of the connection: idle, connecting, ready, transient_failure or shutdown."""
        return str(self._channel.get_state().name.lower())

    def add(self, session: Asker) -> None:
        """Note that a session is open over this connection."""
        self.sessions.add(session)
        self._lifeline.watch()

    def remove(self, session: Asker) -> None:
        """Note that a session has ended. A connection that is lost closes with its last session."""
        self.sessions.discard(session)
        if self.is_lost and not self.sessions:
            self._close_soon()

    @property
    def load(self) -> float:
        """Estimated share of the node's KV cache that is reserved: what it last said, and what was opened since."""
        return estimated_load(self._told_load, len(self.sessions) - self._sessions_then)

    def tell_load(self, load: float) -> None:
        """Take in what the node says about its load."""
        self._told_load, self._sessions_then = load, len(self.sessions)

    def tell_instance(self, instance: bytes) -> None:
        """Take in which process serves a session of this connection."""
        self._lifeline.instances.add(instance)

    def hear(self) -> None:
        """Note that the node is there."""
        self.heard_at, self.avoided_at = time.monotonic(), NEVER

    def avoid(self) -> None:
        """Note that the node should get no new sessions for a moment, if there is another replica."""
        self.avoided_at = time.monotonic()

    def lose(self) -> None:
        """Give up the connection: sessions that can still use it may, and new ones get a new one."""
        self.is_lost = True
        self.avoid()
        if not self.sessions:
            self._close_soon()

    def leave(self) -> None:
        """Note that the node shuts down, and move its sessions if another replica can take them over."""
        self.is_draining = True
        if self.has_others():
            for session in tuple(self.sessions):
                session.leave()

    def _heard(self, sign: pb.Sign | None) -> None:
        """Take in a sign of life, or end all sessions since there is none."""
        if sign is not None:
            self.hear()
            self.tell_load(sign.load)
            if sign.draining and not self.is_draining:
                self.leave()
            return
        self.is_lost = True
        self.avoid()
        for session in tuple(self.sessions):
            session.lose(
                NodeUnavailable(
                    f"node {self.name!r} at {self.address} owes an answer and gives no sign of life: it hangs, or the "
                    "connection is dead",
                    node=self.name,
                    cause="silent",
                )
            )
        self._close_soon()

    def _dropped(self, session: Asker) -> None:
        """End a session that waits in vain, and use the connection for no new ones."""
        self.lose()
        session.lose(
            NodeUnavailable(
                f"node {self.name!r} at {self.address} owes an answer that it does not work for: a message was lost on "
                "the way",
                node=self.name,
                cause="dropped",
            )
        )

    def _close_soon(self) -> asyncio.Task[None]:
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name=f"close the connection to {self.name}")
        return self._closing

    async def generate(self, request: GenerateRequest, *, timeout_s: float) -> AsyncGenerator[Event, None]:
        """Send a user's request to an entry node, and yield its answer token by token.

        Args:
            request: the request.
            timeout_s: seconds that the whole answer may take.

        Raises:
            RequestError: the node refuses the request.
            NodeError: the node or the connection fails.
        """
        key = token_bytes(8)
        metadata = ((CALL_KEY, key), *(trace_metadata(current_span.get().traceparent) or ()))
        data = seal(codec.generate_to_pb(request).SerializeToString())
        call, number = self._generate(data, timeout=timeout_s, metadata=metadata), 0
        answer = _Answer(call, self, key, len(data))
        self.add(answer)
        failure: RuyiFlowError | None = None
        try:
            async with aclosing(aiter(call)) as replies:  # unless closed, it and the call would keep each other alive
                async for data in replies:
                    number += 1
                    self.hear()
                    answer.waiting_since = None
                    # The tokens of a long prompt may be megabytes: the event loop must not wait for their conversion.
                    short = len(data) <= SHORT_BYTES
                    event, instance = _decode(data, number) if short else await asyncio.to_thread(_decode, data, number)
                    if instance:
                        answer.instance = instance
                        self.tell_instance(instance)
                    yield event
                    answer.waiting_since = time.monotonic()
        except grpc.aio.AioRpcError as error:
            if is_of_connection(error):
                self.lose()
            failure = error_of_call(error, self.name, self.address, timeout_s=timeout_s)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Without an error, the connection was closed while the call began: gRPC raises no error of its own then.
            failure = answer.error or RequestCancelled(
                f"the call to node {self.name!r} at {self.address} was cancelled", node=self.name
            )
        except WireError as error:
            failure = wrong_answer(error, self.name)
        finally:
            call.cancel()
            self.remove(answer)
        if failure is not None:
            del call, replies, answer  # whoever keeps the error must not keep the connection open
            raise failure

    async def tokenize(self, request: GenerateRequest, *, timeout_s: float) -> Tokenized:
        """Ask an entry node for the tokens of a request's prompt.

        Args:
            request: the request.
            timeout_s: seconds that the answer may take.

        Raises:
            RequestError: the node refuses the prompt.
            NodeError: the node or the connection fails.
        """
        try:
            data = await self._tokenize(seal(codec.generate_to_pb(request).SerializeToString()), timeout=timeout_s)
            return codec.tokenized_from_pb(codec.parse(pb.Tokenized, data))
        except grpc.aio.AioRpcError as error:
            raise error_of_call(error, self.name, self.address, timeout_s=timeout_s, needs_deeper=False) from None
        except WireError as error:
            raise wrong_answer(error, self.name) from None

    async def status(self, *, timeout_s: float, measure_link: bool = False) -> NodeStatus:
        """Ask what the node contains and does.

        Args:
            timeout_s: seconds that the answer may take.
            measure_link: whether the node measures its link to the next node, which takes it some seconds.

        Raises:
            NodeError: the node cannot be reached.
        """
        try:
            request = pb.StatusRequest(measure_link=measure_link)
            data = await self._status(request.SerializeToString(), timeout=timeout_s)
            return codec.status_from_pb(codec.parse(pb.StatusReply, data))
        except grpc.aio.AioRpcError as error:
            raise error_of_call(
                error, self.name, self.address, timeout_s=timeout_s, needs_deeper=measure_link
            ) from None
        except WireError as error:
            raise wrong_answer(error, self.name) from None

    async def next_sign(self, *, timeout_s: float) -> pb.Sign:
        """Wait for a sign of life.

        Args:
            timeout_s: seconds to wait; a node gives one at once, and then each `SIGN_S`, unless it is stuck.

        Raises:
            NodeError: no node answers, or it is stuck.
        """
        call = self._alive(pb.AliveRequest().SerializeToString(), timeout=timeout_s)
        try:
            if (data := await call.read()) is grpc.aio.EOF:
                raise NodeUnavailable(f"node {self.name!r} ended the signs of life", node=self.name)
            return codec.parse_sealed(pb.Sign, data)
        except grpc.aio.AioRpcError as error:
            raise error_of_call(error, self.name, self.address, timeout_s=timeout_s, needs_deeper=False) from None
        except WireError as error:
            raise wrong_answer(error, self.name) from None
        finally:
            call.cancel()

    async def is_serving(self, *, timeout_s: float) -> bool:
        """Ask the standard health service whether the node takes sessions; it does not while it drains.

        Args:
            timeout_s: seconds that the answer may take.

        Raises:
            NodeError: no node answers.
        """
        try:
            reply = await health_pb2_grpc.HealthStub(self._channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_s
            )
        except grpc.aio.AioRpcError as error:
            raise error_of_call(error, self.name, self.address, timeout_s=timeout_s, needs_deeper=False) from None
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    async def watch_health(self) -> AsyncGenerator[bool, None]:
        """Yield whether the node takes sessions, each time that the standard health service tells it.

        Raises:
            grpc.aio.AioRpcError: the node cannot be reached.
        """
        call = health_pb2_grpc.HealthStub(self._channel).Watch(health_pb2.HealthCheckRequest())
        try:
            async with aclosing(aiter(call)) as replies:
                async for reply in replies:
                    yield reply.status == health_pb2.HealthCheckResponse.SERVING
        finally:
            call.cancel()

    async def close(self) -> None:
        """Close the connection and the sessions over it."""
        await asyncio.shield(self._close_soon())

    @property
    def is_closed(self) -> bool:
        """Whether the connection is closed."""
        return self._closing is not None and self._closing.done()

    async def _close(self) -> None:
        await self._lifeline.close()
        await self.batches.close()
        await self._channel.close()
        self.has_others = _never  # a circle would keep gRPC's objects alive until the garbage collector runs


class _Answer:
    """An answer to a user, which an entry node owes until it is complete.

    Args:
        call: its call.
        peer: the connection to the entry node.
        key: what the node knows the call by.
        size: bytes of the request.
    """

    def __init__(self, call: Any, peer: Peer, key: bytes, size: int) -> None:
        self._call, self._peer = call, peer
        self.key, self.owed_bytes, self.instance = key, size, b""
        self.waiting_since: float | None = time.monotonic()
        self.error: NodeError | None = None
        """Why it was ended here."""

    def check(self, now: float) -> None:
        """The call has a deadline of its own."""

    def leave(self) -> None:
        name = self._peer.name
        self.lose(NodeUnavailable(f"node {name!r} shuts down; the answer moves", node=name, cause="left"))

    def lose(self, error: NodeError) -> None:
        self.error = self.error or error
        self._call.cancel()


def _decode(data: bytes, number: int) -> tuple[Event, bytes]:
    """Decode the event of an answer that must have this number, and its sender's process, which the first one names.

    Raises:
        WireError: it has another one, since one was lost or came twice, or it was changed on its way.
    """
    message = codec.parse_sealed(pb.GenerateReply, data)
    if message.number != number:
        raise WireError(f"event {message.number} of an answer arrived in place of event {number}")
    return codec.reply_from_pb(message), message.instance


def trace_metadata(traceparent: str) -> tuple[tuple[str, str]] | None:
    """Return a call's metadata with the context of a trace; None for an empty one."""
    return ((TRACEPARENT, traceparent),) if traceparent else None
