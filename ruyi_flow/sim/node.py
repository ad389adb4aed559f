"""A node in virtual time: the product's sessions and steps, with rows that are counted and not computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ruyi_flow.loop.capacity import Capacity, Lease
from ruyi_flow.loop.scheduler import rows_alone
from ruyi_flow.loop.session import Pass, Session
from ruyi_flow.loop.steps import Job, Parts, Steps, Task, run_parts
from ruyi_flow.requests import SessionOpen
from ruyi_flow.sim.behaviour import Script
from ruyi_flow.sim.clock import Shared, VirtualTime, until
from ruyi_flow.sim.profile import StepCost
from ruyi_flow.sim.results import Amount

__all__ = ["Rows", "VirtualSession", "VirtualStages", "VirtualWorker"]

T = TypeVar("T")

Told = Callable[[float, float, int, int], None]
"""Told of a step: when it began, how long it took, its stage and its rows."""


class Rows:
    """States that are only counted."""

    __slots__ = ("shape",)

    def __init__(self, count: int) -> None:
        self.shape = (count,)

    def __getitem__(self, rows: slice) -> Rows:
        start, stop, _ = rows.indices(self.shape[0])
        return Rows(max(0, stop - start))


_ONE = Rows(1)
"""Of a token, which is nearly always."""


class VirtualStages:
    """A node's consecutive stages.

    Args:
        exits: where they end.
        first: whether they start with the embedding.
        costs: of each of them.
        scripts: by a session's seed, what the branches say in it.
        capacity: for sessions.
    """

    def __init__(
        self,
        exits: tuple[int, ...],
        first: bool,
        costs: Sequence[StepCost],
        scripts: Mapping[int, Script],
        capacity: Capacity,
    ) -> None:
        self.exits, self._first, self.capacity = exits, first, capacity
        self._costs, self._scripts = costs, scripts

    @property
    def is_entry(self) -> bool:
        """See `Stages`."""
        return self._first

    def open(self, opening: SessionOpen, lease: Lease, *, covers_next: bool = False) -> VirtualSession:
        """Start a session; see `Stages.open`. The seed says which script it follows."""
        script = self._scripts[opening.sampling.seed or 0]
        return VirtualSession(self, lease, opening, script=script, covers_next=covers_next)

    def cost(self, parts: Sequence[tuple[Pass, int]]) -> float:
        """Seconds that the next rows of passes take together."""
        work, count = parts[0]
        stage = work.stage
        costs = self._costs[stage]
        if count == 1 and len(parts) == 1:  # a token, which is nearly always
            session = work.session
            start = session.positions[stage]
            read = len(session.rows_to_read(stage, start, 1, work.wants)) if work.looks else 0
            return costs.of_one(start + 1, work.looks, read, 0 if session.policy.routing.scale is None else read)
        rows = taken = read = scaled = context = read_context = read_attended = 0
        attended = 0.0
        for work, count in parts:
            start = work.session.positions[stage]
            held = start + count
            rows, context, attended = rows + count, context + held, attended + count * (start + 0.5 * count)
            if work.looks:
                asked = len(work.session.rows_to_read(stage, start, count, work.wants))
                taken, read = taken + count, read + asked
                if asked:
                    read_attended, read_context = read_attended + asked * held, read_context + held
                    scaled += 0 if work.session.policy.routing.scale is None else asked
        return costs.of(rows, attended, context, len(parts), taken, read, read_attended, read_context, scaled)

    def run(self, parts: Sequence[tuple[Pass, int]]) -> None:
        """See `Stages.run`."""
        for work, count in parts:
            session = work.session
            start = session.positions[work.stage]
            session.add_boundary(work.stage, work.take(count))
            if work.looks:
                assert isinstance(session, VirtualSession)
                session.look(work, start, start + count)


class VirtualSession(Session):
    """A session whose branches say what its script has."""

    def __init__(
        self, stages: VirtualStages, lease: Lease, opening: SessionOpen, *, script: Script, covers_next: bool
    ) -> None:
        super().__init__(stages, lease, opening, vocab_size=script.vocab_size, covers_next=covers_next)
        self._script, self._looks = script, [script.looks[p] for p in stages.exits]

    def embed(self, token_ids: Sequence[int]) -> Rows:
        return _ONE if len(token_ids) == 1 else Rows(len(token_ids))

    def join(self, states: Sequence[Rows]) -> Rows:
        return Rows(sum(s.shape[0] for s in states))

    def look(self, work: Pass, start: int, stop: int) -> None:
        """What the branch says at the wanted ones of some positions."""
        looks, found, first = self._looks[work.stage], work.found, self.prompt_length - 1
        assert found is not None
        if self.rates_prompt(work.stage, stop):
            self.choose_start(self._script.reading)
        for position in work.wants:
            if start <= position < stop:
                found.append(looks[(position - first) % len(looks)])


class _Waiter:
    """Who waits for a task in virtual time."""

    __slots__ = ("event", "gone", "result")

    def __init__(self) -> None:
        self.event: Any = None
        self.result: Any = None
        self.gone = False

    def cancelled(self) -> bool:
        return self.gone


@dataclass(frozen=True, slots=True)
class _Step:
    parts: Parts
    began: float
    cost: float


class VirtualWorker:
    """A `Worker` whose steps take what they cost.

    Args:
        time: where.
        stages: whose.
        budget: positions of a step.
        step_s: of a task, beyond its steps, unless it is brief.
        round_s: of every task: the entry node's rounds.
        round_cpu_s: processor time of one, where there are cores.
        cores: of the machine, where nodes share it.
        cold: what the first step after a pause takes more, by the pause; None for nothing.
        note: takes in the seconds of every step, from when it began.
        told: told of every step.
    """

    def __init__(
        self,
        time: VirtualTime,
        stages: VirtualStages,
        budget: int,
        step_s: float = 0.0,
        round_s: float = 0.0,
        round_cpu_s: float = 0.0,
        cores: Shared | None = None,
        cold: Callable[[float], float] | None = None,
        note: Callable[[Amount], None] = lambda amount: None,
        told: Told | None = None,
    ) -> None:
        self._cold, self._idle_since = cold, -math.inf
        self._step_s, self._round_s, self._round_cpu_s = step_s, round_s, round_cpu_s
        self._time, self._stages, self._cores = time, stages, cores
        self._note, self._told = note, told
        self._steps, self._budget = Steps(budget, self._ended, self._failed), budget
        self._busy = self._in_step = False
        self._later: list[Callable[[], object]] = []
        """What is to be run after the step that is under way, in which jobs have a part that may be forgotten."""
        self.busy_s = 0.0
        """Seconds of steps so far."""
        self.waited_s = 0.0
        """That tasks have waited, all together."""

    def run(
        self, task: Task[T], *, brief: bool = False, since: float | None = None
    ) -> Coroutine[Any, Any, tuple[T, float, float]]:
        around_s = self._round_s if brief else self._round_s + self._step_s
        if self._cores is not None and self._round_cpu_s:
            self._time.start(self._cores.take(self._round_cpu_s))
        return (self._with_others if self._busy else self._alone)(task, around_s, since)

    async def _with_others(self, task: Task[T], around_s: float, since: float | None) -> tuple[T, float, float]:
        waiter = _Waiter()
        try:
            self._steps.add(Job(task, waiter, self._time.now(), since=since))
            if waiter.result is None:
                waiter.event = self._time.env.event()
                await until(waiter.event)
            if around_s:
                await self._time.sleep(around_s)
        except BaseException:
            waiter.gone = True  # interrupted: the step that it has a part in goes on without it
            raise
        return self._given(waiter)

    async def _alone(self, task: Task[T], around_s: float, since: float | None) -> tuple[T, float, float]:
        """Run a task on the idle node: without the scheduler, until there is another one.

        What it takes around its steps is waited for with the first of them, which is an event less.
        """
        time, now, stages, others = self._time, self._time.now, self._stages, self._steps.jobs
        self._busy, asked, ran_s = True, now(), 0.0
        before_s, began = around_s, asked
        if self._cold is not None:
            before_s += self._cold(asked - self._idle_since)
        try:
            work = next(task)
            while not others:
                rows = rows_alone(work.rows, self._budget)
                parts = ((work, rows),)
                cost = before_s + stages.cost(parts)
                await (time.sleep(cost) if self._cores is None else self._cores.take(cost))
                ended_s = now()
                took = max(0.0, ended_s - began - around_s)
                self.busy_s += took
                self._note((began, took, took))
                if self._told is not None:
                    self._told(began, took, work.stage, rows)
                stages.run(parts)
                ran_s += took
                began, before_s, around_s = ended_s, 0.0, 0.0
                if not work.rows:
                    work = task.send(work.found)
        except StopIteration as ended:
            result: T = ended.value
        except BaseException:  # interrupted, or the task failed: the node is free again
            self._leave()
            raise
        else:
            return await self._joined(task, work, asked, since, ran_s)
        self._leave()
        waited = began - asked - ran_s
        self.waited_s += waited
        return result, waited, ran_s

    async def _joined(
        self, task: Task[T], work: Pass, asked: float, since: float | None, ran_s: float
    ) -> tuple[T, float, float]:
        """Go on with a task together with others, and take the node's steps until it is done."""
        waiter = _Waiter()
        job = Job(task, waiter, asked, since=since)
        job.work, job.ran_s = work, ran_s
        self._steps.join(job)
        try:
            while waiter.result is None:
                await self._do(self._begin())
        except BaseException:  # interrupted: others go on without it
            waiter.gone = True
            raise
        self._leave()
        return self._given(waiter)

    def _given(self, waiter: _Waiter) -> tuple[Any, float, float]:
        result, error, waited, ran_s = waiter.result
        self.waited_s += waited
        if error is not None:
            raise error
        return result, waited, ran_s

    def _leave(self) -> None:
        """Who took the node's steps is done; those who are there go on."""
        if self._steps.jobs:
            self._time.start(self._go_on())
        else:
            self._busy, self._idle_since = False, self._time.now()

    def submit(self, call: Callable[[], object]) -> None:
        self._later.append(call)
        if not self._in_step:
            self._run_later()

    def _run_later(self) -> None:
        self._steps.forget_cancelled()
        later, self._later = self._later, []
        for call in later:
            call()

    def shutdown(self) -> None:
        pass

    def _begin(self) -> _Step:
        self._in_step = True
        parts = self._steps.next()
        return _Step(parts, self._time.now(), self._stages.cost([(job.running, rows) for job, rows in parts]))

    async def _pass(self, cost: float) -> None:
        if self._cores is None:
            await self._time.sleep(cost)
        else:
            await self._cores.take(cost)

    async def _do(self, step: _Step) -> None:
        try:
            await self._pass(step.cost)
        except BaseException:  # interrupted
            self._time.start(self._take_over(step))  # others may have a part in it
            raise
        self._end(step)

    def _end(self, step: _Step) -> None:
        took = self._time.now() - step.began
        self.busy_s += took
        self._note((step.began, took, took))
        if self._told is not None:
            rows = sum(rows for _, rows in step.parts)
            self._told(step.began, took, step.parts[0][0].running.stage, rows)
        run_parts(step.parts)
        self._steps.ran(took)
        self._in_step = False
        if self._later:
            self._run_later()

    async def _take_over(self, step: _Step) -> None:
        await self._pass(max(0.0, step.began + step.cost - self._time.now()))
        self._end(step)
        await self._go_on()

    async def _go_on(self) -> None:
        while self._steps.jobs:
            await self._do(self._begin())
        self._leave()

    def _ended(self, job: Job, result: object) -> None:
        self._tell(job, result, None)

    def _failed(self, job: Job, error: Exception) -> None:
        self._tell(job, None, error)

    def _tell(self, job: Job, result: object, error: Exception | None) -> None:
        waiter = job.waiter
        assert isinstance(waiter, _Waiter)
        waiter.result = result, error, self._time.now() - job.asked - job.ran_s, job.ran_s
        if waiter.event is not None:
            waiter.event.succeed()
