"""Time as the loop sees it: the event loop's, or the simulator's. What waits or reads a clock does so through here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Generator
from typing import Any, Protocol, TypeVar

__all__ = ["REAL", "Event", "Pending", "Time"]

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class Event(Protocol):
    """Something to wait for."""

    def set(self) -> None:
        """It has happened; to be called on any thread."""
        ...

    def clear(self) -> None:
        """It has not happened any more."""
        ...


class Pending(Protocol[T_co]):
    """A coroutine that runs beside the one that started it; awaiting it gives its result."""

    def __await__(self) -> Generator[Any, Any, T_co]: ...

    def done(self) -> bool:
        """Whether it has ended."""
        ...

    async def drop(self) -> None:
        """Cancel it, and wait until it is gone; what it was to give is lost."""
        ...


class Time(Protocol):
    """A clock, and the ways to wait."""

    def now(self) -> float:
        """Seconds, from some start."""
        ...

    def event(self) -> Event:
        """A new one, for `wait`."""
        ...

    async def wait(self, event: Event, most_s: float) -> bool:
        """Wait for an event; False when it has not happened after so long."""
        ...

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Pending[T]:
        """Run a coroutine beside this one."""
        ...

    async def pause(self) -> None:
        """Let the others go on first."""
        ...


class _Event:
    """asyncio's, that any thread may set."""

    __slots__ = ("_loop", "happened")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.happened = asyncio.Event()

    def set(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.happened.set)

    def clear(self) -> None:
        self.happened.clear()


class _Task:
    """A `Pending` of asyncio's."""

    __slots__ = ("_task",)

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._task = asyncio.ensure_future(coroutine)

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._task.__await__()

    def done(self) -> bool:
        return self._task.done()

    async def drop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class _RealTime:
    """asyncio's."""

    now = staticmethod(time.perf_counter)
    event = _Event

    async def wait(self, event: Event, most_s: float) -> bool:
        assert isinstance(event, _Event)
        try:
            async with asyncio.timeout(most_s):
                await event.happened.wait()
        except TimeoutError:
            return False
        return True

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Pending[T]:
        return _Task(coroutine)

    async def pause(self) -> None:
        await asyncio.sleep(0)


REAL: Time = _RealTime()
