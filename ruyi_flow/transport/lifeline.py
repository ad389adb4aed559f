"""Signs of life of a node that owes answers: they tell a node that is slow from one that is dead or hangs.

A node may also be well and never have got a message, since damage on the way made gRPC drop it. So a caller asks after
an answer that is late.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence, Set
from contextlib import aclosing, suppress
from typing import Any, Protocol

import grpc

from ruyi_flow.errors import NodeError, WireError
from ruyi_flow.loop.replicas import CONNECT_S, SILENT_S, TICK_S
from ruyi_flow.transport import codec
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.checksum import seal

__all__ = ["Asker", "Lifeline"]

_LATE_S = 1.0
"""Seconds without progress after which a caller asks after an answer."""

_SLOW_BYTES_PER_S = 50_000.0
"""A link's least rate, in bytes per second: what is still being sent on a slower link may be taken for lost."""

_ASK_EVERY_S = 0.5
"""Seconds between two questions after an answer. The second one decides: a reply may be on its way at the first."""

_UNHEARD_S = 5.0
"""Seconds without an answer to any question after which the node is taken not to hear this end, though signs arrive: a
damaged length makes HTTP/2 wait for the rest of a message that never ends."""

_SLOWEST_BYTES_PER_S = 10_000
"""A question may wait behind what is sent at this rate."""

_MOST_ASKED = 1024
"""Largest number of answers that are asked after at once."""

_IDLE_S = 5.0
"""Seconds without a question after which signs are no longer asked for."""


class Asker(Protocol):
    """A session or a call that may wait for an answer."""

    waiting_since: float | None
    """Time of the last sign that its answer makes progress; None while it waits for none."""
    key: bytes
    """What the node knows it by; empty if it cannot be asked after."""
    instance: bytes
    """The process that serves it; empty until that has answered."""
    owed_bytes: int
    """Bytes of the messages whose answer it waits for."""

    def check(self, now: float) -> None:
        """End it if its answer is too late."""
        ...

    def leave(self) -> None:
        """End it since the node shuts down, at once or after the answer that it waits for."""
        ...

    def lose(self, error: NodeError) -> None:
        """End it with an error, since the node is lost."""
        ...


def _ignore(what: object) -> None:
    """Do nothing about what is heard of a connection that is closed."""


