"""The loop's clock: the event loop's time, or the simulator's. Whatever waits or reads a time does so through it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Coroutine, Generator
from typing import Any, Protocol, TypeVar

__all__ = ["REAL_CLOCK", "Clock", "Event", "Pending"]

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class Event(Protocol):
    """A flag that a coroutine can wait for."""

    def set(self) -> None:
        """Set the flag; may be called on any thread."""
        ...

    def clear(self) -> None:
        """Clear the flag."""
        ...


class Pending(Protocol[T_co]):
    """A coroutine that runs beside the one that started it; awaiting it gives its result."""

    def __await__(self) -> Generator[Any, Any, T_co]: ...

    def done(self) -> bool:
        """Return whether it has ended."""
        ...

    async def drop(self) -> None:
        """Cancel it, wait until it has ended, and ignore its result."""
        ...


class Clock(Protocol):
    """A clock and the ways to wait."""

    def now(self) -> float:
        """Return the time in seconds since an arbitrary start."""
        ...

    def event(self) -> Event:
        """Return a new event for `wait`."""
        ...

    async def wait(self, event: Event, timeout_s: float) -> bool:
        """Wait for an event; return False when it was not set within `timeout_s`."""
        ...

    def sleep(self, seconds: float) -> Awaitable[object]:
        """Wait so many seconds, 0 or more."""
        ...

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Pending[T]:
        """Run a coroutine beside this one."""
        ...

    async def pause(self) -> None:
        """Let other coroutines run first."""
        ...


class _Event:
    """An asyncio event that any thread may set."""

    __slots__ = ("_loop", "flag")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.flag = asyncio.Event()

    def set(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.flag.set)

    def clear(self) -> None:
        self.flag.clear()


class _Task:
    """A `Pending` on an asyncio task."""

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


class _RealClock:
    """The clock of asyncio's event loop."""

    now = staticmethod(time.perf_counter)
    sleep = staticmethod(asyncio.sleep)
    event = _Event

    async def wait(self, event: Event, timeout_s: float) -> bool:
        assert isinstance(event, _Event)
        try:
            async with asyncio.timeout(timeout_s):
                await event.flag.wait()
        except TimeoutError:
            return False
        return True

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Pending[T]:
        return _Task(coroutine)

    async def pause(self) -> None:
        await asyncio.sleep(0)


REAL_CLOCK: Clock = _RealClock()
"""The clock of a running node."""
