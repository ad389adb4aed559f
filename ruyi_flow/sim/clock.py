"""The virtual clock, built on SimPy, and capacities that several users share evenly."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Coroutine, Generator, Iterator
from functools import partial
from typing import Any, TypeVar

import simpy
from simpy.events import Interruption

from ruyi_flow.errors import RuyiFlowError
from ruyi_flow.loop.clock import Event, Pending

__all__ = ["SharedCapacity", "VirtualTime", "interrupt", "until"]

T = TypeVar("T")


class until:  # noqa: N801 (reads as a word: `await until(event)`)
    """An awaitable that waits for a SimPy event, in a coroutine that runs as a SimPy process."""

    __slots__ = ("_event",)

    def __init__(self, event: simpy.Event) -> None:
        self._event = event

    def __await__(self) -> Generator[simpy.Event, Any, Any]:
        return (yield self._event)


class _Sleep(simpy.Timeout):  # type: ignore[misc]  # SimPy has no types
    """A timeout that can be awaited. It has no value, so an iterator in C, which is faster, does."""

    def __await__(self) -> Iterator[simpy.Event]:
        return iter((self,))


class _Event:
    """An `Event` of `loop/clock.py` in virtual time."""

    __slots__ = ("_env", "happened")

    def __init__(self, env: simpy.Environment) -> None:
        self._env, self.happened = env, env.event()

    def set(self) -> None:
        if not self.happened.triggered:
            self.happened.succeed()

    def clear(self) -> None:
        if self.happened.triggered:
            self.happened = self._env.event()


class _Process:
    """A `Pending` of `loop/clock.py` in virtual time."""

    __slots__ = ("_process",)

    def __init__(self, process: simpy.Process) -> None:
        self._process = process

    def __await__(self) -> Generator[simpy.Event, Any, Any]:
        return (yield self._process)

    def done(self) -> bool:
        return bool(self._process.triggered)

    async def drop(self) -> None:
        if not self._process.triggered:
            self._process.interrupt()
        try:
            await until(self._process)
        except Exception:  # its own failure, or the interrupt
            pass


def _keep_failure(event: simpy.Event) -> None:
    """Keep a coroutine's failure for whoever awaits it, now or later, instead of ending the simulation.

    Ctrl-C always ends the simulation.
    """
    if not event.ok and not isinstance(event.value, Exception):
        raise event.value
    event.defused = True


def _ignore_simulated_failure(event: simpy.Event) -> None:
    """Ignore failures of the simulated system; end the simulation at any other one, a mistake in this program."""
    if event.ok or isinstance(event.value, (RuyiFlowError, simpy.Interrupt)):
        event.defused = True
    else:
        raise event.value


class _Interruption(Interruption):  # type: ignore[misc]  # SimPy has no types
    """An interrupt that is dropped if nobody wants it any more when its turn comes."""

    def __init__(self, process: simpy.Process, cause: object, is_wanted: Callable[[], bool]) -> None:
        super().__init__(process, cause)
        self._is_wanted = is_wanted

    def _interrupt(self, event: simpy.Event) -> None:
        if self._is_wanted():
            super()._interrupt(event)


def interrupt(process: simpy.Process, cause: object, is_wanted: Callable[[], bool]) -> None:
    """Interrupt a process at this moment.

    Several interrupts of one moment may concern calls within each other. The first one ends the inner calls, and their
    interrupts must not hit what the process does then.

    Args:
        process: the process, which is not the one that runs now.
        cause: who interrupts it.
        is_wanted: asked when the interrupt's turn comes; returns whether the process still waits for the cause.
    """
    _Interruption(process, cause, is_wanted)


class VirtualTime:
    """A `Clock` of `loop/clock.py` on a SimPy environment, whose processes are coroutines."""

    def __init__(self) -> None:
        self.env = simpy.Environment()
        self.now: Callable[[], float] = partial(getattr, self.env, "_now")
        """See `Clock.now`. Nothing is called more often, and a call without Python code takes a quarter of the time."""

    def event(self) -> Event:
        return _Event(self.env)

    async def wait(self, event: Event, timeout_s: float) -> bool:
        assert isinstance(event, _Event)
        happened = event.happened
        if not happened.processed:
            await until(happened | self.env.timeout(max(0.0, timeout_s)))
        return bool(happened.triggered)

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Pending[T]:
        process = self.env.process(coroutine)  # a coroutine is a generator to SimPy
        process.callbacks.append(_keep_failure)
        return _Process(process)

    def process(self, coroutine: Coroutine[Any, Any, Any]) -> simpy.Process:
        """Run a coroutine as a SimPy process that need not be awaited."""
        process = self.env.process(coroutine)
        process.callbacks.append(_ignore_simulated_failure)
        return process

    async def pause(self) -> None:
        await self.sleep(0)

    def sleep(self, seconds: float) -> _Sleep:
        """Return an event that happens after `seconds` seconds and can be awaited."""
        return _Sleep(self.env, seconds)


class SharedCapacity:
    """A capacity that its users share evenly at every moment: a link's bandwidth, a machine's cores.

    This is processor sharing: each of n users gets min(most, capacity / n). All users are served at the same rate, so
    they end in the order of (served so far + units left) at their arrival; a heap of that makes an arrival or a
    departure cost O(log n).

    Args:
        time: the simulation's virtual time.
        capacity: units per second of all users together.
        most: most units per second of one user. Default: the whole capacity.
    """

    def __init__(self, time: VirtualTime, capacity: float, most: float | None = None) -> None:
        self._time, self._capacity, self._most = time, capacity, capacity if most is None else most
        self._served = self._then = 0.0
        self._users: list[tuple[float, int, simpy.Event]] = []
        self._count = self._alarms = 0

    def start(self, units: float) -> simpy.Event:
        """Begin to use `units` units, and return the event of having used them."""
        self._advance()
        event = self._time.env.event()
        self._count += 1
        heapq.heappush(self._users, (self._served + units, self._count, event))
        self._set_alarm()
        return event

    async def take(self, units: float) -> None:
        """Use `units` units and wait until they are used. An interrupted user gives the rest back."""
        if units <= 0:
            return
        event = self.start(units)
        try:
            await until(event)
        except BaseException:  # an interrupted user leaves its share to the others
            self._advance()
            self._users = [user for user in self._users if user[2] is not event]
            heapq.heapify(self._users)
            self._set_alarm()
            raise

    @property
    def _rate(self) -> float:
        return min(self._most, self._capacity / len(self._users)) if self._users else 0.0

    def _advance(self) -> None:
        now = self._time.now()
        self._served += (now - self._then) * self._rate
        self._then = now

    def _set_alarm(self) -> None:
        self._alarms += 1
        if self._users:
            left = max(0.0, self._users[0][0] - self._served) / self._rate
            alarm = self._time.env.timeout(left, self._alarms)
            alarm.callbacks.append(self._on_alarm)

    def _on_alarm(self, alarm: simpy.Event) -> None:
        if alarm.value != self._alarms:
            return  # a later arrival or departure has set another alarm
        self._advance()
        end = self._users[0][0]
        self._served = max(self._served, end)  # the first one is done, whatever rounding errors say
        while self._users and self._users[0][0] <= self._served:
            heapq.heappop(self._users)[2].succeed()
        self._set_alarm()