class Lifeline:
    """Listens to a node's signs of life while sessions with it wait for answers.

    The signs come over a stream of their own, which is open as long as questions are asked. It does not wait behind a
    long prompt, since it carries nothing upward. Listening costs nothing per question.

    Args:
        alive: opens the stream of signs.
        owed: asks after answers.
        askers: the sessions with the node.
        heard: called with each sign, and once with None when the node is lost.
        dropped: called with a session whose message, or the reply to it, was lost.
    """

    def __init__(
        self,
        alive: Callable[[bytes], Any],
        owed: Callable[..., Any],
        askers: Set[Asker],
        *,
        heard: Callable[[pb.Sign | None], None],
        dropped: Callable[[Asker], None],
    ) -> None:
        self._alive, self._owed, self._askers = alive, owed, askers
        self._heard: Callable[[pb.Sign | None], None] = heard
        self._dropped: Callable[[Asker], None] = dropped
        self._asking: asyncio.Task[None] | None = None
        self._asked_after = -math.inf
        self._doubts: dict[Asker, float] = {}
        """The sessions that the node did not work for when it was last asked, with their `waiting_since`."""
        self._unheard_since: float | None = None
        """When the first of the questions was asked that have found no answer."""
        self.instances: set[bytes] = set()
        """The processes that serve the sessions of this connection: one, unless a proxy spreads them."""
        self._watching: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._last = self._asked = time.monotonic()
        self._is_connected = False

    def watch(self) -> None:
        """Watch over the sessions, as long as there are any."""
        now = time.monotonic()
        self._asked = now
        if self._listening is None:
            self._last = now
            self._listening = asyncio.create_task(self._listen(), name="signs of life")
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch(), name="watch over a node")

    async def close(self) -> None:
        """Stop to listen and to watch, and forget the connection, which would otherwise be in a circle with this."""
        self._heard = self._dropped = _ignore
        self._doubts.clear()
        tasks = [task for task in (self._watching, self._listening, self._asking) if task is not None]
        self._watching = self._listening = self._asking = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        then = time.monotonic()
        while self._askers:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            if now - then > 2 * TICK_S:  # this process stood still, and has not read what has arrived
                self._last = now
            then = now
            waiting = False
            for asker in list(self._askers):
                if asker.waiting_since is not None:
                    waiting = True
                    asker.check(now)
            if waiting:
                self._asked = now
                if self._listening is None:
                    self.watch()
                elif self._listening.done() and now - self._last < SILENT_S:  # the stream alone was lost
                    self._listening = asyncio.create_task(self._listen(), name="signs of life")
                elif now - self._last > (SILENT_S if self._is_connected else CONNECT_S):
                    self._heard(None)
                    break
                self._ask_after_late_ones(now)
            elif self._listening is not None and now - self._asked > _IDLE_S:
                self._listening.cancel()
                self._listening = None
        self._watching = None
        if self._listening is not None:
            self._listening.cancel()
            self._listening = None

    def _ask_after_late_ones(self, now: float) -> None:
        """Ask what the node does about the answers that are late, if there are any."""
        if self._asking is not None or now - self._asked_after < _ASK_EVERY_S:
            return
        waiting = [asker for asker in self._askers if asker.waiting_since is not None]
        sent_s = sum(asker.owed_bytes for asker in waiting) / _SLOW_BYTES_PER_S  # they share the link
        late = [asker for asker in waiting if asker.key and now - (asker.waiting_since or now) > _LATE_S + sent_s]
        if late:
            late = late[:_MOST_ASKED]
            self._asked_after = now
            self._asking = asyncio.create_task(self._ask_after(late), name="question after late answers")

    async def _ask_after(self, late: Sequence[Asker]) -> None:
        """Ask what the node does about answers, and give up those that it did not work for twice in a row.

        If no question is answered for long, those are given up that have made no progress since the first one.
        """
        asked_at, is_answered = time.monotonic(), False
        try:
            request = pb.OwedRequest(keys=[asker.key for asker in late])
            with suppress(grpc.aio.AioRpcError, WireError):  # the signs of life tell that the connection is lost
                data = await self._owed(seal(request.SerializeToString()), timeout=SILENT_S)
                reply, doubts = codec.parse_sealed(pb.OwedReply, data), self._doubts
                self._doubts, self._unheard_since, is_answered = {}, None, True
                for asker, work in zip(late, reply.work, strict=False):
                    since = asker.waiting_since
                    serves = {asker.instance} if asker.instance else self.instances
                    if since is None or work == pb.WORK_UNDER_WAY or serves != {reply.instance}:
                        continue
                    if doubts.get(asker) == since:
                        self._dropped(asker)
                    else:
                        self._doubts[asker] = since
            if not is_answered:
                self._doubt_hearing(late, asked_at)
        finally:
            self._asking = None

    def _doubt_hearing(self, late: Sequence[Asker], asked_at: float) -> None:
        """Note that a question found no answer, and give up sessions if none has for long."""
        since = asked_at if self._unheard_since is None else self._unheard_since
        unmoved = [asker for asker in late if asker.waiting_since is not None and asker.waiting_since < since]
        if self._unheard_since is None or not unmoved:
            self._unheard_since = asked_at
            return
        if time.monotonic() - since > _UNHEARD_S + sum(asker.owed_bytes for asker in unmoved) / _SLOWEST_BYTES_PER_S:
            for asker in unmoved:
                self._dropped(asker)

    async def _listen(self) -> None:
        """Read signs until the stream ends. Sessions notice by themselves that a connection is lost."""
        call = self._alive(pb.AliveRequest().SerializeToString())
        try:
            with suppress(grpc.aio.AioRpcError, WireError):
                async with aclosing(aiter(call)) as signs:
                    async for data in signs:
                        self._last, self._is_connected = time.monotonic(), True
                        self._heard(codec.parse_sealed(pb.Sign, data))
        finally:
            call.cancel()
