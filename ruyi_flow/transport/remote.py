"""A stage on another node."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import grpc

from ruyi_flow.errors import (
    CacheMiss,
    CapacityError,
    DeadlineExceeded,
    NodeError,
    NodeUnavailable,
    RuyiFlowError,
    WireError,
)
from ruyi_flow.requests import SessionOpen
from ruyi_flow.telemetry.counters import LinkCounters
from ruyi_flow.transport import codec
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.blocks import BlockCodec, rows_in
from ruyi_flow.transport.checksum import SEAL_BYTES, seal
from ruyi_flow.transport.peer import Peer, trace_metadata
from ruyi_flow.transport.status import error_of, error_of_call, is_of_connection, wrong_answer
from ruyi_flow.types import MESSAGE_ROWS, Block, Hop, Verdict

__all__ = ["RemoteStage"]


class RemoteStage:
    """The next node's stages, over one bidirectional stream: a `Stage`.

    The stream opens with the first block, and the handshake travels with it, so a session costs no extra round trip. A
    task reads the stream and queues the replies. While other sessions are open with that node, short blocks travel in
    batches with theirs, and this stream only keeps the session open.

    Args:
        peer: the connection to the node.
        opening: the handshake.
        timeout_s: seconds that one answer may take.
        session_timeout_s: seconds that the whole session may take. Default: no limit.
        traceparent: the context of the trace that the session belongs to. Default: none.
        counters: where the traffic is counted. Default: nowhere.
    """

    def __init__(
        self,
        peer: Peer,
        opening: SessionOpen,
        *,
        timeout_s: float,
        session_timeout_s: float | None = None,
        traceparent: str = "",
        counters: LinkCounters | None = None,
    ) -> None:
        self._counters = counters
        self._peer, self._opening, self._traceparent = peer, opening, traceparent
        self._timeout_s, self._session_timeout_s = timeout_s, session_timeout_s
        self._blocks = BlockCodec(opening.hidden_size, opening.encoding)
        self._rows = min(MESSAGE_ROWS, rows_in(peer.max_message_bytes, opening.hidden_size, opening.encoding))
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None
        self._number = 0
        """The session's number in batches; 0 while it is unknown or of no use."""
        self._replies: deque[tuple[pb.SessionReply, int]] = deque()
        """Replies that have arrived and were not taken yet, with their sizes in bytes."""
        self._owed = 0
        """Number of messages whose replies have not arrived."""
        self._stops: deque[int] = deque()
        """Positions after the blocks, or of the rewinds, whose replies have not been taken yet."""
        self._answer: asyncio.Future[bytes] | None = None
        """The reply to a message in a batch."""
        self._waiter: asyncio.Future[None] | None = None
        """The caller that waits for a reply; it is woken by every reply and by the end of the stream."""
        self._is_reached = False
        """Whether the first message has been written, for which gRPC must be connected."""
        self._error: RuyiFlowError | None = None
        """Why the stream has ended."""
        self._fed_positions = self._fed_bytes = 0
        """Positions and bytes that `feed` has sent since the last `advance`."""
        self.waiting_since: float | None = None
        """Time of the node's last reply, while an answer is awaited."""
        # The reply with a prompt's log-probabilities may be long, and the node does not work while it sends it.
        self.key = b"" if opening.sampling.prompt_logprobs is not None else opening.key
        self.instance = b""
        self.owed_bytes = 0
        self._is_leaving = False

    async def advance(self, block: Block) -> Verdict:
        """Send a block and return the verdict on it; see `Stage.advance`."""
        began = time.perf_counter()
        messages = self._messages(block)
        early = len(self._replies)  # what was fed before has been answered already
        await self._exchange(messages)
        verdicts: list[Verdict] = []
        bytes_down, elapsed_s = 0, 0.0
        try:
            for i, (reply, size) in enumerate(tuple(self._replies)):
                self._check_place(reply)
                if reply.HasField("verdict"):
                    if reply.verdict.HasField("prompt"):  # of thousands of tokens: the event loop must not wait
                        verdict = await asyncio.to_thread(codec.verdict_from_pb, reply.verdict)
                    else:
                        verdict = codec.verdict_from_pb(reply.verdict)
                    if not verdict.hops:
                        raise WireError("a verdict names no node")
                    verdicts.append(verdict)
                    bytes_down += size
                    elapsed_s += reply.verdict.elapsed_s if i >= early else 0.0
            if not verdicts:
                raise WireError("a block has no verdict")
        except WireError as error:
            raise wrong_answer(error, self._peer.name) from None
        self._replies.clear()
        if self._is_leaving:
            self.leave()
        hops = _sum(verdicts)
        mine = hops[0]
        mine.messages += len(verdicts)
        mine.positions += self._fed_positions + len(block.token_ids)
        bytes_up = self._fed_bytes + _bytes_of(messages)
        mine.bytes_up += bytes_up
        mine.bytes_down += bytes_down
        wire_s = max(0.0, time.perf_counter() - began - elapsed_s)
        mine.wire_s += wire_s
        if self._counters is not None:
            self._counters.exchanged(
                self._peer.name, messages=len(verdicts), bytes_up=bytes_up, bytes_down=bytes_down, wire_s=wire_s
            )
        self._fed_positions = self._fed_bytes = 0
        prompt = tuple(one for verdict in verdicts for one in verdict.prompt)
        return Verdict(verdicts[-1].decisions, hops, prompt)

    async def feed(self, block: Block) -> None:
        """Send a block without questions; see `Stage.feed`. The next `advance` takes the replies."""
        messages = self._messages(block)
        await self._exchange(messages, waits=False)
        self._fed_positions += len(block.token_ids)
        self._fed_bytes += _bytes_of(messages)

    async def arrived(self) -> None:
        """Wait until the node has replied to everything that was fed; see `Stage.arrived`."""
        await self._exchange(())

    async def rewind(self, position: int) -> None:
        """Make the node forget every position from `position` on; see `Stage.rewind`."""
        if self._reader is not None:
            self._stops.append(position)
            await self._exchange([pb.SessionRequest(rewind=pb.Rewind(position=position)).SerializeToString()])

    async def close(self) -> None:
        """End the session, which ends with its stream; see `Stage.close`."""
        if self._reader is not None:
            self._end(NodeUnavailable(f"the session with node {self._peer.name!r} is closed", node=self._peer.name))

    def leave(self) -> None:
        """End the session since the node shuts down: now, or once what is asked is answered."""
        if self.waiting_since is None and not self._owed:
            name = self._peer.name
            self._end(NodeUnavailable(f"node {name!r} shuts down; the session moves", node=name, cause="left"))
        else:
            self._is_leaving = True

    def lose(self, error: NodeError) -> None:
        """End the session, whose node is lost."""
        self._end(error)

    def _check_place(self, reply: pb.SessionReply) -> None:
        """Check that a reply answers the message whose turn it is.

        Raises:
            WireError: it does not: a reply was lost, or came twice.
        """
        kind = reply.WhichOneof("message")
        if kind == "opened":
            return
        place = reply.verdict.position if kind == "verdict" else reply.rewound.position
        expected = self._stops.popleft() if self._stops else None
        if place != expected:
            raise WireError(f"a reply is about position {place}; the message was about {expected}")

    def _messages(self, block: Block) -> list[bytes]:
        """Encode a block; the session's first one starts with the handshake."""
        messages = []
        for part in block.parts(self._rows):
            messages.append(self._blocks.to_bytes(part))
            self._stops.append(part.start + len(part.token_ids))
        if self._reader is None:
            self._call = self._peer.session_call(
                timeout=self._session_timeout_s, metadata=trace_metadata(self._traceparent)
            )
            self._reader = asyncio.create_task(self._read(), name=f"session with {self._peer.name}")
            self._peer.add(self)
            messages.insert(0, codec.open_to_pb(self._opening).SerializeToString())
        return messages

    async def _exchange(self, messages: Sequence[bytes], *, waits: bool = True) -> None:
        """Send messages, and wait until every message so far has its reply, unless told not to."""
        self.waiting_since = time.monotonic()
        self.owed_bytes += sum(map(len, messages))
        try:
            if waits and await self._ask_in_batch(messages):
                return
            await self._write(messages)
            while waits and self._owed:
                self._raise_error()
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
        finally:
            self.waiting_since = None
            if waits:
                self.owed_bytes = 0

    async def _write(self, messages: Sequence[bytes]) -> None:
        """Write messages to the stream."""
        for message in messages:
            self._raise_error()
            self._owed += 1  # before the write, since the reply may arrive before it returns
            try:
                write = self._call.write(seal(message))
                await (write if self._is_reached else self._reach(write))
                continue
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
            # The stream has ended. Raised above, the session's error would keep gRPC's, with it the call, and so the
            # connection.
            assert self._reader is not None
            await asyncio.wait([self._reader])
            self._raise_error()
            raise AssertionError("a reader that has ended says why")

    async def _reach(self, write: Coroutine[Any, Any, None]) -> None:
        """Write the first message. A call that is cancelled before it is connected never returns from its write."""
        assert self._reader is not None
        writing = asyncio.ensure_future(write)
        try:
            await asyncio.wait([writing, self._reader], return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                await writing
                self._is_reached = True
        finally:
            writing.cancel()
            del writing  # the task has the error, and the error's trace has this frame: a circle would keep the call
        self._raise_error()

    def _raise_error(self) -> None:
        """Raise why the session has ended, if it has."""
        if self._error is not None:
            raise self._error from None

    async def _ask_in_batch(self, messages: Sequence[bytes]) -> bool:
        """Send a message in a batch with other sessions', and wait for its reply.

        Returns:
            Whether it was answered; if not, it must be written to this session's stream.
        """
        batches = self._peer.batches
        if len(self._peer.sessions) < 2 or not self._number or len(messages) != 1 or self._owed:
            return False
        self._raise_error()
        if not batches.accepts(messages[0]):
            return False
        self._answer = batches.ask(self._number, messages[0])
        try:
            data = await self._answer
        finally:
            self._answer = None
            batches.forget(self._number)
        if data:
            if not self._queue(codec.parse, data):
                self._raise_error()
        else:
            self._number = 0  # a proxy in between sends the streams to different nodes
        return bool(data)

    async def _read(self) -> None:
        """Queue replies until the stream ends."""
        call, peer = self._call, self._peer
        error: RuyiFlowError = NodeUnavailable(f"node {peer.name!r} ended the session", node=peer.name)
        try:
            while (data := await call.read()) is not grpc.aio.EOF:
                self._queue(codec.parse_sealed, data)
                self._wake()
        except grpc.aio.AioRpcError as failure:
            error = error_of_call(failure, peer.name, peer.address, timeout_s=self._session_timeout_s)
            if is_of_connection(failure):
                peer.lose()
        except asyncio.CancelledError:  # the call was ended here; kept by this task, it would keep the connection open
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
        except WireError as failure:
            error = failure
        finally:
            self._end(error)

    def _queue(self, parse: Callable[[type[pb.SessionReply], bytes], pb.SessionReply], data: bytes) -> bool:
        """Parse a reply and queue it. A failure ends the session instead; return whether it was queued."""
        if self.waiting_since is not None:
            self.waiting_since = time.monotonic()  # the node makes progress
        peer = self._peer
        peer.hear()
        try:
            reply = parse(pb.SessionReply, data)
        except WireError as error:
            self._end(wrong_answer(error, peer.name))
            return False
        kind = reply.WhichOneof("message")
        if kind == "failure":
            failure = error_of(reply.failure.status, reply.failure.message, reply.failure.node)
            if isinstance(failure, CacheMiss):
                failure.position = reply.failure.position
            self._end(failure)
            return False
        if kind == "leaving":
            peer.leave()
            return False
        if parse is codec.parse_sealed:
            if not self._owed:
                self._end(WireError(f"node {peer.name!r} sent a reply that nothing asked for", node=peer.name))
                return False
            self._owed -= 1
        if kind == "opened":
            self._number, self.instance = reply.opened.session, reply.opened.instance
            peer.tell_instance(self.instance)
            peer.tell_load(reply.opened.load)
        self._replies.append((reply, len(data)))
        return True

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end(self, error: RuyiFlowError) -> None:
        """End the session with an error for whoever waits for it, or asks it later; the first error counts."""
        if self._error is not None:
            return
        self._error = error
        if isinstance(error, CapacityError):
            self._peer.avoid()
        self._peer.remove(self)
        call, self._call = self._call, None  # an error that somebody keeps must not keep the connection from closing
        call.cancel()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        self._wake()

    def check(self, now: float) -> None:
        """End the session if an answer is late."""
        if self.waiting_since is None or now - self.waiting_since < self._timeout_s:
            return
        peer = self._peer
        self._end(
            DeadlineExceeded(
                f"node {peer.name!r} at {peer.address} did not answer within {self._timeout_s:g} s (link timeout_s); "
                "it or a deeper node is stuck or too slow",
                node=peer.name,
            )
        )


def _bytes_of(messages: Sequence[bytes]) -> int:
    """Return the bytes of messages with their checksums."""
    return sum(map(len, messages)) + SEAL_BYTES * len(messages)


def _sum(verdicts: Sequence[Verdict]) -> tuple[Hop, ...]:
    """Add up what each node spent on all verdicts, the nearest node first."""
    if len(verdicts) == 1:
        return verdicts[0].hops
    hops: dict[str, Hop] = {}
    for hop in (hop for verdict in verdicts for hop in verdict.hops):
        hops.setdefault(hop.node, Hop(hop.node)).add(hop)
    return tuple(hops.values())
