"""A node in virtual time: the product's own sessions and steps, over states that are counted instead of computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import simpy

from ruyi_flow.loop.capacity import Capacity, Lease
from ruyi_flow.loop.pages import PageRun
from ruyi_flow.loop.scheduler import rows_alone
from ruyi_flow.loop.session import Pass, Session
from ruyi_flow.loop.steps import Job, Parts, Steps, Task, run_parts
from ruyi_flow.requests import SessionOpen
from ruyi_flow.sim.behaviour import Script
from ruyi_flow.sim.clock import SharedCapacity, VirtualTime, until
from ruyi_flow.sim.profile import StepCost
from ruyi_flow.sim.results import AddSlice, TimedAmount

__all__ = ["Rows", "VirtualSession", "VirtualStages", "VirtualWorker"]

T = TypeVar("T")


class Rows:
    """A stand-in for a tensor of hidden states: it only has a number of rows."""

    __slots__ = ("shape",)

    def __init__(self, count: int) -> None:
        self.shape = (count,)

    def __getitem__(self, rows: slice) -> Rows:
        start, stop, _ = rows.indices(self.shape[0])
        return Rows(max(0, stop - start))


_ONE = Rows(1)
"""The state of one token, by far the most frequent case."""


class VirtualStages:
    """A node's consecutive stages in virtual time.

    Args:
        exits: the exits that the stages end at.
        first: whether the first stage starts with the embedding.
        costs: the step cost of each stage.
        scripts: what the branches predict in each session, by the session's sampling seed.
        capacity: the node's capacity for sessions.
    """

    def __init__(
        self,
        exits: tuple[int, ...],
        *,
        first: bool,
        costs: Sequence[StepCost],
        scripts: Mapping[int, Script],
        capacity: Capacity,
    ) -> None:
        self.exits, self._first, self.capacity = exits, first, capacity
        self._costs, self._scripts = costs, scripts

    @property
    def is_entry(self) -> bool:
        """See `Stages.is_entry`."""
        return self._first

    def open(self, opening: SessionOpen, lease: Lease, *, covers_next: bool = False) -> VirtualSession:
        """Start a session; see `Stages.open`. The sampling seed selects its script."""
        return VirtualSession(self, lease, opening, covers_next=covers_next)

    def script(self, opening: SessionOpen) -> Script:
        """Return the script of an answer."""
        return self._scripts[opening.sampling.seed or 0]

    def cost(self, parts: Sequence[tuple[Pass, int]]) -> float:
        """Return the seconds of a step that runs the next rows of several passes."""
        work, count = parts[0]
        stage = work.stage
        costs = self._costs[stage]
        if count == 1 and len(parts) == 1:  # one token: by far the most frequent case
            session = work.session
            start = session.positions[stage]
            read = len(session.rows_to_read(stage, start, 1, work.wants)) if work.looks else 0
            return costs.seconds_of_one(
                start + 1, work.looks, read, 0 if session.policy.routing.scale is None else read
            )
        rows = taken = read = scaled = context = read_context = read_attended = 0
        attended = 0.0
        for work, count in parts:
            start = work.session.positions[stage]
            stop = start + count
            rows, context, attended = rows + count, context + stop, attended + count * (start + 0.5 * count)
            if work.looks:
                asked = len(work.session.rows_to_read(stage, start, count, work.wants))
                taken, read = taken + count, read + asked
                if asked:
                    read_attended, read_context = read_attended + asked * stop, read_context + stop
                    scaled += 0 if work.session.policy.routing.scale is None else asked
        return costs.seconds(
            rows,
            attended,
            context,
            sessions=len(parts),
            taken=taken,
            read=read,
            read_attended=read_attended,
            read_context=read_context,
            scaled=scaled,
        )

    def run(self, parts: Sequence[tuple[Pass, int]]) -> None:
        """See `Stages.run`."""
        for work, count in parts:
            session = work.session
            start = session.positions[work.stage]
            session.add_boundary(work.stage, work.take(count), looks=work.looks)
            if work.looks:
                assert isinstance(session, VirtualSession)
                session.look(work, start, start + count)


class VirtualSession(Session):
    """A session whose branches predict what its script says."""

    def __init__(self, stages: VirtualStages, lease: Lease, opening: SessionOpen, *, covers_next: bool) -> None:
        self._stages = stages
        super().__init__(stages, lease, opening, vocab_size=stages.script(opening).vocab_size, covers_next=covers_next)

    def begin(self, opening: SessionOpen, *, covers_next: bool) -> None:
        self._script = script = self._stages.script(opening)
        self._looks = [script.looks[p] for p in self._stages.exits]
        super().begin(opening, covers_next=covers_next)

    def embed(self, token_ids: Sequence[int]) -> Rows:
        return _ONE if len(token_ids) == 1 else Rows(len(token_ids))

    def use_pages(self, moved_from: PageRun | None) -> None:
        """There is nothing to copy."""

    def states(self, start: int, stop: int) -> Rows:
        return _ONE if stop - start == 1 else Rows(stop - start)

    def write_log(self, start: int, boundary: Rows) -> None:
        """There is nothing to keep: rows are counted, not computed."""

    def join(self, states: Sequence[Rows]) -> Rows:
        return Rows(sum(s.shape[0] for s in states))

    def look(self, work: Pass, start: int, stop: int) -> None:
        """Add what the branch predicts at the wanted positions from start to before stop."""
        looks, found, first = self._looks[work.stage], work.found, self.prompt_length - 1
        assert found is not None
        if self.rates_prompt(work.stage, stop):
            self.choose_start(self._script.prompt_reading)
        for position in work.wants:
            if start <= position < stop:
                found.append(looks[(position - first) % len(looks)])


class _Waiter:
    """The caller of `VirtualWorker.run` that waits for one task."""

    __slots__ = ("event", "gone", "outcome")

    def __init__(self) -> None:
        self.event: Any = None
        """The event that it waits for; None for the caller that takes the node's steps."""
        self.outcome: Any = None
        """(result, error, seconds waited, seconds run) of the task, once it has ended."""
        self.gone = False

    def cancelled(self) -> bool:
        return self.gone


