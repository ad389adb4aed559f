"""A stage that lives on another node."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import grpc

from ruyi_flow.errors import DeadlineExceeded, NodeUnavailable, WireError
from ruyi_flow.requests import SessionOpen
from ruyi_flow.transport import codec
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.blocks import BlockCodec, rows_in
from ruyi_flow.transport.peer import Peer
from ruyi_flow.transport.status import error_of, error_of_call
from ruyi_flow.types import Block, Hop, Verdict

__all__ = ["RemoteStage"]

_ROWS = 512
"""Positions in a message at the most, so that a node can start on a long prompt before all of it is there."""


class RemoteStage:
    """The next node's stages, over one bidirectional stream: a `Stage`.

    The stream opens with the first block, and the handshake travels with it, so a session costs no extra round trip.
    While other sessions are open with that node, short blocks go together with theirs, and this stream only keeps the
    session.

    Args:
        peer: the node.
        opening: the handshake.
        timeout_s: deadline of one answer.
        session_timeout_s: deadline of the whole session; None for none.
    """

    def __init__(
        self, peer: Peer, opening: SessionOpen, *, timeout_s: float, session_timeout_s: float | None = None
    ) -> None:
        self._peer, self._opening = peer, opening
        self._timeout_s, self._session_timeout_s = timeout_s, session_timeout_s
        self._blocks = BlockCodec(opening.hidden_size, opening.encoding)
        self._rows = min(_ROWS, rows_in(peer.max_message_bytes, opening.hidden_size, opening.encoding))
        self._call: Any = None
        self._number = 0
        """Of the session in batches; 0 while it is not known, or of no use there."""
        self._answer: asyncio.Future[Any] | None = None
        """To what has gone with others'."""
        self._reading: asyncio.Future[Any] | None = None
        """A read that `arrived` has begun, and left when it was cancelled."""
        self._replies: list[tuple[pb.SessionReply, int]] = []
        """That were read and have not been told."""
        self._owed = 0
        """Messages that were written and whose replies have not been read."""
        self._fed_positions = self._fed_bytes = 0
        """What `feed` has sent since the last `advance`."""
        self._waiting_since: float | None = None
        """When the node last gave a sign of life, while an answer of it is awaited."""
        self._late = self._closed = False
        self._timer: asyncio.TimerHandle | None = None

    async def advance(self, block: Block) -> Verdict:
        """See `Stage.advance`."""
        began = time.perf_counter()
        messages = self._messages(block)
        verdicts: list[Verdict] = []
        early, bytes_down, elapsed_s = len(self._replies), 0, 0.0
        try:
            for i, (reply, size) in enumerate(await self._exchange(messages)):
                if reply.HasField("verdict"):
                    verdict = codec.verdict_from_pb(reply.verdict)
                    if not verdict.hops:
                        raise WireError("a verdict of no node")
                    verdicts.append(verdict)
                    bytes_down += size
                    elapsed_s += reply.verdict.elapsed_s if i >= early else 0.0
            if not verdicts:
                raise WireError("no verdict on a block")
        except WireError as error:
            if error.node is None:
                raise WireError(f"node {self._peer.name!r} answered: {error}", node=self._peer.name) from None
            raise
        hops = _sum(verdicts)
        mine = hops[0]
        mine.messages += len(verdicts)
        mine.positions += self._fed_positions + len(block.token_ids)
        mine.bytes_up += self._fed_bytes + sum(map(len, messages))
        mine.bytes_down += bytes_down
        mine.wire_s += max(0.0, time.perf_counter() - began - elapsed_s)
        self._fed_positions = self._fed_bytes = 0
        return Verdict(verdicts[-1].decisions, hops)

    async def feed(self, block: Block) -> None:
        """See `Stage.feed`: the node's answers are read by the next `advance`."""
        messages = self._messages(block)
        await self._exchange(messages, wait=False)
        self._fed_positions += len(block.token_ids)
        self._fed_bytes += sum(map(len, messages))

    def _messages(self, block: Block) -> list[bytes]:
        """A block as it goes on the wire; the session's first one has the handshake in front."""
        messages = [self._blocks.to_bytes(b) for b in self._split(block)]
        if self._call is None:
            self._call = self._peer.session_call(timeout=self._session_timeout_s)
            self._call.add_done_callback(self._ended)
            self._peer.sessions += 1
            self._watch()
            messages.insert(0, codec.open_to_pb(self._opening).SerializeToString())
        return messages

    async def arrived(self) -> None:
        """See `Stage.arrived`: what the node has to say of it is told with the next answer."""
        if self._owed:
            await self._exchange((), keep=True)

    async def rewind(self, position: int) -> None:
        """See `Stage.rewind`."""
        if self._call is not None:
            await self._exchange([pb.SessionRequest(rewind=pb.Rewind(position=position)).SerializeToString()])

    async def close(self) -> None:
        """See `Stage.close`: the stream's end is the session's end."""
        if self._call is not None and not self._closed:
            self._closed = True
            self._peer.sessions -= 1
            self._call.cancel()
        if self._timer is not None:
            self._timer.cancel()

    async def _exchange(
        self, messages: Sequence[bytes], *, wait: bool = True, keep: bool = False
    ) -> list[tuple[pb.SessionReply, int]]:
        """Write messages and, unless not to wait, read every reply that is owed, with its size; or keep them."""
        call = self._call
        self._waiting_since = time.monotonic()
        try:
            if self._peer.sessions > 1 and wait and self._number and len(messages) == 1 and not self._owed:
                data = await self._ask_together(messages[0])
                if data:
                    self._replies.append(await self._reply(data))
                    messages = ()
            for message in messages:
                await call.write(message)
            self._owed += len(messages)
            while wait and self._owed:
                data = await (self._read() if keep or self._reading is not None else call.read())
                self._replies.append(await self._reply(data))
                self._owed -= 1
                self._waiting_since = time.monotonic()  # it is alive
            replies: list[tuple[pb.SessionReply, int]] = []
            if wait and not keep:
                replies, self._replies = self._replies, replies
            return replies
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._late or (task is not None and task.cancelling()):
                raise
            self._fail_late()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the latter: written to a stream that has ended
            await self._fail()
        finally:
            self._waiting_since = None

    async def _read(self) -> Any:
        """What the node sends next. When this is cancelled the read goes on: a cancelled one would end the stream."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._call.read())
            self._reading.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may ask again
        await asyncio.wait([self._reading])
        reading, self._reading = self._reading, None
        return reading.result()

    async def _ask_together(self, message: bytes) -> Any:
        """The reply to a message that goes with other sessions'; nothing where it must go on this session's stream."""
        peer = self._peer
        if not peer.together.takes(message):
            return None
        self._answer = peer.together.ask(self._number, message)
        try:
            data = await self._answer
        finally:
            self._answer = None
            peer.together.forget(self._number)
        if not data:
            self._number = 0  # something in between sends streams different ways
        return data

    def _ended(self, _: Any) -> None:
        """This session's stream is over; an answer among others' will not come then."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(grpc.aio.EOF)

    async def _reply(self, data: Any) -> tuple[pb.SessionReply, int]:
        """What the node has sent, and its size."""
        if data is grpc.aio.EOF:
            await self._fail()
        reply = codec.parse(pb.SessionReply, data)
        if reply.HasField("failure"):
            raise error_of(reply.failure.status, reply.failure.message, reply.failure.node)
        if reply.HasField("opened"):
            self._number = reply.opened.session
        return reply, len(data)

    def _watch(self) -> None:
        """End the call when an answer is late. One timer a session: arming one a token costs 0.08 ms (docs/log.md)."""
        now = time.monotonic()
        left = (now if self._waiting_since is None else self._waiting_since) + self._timeout_s - now
        if left <= 0:
            self._late = True
            self._call.cancel()
        else:
            self._timer = asyncio.get_running_loop().call_later(left, self._watch)

    async def _fail(self) -> NoReturn:
        """Raise what the stream's final status means."""
        call, peer = self._call, self._peer
        if self._late:
            self._fail_late()
        code, details = await call.code(), await call.details()
        if code is grpc.StatusCode.OK:
            raise NodeUnavailable(f"node {peer.name!r} ended the session", node=peer.name)
        failure = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), await call.trailing_metadata(), details)
        raise error_of_call(failure, peer.name, peer.address)

    def _fail_late(self) -> NoReturn:
        peer = self._peer
        raise DeadlineExceeded(
            f"node {peer.name!r} at {peer.address} gave no answer within {self._timeout_s:g} s; "
            "it, or a node beyond it, hangs",
            node=peer.name,
        ) from None

    def _split(self, block: Block) -> Iterator[Block]:
        """A long block as several, whose wanted positions are all in the last one."""
        n = len(block.token_ids)
        first_wanted = (block.wants[0] if block.wants else block.start + n - 1) - block.start
        start = 0
        while n - start > self._rows and start < first_wanted:
            stop = min(start + self._rows, first_wanted)
            yield block._replace(
                start=block.start + start,
                states=block.states[start:stop],
                token_ids=block.token_ids[start:stop],
                wants=(),
            )
            start = stop
        if start:
            block = block._replace(
                start=block.start + start, states=block.states[start:], token_ids=block.token_ids[start:]
            )
        yield block


def _sum(verdicts: Sequence[Verdict]) -> tuple[Hop, ...]:
    """What each node spent on all of them, the nearest first."""
    if len(verdicts) == 1:
        return verdicts[0].hops
    hops: dict[str, Hop] = {}
    for hop in (hop for verdict in verdicts for hop in verdict.hops):
        hops.setdefault(hop.node, Hop(hop.node)).add(hop)
    return tuple(hops.values())
