"""Batches: short messages of sessions that share a link, which travel as one when they are ready at the same moment.

A message costs both ends some 0.1 ms in gRPC and asyncio, whatever it contains (docs/design/0002-wire.md).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import grpc

from ruyi_flow.errors import NodeUnavailable, RuyiFlowError, WireError
from ruyi_flow.transport import codec
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.checksum import seal
from ruyi_flow.transport.status import error_of_call, wrong_answer

__all__ = ["SHORT_BYTES", "Batches", "Outbox", "items_of"]

SHORT_BYTES = 64 * 1024
"""Bytes of the longest message that travels in a batch: a longer one would delay the others."""

_MAX_BYTES = 1024 * 1024
"""Largest number of bytes of the messages in a batch."""

_MAX_ITEMS = 1024
"""Largest number of messages in a batch; the event loop reads them without a pause."""

_FRAME = 32
"""Bytes around a message in a batch, rounded up."""


def items_of(data: bytes) -> Sequence[pb.Item]:
    """Parse a batch that a peer has sent.

    Raises:
        WireError: the bytes are no batch, or more than a batch may contain.
    """
    if len(data) > _MAX_BYTES:  # before it is parsed: a message of millions of items stops the event loop
        raise WireError(f"a batch has {len(data)} bytes; at most {_MAX_BYTES} are allowed")
    items = codec.parse_sealed(pb.Batch, data).items
    if len(items) > _MAX_ITEMS:
        raise WireError(f"a batch has {len(items)} messages; at most {_MAX_ITEMS} are allowed")
    return items


class Outbox:
    """Messages to be written: all that have gathered go in one batch, while the next ones gather.

    Args:
        max_bytes: bytes of a batch; a single message may be longer.
    """

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._items: deque[pb.Item] = deque()
        self._bytes = 0
        self._changed, self._emptied = asyncio.Event(), asyncio.Event()
        self._closed = False

    def put(self, session: int, message: bytes) -> None:
        """Add a session's message."""
        self._items.append(pb.Item(session=session, message=message))
        self._bytes += len(message) + _FRAME
        self._changed.set()

    async def room(self) -> None:
        """Wait until less than a full batch is waiting to be written."""
        while self._bytes >= self._max_bytes:
            self._emptied.clear()
            await self._emptied.wait()

    def close(self) -> None:
        """Drop what has not been written; `empty_into` returns as soon as no write is under way."""
        self._items.clear()
        self._bytes, self._closed = 0, True
        self._changed.set()
        self._emptied.set()

    async def empty_into(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Write batch after batch, until the outbox is closed, the coroutine is cancelled or the stream has ended.

        Raises:
            grpc.aio.BaseError: the serving end has lost its connection. (The calling end's reader learns why.)
        """
        try:
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                while True:
                    await self._changed.wait()
                    if self._closed:
                        return
                    batch, room = pb.Batch(), self._max_bytes
                    while self._items and len(batch.items) < _MAX_ITEMS:
                        size = len(self._items[0].message) + _FRAME
                        if batch.items and size > room:
                            break
                        batch.items.append(self._items.popleft())
                        room -= size
                    if not self._items:
                        self._changed.clear()
                    await write(seal(batch.SerializeToString()))
                    self._bytes -= self._max_bytes - room
                    self._emptied.set()
        finally:
            self.close()  # nobody waits for room in vain


class Batches:
    """The calling end of one stream for the short messages of all sessions with a node.

    Each session also has a stream of its own, which begins and ends it. The node accepts a session's messages only on
    the connection on which the session was opened.

    Args:
        peer: the node's name, for error messages.
        address: the node's address, for error messages.
        call: opens the stream when it is needed.
        max_bytes: the longest message that the node accepts.
    """

    def __init__(self, peer: str, address: str, call: Callable[[], Any], *, max_bytes: int) -> None:
        self._peer, self._address, self._call = peer, address, call
        self._max_bytes = min(_MAX_BYTES, max_bytes)
        self._outbox = Outbox(self._max_bytes)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._running: asyncio.Task[None] | None = None

    def accepts(self, message: bytes) -> bool:
        """Return whether a message is short enough."""
        return len(message) + _FRAME <= min(SHORT_BYTES, self._max_bytes)

    def ask(self, session: int, message: bytes) -> asyncio.Future[Any]:
        """Send a session's message and return the future of its reply, which is b"" if the node has no such session.

        A session must not ask again before it has the reply or has called `forget`.
        """
        if self._running is None:
            self._running = asyncio.create_task(self._run(self._call()), name=f"batches to {self._peer}")
        answer = self._answers[session] = asyncio.get_running_loop().create_future()
        self._outbox.put(session, message)
        return answer

    def forget(self, session: int) -> None:
        """Ignore the reply to a session's last message."""
        self._answers.pop(session, None)

    async def close(self) -> None:
        """End the stream."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])

    async def _run(self, call: Any) -> None:
        writing = asyncio.create_task(self._outbox.empty_into(call.write))
        error: RuyiFlowError = NodeUnavailable(f"node {self._peer!r} ended the stream of batches", node=self._peer)
        try:
            while (data := await call.read()) is not grpc.aio.EOF:
                for item in items_of(data):
                    answer = self._answers.pop(item.session, None)
                    if answer is not None and not answer.done():
                        answer.set_result(item.message)
            await call.code()
        except grpc.aio.AioRpcError as failure:
            error = error_of_call(failure, self._peer, self._address)
        except WireError as failure:
            error = wrong_answer(failure, self._peer)
        finally:
            writing.cancel()
            call.cancel()
            self._running, self._outbox = None, Outbox(self._max_bytes)
            answers, self._answers = self._answers, {}
            for answer in answers.values():
                if not answer.done():
                    answer.set_exception(error)
