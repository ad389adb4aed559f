"""Where a node computes: one thread that forms steps from the work of all sessions, while the event loop goes on.

A task is a generator that yields a `Pass` where it wants rows run through a stage, and goes on when that is done. Tasks
of several sessions so meet at a stage and share its matrix products; what a task does in between runs on the compute
thread, too.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Callable, Generator
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol, TypeVar

import torch

from ruyi_flow.errors import NodeUnavailable
from ruyi_flow.runtime.scheduler import Scheduler
from ruyi_flow.runtime.stage import CHUNK, Pass

__all__ = ["InlineWorker", "Task", "ThreadWorker", "Worker"]

_BRIEF_S = 0.02
"""The longest that a step may hold up the event loop."""

T = TypeVar("T")
Task = Generator[Pass, None, T]
"""What a worker runs."""

logger = logging.getLogger(__name__)


class Worker(Protocol):
    """Runs tasks."""

    async def run(self, task: Task[T], *, brief: bool = False) -> tuple[T, float, float]:
        """The task's result, the seconds it waited and the seconds that steps ran in which it had a part.

        Args:
            brief: it has few positions, and no other session would wait for it.
        """
        ...

    def submit(self, call: Callable[[], object]) -> None:
        """Run something that nobody waits for, between two steps; cancelled tasks are gone by then."""
        ...

    def shutdown(self) -> None:
        """Finish what is there and end."""
        ...


def drive(task: Task[T]) -> T:
    """Run a task alone, on the caller's thread."""
    try:
        work = next(task)
        while True:
            while work.rows and work.error is None:
                work.session.shard.run([(work, min(work.rows, CHUNK))])
            work = task.throw(work.error) if work.error is not None else task.send(None)
    except StopIteration as done:
        result: T = done.value
        return result


class InlineWorker:
    """A worker that computes on the caller's thread: for a family that runs in one process without an event loop."""

    async def run(self, task: Task[T], *, brief: bool = False) -> tuple[T, float, float]:
        began = time.perf_counter()
        return drive(task), 0.0, time.perf_counter() - began

    def submit(self, call: Callable[[], object]) -> None:
        call()

    def shutdown(self) -> None:
        pass


class _Job:
    """A task on the compute thread, and who waits for it."""

    __slots__ = ("asked", "brief", "done", "ran_s", "task", "work")

    def __init__(self, task: Task[Any], done: asyncio.Future[Any], brief: bool) -> None:
        self.task, self.done, self.brief = task, done, brief
        self.asked, self.ran_s = time.perf_counter(), 0.0
        self.work: Pass | None = None


class ThreadWorker:
    """A worker with a thread of its own, which all sessions share.

    A plain queue and the loop's own futures instead of an executor's: a step's way in and out of the thread is on the
    path of every token (docs/log.md).

    Args:
        threads: CPU threads that torch uses in it; None for torch's default.
        budget: positions of a step.
    """

    def __init__(self, threads: int | None = None, budget: int = 256) -> None:
        self._inbox: SimpleQueue[_Job | Callable[[], object] | None] = SimpleQueue()
        self._scheduler = Scheduler(budget)
        self._jobs: dict[int, _Job] = {}
        self._keys = itertools.count()
        self._thread = Thread(target=self._work, args=(threads,), name="compute", daemon=True)
        self._threads = threads
        self._closed = self._lent = False
        self._brief_s = math.inf
        """What the last brief task took."""
        self._thread.start()

    def lend(self) -> None:
        """Let brief tasks run on the event loop, whose thread calls this, when they take less than `_BRIEF_S`.

        A lone session's next token then needs no thread to wake on its way in or out, which saves 0.2 ms a node; the
        price is a loop that pauses for that long. For a loop that serves nothing but this node.
        """
        self._lent = True
        if self._threads:
            torch.set_num_threads(self._threads)

    async def run(self, task: Task[T], *, brief: bool = False) -> tuple[T, float, float]:
        if self._closed:
            raise NodeUnavailable("the node is closed")
        if brief and self._brief_s < _BRIEF_S:
            began = time.perf_counter()
            result = drive(task)
            self._brief_s = time.perf_counter() - began
            return result, 0.0, self._brief_s
        done: asyncio.Future[tuple[T, float, float]] = asyncio.get_running_loop().create_future()
        self._inbox.put(_Job(task, done, brief))
        return await done

    def submit(self, call: Callable[[], object]) -> None:
        self._inbox.put(call)

    def shutdown(self) -> None:
        self._closed = True
        self._inbox.put(None)
        self._thread.join()

    def _work(self, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)
        inbox, ending = self._inbox, False
        while not (ending and not self._scheduler):
            while not ending and (not self._scheduler or not inbox.empty()):
                entry = inbox.get()
                if entry is None:
                    ending = True
                elif isinstance(entry, _Job):
                    self._go_on(next(self._keys), entry)
                else:
                    self._forget_cancelled()  # it may free what a cancelled task still counts on
                    try:
                        entry()
                    except Exception:  # the thread must outlive a call that nobody waits for
                        logger.exception("a call that nobody waits for failed")
            self._forget_cancelled()
            self._step()

    def _step(self) -> None:
        """Run the next step, and let the tasks go on whose work is done with it."""
        parts = [(key, self._jobs[key], rows) for key, rows in self._scheduler.next()]
        if not parts:
            return
        began = time.perf_counter()
        works = [(job.work, rows) for _, job, rows in parts if job.work is not None]
        try:
            works[0][0].session.shard.run(works)
        except Exception as error:  # of the step as a whole: every session in it is told
            for work, _ in works:
                work.error = error
        spent = time.perf_counter() - began
        for key, job, _ in parts:
            job.ran_s += spent
            assert job.work is not None
            if job.work.error is not None or not job.work.rows:
                self._scheduler.drop(key)
                self._go_on(key, job)

    def _go_on(self, key: int, job: _Job) -> None:
        """Let a task run up to its next work, or to its end."""
        if job.done.cancelled():
            self._jobs.pop(key, None)
            return
        error = None if job.work is None else job.work.error
        try:
            work = job.task.send(None) if error is None else job.task.throw(error)
        except StopIteration as ended:
            self._jobs.pop(key, None)
            waited = time.perf_counter() - job.asked - job.ran_s
            if job.brief and self._lent:
                self._brief_s = job.ran_s
            _tell(job.done, _finish, (ended.value, waited, job.ran_s))
        except Exception as error:  # whatever a task raises belongs to the caller that waits for it
            self._jobs.pop(key, None)
            _tell(job.done, _fail, error)
        else:
            job.work, self._jobs[key] = work, job
            self._scheduler.add(key, work.stage, work.rows)

    def _forget_cancelled(self) -> None:
        for key in [key for key, job in self._jobs.items() if job.done.cancelled()]:
            del self._jobs[key]
            self._scheduler.drop(key)


def _tell(done: asyncio.Future[Any], how: Callable[[asyncio.Future[Any], Any], None], what: Any) -> None:
    loop = done.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(how, done, what)


def _finish(done: asyncio.Future[Any], result: Any) -> None:
    if not done.done():  # the caller may have been cancelled while the step ran
        done.set_result(result)


def _fail(done: asyncio.Future[Any], error: Exception) -> None:
    if not done.done():
        done.set_exception(error)
