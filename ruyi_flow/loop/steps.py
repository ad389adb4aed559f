"""Tasks that meet at a stage: what a node's sessions have to run, put together into steps. Pure.

A task is a generator that yields a `Pass` where it wants rows run through a stage, and goes on when that is done. Tasks
of several sessions so meet at a stage and share its matrix products.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol, TypeVar

from ruyi_flow.loop.scheduler import Scheduler
from ruyi_flow.loop.session import CHUNK, Found, Pass

__all__ = ["Job", "Parts", "Steps", "Task", "Waiter", "Worker", "drive", "passes", "run"]

T = TypeVar("T")
Task = Generator[Pass, Found | None, T]
"""What a worker runs; a pass that it yields is answered with what was found."""

Parts = Sequence[tuple["Job", int]]
"""A step: jobs whose passes are at one stage, and how many rows of each."""


class Worker(Protocol):
    """Runs tasks."""

    async def run(self, task: Task[T], *, brief: bool = False, since: float | None = None) -> tuple[T, float, float]:
        """The task's result, the seconds it waited and the seconds that steps ran in which it had a part.

        Args:
            brief: it has few positions, and no other session would wait for it.
            since: when what it is part of came to this node; now, when left out.
        """
        ...

    def submit(self, call: Callable[[], object]) -> None:
        """Run something that nobody waits for, between two steps; cancelled tasks are gone by then."""
        ...

    def shutdown(self) -> None:
        """Finish what is there and end."""
        ...


def passes(task: Task[T]) -> Generator[Pass, None, T]:
    """Run a task alone, on the caller's thread; its passes, each of which has been run."""
    try:
        work = next(task)
        while True:
            while work.rows and work.error is None:
                work.session.shard.run([(work, min(work.rows, CHUNK))])
            yield work
            work = task.throw(work.error) if work.error is not None else task.send(work.found)
    except StopIteration as done:
        result: T = done.value
        return result


def drive(task: Task[T]) -> T:
    """The result of a task that is run alone, on the caller's thread."""
    running = passes(task)
    try:
        while True:
            next(running)
    except StopIteration as done:
        result: T = done.value
        return result


class Waiter(Protocol):
    """Who waits for a task."""

    def cancelled(self) -> bool:
        """Whether it waits no more."""
        ...


class Job:
    """A task, and who waits for it."""

    __slots__ = ("asked", "brief", "key", "ran_s", "since", "task", "waiter", "work")

    def __init__(
        self, task: Task[Any], waiter: Waiter, now: float, brief: bool = False, since: float | None = None
    ) -> None:
        self.task, self.waiter, self.brief = task, waiter, brief
        self.asked, self.ran_s = now, 0.0
        self.since = now if since is None else since
        self.key = -1
        self.work: Pass | None = None

    @property
    def running(self) -> Pass:
        """What it waits for."""
        assert self.work is not None
        return self.work


class Steps:
    """The jobs of a node.

    Args:
        budget: positions of a step.
        ended: told of a job that has ended, with its result.
        failed: told of a job that has failed, with why.
    """

    def __init__(
        self, budget: int, ended: Callable[[Job, Any], None], failed: Callable[[Job, Exception], None]
    ) -> None:
        self._scheduler = Scheduler(budget)
        self.jobs: dict[int, Job] = {}
        """Those that are there, by their keys."""
        self._keys = itertools.count()
        self._step: list[int] = []
        self._ended, self._failed = ended, failed

    def add(self, job: Job) -> None:
        """Let a task run up to its first pass."""
        job.key = next(self._keys)
        self._go_on(job)

    def join(self, job: Job) -> None:
        """Let a job in that has a pass already."""
        job.key = next(self._keys)
        self._wait(job)

    def next(self) -> Parts:
        """The next step, to be told `ran` afterwards; empty when nothing waits."""
        step = self._scheduler.next()
        self._step = [key for key, _ in step]
        return [(self.jobs[key], rows) for key, rows in step]

    def ran(self, spent_s: float) -> None:
        """The step has run: let the tasks go on whose pass is done with it."""
        for key in self._step:
            job = self.jobs[key]
            job.ran_s += spent_s
            work = job.running
            if work.error is not None or not work.rows:
                self._scheduler.drop(key)
                self._go_on(job)

    def forget_cancelled(self) -> None:
        """Drop the jobs that nobody waits for any more."""
        for key in [key for key, job in self.jobs.items() if job.waiter.cancelled()]:
            del self.jobs[key]
            self._scheduler.drop(key)

    def _go_on(self, job: Job) -> None:
        """Let a task run up to its next pass, or to its end."""
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


def run(parts: Parts) -> None:
    """Run a step; an error of it as a whole is every job's."""
    works = [(job.running, rows) for job, rows in parts]
    try:
        works[0][0].session.shard.run(works)
    except Exception as error:
        for work, _ in works:
            work.error = error
