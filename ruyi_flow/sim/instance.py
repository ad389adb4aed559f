"""One simulated node: the process that it runs as, and the outages that end one process and start the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

from ruyi_flow.loop.capacity import Capacity
from ruyi_flow.loop.front_door import FrontDoor
from ruyi_flow.sim.clock import VirtualTime
from ruyi_flow.sim.link import Pipe
from ruyi_flow.sim.node import VirtualWorker
from ruyi_flow.sim.results import AddSlice

__all__ = ["Caller", "Instance", "Life", "Outage", "merged"]


class Outage(NamedTuple):
    """A time for which a node does not serve."""

    start_s: float
    stop_s: float
    kind: str = "crash"
    """crash: its process ends. hang: it answers nothing, and is then restarted. drain: its sessions may move first."""


class Caller(Protocol):
    """A session with a node's process, or an answer that it owes."""

    def lose(self, cause: str) -> None:
        """Fail when it is noticed that the process has ended.

        Args:
            cause: "reset" if the connection tells, "silent" if only missing signs of life do.
        """
        ...

    def leave(self) -> None:
        """Move to another replica, if there is one: at once, or after the answer that is awaited."""
        ...


class Life:
    """One process of a node, from its start to its end.

    Args:
        worker: runs its stages.
        front_door: takes its sessions in.
        capacity: the node's capacity for sessions.
    """

    __slots__ = ("_idle", "_time", "callers", "capacity", "ended", "front_door", "worker")

    def __init__(self, time: VirtualTime, worker: VirtualWorker, front_door: FrontDoor, capacity: Capacity) -> None:
        self._time, self.worker, self.front_door, self.capacity = time, worker, front_door, capacity
        self.callers: dict[Caller, None] = {}
        """Who has a session with it; a dictionary keeps the order, without which runs would differ."""
        self.ended: str | None = None
        """How callers notice that it has ended: "reset" or "silent"; None while it runs."""
        self._idle = time.event()

    @property
    def is_draining(self) -> bool:
        """Whether it has told its callers that it shuts down, and still runs."""
        return self.front_door.draining and self.ended is None

    @property
    def load(self) -> float:
        """Share of the KV cache that is reserved, without parked sessions."""
        pool = self.capacity.pool
        return pool.used / pool.num_pages

    def remove(self, caller: Caller) -> None:
        """Forget a caller whose session has ended."""
        self.callers.pop(caller, None)
        if not self.callers:
            self._idle.set()

    def end(self, cause: str) -> None:
        """End the process with all its sessions, parked ones too."""
        self.ended, self.front_door.draining = cause, True
        for caller in tuple(self.callers):
            caller.lose(cause)

    async def drain(self, grace_s: float) -> None:
        """Let the callers move their sessions, and wait for at most `grace_s` seconds until all have ended."""
        self.front_door.draining = True
        for caller in tuple(self.callers):
            caller.leave()
        if self.callers:
            self._idle.clear()
            await self._time.wait(self._idle, grace_s)


class Instance:
    """One simulated node.

    Args:
        time: the simulation's virtual time.
        name: the name that tells it from the others of its tier.
        start: starts a process of the node.
        pipe: the link to the next tier; None on the last tier.
        outages: when it does not serve; in order, without overlaps, possibly without end.
        grace_s: seconds that sessions may go on while it drains.
        add_slice: adds an outage to the Chrome trace. Default: no trace.
    """

    def __init__(
        self,
        time: VirtualTime,
        name: str,
        start: Callable[[], Life],
        *,
        pipe: Pipe | None,
        outages: Iterable[Outage] = (),
        grace_s: float = 0.0,
        add_slice: AddSlice | None = None,
    ) -> None:
        self._time, self.name, self._start, self.pipe = time, name, start, pipe
        self._grace_s, self._add_slice = grace_s, add_slice
        self.life = start()
        """The present process, or the last one while the node is down."""
        self.outages = 0
        """Number of outages so far."""
        self._outages = iter(outages)
        first = next((one for one in self._outages if one.stop_s > time.now()), None)
        if first is not None:
            if first.start_s <= time.now():  # nodes are made when they are first needed
                self._end(first)
            time.process(self._fail(first))

    @property
    def worker(self) -> VirtualWorker:
        """The worker of the present process, whose counters go on where those of the last one ended."""
        return self.life.worker

    async def _fail(self, outage: Outage | None) -> None:
        """Let outage after outage happen."""
        time = self._time
        while outage is not None:
            await time.sleep(max(0.0, outage.start_s - time.now()))
            if self.life.ended is None:
                if outage.kind == "drain":
                    await self.life.drain(self._grace_s)
                self._end(outage)
            await time.sleep(max(0.0, outage.stop_s - time.now()))
            if self._add_slice is not None:
                self._add_slice(outage.kind, outage.start_s, time.now() - outage.start_s)
            self._restart()
            outage = next(self._outages, None)

    def _end(self, outage: Outage) -> None:
        self.outages += 1
        self.life.end("silent" if outage.kind == "hang" else "reset")

    def _restart(self) -> None:
        old, self.life = self.life, self._start()
        self.life.worker.busy_s, self.life.worker.waited_s = old.worker.busy_s, old.worker.waited_s
        for caller in tuple(old.callers):  # whoever still waits for a process that hung learns that it is gone
            caller.lose("reset")


def merged(outages: Iterable[Outage]) -> Iterator[Outage]:
    """Yield outages, which ascend by their start, with those that touch made one of the first one's kind."""
    last: Outage | None = None
    for one in outages:
        if last is not None and one.start_s <= last.stop_s:
            last = last._replace(stop_s=max(last.stop_s, one.stop_s))
            continue
        if last is not None:
            yield last
        last = one
    if last is not None:
        yield last
