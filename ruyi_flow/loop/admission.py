"""New sessions on a full node: a bounded queue, first come first served, a deadline, then a clear refusal. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ruyi_flow.errors import CapacityError
from ruyi_flow.loop.capacity import Rooms
from ruyi_flow.loop.clock import REAL, Event, Time
from ruyi_flow.loop.session import Session

__all__ = ["Admission"]

S = TypeVar("S", bound=Session)


class Admission:
    """Lets sessions in when there is room for them.

    Args:
        rooms: they tell when some is given back.
        most: sessions that may wait.
        wait_s: how long each of them may.
        time: where they wait.
    """

    def __init__(self, rooms: Rooms, most: int, wait_s: float, time: Time = REAL) -> None:
        self._room, self._most, self._wait_s, self._time = rooms.pool.num_positions, most, wait_s, time
        self._queue: list[Event] = []
        rooms.on_release = self._wake

    @property
    def waiting(self) -> int:
        """Sessions in the queue."""
        return len(self._queue)

    async def admit(self, open: Callable[[], S], positions: int) -> S:
        """Open a session that needs so many positions, at once or when there is room.

        Raises:
            CapacityError: it is more than the node has in all, too many wait already, or there was no room in time.
        """
        refused = CapacityError("others wait before it")
        never = positions > self._room
        if not self._queue or never:
            try:
                return open()
            except CapacityError as error:
                if never or not self._most:
                    raise
                refused = error
        if len(self._queue) >= self._most:
            raise CapacityError(f"{len(self._queue)} sessions wait for room already")
        turn, until = self._time.event(), self._time.now() + self._wait_s
        self._queue.append(turn)
        if self._queue[0] is turn:
            turn.set()  # room may have been given back before it stood here to be told
        try:
            while await self._time.wait(turn, until - self._time.now()):
                turn.clear()
                try:
                    return open()
                except CapacityError as error:
                    refused = error
        finally:
            self._queue.remove(turn)
            self._wake()  # there may be room for the next one, which is the first now
        raise CapacityError(f"no room within {self._wait_s:g} s: {refused}")

    def _wake(self) -> None:
        """Some room is free, or another session is the first; called on whatever thread."""
        for turn in self._queue[:1]:
            turn.set()
