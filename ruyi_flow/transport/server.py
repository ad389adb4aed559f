"""The serving end of the wire: gRPC calls in, calls of a `Service` out, exceptions as statuses."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, Protocol

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from ruyi_flow.errors import HandshakeError, NodeError, NodeFault, RuyiFlowError, WireError
from ruyi_flow.requests import GenerateRequest, SessionOpen
from ruyi_flow.transport import codec
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.blocks import BlockCodec
from ruyi_flow.transport.client import METHODS
from ruyi_flow.transport.status import NODE_KEY, status_of
from ruyi_flow.types import Final, NodeStatus, Stage, Token, Verdict

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SERVICE", "Server", "Service"]

SERVICE = "ruyi_flow.v1.Node"

_PARTING_S = 5.0
"""How long a caller that was told of a failure may take to end the stream."""

logger = logging.getLogger(__name__)


class Service(Protocol):
    """What a node does for its callers."""

    name: str

    async def open_session(self, opening: SessionOpen, timeout_s: float | None) -> tuple[Stage, Tensor]:
        """A new session on this node's stages, and a tensor whose number format and device its states must have.

        Raises:
            HandshakeError, CapacityError, NodeUnavailable: why not.
        """
        ...

    def generate(self, request: GenerateRequest, timeout_s: float | None) -> AsyncGenerator[Token | Final, None]:
        """Answer a user's request."""
        ...

    def status(self) -> NodeStatus:
        """What the node holds and does."""
        ...


class Server:
    """A gRPC server of one node, with the standard health service.

    Args:
        service: the node.
        address: host:port; port 0 picks a free one.
        max_message_bytes: larger messages are refused.
    """

    def __init__(self, service: Service, address: str, *, max_message_bytes: int) -> None:
        self._service = service
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a second node on the same port must fail, not share it
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ]
        )
        handlers = {
            "Session": grpc.stream_stream_rpc_method_handler(self._session),
            "Generate": grpc.unary_stream_rpc_method_handler(self._generate),
            "Status": grpc.unary_unary_rpc_method_handler(self._status),
        }
        assert handlers.keys() == METHODS.keys()
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self._health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        host = address.rpartition(":")[0]
        try:
            self.address = f"{host}:{self._server.add_insecure_port(address)}"
        except RuntimeError as error:
            raise NodeError(
                f"cannot listen on {address}: {error}; is another process there?", node=service.name
            ) from None

    async def start(self) -> None:
        """Listen, and report SERVING."""
        await self._server.start()
        await self._report(health_pb2.HealthCheckResponse.SERVING)

    async def refuse(self) -> None:
        """Report NOT_SERVING, so that balancers and probes look elsewhere."""
        await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def stop(self) -> None:
        """Close the port, and cancel what still runs a moment later."""
        await self._server.stop(0.2)

    async def _report(self, status: Any) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def _session(self, _: Any, context: Any) -> None:
        name = self._service.name
        async with _Statuses(name, context):
            try:
                await self._converse(context)
            except Exception as error:
                known = _known(error, name)
                failure = pb.Failure(status=status_of(known).value[0], message=_text(known), node=_about(known, name))
                await context.write(pb.SessionReply(failure=failure).SerializeToString())
                with suppress(TimeoutError):
                    async with asyncio.timeout(_PARTING_S):
                        while await context.read() is not grpc.aio.EOF:
                            pass
                raise known from None

    async def _converse(self, context: Any) -> None:
        """A session from its handshake to the stream's end."""
        stage: Stage | None = None
        try:
            while (data := await context.read()) is not grpc.aio.EOF:
                began = time.perf_counter()
                message = codec.parse(pb.SessionRequest, data)
                kind = message.WhichOneof("message")
                if stage is None:
                    if kind != "open":
                        raise WireError(f"a session starts with open, not with {kind}")
                    opening = codec.open_from_pb(_checked_version(message.open, self._service.name))
                    stage, like = await self._service.open_session(opening, context.time_remaining())
                    blocks = BlockCodec(opening.hidden_size, opening.encoding, like)
                    reply = pb.SessionReply(opened=pb.Opened(node=self._service.name))
                elif kind == "block":
                    verdict: Verdict = await stage.advance(blocks.from_pb(message.block))
                    reply = codec.verdict_to_pb(verdict, time.perf_counter() - began)
                elif kind == "rewind":
                    await stage.rewind(message.rewind.position)
                    reply = pb.SessionReply(rewound=pb.Rewound())
                else:
                    raise WireError(f"{kind or 'an empty message'} in the middle of a session")
                await context.write(reply.SerializeToString())
        finally:
            if stage is not None:
                await stage.close()

    async def _generate(self, data: bytes, context: Any) -> None:
        async with _Statuses(self._service.name, context):
            request = codec.generate_from_pb(codec.parse(pb.GenerateRequest, data))
            async with aclosing(self._service.generate(request, context.time_remaining())) as events:
                async for event in events:
                    await context.write(codec.reply_to_pb(event).SerializeToString())

    async def _status(self, data: bytes, context: Any) -> bytes:
        async with _Statuses(self._service.name, context):
            return codec.status_to_pb(self._service.status()).SerializeToString()
        raise AssertionError("abort has raised")


class _Statuses:
    """Ends a call with the status of the exception that leaves the block."""

    def __init__(self, node: str, context: Any) -> None:
        self._node, self._context = node, context

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        # Not of our making, and nothing to tell anyone: cancellation, and gRPC's own abort.
        if error is None or not isinstance(error, Exception) or isinstance(error, grpc.aio.AbortError):
            return
        known = _known(error, self._node)
        await self._context.abort(status_of(known), _text(known), ((NODE_KEY, _about(known, self._node)),))


def _known(error: Exception, node: str) -> RuyiFlowError:
    """An exception as callers know it: of a bug, the log gets all of it, the caller one line."""
    if isinstance(error, RuyiFlowError):
        return error
    logger.error("a call failed", exc_info=error)
    return NodeFault(f"node {node!r} failed on this request: {type(error).__name__}; its log says where", node=node)


def _text(error: RuyiFlowError) -> str:
    """gRPC carries 16 KB of this at most, and would replace all of it by an error of its own."""
    return str(error)[:2000]


def _about(error: RuyiFlowError, node: str) -> str:
    """The node that an error is about: one beyond this one, or this one."""
    return error.node if isinstance(error, NodeError) and error.node else node


def _checked_version(message: pb.Open, node: str) -> pb.Open:
    if message.protocol != codec.PROTOCOL:
        raise HandshakeError(
            f"node {node!r} speaks protocol {codec.PROTOCOL}, the caller {message.protocol}; "
            "run the same version on both",
            node=node,
        )
    return message
