"""Signs of life of a node that owes answers: they tell a node that is slow from one that is dead or hangs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Set
from contextlib import aclosing, suppress
from typing import Any, Protocol

import grpc

from ruyi_flow.errors import NodeError, WireError
from ruyi_flow.loop.replicas import CONNECT_S, SILENT_S, TICK_S
from ruyi_flow.transport import codec
from ruyi_flow.transport._pb import node_pb2 as pb

__all__ = ["Asker", "Lifeline"]

_IDLE_S = 5.0
"""Seconds without a question after which signs are no longer asked for."""


class Asker(Protocol):
    """A session or a call that may wait for an answer."""

    waiting_since: float | None
    """Time of the last sign that its answer makes progress; None while it waits for none."""

    def check(self, now: float) -> None:
        """End it if its answer is too late."""
        ...

    def leave(self) -> None:
        """End it since the node shuts down, at once or after the answer that it waits for."""
        ...

    def lose(self, error: NodeError) -> None:
        """End it with an error, since the node is lost."""
        ...


def _ignore(sign: pb.Sign | None) -> None:
    """Do nothing about a sign of a connection that is closed."""


class Lifeline:
    """Listens to a node's signs of life while sessions with it wait for answers.

    The signs come over a stream of their own, which is open as long as questions are asked. It does not wait behind a
    long prompt, since it carries nothing upward. Listening costs nothing per question.

    Args:
        call: opens the stream of signs.
        askers: the sessions with the node.
        heard: called with each sign, and once with None when the node is lost.
    """

    def __init__(
        self, call: Callable[[bytes], Any], askers: Set[Asker], heard: Callable[[pb.Sign | None], None]
    ) -> None:
        self._call, self._askers = call, askers
        self._heard: Callable[[pb.Sign | None], None] = heard
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
        self._heard = _ignore
        tasks = [task for task in (self._watching, self._listening) if task is not None]
        self._watching = self._listening = None
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
                elif now - self._last > (SILENT_S if self._is_connected else CONNECT_S):
                    self._heard(None)
                    break
            elif self._listening is not None and now - self._asked > _IDLE_S:
                self._listening.cancel()
                self._listening = None
        self._watching = None
        if self._listening is not None:
            self._listening.cancel()
            self._listening = None

    async def _listen(self) -> None:
        """Read signs until the stream ends. Sessions notice by themselves that a connection is lost."""
        call = self._call(pb.AliveRequest().SerializeToString())
        try:
            with suppress(grpc.aio.AioRpcError, WireError):
                async with aclosing(aiter(call)) as signs:
                    async for data in signs:
                        self._last, self._is_connected = time.monotonic(), True
                        self._heard(codec.parse_sealed(pb.Sign, data))
        finally:
            call.cancel()
