"""New sessions on a full node: a bounded queue, first come first served, with a deadline and then a clear refusal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ruyi_flow.errors import CapacityError
from ruyi_flow.runtime.stage import Shard, ShardSession

__all__ = ["Admission"]


class Admission:
    """Lets sessions in when there is room for them.

    Args:
        shard: whose room it is; it tells when some is given back.
        most: sessions that may wait.
        wait_s: how long each of them may.
    """

    def __init__(self, shard: Shard, most: int, wait_s: float) -> None:
        self._pool, self._most, self._wait_s = shard.pool, most, wait_s
        self.waiting = 0
        self._turn = asyncio.Lock()  # who holds it is the first in the queue, which the lock keeps in order
        self._freed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        shard.on_release = self._released

    async def admit(self, open: Callable[[], ShardSession], positions: int) -> ShardSession:
        """Open a session that needs so many positions, at once or when there is room.

        Raises:
            CapacityError: it is more than the node has in all, too many wait already, or there was no room in time.
        """
        self._loop = asyncio.get_running_loop()
        never = positions > self._pool.num_positions
        if not self.waiting or never:
            try:
                return open()
            except CapacityError:
                if never or not self._most:
                    raise
        if self.waiting >= self._most:
            raise CapacityError(f"{self.waiting} sessions wait for room already")
        self.waiting += 1
        refused = CapacityError("others wait before it")
        try:
            async with asyncio.timeout(self._wait_s), self._turn:
                while True:
                    self._freed.clear()
                    try:
                        return open()
                    except CapacityError as error:
                        refused = error
                    await self._freed.wait()
        except TimeoutError:
            raise CapacityError(f"no room within {self._wait_s:g} s: {refused}") from None
        finally:
            self.waiting -= 1

    def _released(self) -> None:
        """A session's room is free again; called on the compute thread."""
        if self._loop is not None and self.waiting and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._freed.set)
