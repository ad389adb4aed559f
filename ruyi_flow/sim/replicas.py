"""What a caller knows of the replicas of a simulated node, and its calls to one of them, which may be lost."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import simpy

from ruyi_flow.errors import NodeError, NodeUnavailable
from ruyi_flow.loop.replicas import (
    CONNECT_S,
    SIGN_S,
    SILENT_S,
    TICK_S,
    RecoveryTime,
    choose_replica,
    estimated_load,
    is_usable,
)
from ruyi_flow.sim.clock import VirtualTime, interrupt, until
from ruyi_flow.sim.instance import Instance, Life
from ruyi_flow.sim.link import Pipe
from ruyi_flow.types import Recovery

__all__ = ["Call", "Replica", "VirtualReplicas"]

T = TypeVar("T")

_NEVER = -math.inf


class Replica:
    """What one caller knows of one replica: a `Candidate`.

    Args:
        instance: the simulated node.
        is_watched: whether its health is watched, as that of one of several is.
    """

    __slots__ = (
        "_is_watched",
        "_lost",
        "_opened",
        "_sessions_then",
        "_told",
        "address",
        "avoided_at",
        "instance",
        "is_connected",
        "listens_since",
        "sessions",
    )

    def __init__(self, instance: Instance, is_watched: bool) -> None:
        self.instance, self._is_watched, self.address = instance, is_watched, instance.name
        self.avoided_at = _NEVER
        self.sessions = 0
        """Number of the caller's sessions there."""
        self.is_connected = True
        """Whether there is a connection; one that is made during an answer takes a round trip."""
        self.listens_since = 0.0
        """When the caller began to listen to signs of life."""
        self._lost: Life | None = None
        """The process that was lost last."""
        self._told, self._sessions_then = 0.0, 0

    @property
    def load(self) -> float:
        """See `Candidate.load`. Signs of life tell it as long as the caller has a session there."""
        if self.sessions:
            self.tell_load()
        return estimated_load(self._told, self.sessions - self._sessions_then)

    @property
    def refuses(self) -> bool:
        """See `Candidate.refuses`. A health service that is watched tells of a process that ends, and no other."""
        life = self.instance.life
        return life.is_draining or (self._is_watched and (life.ended == "reset" or life is self._lost))

    def tell_load(self) -> None:
        """Take in what the node says of its load, where there is a choice."""
        if self._is_watched:
            self._told, self._sessions_then = self.instance.life.load, self.sessions

    def lose(self, life: Life | None, now: float) -> None:
        """Note that a process of the node is lost."""
        self.avoided_at, self._lost, self.is_connected = now, life, self._is_watched

    def silent_at(self, now: float, round_trip_s: float) -> float:
        """Return when it is noticed that the node has been silent from now on.

        Signs of life come at an even pace from when the caller began to listen, and so do its looks at the time.
        """
        if not self.is_connected:
            return now + CONNECT_S + TICK_S
        since = self.listens_since
        last = round_trip_s + SIGN_S * math.floor(max(0.0, now - since - round_trip_s / 2) / SIGN_S)
        return since + TICK_S * (math.floor((last + SILENT_S) / TICK_S) + 1)


class VirtualReplicas:
    """The replicas of one node: the virtual counterpart of `transport.replicas.Replicas`.

    Args:
        time: the simulation's virtual time.
        name: the node's name.
        instances: its replicas.
        recover_s: seconds for which a lost session is taken up again, since the node was last heard.
        timeout_s: seconds that an answer may take.
        source: source of random numbers.
        count_loss: called with the cause of each loss.
    """

    def __init__(
        self,
        time: VirtualTime,
        name: str,
        instances: Sequence[Instance],
        *,
        recover_s: float,
        timeout_s: float,
        source: random.Random,
        count_loss: Callable[[str], None],
    ) -> None:
        self._time, self.name, self.timeout_s = time, name, timeout_s
        self._replicas = [Replica(instance, len(instances) > 1) for instance in instances]
        self._recovery_time, self._source, self._count_loss = RecoveryTime(name, recover_s), source, count_loss
        self.heard_at: float | None = None
        """When a replica was last heard."""

    def pick(self, key: bytes) -> Replica:
        """Return the replica that a new session goes to; see `choose_replica`."""
        if len(self._replicas) == 1:
            return self._replicas[0]
        return choose_replica(self._replicas, key, self._time.now(), self._source)

    def has_others(self, replica: Replica) -> bool:
        """Return whether another replica can take over the sessions of one."""
        now = self._time.now()
        return any(other is not replica and is_usable(other, now) for other in self._replicas)

    def left_s(self, error: NodeError, *, began: bool, waited_s: float) -> float:
        """Return the seconds for which another attempt makes sense; see `Recoveries.left_s`."""
        now = self._time.now()
        return self._recovery_time.left_s(
            error,
            began=began,
            waited_s=waited_s,
            now=now,
            heard_at=self.heard_at,
            has_usable=any(is_usable(replica, now) for replica in self._replicas),
        )

    def lost(self, node: str, cause: str) -> None:
        """Count a loss of the node."""
        self._count_loss(cause)

    def recovered(self, node: str, recovery: Recovery) -> None:
        """Note that a session was taken up again."""
        self._recovery_time.recovered()


