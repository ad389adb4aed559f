"""Where a node computes: one thread, so that the event loop goes on while a step runs."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Protocol, TypeVar, TypeVarTuple

import torch

from ruyi_flow.errors import NodeUnavailable

__all__ = ["InlineWorker", "ThreadWorker", "Worker"]

_BRIEF_S = 0.02
"""The longest that a step may hold up the event loop."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

logger = logging.getLogger(__name__)


class Worker(Protocol):
    """Runs steps one after the other, first come first served."""

    async def run(self, step: Callable[[*Ts], T], *args: *Ts, brief: bool = False) -> tuple[T, float, float]:
        """The step's result, the seconds it waited and the seconds it ran.

        Args:
            step: what to run.
            args: of the step.
            brief: it has few positions, and no other session would wait for it.
        """
        ...

    def submit(self, step: Callable[[], object]) -> None:
        """Run a step that nobody waits for, after those that are queued already."""
        ...

    def shutdown(self) -> None:
        """Finish what is queued and end."""
        ...


class ThreadWorker:
    """A worker with a thread of its own.

    A plain queue and the loop's own futures instead of an executor's: a step's way in and out of the thread is on the
    path of every token (docs/log.md).

    Args:
        threads: CPU threads that torch uses in it; None for torch's default.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, args=(threads,), name="compute", daemon=True)
        self._thread.start()
        self._threads = threads
        self._closed = self._lent = False
        self._brief_s = math.inf
        """What the last brief step took."""

    def lend(self) -> None:
        """Let brief steps run on the event loop, whose thread calls this, when they take less than `_BRIEF_S`.

        A lone session's next token then needs no thread to wake on its way in or out, which saves 0.2 ms a node; the
        price is a loop that pauses for that long. For a loop that serves nothing but this node.
        """
        self._lent = True
        if self._threads:
            torch.set_num_threads(self._threads)

    async def run(self, step: Callable[[*Ts], T], *args: *Ts, brief: bool = False) -> tuple[T, float, float]:
        if self._closed:
            raise NodeUnavailable("the node is closed")
        if brief and self._brief_s < _BRIEF_S:
            began = time.perf_counter()
            result = step(*args)
            self._brief_s = time.perf_counter() - began
            return result, 0.0, self._brief_s
        loop = asyncio.get_running_loop()
        done: asyncio.Future[tuple[T, float, float]] = loop.create_future()
        asked = time.perf_counter()

        def timed() -> None:
            if done.cancelled():
                return
            began = time.perf_counter()
            try:
                result = step(*args)
            except Exception as error:  # whatever a step raises belongs to the caller that waits for it
                loop.call_soon_threadsafe(_fail, done, error)
            else:
                spent = time.perf_counter() - began
                if brief and self._lent:
                    self._brief_s = spent
                loop.call_soon_threadsafe(_finish, done, (result, began - asked, spent))

        self._queue.put(timed)
        return await done

    def submit(self, step: Callable[[], object]) -> None:
        self._queue.put(step)  # type: ignore[arg-type]

    def shutdown(self) -> None:
        self._closed = True
        self._queue.put(None)
        self._thread.join()

    def _work(self, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)
        while (step := self._queue.get()) is not None:
            try:
                step()
            except Exception:  # the thread must outlive a step that nobody waits for
                logger.exception("a step that nobody waits for failed")


class InlineWorker:
    """A worker that computes on the caller's thread: for a family that runs in one process without an event loop."""

    async def run(self, step: Callable[[*Ts], T], *args: *Ts, brief: bool = False) -> tuple[T, float, float]:
        began = time.perf_counter()
        return step(*args), 0.0, time.perf_counter() - began

    def submit(self, step: Callable[[], object]) -> None:
        step()

    def shutdown(self) -> None:
        pass


def _finish(done: asyncio.Future[T], result: T) -> None:
    if not done.done():  # the caller may have been cancelled while the step ran
        done.set_result(result)


def _fail(done: asyncio.Future[T], error: Exception) -> None:
    if not done.done():
        done.set_exception(error)
