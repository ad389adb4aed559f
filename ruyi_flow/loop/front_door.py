"""What a node does when a session comes in: room for it, its operator's limits, and the way on. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from ruyi_flow.config.topology import Limits
from ruyi_flow.errors import CapacityError, NodeUnavailable
from ruyi_flow.loop.admission import Admission
from ruyi_flow.loop.chain import Chain
from ruyi_flow.loop.clock import REAL, Time
from ruyi_flow.loop.next_stage import Uplink
from ruyi_flow.loop.session import Session, Stages
from ruyi_flow.loop.steps import Worker
from ruyi_flow.requests import SessionOpen
from ruyi_flow.routing.drafting import Pace
from ruyi_flow.routing.policy import Policy
from ruyi_flow.types import Reason, SamplingParams, Stage

__all__ = ["Opens", "Sessions", "Way"]

Way = Callable[[SessionOpen, float | None], Callable[[Policy], Stage]]
"""From a session's handshake and deadline to how the stage beyond is made, once it is needed."""


class Opens(Stages, Protocol):
    """Stages that sessions are opened on."""

    def open(
        self,
        policy: Policy,
        params: SamplingParams,
        prompt_length: int,
        max_positions: int,
        *,
        stands_in: bool = False,
    ) -> Session:
        """Start a session; see `runtime.stage.Shard.open`."""
        ...


class Sessions:
    """A node's front door.

    Args:
        name: the node's.
        limits: its operator's.
        shard: its stages.
        worker: where they run.
        way: to the node beyond; None on the deepest one.
        row_bytes: of a position on the link to it.
        ahead: positions of a session that may go up before they are asked for.
        time: where it waits.
    """

    def __init__(
        self,
        name: str,
        limits: Limits,
        shard: Opens,
        worker: Worker,
        way: Way | None,
        row_bytes: int = 0,
        ahead: int = 0,
        time: Time = REAL,
    ) -> None:
        self.draining = False
        """Whether it takes no new session."""
        self._name, self._limits, self._shard, self._worker = name, limits, shard, worker
        self._way, self._ahead, self._time = way, ahead, time
        self._admission = Admission(shard.rooms, limits.max_waiting, limits.max_wait_s, time)
        self._pace, self._uplink = Pace(), Uplink()
        per_minute = None if way is None else limits.bytes_up_per_minute
        self._allowance = None if per_minute is None else _Allowance(per_minute, row_bytes, time)

    @property
    def waiting(self) -> int:
        """Sessions that wait for room."""
        return self._admission.waiting

    async def open(self, opening: SessionOpen, timeout_s: float | None) -> Chain:
        """Let a session in, at once or when there is room.

        Raises:
            NodeUnavailable, CapacityError: why not.
        """
        self._check_open()
        if self._limits.deepest is not None:
            opening = replace(opening, policy=opening.policy.limited_to(self._limits.deepest))
        gate, policy = self._allowance, opening.policy
        stands_in = policy.fallback or gate is not None

        def open_session() -> Session:
            return self._shard.open(
                policy, opening.sampling, opening.prompt_length, opening.max_positions, stands_in=stands_in
            )

        try:
            session = await self._admission.admit(open_session, opening.max_positions)
        except CapacityError as error:
            raise CapacityError(f"node {self._name!r} is full: {error}", node=self._name) from None
        try:
            self._check_open()  # it may have waited
        except NodeUnavailable:
            session.close()
            raise
        beyond = None if self._way is None else self._way(opening, timeout_s)
        spend = None if gate is None else gate.spend
        return Chain(
            session, self._worker, self._name, beyond, spend, self._pace, self._ahead, self._time, self._uplink
        )

    def _check_open(self) -> None:
        if self.draining:
            raise NodeUnavailable(f"node {self._name!r} is shutting down and takes no new session", node=self._name)


class _Allowance:
    """The bytes that a node may still send upwards: so many a minute, and at most a minute's worth at once.

    Args:
        bytes_per_minute: refilled evenly.
        row_bytes: of a position.
        time: whose minutes.
    """

    def __init__(self, bytes_per_minute: int, row_bytes: int, time: Time) -> None:
        self._most, self._row_bytes, self._time = float(bytes_per_minute), row_bytes, time
        self._left, self._then = self._most, time.now()

    def spend(self, positions: int) -> Reason | None:
        """Take what so many positions need, or say why they may not go."""
        now = self._time.now()
        self._left = min(self._most, self._left + (now - self._then) * self._most / 60)
        self._then = now
        need = positions * self._row_bytes
        if need > self._left:
            return Reason.BUDGET
        self._left -= need
        return None
