"""Admission of sessions on a full node: a bounded queue, first come first served, a deadline, then a refusal. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ruyi_flow.errors import CapacityError
from ruyi_flow.loop.capacity import Capacity, Lease
from ruyi_flow.loop.clock import REAL_CLOCK, Clock, Event

__all__ = ["Admission"]

T = TypeVar("T")


class Admission:
    """Leases a node's capacity to sessions in the order of their arrival.

    Args:
        capacity: the node's capacity, which reports when a lease is given back or parked.
        max_waiting: number of sessions that may wait.
        max_wait_s: seconds that each of them may wait.
        clock: where they wait.
    """

    def __init__(self, capacity: Capacity, max_waiting: int, max_wait_s: float, clock: Clock = REAL_CLOCK) -> None:
        self._capacity, self._clock = capacity, clock
        self._max_waiting, self._max_wait_s = max_waiting, max_wait_s
        self._queue: list[Event] = []
        capacity.on_release = self._wake

    @property
    def waiting(self) -> int:
        """Number of sessions in the queue."""
        return len(self._queue)

    async def admit(self, max_positions: int, resume: Callable[[], T | None] = lambda: None) -> Lease | T:
        """Lease capacity for `max_positions`, at once or when enough is free.

        Args:
            max_positions: largest number of positions of the session.
            resume: called at every attempt; takes a parked session back and returns it, or returns None for a new
                lease. No other coroutine runs between its call and the return. Default: there is none to take back.

        Raises:
            CapacityError: the queue is full, or too little became free in time.
            ContextLengthError: the family's context is shorter.
        """
        refused = CapacityError("earlier requests are still waiting")
        if not self._queue:
            try:
                return resume() or self._capacity.lease(max_positions)
            except CapacityError as error:
                if not self._max_waiting:
                    raise
                refused = error
        if len(self._queue) >= self._max_waiting:
            raise CapacityError(
                f"the queue is full ({len(self._queue)} waiting, limits.max_waiting {self._max_waiting}); "
                "try again later"
            )
        turn, until = self._clock.event(), self._clock.now() + self._max_wait_s
        self._queue.append(turn)
        if self._queue[0] is turn:
            turn.set()  # a lease may have been given back or parked before this session was in the queue
        try:
            while await self._clock.wait(turn, until - self._clock.now()):
                turn.clear()
                try:
                    return resume() or self._capacity.lease(max_positions)
                except CapacityError as error:
                    refused = error
        finally:
            self._queue.remove(turn)
            self._wake()  # there may be enough for the next session, which is now the first
        raise CapacityError(f"no capacity became free within {self._max_wait_s:g} s: {refused}")

    def _wake(self) -> None:
        """Let the first session in the queue try again; called on any thread."""
        for turn in self._queue[:1]:
            turn.set()
