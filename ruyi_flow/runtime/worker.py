"""The workers of a node: one computes on the caller's thread, the other on a compute thread that forms steps from the
work of all sessions while the event loop goes on."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Any, TypeVar

import torch

from ruyi_flow.errors import NodeUnavailable
from ruyi_flow.loop.steps import Job, Steps, Task, drive, run_alone, run_parts
from ruyi_flow.telemetry.counters import StepCounters

__all__ = ["InlineWorker", "ThreadWorker"]

_BRIEF_S = 0.02
"""Seconds of a task on the event loop; once they are exceeded, the rest runs on the compute thread."""

_STUCK_S = 5.0
"""Seconds that a step may always take before the compute thread counts as stuck."""

_STUCK_FACTOR = 10
"""Times the slowest row so far, for each of its rows, that it may take: a step of many rows costs much less."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


class InlineWorker:
    """A worker that computes on the caller's thread, for a family that runs in one process without an event loop."""

    async def run(self, task: Task[T], *, brief: bool = False, since: float | None = None) -> tuple[T, float, float]:
        began = time.perf_counter()
        return drive(task), 0.0, time.perf_counter() - began

    def submit(self, call: Callable[[], object]) -> None:
        call()

    def shutdown(self) -> None:
        pass


class ThreadWorker:
    """A worker with one compute thread, which all sessions share.

    It uses a plain queue and the event loop's own futures instead of an executor, since entering and leaving the thread
    is on the path of every token (docs/log.md).

    Args:
        threads: CPU threads of torch in the compute thread. Default: torch's own.
        budget: positions of a step.
        counters: where the steps of the compute thread and of the event loop are counted. Default: nowhere.
    """

    def __init__(
        self,
        threads: int | None = None,
        budget: int = 256,
        counters: tuple[StepCounters, StepCounters] | None = None,
    ) -> None:
        self._thread_steps, self._loop_steps = counters or (StepCounters(), StepCounters())
        self._inbox: SimpleQueue[Job | Callable[[], object] | None] = SimpleQueue()
        self._steps = Steps(budget, self._ended, self._failed)
        self._thread = Thread(target=self._work, args=(threads,), name="compute", daemon=True)
        self._threads = threads
        self._closed = self._lent = False
        self._brief_s = math.inf
        """Seconds that the last brief task took."""
        self._step: tuple[float, int] | None = None
        """When the step that is running began, and its rows."""
        self._slowest_row_s = 0.0
        self._thread.start()

    def lend(self) -> None:
        """Let brief tasks run on the event loop, on whose thread this is called.

        The next token of a session that is alone then wakes no thread, which saves 0.2 ms per node. The event loop
        pauses for up to `_BRIEF_S`, so this is only for a loop that serves nothing but this node.
        """
        self._lent = True
        if self._threads:
            torch.set_num_threads(self._threads)

    @property
    def is_stuck(self) -> bool:
        """Whether the step that is running takes far longer than such steps have taken so far."""
        step = self._step
        if step is None or not self._slowest_row_s:  # the first step may take any time
            return False
        began, rows = step
        return time.perf_counter() - began > max(_STUCK_S, _STUCK_FACTOR * rows * self._slowest_row_s)

    async def run(self, task: Task[T], *, brief: bool = False, since: float | None = None) -> tuple[T, float, float]:
        if self._closed:
            raise NodeUnavailable("the node is closed")
        began, work, spent = time.perf_counter(), None, 0.0
        if brief and self._brief_s < _BRIEF_S:
            running = run_alone(task)
            try:
                while spent < _BRIEF_S:
                    before = spent
                    work = next(running)
                    spent = time.perf_counter() - began
                    self._loop_steps.ran(work.exit, spent - before, work.count)
            except StopIteration as ended:
                self._brief_s = time.perf_counter() - began
                return ended.value, 0.0, self._brief_s
        done: asyncio.Future[tuple[T, float, float]] = asyncio.get_running_loop().create_future()
        job = Job(task, done, began, brief=brief, since=since)
        job.work, job.ran_s = work, spent
        self._inbox.put(job)
        return await done

    def submit(self, call: Callable[[], object]) -> None:
        self._inbox.put(call)

    def shutdown(self) -> None:
        self._closed = True
        self._inbox.put(None)
        if current_thread() is not self._thread:  # the garbage collector may drop an engine on any thread
            self._thread.join()

    def _work(self, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)
        inbox, steps, ending = self._inbox, self._steps, False
        while not (ending and not steps.jobs):
            while not ending and (not steps.jobs or not inbox.empty()):
                entry = inbox.get()
                if entry is None:
                    ending = True
                elif isinstance(entry, Job):
                    steps.add(entry)
                else:
                    steps.forget_cancelled()  # the call may free what a cancelled task still uses
                    try:
                        entry()
                    except Exception:  # the thread must outlive a call that nobody waits for
                        logger.exception("a call that nobody waits for failed")
            steps.forget_cancelled()
            parts = steps.next()
            if parts:
                rows, exit = sum(count for _, count in parts), parts[0][0].running.exit
                began = time.perf_counter()
                self._step = began, rows
                run_parts(parts)
                took_s = time.perf_counter() - began
                self._step, self._slowest_row_s = None, max(self._slowest_row_s, took_s / rows)
                self._thread_steps.ran(exit, took_s, rows)
                steps.ran(took_s)

    def _ended(self, job: Job, result: object) -> None:
        if job.brief and self._lent:
            self._brief_s = job.ran_s
        waited = time.perf_counter() - job.asked - job.ran_s
        _tell(job, _finish, (result, waited, job.ran_s))

    def _failed(self, job: Job, error: Exception) -> None:
        _tell(job, _fail, error)


def _tell(job: Job, how: Callable[[asyncio.Future[Any], Any], None], what: Any) -> None:
    done = job.waiter
    assert isinstance(done, asyncio.Future)
    loop = done.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(how, done, what)


def _finish(done: asyncio.Future[Any], result: Any) -> None:
    if not done.done():  # the caller may have been cancelled while the step ran
        done.set_result(result)


def _fail(done: asyncio.Future[Any], error: Exception) -> None:
    if not done.done():
        done.set_exception(error)
