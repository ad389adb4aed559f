"""Short messages of sessions that share a link: those that are ready at the same moment travel as one.

A message costs both ends some 0.1 ms in gRPC and asyncio, whatever is in it (docs/design/0002-wire.md).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc

from ruyi_flow.errors import NodeUnavailable, RuyiFlowError
from ruyi_flow.transport import codec
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.status import error_of_call

__all__ = ["SHORT", "Outbox", "Together"]

SHORT = 64 * 1024
"""Bytes of the longest message that goes with others: a longer one would hold them up."""

_MOST = 1024 * 1024
"""Bytes of the messages in a batch, at the most."""

_FRAME = 32
"""Bytes around a message in a batch, and to spare."""


class Outbox:
    """Messages that are to be written: whatever has gathered goes in one batch, while the next ones gather.

    Args:
        most_bytes: of a batch; a single message may be longer.
    """

    def __init__(self, most_bytes: int = _MOST) -> None:
        self._most = most_bytes
        self._items: deque[pb.Item] = deque()
        self._filled = asyncio.Event()

    def put(self, session: int, message: bytes) -> None:
        """Let a session's message go."""
        self._items.append(pb.Item(session=session, message=message))
        self._filled.set()

    async def empty_into(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Write batch after batch, until this is cancelled or the stream has ended."""
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # whoever reads from the stream is told why
            while True:
                await self._filled.wait()
                batch, room = pb.Batch(), self._most
                while self._items and (not batch.items or len(self._items[0].message) + _FRAME <= room):
                    item = self._items.popleft()
                    room -= len(item.message) + _FRAME
                    batch.items.append(item)
                if not self._items:
                    self._filled.clear()
                await write(batch.SerializeToString())


class Together:
    """The calling end: one stream for the short messages of all sessions with a node.

    Each session has a stream of its own all the same, which begins and ends it. The node counts a session's messages as
    its own only on the connection that it was opened on.

    Args:
        peer, address: whom, for messages.
        call: makes the stream, once it is needed.
        most_bytes: the longest message that the node takes.
    """

    def __init__(self, peer: str, address: str, call: Callable[[], Any], most_bytes: int) -> None:
        self._peer, self._address, self._call = peer, address, call
        self._most = min(_MOST, most_bytes)
        self._outbox = Outbox(self._most)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._running: asyncio.Task[None] | None = None

    def takes(self, message: bytes) -> bool:
        """Whether a message is short enough."""
        return len(message) + _FRAME <= min(SHORT, self._most)

    def ask(self, session: int, message: bytes) -> asyncio.Future[Any]:
        """Send a session's message, and give what its reply will be in: bytes, b"" where the node has no such session.

        A session must not ask again before it is answered, or has `forget` its question.
        """
        if self._running is None:
            self._running = asyncio.create_task(self._run(self._call()), name=f"batches to {self._peer}")
        answer = self._answers[session] = asyncio.get_running_loop().create_future()
        self._outbox.put(session, message)
        return answer

    def forget(self, session: int) -> None:
        """Wait no more for the answer to a session's last question."""
        self._answers.pop(session, None)

    async def close(self) -> None:
        """End the stream."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])

    async def _run(self, call: Any) -> None:
        writing = asyncio.create_task(self._outbox.empty_into(call.write))
        error: RuyiFlowError = NodeUnavailable(f"node {self._peer!r} ended its stream of batches", node=self._peer)
        try:
            while (data := await call.read()) is not grpc.aio.EOF:
                for item in codec.parse(pb.Batch, data).items:
                    answer = self._answers.pop(item.session, None)
                    if answer is not None and not answer.done():
                        answer.set_result(item.message)
            await call.code()
        except grpc.aio.AioRpcError as failure:
            error = error_of_call(failure, self._peer, self._address)
        except RuyiFlowError as failure:
            error = failure
        finally:
            writing.cancel()
            call.cancel()
            self._running, self._outbox = None, Outbox(self._most)
            answers, self._answers = self._answers, {}
            for answer in answers.values():
                if not answer.done():
                    answer.set_exception(error)