class Call:
    """One session's way to one process of a node: what is awaited there fails when a loss of the process is noticed.

    Args:
        time: the simulation's virtual time.
        replicas: the node's replicas, one of which is picked.
        key: the session's or the conversation's key, by which it is picked.
        pipe: the link between. Default: the caller is on the same machine.
        moves_at_once: whether the caller leaves a node that drains in the middle of an answer.
    """

    def __init__(
        self,
        time: VirtualTime,
        replicas: VirtualReplicas,
        key: bytes,
        *,
        pipe: Pipe | None = None,
        moves_at_once: bool = False,
    ) -> None:
        self._time, self._replicas, self._pipe, self._moves_at_once = time, replicas, pipe, moves_at_once
        self.replica = replicas.pick(key)
        """The replica that was picked."""
        self.life: Life | None = None
        """The process that it has a session with."""
        self.parts: list[simpy.Process] = []
        """Processes that send something that nobody awaits yet; a loss ends them."""
        self._loss: tuple[NodeError, float] | None = None
        """Why it is lost, and when that is noticed."""
        self._asker: simpy.Process | None = None
        """The process that waits for an answer."""
        self._sooner: simpy.Event | None = None
        """Happens when the loss is noticed earlier than expected."""
        self._is_leaving = False

    @property
    def is_waiting(self) -> bool:
        """Whether an answer is awaited."""
        return self._asker is not None

    @property
    def is_lost(self) -> bool:
        """Whether the session is lost, noticed or not."""
        return self._loss is not None

    def connect(self) -> Life:
        """Begin the session with the node's present process."""
        replica, now = self.replica, self._time.now()
        life = self.life = replica.instance.life
        life.callers[self] = None
        if self._pipe is not None and self._pipe.outages:
            self._pipe.calls[self] = None
        if not replica.sessions:
            replica.listens_since = now
        replica.sessions += 1
        if life.ended is not None:
            trip_s = 0.0 if self._pipe is None else self._pipe.round_trip_s
            silent = life.ended == "silent"
            self.end(self._error(life.ended), now + (CONNECT_S + TICK_S if silent else trip_s))
        return life

    def close(self) -> None:
        """End the session."""
        if self.life is None:
            return
        life, self.life = self.life, None
        if self._pipe is not None:
            self._pipe.calls.pop(self, None)
        self.replica.tell_load()
        self.replica.sessions -= 1
        life.remove(self)

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine, unless the session is lost.

        Raises:
            NodeError: the session is lost. It is raised when that is noticed; the coroutine has ended before.
        """
        self._asker = self._time.env.active_process
        try:
            if self._loss is None:
                if self._pipe is not None and self._pipe.outages:
                    self.check_silence()
                try:
                    result = await coroutine
                except simpy.Interrupt as interruption:
                    if interruption.cause is not self:
                        raise
                else:
                    self._replicas.heard_at, self.replica.avoided_at = self._time.now(), _NEVER
                    return result
            else:
                coroutine.close()
            raise await self._noticed()
        finally:
            self._asker = None
            if self._is_leaving:
                self._go()

    async def _noticed(self) -> NodeError:
        """Wait until the loss is noticed, and return the error."""
        assert self._loss is not None
        while (wait_s := self._loss[1] - self._time.now()) > 0:
            self._sooner = self._time.env.event()
            await until(self._sooner | self._time.env.timeout(wait_s))
        error = self._loss[0]
        if error.cause in ("reset", "silent"):
            self.replica.lose(self.life, self._time.now())
        return error

    def end(self, error: NodeError, at_s: float) -> None:
        """Fail at a moment, unless it fails earlier; what is under way ends at once."""
        if self._loss is not None:
            if at_s < self._loss[1]:
                self._loss = error, at_s
                if self._sooner is not None and not self._sooner.triggered:
                    self._sooner.succeed()
            return
        self._loss = error, at_s
        for process in self.parts:
            if process.is_alive:
                process.interrupt(self)
        asker = self._asker
        if asker is not None and asker is not self._time.env.active_process:
            interrupt(asker, self, lambda: asker is self._asker)

    def lose(self, cause: str) -> None:
        """See `Caller.lose`."""
        now, pipe = self._time.now(), self._pipe
        trip_s = 0.0 if pipe is None else pipe.round_trip_s
        if cause == "silent":
            at_s = self.replica.silent_at(now, trip_s)
        else:
            at_s = (now if pipe is None else pipe.outages.ends(now)) + trip_s / 2
        self.end(self._error(cause), at_s)

    def leave(self) -> None:
        """See `Caller.leave`."""
        if not self._replicas.has_others(self.replica):
            return
        if self._moves_at_once or not (self._asker or any(process.is_alive for process in self.parts)):
            self._go()
        else:
            self._is_leaving = True

    def check_silence(self) -> None:
        """While the link is down, fail if it is still down when signs of life have been missing for too long."""
        pipe, now = self._pipe, self._time.now()
        assert pipe is not None
        if self._asker is None or pipe.outages.ends(now) <= now:
            return
        asker, at_s = self._asker, self.replica.silent_at(now, pipe.round_trip_s)
        alarm = self._time.env.timeout(max(0.0, at_s - now))

        def fail(_: simpy.Event) -> None:
            then = self._time.now()
            if self._asker is asker and pipe.outages.ends(then) > then:
                self.end(self._error("silent"), then)

        alarm.callbacks.append(fail)

    def _go(self) -> None:
        self._is_leaving = False
        self.end(self._error("left"), self._time.now())
        self.close()

    def _error(self, cause: str) -> NodeUnavailable:
        name = self._replicas.name
        why = {
            "reset": "went down and lost the session",
            "silent": "owes an answer and gives no sign of life",
            "left": "shuts down; the session moves",
        }
        return NodeUnavailable(f"node {name!r} {why[cause]}", node=name, cause=cause)
