"""Virtual time, on SimPy: the waits of the loop, and things that share a capacity."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Coroutine, Generator, Iterator
from functools import partial
from typing import Any, TypeVar

import simpy

from ruyi_flow.errors import RuyiFlowError
from ruyi_flow.loop.clock import Event, Pending

__all__ = ["Shared", "VirtualTime", "until"]

T = TypeVar("T")


class until:  # noqa: N801 (reads as a word: `await until(event)`)
    """Waits for a SimPy event, in a coroutine that runs as a SimPy process."""

    __slots__ = ("_event",)

    def __init__(self, event: simpy.Event) -> None:
        self._event = event

    def __await__(self) -> Generator[simpy.Event, Any, Any]:
        return (yield self._event)


class _Sleep(simpy.Timeout):  # type: ignore[misc]  # SimPy has no types
    """A time-out that can be awaited; by an iterator in C, since nobody wants what it is worth."""

    def __await__(self) -> Iterator[simpy.Event]:
        return iter((self,))


class _Event:
    """A `runtime.times.Event`."""

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
    """A `runtime.times.Pending`."""

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


def _forgive(event: simpy.Event) -> None:
    """A failure of the simulated system is told to who awaits it, if anybody does at that moment.

    Ctrl-C ends the simulation, whoever awaits what it hit.
    """
    if not event.ok and not isinstance(event.value, Exception):
        raise event.value
    event.defused = True


def _forgive_ours(event: simpy.Event) -> None:
    """The same of the simulated system's own failures; any other is a mistake in this program, and ends it."""
    if event.ok or isinstance(event.value, (RuyiFlowError, simpy.Interrupt)):
        event.defused = True
    else:
        raise event.value


class VirtualTime:
    """A `runtime.times.Time` of a SimPy environment.

    What runs in it are SimPy processes made of coroutines.
    """

    def __init__(self) -> None:
        self.env = simpy.Environment()
        self.now: Callable[[], float] = partial(getattr, self.env, "_now")
        """See `Time`; what runs no Python costs a quarter, and nothing is called more often."""

    def event(self) -> Event:
        return _Event(self.env)

    async def wait(self, event: Event, most_s: float) -> bool:
        assert isinstance(event, _Event)
        happened = event.happened
        if not happened.processed:
            await until(happened | self.env.timeout(max(0.0, most_s)))
        return bool(happened.triggered)

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Pending[T]:
        process = self.env.process(coroutine)  # a coroutine is a generator to SimPy
        process.callbacks.append(_forgive)
        return _Process(process)

    def process(self, coroutine: Coroutine[Any, Any, Any]) -> simpy.Process:
        """Run a coroutine as a SimPy process that nobody need await."""
        process = self.env.process(coroutine)
        process.callbacks.append(_forgive_ours)
        return process

    async def pause(self) -> None:
        await self.sleep(0)

    def sleep(self, seconds: float) -> _Sleep:
        """Return the event of so many seconds from now, which can be awaited."""
        return _Sleep(self.env, seconds)


class Shared:
    """A capacity that all who want some of it at a time share evenly: a link's bandwidth, a machine's cores.

    Processor sharing: with n takers each gets min(most, capacity / n). Virtual service makes an arrival and a departure
    cost O(log n): everybody's service grows at the same rate, so whoever has the least left when it comes ends first.

    Args:
        time: where.
        capacity: units a second.
        most: units a second that one taker can use; None for all of them.
    """

    def __init__(self, time: VirtualTime, capacity: float, most: float | None = None) -> None:
        self._time, self._capacity, self._most = time, capacity, capacity if most is None else most
        self._served = self._then = 0.0
        self._takers: list[tuple[float, int, simpy.Event]] = []
        self._count = self._wakes = 0

    @property
    def takers(self) -> int:
        """At the moment."""
        return len(self._takers)

    def start(self, units: float) -> simpy.Event:
        """Use so many units; the event happens when they are used."""
        self._go_on()
        event = self._time.env.event()
        self._count += 1
        heapq.heappush(self._takers, (self._served + units, self._count, event))
        self._set_alarm()
        return event

    async def take(self, units: float) -> None:
        """Use so many units, and wait until they are used; who is interrupted uses no more of them."""
        if units <= 0:
            return
        event = self.start(units)
        try:
            await until(event)
        except BaseException:
            self._go_on()
            self._takers = [taker for taker in self._takers if taker[2] is not event]
            heapq.heapify(self._takers)
            self._set_alarm()
            raise

    @property
    def _rate(self) -> float:
        return min(self._most, self._capacity / len(self._takers)) if self._takers else 0.0

    def _go_on(self) -> None:
        now = self._time.now()
        self._served += (now - self._then) * self._rate
        self._then = now

    def _set_alarm(self) -> None:
        self._wakes += 1
        if self._takers:
            left = max(0.0, self._takers[0][0] - self._served) / self._rate
            alarm = self._time.env.timeout(left, self._wakes)
            alarm.callbacks.append(self._rings)

    def _rings(self, alarm: simpy.Event) -> None:
        if alarm.value != self._wakes:
            return  # somebody came or left since
        self._go_on()
        end = self._takers[0][0]
        self._served = max(self._served, end)  # whatever rounding says, the first one is done
        while self._takers and self._takers[0][0] <= self._served:
            heapq.heappop(self._takers)[2].succeed()
        self._set_alarm()