class VirtualWorker:
    """A `Worker` whose steps take their cost in virtual time.

    The caller that runs a task on an idle node takes the node's steps. As long as it is alone, it does so without a
    scheduler. Tasks that arrive meanwhile join its steps. When its own task is done, a process takes the other steps.

    Args:
        time: the simulation's virtual time.
        stages: the node's stages.
        budget: most positions in one step.
        step_s: overhead of a task in seconds, unless it is brief.
        round_s: overhead of every task in seconds, for a round on the entry node.
        round_cpu_s: processor seconds of that round; only used with `cores`.
        cores: the cores that the node shares with other nodes of its machine. Default: a core of its own.
        cold: returns the extra seconds of the first step after a pause, from its seconds. Default: none.
        add_busy: takes the start and the length of every step.
        add_slice: adds a step that has ended to the Chrome trace. Default: no trace.
    """

    def __init__(
        self,
        time: VirtualTime,
        stages: VirtualStages,
        *,
        budget: int,
        step_s: float = 0.0,
        round_s: float = 0.0,
        round_cpu_s: float = 0.0,
        cores: SharedCapacity | None = None,
        cold: Callable[[float], float] | None = None,
        add_busy: Callable[[TimedAmount], None] = lambda busy: None,
        add_slice: AddSlice | None = None,
    ) -> None:
        self._cold, self._idle_since = cold, -math.inf
        self._step_s, self._round_s, self._round_cpu_s = step_s, round_s, round_cpu_s
        self._time, self._stages, self._cores = time, stages, cores
        self._add_busy, self._add_slice = add_busy, add_slice
        self._steps = Steps(budget, self._ended, lambda job, error: self._ended(job, None, error))
        self._budget = budget
        self._busy = False
        """Whether the node's steps are being taken."""
        self._under_way: tuple[Parts, float, simpy.Event] | None = None
        """The step of several tasks that is under way: its parts, when it began, and the event of its end."""
        self._submitted: list[Callable[[], object]] = []
        self.busy_s = 0.0
        """Seconds of all steps so far."""
        self.waited_s = 0.0
        """Seconds that all tasks have waited so far."""

    def run(
        self, task: Task[T], *, brief: bool = False, since: float | None = None
    ) -> Coroutine[Any, Any, tuple[T, float, float]]:
        around_s = self._round_s if brief else self._round_s + self._step_s
        if self._cores is not None and self._round_cpu_s:
            self._time.start(self._cores.take(self._round_cpu_s))
        return (self._join if self._busy else self._lead)(task, around_s, since)

    async def _join(self, task: Task[T], around_s: float, since: float | None) -> tuple[T, float, float]:
        """Run a task on a busy node, whose steps another caller takes."""
        waiter = _Waiter()
        try:
            self._steps.add(Job(task, waiter, self._time.now(), since=since))
            if waiter.outcome is None:
                waiter.event = self._time.env.event()
                await until(waiter.event)
            if around_s:
                await self._time.sleep(around_s)
        except BaseException:
            waiter.gone = True  # interrupted: the step under way continues without it
            raise
        return self._result(waiter)

    async def _lead(self, task: Task[T], around_s: float, since: float | None) -> tuple[T, float, float]:
        """Run a task on the idle node, and take the node's steps until it is done.

        As long as it is alone, `around_s` passes together with its first step, which saves an event.
        """
        time, now, stages, others = self._time, self._time.now, self._stages, self._steps.jobs
        self._busy, asked, ran_s = True, now(), 0.0
        before_s, began = around_s, asked
        if self._cold is not None:
            before_s += self._cold(asked - self._idle_since)
        waiter: _Waiter | None = None
        try:
            work = next(task)
            while not others:
                rows = rows_alone(work.rows, self._budget)
                parts = ((work, rows),)
                cost = before_s + stages.cost(parts)
                await (time.sleep(cost) if self._cores is None else self._cores.take(cost))
                ended_s = now()
                took = max(0.0, ended_s - began - around_s)
                self._count(began, took, work.stage, rows)
                stages.run(parts)
                ran_s += took
                began, before_s, around_s = ended_s, 0.0, 0.0
                if not work.rows:
                    work = task.send(work.found)
            waiter = _Waiter()
            job = Job(task, waiter, asked, since=since)
            job.work, job.ran_s = work, ran_s
            self._steps.join(job)
            while waiter.outcome is None:
                await self._step()
            return self._result(waiter)
        except StopIteration as ended:  # it was alone to its end
            result: T = ended.value
        except BaseException:
            if waiter is not None:
                waiter.gone = True  # interrupted: the other tasks continue without it
            raise
        finally:
            if others:
                time.start(self._take_steps())
            else:
                self._busy, self._idle_since = False, now()
        waited = began - asked - ran_s
        self.waited_s += waited
        return result, waited, ran_s

    async def _take_steps(self) -> None:
        """Take the node's steps until there are no jobs, after the leading task is done."""
        while self._steps.jobs:
            await self._step()
        self._busy, self._idle_since = False, self._time.now()

    async def _step(self) -> None:
        """Take the scheduler's next step, or finish the one under way if whoever began it was interrupted."""
        if self._under_way is None:
            parts = self._steps.next()
            cost = self._stages.cost([(job.running, rows) for job, rows in parts])
            ends = self._time.sleep(cost) if self._cores is None else self._cores.start(cost)
            self._under_way = parts, self._time.now(), ends
        parts, began, ends = self._under_way
        await until(ends)
        took = self._time.now() - began
        self._count(began, took, parts[0][0].running.stage, sum(rows for _, rows in parts))
        run_parts(parts)
        self._steps.ran(took)
        self._under_way = None
        if self._submitted:
            self._run_submitted()

    def _count(self, began: float, took: float, stage: int, rows: int) -> None:
        self.busy_s += took
        self._add_busy((began, took, took))
        if self._add_slice is not None:
            self._add_slice(f"exit {self._stages.exits[stage]}", began, took, rows=rows)

    def _ended(self, job: Job, result: object, error: Exception | None = None) -> None:
        waiter = job.waiter
        assert isinstance(waiter, _Waiter)
        waiter.outcome = result, error, self._time.now() - job.asked - job.ran_s, job.ran_s
        if waiter.event is not None:
            waiter.event.succeed()

    def _result(self, waiter: _Waiter) -> tuple[Any, float, float]:
        result, error, waited, ran_s = waiter.outcome
        self.waited_s += waited
        if error is not None:
            raise error
        return result, waited, ran_s

    def submit(self, call: Callable[[], object]) -> None:
        self._submitted.append(call)
        if self._under_way is None:
            self._run_submitted()

    def _run_submitted(self) -> None:
        self._steps.forget_cancelled()
        calls, self._submitted = self._submitted, []
        for call in calls:
            call()

    def shutdown(self) -> None:
        pass
