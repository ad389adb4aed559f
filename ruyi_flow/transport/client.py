"""The calling end of the wire: a peer, and a stage that lives there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Any, NoReturn

import grpc

from ruyi_flow.errors import DeadlineExceeded, NodeUnavailable, WireError
from ruyi_flow.requests import GenerateRequest, SessionOpen
from ruyi_flow.transport import codec
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.status import error_of
from ruyi_flow.types import Block, Final, Hop, NodeStatus, Token, Verdict

__all__ = ["METHODS", "Peer", "RemoteStage"]

METHODS = {name: f"/ruyi_flow.v1.Node/{name}" for name in ("Session", "Generate", "Status")}
"""Full names of the calls in protos/ruyi_flow/v1/node.proto."""

_CHUNK = 512
"""Positions in a message at the most, so that a node can start on a long prompt before all of it is there."""

_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A dead link without a reset is noticed by pings; a node that comes back is found within a second.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 10_000),  # also how long one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
]


class Peer:
    """One channel to one node; sessions and calls share it. Make it inside a running event loop.

    Args:
        name: the node's name, for messages.
        address: host:port.
        max_message_bytes: the largest message that the node takes.
    """

    def __init__(self, name: str, address: str, *, max_message_bytes: int) -> None:
        self.name, self.address, self.max_message_bytes = name, address, max_message_bytes
        self._channel = grpc.aio.insecure_channel(address, _CHANNEL_OPTIONS)
        self.session_call = self._channel.stream_stream(METHODS["Session"])
        self._generate = self._channel.unary_stream(METHODS["Generate"])
        self._status = self._channel.unary_unary(METHODS["Status"])

    @property
    def state(self) -> str:
        """Of the connection: idle, connecting, ready, transient_failure or shutdown."""
        return str(self._channel.get_state().name.lower())

    async def generate(self, request: GenerateRequest, *, timeout_s: float) -> AsyncGenerator[Token | Final, None]:
        """A user's request to an entry node, answered token by token.

        Raises:
            RequestError, NodeError: as the node says, or as the connection fails.
        """
        call = self._generate(codec.generate_to_pb(request).SerializeToString(), timeout=timeout_s)
        try:
            async for data in call:
                for event in codec.reply_from_pb(codec.parse(pb.GenerateReply, data)):
                    yield event
        except grpc.aio.AioRpcError as error:
            raise error_of(error, self.name, self.address) from None
        finally:
            call.cancel()

    async def status(self, *, timeout_s: float) -> NodeStatus:
        """What the node holds and does.

        Raises:
            NodeError: it cannot be reached.
        """
        try:
            data = await self._status(pb.StatusRequest().SerializeToString(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise error_of(error, self.name, self.address) from None
        return codec.status_from_pb(codec.parse(pb.StatusReply, data))

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()


class RemoteStage:
    """The next node's stages, over one bidirectional stream: a `Stage`.

    The stream opens with the first block, and the handshake travels with it, so a session costs no extra round trip.

    Args:
        peer: the node.
        opening: the handshake.
        timeout_s: deadline of one answer.
        session_timeout_s: deadline of the whole session; None for none.
    """

    def __init__(
        self, peer: Peer, opening: SessionOpen, *, timeout_s: float, session_timeout_s: float | None = None
    ) -> None:
        self._peer, self._opening, self._timeout_s, self._session_timeout_s = (
            peer,
            opening,
            timeout_s,
            session_timeout_s,
        )
        self._call: Any = None
        size = codec.row_bytes(opening.hidden_size, opening.encoding) + 16  # 16: its token id and its part of the frame
        self._rows = max(1, min(_CHUNK, (peer.max_message_bytes - 1024) // size))

    async def advance(self, block: Block) -> Verdict:
        """See `Stage.advance`."""
        began = time.perf_counter()
        opening = self._call is None
        if opening:
            self._call = self._peer.session_call(timeout=self._session_timeout_s)
        messages = [codec.block_to_pb(b, self._opening.encoding).SerializeToString() for b in self._split(block)]
        up = sum(map(len, messages))
        if opening:
            messages.insert(0, codec.open_to_pb(self._opening).SerializeToString())
        verdicts = []
        down, elapsed_s = 0, 0.0
        for reply, size in await self._exchange(messages):
            if reply.WhichOneof("message") == "verdict":
                verdicts.append(codec.verdict_from_pb(reply.verdict))
                elapsed_s += reply.verdict.elapsed_s
                down += size
        if len(verdicts) != len(messages) - opening or not all(v.hops for v in verdicts):
            raise WireError(f"{len(verdicts)} verdicts for {len(messages) - opening} blocks", node=self._peer.name)
        hops: dict[str, Hop] = {}
        for verdict in verdicts:
            for hop in verdict.hops:
                hops.setdefault(hop.node, Hop(hop.node)).add(hop)
        mine = next(iter(hops.values()))
        mine.add(
            Hop(
                mine.node,
                wire_s=max(0.0, time.perf_counter() - began - elapsed_s),
                messages=len(verdicts),
                positions=len(block.token_ids),
                bytes_up=up,
                bytes_down=down,
            )
        )
        return Verdict(verdicts[-1].decisions, tuple(hops.values()))

    async def rewind(self, position: int) -> None:
        """See `Stage.rewind`."""
        if self._call is not None:
            await self._exchange([pb.SessionRequest(rewind=pb.Rewind(position=position)).SerializeToString()])

    async def close(self) -> None:
        """See `Stage.close`: the stream's end is the session's end."""
        if self._call is not None:
            self._call.cancel()

    async def _exchange(self, messages: list[bytes]) -> list[tuple[pb.SessionReply, int]]:
        """Write messages and read a reply to each, with its size."""
        call, replies = self._call, []
        try:
            async with asyncio.timeout(self._timeout_s) as timer:
                for message in messages:
                    await call.write(message)
                for _ in messages:
                    data = await call.read()
                    if data is grpc.aio.EOF:
                        await self._fail()
                    replies.append((codec.parse(pb.SessionReply, data), len(data)))
                    timer.reschedule(asyncio.get_running_loop().time() + self._timeout_s)  # it is alive
        except TimeoutError:
            call.cancel()
            raise DeadlineExceeded(
                f"node {self._peer.name!r} at {self._peer.address} gave no answer within {self._timeout_s:g} s; "
                "it, or a node beyond it, hangs",
                node=self._peer.name,
            ) from None
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the latter: written to a stream that has ended
            await self._fail()
        return replies

    async def _fail(self) -> NoReturn:
        """Raise what the stream's final status means."""
        call = self._call
        code, details = await call.code(), await call.details()
        if code is grpc.StatusCode.OK:
            raise NodeUnavailable(f"node {self._peer.name!r} ended the session", node=self._peer.name)
        failure = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), await call.trailing_metadata(), details)
        raise error_of(failure, self._peer.name, self._peer.address)

    def _split(self, block: Block) -> Iterator[Block]:
        """A long block as several, whose wanted positions are all in the last one."""
        n = len(block.token_ids)
        first_wanted = (block.wants[0] if block.wants else block.start + n - 1) - block.start
        start = 0
        while n - start > self._rows and start < first_wanted:
            stop = min(start + self._rows, first_wanted)
            yield replace(
                block,
                start=block.start + start,
                states=block.states[start:stop],
                token_ids=block.token_ids[start:stop],
                wants=(),
            )
            start = stop
        if start:
            block = replace(
                block, start=block.start + start, states=block.states[start:], token_ids=block.token_ids[start:]
            )
        yield block
