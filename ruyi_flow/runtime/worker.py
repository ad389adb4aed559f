"""The one thread of a node that computes, so that the event loop never waits for a forward pass."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar, TypeVarTuple

import torch

__all__ = ["InlineWorker", "ThreadWorker", "Worker"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

logger = logging.getLogger(__name__)


class Worker(Protocol):
    """Runs steps one after the other, first come first served."""

    async def run(self, step: Callable[[*Ts], T], *args: *Ts) -> tuple[T, float, float]:
        """The step's result, the seconds it waited and the seconds it ran."""
        ...

    def submit(self, step: Callable[[], object]) -> None:
        """Run a step that nobody waits for, after those that are queued already."""
        ...

    def shutdown(self) -> None:
        """Finish what is queued and end."""
        ...


class ThreadWorker:
    """A worker with a thread of its own.

    Args:
        threads: CPU threads that torch uses in it; None for torch's default.
    """

    def __init__(self, threads: int | None = None) -> None:
        initializer = (lambda: torch.set_num_threads(threads)) if threads else None
        self._executor = ThreadPoolExecutor(1, "compute", initializer)

    async def run(self, step: Callable[[*Ts], T], *args: *Ts) -> tuple[T, float, float]:
        asked = time.perf_counter()

        def timed() -> tuple[T, float, float]:
            began = time.perf_counter()
            result = step(*args)
            return result, began - asked, time.perf_counter() - began

        return await asyncio.wrap_future(self._executor.submit(timed))

    def submit(self, step: Callable[[], object]) -> None:
        self._executor.submit(step).add_done_callback(_report)

    def shutdown(self) -> None:
        self._executor.shutdown()


class InlineWorker:
    """A worker that computes on the caller's thread: for a family that runs in one process without an event loop."""

    async def run(self, step: Callable[[*Ts], T], *args: *Ts) -> tuple[T, float, float]:
        began = time.perf_counter()
        return step(*args), 0.0, time.perf_counter() - began

    def submit(self, step: Callable[[], object]) -> None:
        step()

    def shutdown(self) -> None:
        pass


def _report(future: Future[object]) -> None:
    if not future.cancelled() and future.exception() is not None:
        logger.error("a step that nobody waits for failed", exc_info=future.exception())
