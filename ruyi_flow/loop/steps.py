"""Tasks that meet at a stage: the work of a node's sessions, put together into steps. Pure.

A task is a generator. It yields a `Pass` when rows must run through a stage, and goes on when they have. Tasks of
several sessions meet at a stage this way and share its matrix products.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol, TypeVar

from ruyi_flow.loop.scheduler import Scheduler
from ruyi_flow.loop.session import CHUNK, Found, Pass

__all__ = ["Job", "Parts", "Steps", "Task", "Waiter", "Worker", "drive", "run_alone", "run_parts"]

T = TypeVar("T")
Task = Generator[Pass, Found | None, T]
"""A generator that a worker runs; each pass that it yields is answered with the branch's tokens and confidences."""

Parts = Sequence[tuple["Job", int]]
"""A step: jobs whose passes are at one stage, and the number of rows of each."""


class Worker(Protocol):
    """Runs tasks."""

    async def run(self, task: Task[T], *, brief: bool = False, since: float | None = None) -> tuple[T, float, float]:
        """Run a task and return its result, the seconds that it waited, and the time of the steps it took part in.

        Args:
            task: the task.
            brief: whether it has few positions and no other session would wait for it.
            since: when the work that it belongs to arrived at this node. Default: now.
        """
        ...

    def submit(self, call: Callable[[], object]) -> None:
        """Run a call between two steps, after cancelled tasks are gone. Nobody waits for it."""
        ...

    def shutdown(self) -> None:
        """Finish the work that is there, and end."""
        ...


def run_alone(task: Task[T]) -> Generator[Pass, None, T]:
    """Run a task on the caller's thread; yield each of its passes after it has run."""
    try:
        work = next(task)
        while True:
            while work.rows and work.error is None:
                work.session.stages.run([(work, min(work.rows, CHUNK))])
            yield work
            work = task.throw(work.error) if work.error is not None else task.send(work.found)
    except StopIteration as done:
        result: T = done.value
        return result


def drive(task: Task[T]) -> T:
    """Run a task on the caller's thread and return its result."""
    running = run_alone(task)
    try:
        while True:
            next(running)
    except StopIteration as done:
        result: T = done.value
        return result


class Waiter(Protocol):
    """The caller that waits for a task."""

    def cancelled(self) -> bool:
        """Return whether it no longer waits."""
        ...


class Job:
    """A task and its caller.

    Args:
        task: the task.
        waiter: the caller.
        now: the time.
        brief: whether the task was meant to run on the event loop.
        since: when the work that it belongs to arrived. Default: now.
    """

    __slots__ = ("asked", "brief", "key", "ran_s", "since", "task", "waiter", "work")

    def __init__(
        self, task: Task[Any], waiter: Waiter, now: float, *, brief: bool = False, since: float | None = None
    ) -> None:
        self.task, self.waiter, self.brief = task, waiter, brief
        self.asked, self.ran_s = now, 0.0
        self.since = now if since is None else since
        self.key = -1
        self.work: Pass | None = None

    @property
    def running(self) -> Pass:
        """The pass that it waits for."""
        assert self.work is not None
        return self.work


class Steps:
    """The jobs of a node, and the steps made of them.

    Args:
        budget: positions of a step.
        ended: called with a job that has ended, and its result.
        failed: called with a job that has failed, and its exception.
    """

    def __init__(
        self, budget: int, ended: Callable[[Job, Any], None], failed: Callable[[Job, Exception], None]
    ) -> None:
        self._scheduler = Scheduler(budget)
        self.jobs: dict[int, Job] = {}
        """The jobs that have not ended, by key."""
        self._keys = itertools.count()
        self._step: list[int] = []
        self._ended, self._failed = ended, failed

    def add(self, job: Job) -> None:
        """Add a job and run its task up to the first pass."""
        job.key = next(self._keys)
        self._resume(job)

    def join(self, job: Job) -> None:
        """Add a job whose task has yielded a pass already."""
        job.key = next(self._keys)
        self._wait(job)

    def next(self) -> Parts:
        """Return the next step; call `ran` after it has run. It is empty when nothing waits."""
        step = self._scheduler.next()
        self._step = [key for key, _ in step]
        return [(self.jobs[key], rows) for key, rows in step]

    def ran(self, seconds: float) -> None:
        """Note that the step has run, and resume the tasks whose pass is complete."""
        for key in self._step:
            job = self.jobs[key]
            job.ran_s += seconds
            work = job.running
            if work.error is not None or not work.rows:
                self._scheduler.drop(key)
                self._resume(job)

    def forget_cancelled(self) -> None:
        """Drop the jobs whose caller no longer waits."""
        for key in [key for key, job in self.jobs.items() if job.waiter.cancelled()]:
            del self.jobs[key]
            self._scheduler.drop(key)

    def _resume(self, job: Job) -> None:
        """Run a task up to its next pass, or to its end."""
        if job.waiter.cancelled():
            self.jobs.pop(job.key, None)
            return
        last = job.work
        try:
            if last is None:
                work = next(job.task)
            else:
                work = job.task.throw(last.error) if last.error is not None else job.task.send(last.found)
        except StopIteration as ended:
            self.jobs.pop(job.key, None)
            self._ended(job, ended.value)
        except Exception as failure:  # whatever a task raises belongs to the caller that waits for it
            self.jobs.pop(job.key, None)
            self._failed(job, failure)
        else:
            job.work = work
            self._wait(job)

    def _wait(self, job: Job) -> None:
        self.jobs[job.key] = job
        self._scheduler.add(job.key, job.running.stage, job.running.rows, job.since)


def run_parts(parts: Parts) -> None:
    """Run a step. An exception of the whole step becomes the error of every job in it."""
    works = [(job.running, rows) for job, rows in parts]
    try:
        works[0][0].session.stages.run(works)
    except Exception as error:
        for work, _ in works:
            work.error = error
