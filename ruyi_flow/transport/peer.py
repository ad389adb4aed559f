"""The calling end of the wire: a connection to a node, and the calls over it. No torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ruyi_flow.errors import WireError
from ruyi_flow.requests import GenerateRequest
from ruyi_flow.telemetry.spans import TRACEPARENT, current_span
from ruyi_flow.transport import codec
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.batches import SHORT_BYTES, Batches
from ruyi_flow.transport.status import error_of_call, wrong_answer
from ruyi_flow.types import Event, NodeStatus, Tokenized

__all__ = ["METHODS", "Peer", "trace_metadata"]

METHODS = {name: f"/ruyi_flow.v1.Node/{name}" for name in ("Session", "Together", "Generate", "Tokenize", "Status")}
"""Full names of the calls in protos/ruyi_flow/v1/node.proto."""

_MAX_REPLY_BYTES = 64 * 1024 * 1024
"""Largest reply that is read; the longest is the text of a whole answer."""

_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_REPLY_BYTES),
    ("grpc.max_send_message_length", -1),
    # Pings detect a dead link without a reset; a node that comes back is found within a second.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 10_000),  # also how long one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),  # http_proxy is for the web; nodes are dialled at the addresses of the topology
]


class Peer:
    """One channel to one node, shared by sessions and calls. It must be made inside a running event loop.

    Args:
        name: the node's name, for messages.
        address: host:port.
        max_message_bytes: the largest message that the node accepts.
    """

    def __init__(self, name: str, address: str, *, max_message_bytes: int) -> None:
        self.name, self.address, self.max_message_bytes = name, address, max_message_bytes
        self._channel = grpc.aio.insecure_channel(address, _CHANNEL_OPTIONS)
        self.session_call = self._channel.stream_stream(METHODS["Session"])
        self.sessions = 0
        """Number of sessions that are open over this connection."""
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

    async def generate(self, request: GenerateRequest, *, timeout_s: float) -> AsyncGenerator[Event, None]:
        """Send a user's request to an entry node, and yield its answer token by token.

        Args:
            request: the request.
            timeout_s: seconds that the whole answer may take.

        Raises:
            RequestError: the node refuses the request.
            NodeError: the node or the connection fails.
        """
        metadata = trace_metadata(current_span.get().traceparent)
        call = self._generate(codec.generate_to_pb(request).SerializeToString(), timeout=timeout_s, metadata=metadata)
        try:
            async for data in call:
                # The tokens of a long prompt may be megabytes, and the event loop must not wait for their conversion.
                yield _decode(data) if len(data) <= SHORT_BYTES else await asyncio.to_thread(_decode, data)
        except grpc.aio.AioRpcError as error:
            raise error_of_call(error, self.name, self.address, timeout_s=timeout_s) from None
        except WireError as error:
            raise wrong_answer(error, self.name) from None
        finally:
            call.cancel()

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
            data = await self._tokenize(codec.generate_to_pb(request).SerializeToString(), timeout=timeout_s)
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

    async def close(self) -> None:
        """Close the connection and the sessions over it."""
        await self.batches.close()
        await self._channel.close()


def _decode(data: bytes) -> Event:
    return codec.reply_from_pb(codec.parse(pb.GenerateReply, data))


def trace_metadata(traceparent: str) -> tuple[tuple[str, str]] | None:
    """Return a call's metadata with the context of a trace; None for an empty one."""
    return ((TRACEPARENT, traceparent),) if traceparent else None
