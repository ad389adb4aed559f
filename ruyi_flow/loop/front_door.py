"""How a node takes a session in: its operator's limits, admission, and the connection to the next node. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from ruyi_flow.errors import CacheMiss, CapacityError, NodeUnavailable, RequestError, RuyiFlowError
from ruyi_flow.loop.admission import Admission
from ruyi_flow.loop.capacity import Lease
from ruyi_flow.loop.chain import Chain
from ruyi_flow.loop.clock import REAL_CLOCK, Clock
from ruyi_flow.loop.next_stage import NO_RECOVERY, NextStage, Recoveries, Uplink
from ruyi_flow.loop.parking import Parking, Taken
from ruyi_flow.loop.session import Session, Stages
from ruyi_flow.loop.steps import Worker
from ruyi_flow.requests import SessionOpen
from ruyi_flow.routing.drafting import DraftCosts
from ruyi_flow.routing.policy import Policy
from ruyi_flow.routing.start import READ_TOKENS
from ruyi_flow.telemetry.counters import NodeCounters
from ruyi_flow.telemetry.spans import current_span
from ruyi_flow.types import Reason, Stage

__all__ = ["Connect", "FrontDoor", "Limits"]

Connect = Callable[[SessionOpen, float | None], Callable[[Policy, int], Stage]]
"""Returns, for a session's handshake and its deadline in seconds, the function that opens the next stage: with the
policy by then, and the number of positions that the next node may have parked."""

_MAX_PARKED = 1024
"""Largest number of parked sessions; their memory is bounded by the pages."""


class Limits(Protocol):
    """The limits of a node that admission enforces; a topology's `limits` have them."""

    @property
    def max_waiting(self) -> int:
        """Number of sessions that may wait for capacity."""
        ...

    @property
    def max_wait_s(self) -> float:
        """Seconds that each of them may wait."""
        ...

    @property
    def deepest(self) -> int | None:
        """The deepest exit that an answer through this node may reach, or None."""
        ...

    @property
    def park_s(self) -> float:
        """Seconds for which an ended session stays parked, while room allows."""
        ...

    @property
    def bytes_up_per_minute(self) -> int | None:
        """Bytes of boundary states that the node may send to the next one per minute, or None for no limit."""
        ...


_REFUSALS = {NodeUnavailable: "draining", CapacityError: "full", RequestError: "too_large"}
"""Why a session is refused, by the class of the error."""


class FrontDoor:
    """Takes sessions in on one node.

    Args:
        name: the node's name.
        limits: its operator's limits.
        stages: its stages.
        worker: runs them.
        connect: connects to the next node; None on the deepest one.
        recoveries: whether and how long lost sessions are taken up again there. Default: never.
        row_bytes: bytes of one position on the link to the next node.
        ahead: number of positions that a session may upload before anything is asked about them.
        clock: where it waits.
        counters: where admissions, refusals and verified drafts are counted. Default: nowhere.
    """

    def __init__(
        self,
        name: str,
        limits: Limits,
        stages: Stages,
        worker: Worker,
        *,
        connect: Connect | None = None,
        recoveries: Recoveries = NO_RECOVERY,
        row_bytes: int = 0,
        ahead: int = 0,
        clock: Clock = REAL_CLOCK,
        counters: NodeCounters | None = None,
    ) -> None:
        self._counters = counters
        self.draining = False
        """Whether the node takes no new sessions."""
        self._name, self._limits, self._stages, self._worker = name, limits, stages, worker
        self._connect, self._ahead, self._clock = connect, ahead, clock
        self._recoveries = recoveries
        self._admission = Admission(stages.capacity, limits.max_waiting, limits.max_wait_s, clock)
        self._parking: Parking[Session] = Parking(limits.park_s, _MAX_PARKED, clock)
        self._costs, self._uplink = DraftCosts(), Uplink()
        per_minute = None if connect is None else limits.bytes_up_per_minute
        self._budget = None if per_minute is None else _ByteBudget(per_minute, row_bytes, clock)

    @property
    def waiting(self) -> int:
        """Number of sessions that wait for capacity."""
        return self._admission.waiting

    @property
    def parked(self) -> int:
        """Number of parked sessions."""
        return len(self._parking)

    def forget_parked(self) -> None:
        """Close all parked sessions; no step may be running."""
        self._parking.clear()

    async def open(self, opening: SessionOpen, timeout_s: float | None, prompt: Sequence[int] = ()) -> Chain:
        """Open a session, at once or when there is capacity.

        On the entry node, a parked session whose tokens the prompt begins with goes on; on another node, the one that
        the handshake names. Then the chain's session has the positions that are reused.

        Args:
            opening: the handshake.
            timeout_s: seconds until the session must have ended, or None.
            prompt: on the entry node, the prompt's tokens.

        Raises:
            NodeUnavailable: the node is shutting down.
            CapacityError: the node is full.
            RequestError: the session needs more than the node has in all.
            CacheMiss: the node has not parked as much as the handshake names.
        """
        if self._counters is None:
            return await self._open(opening, timeout_s, prompt)
        came = self._clock.now()
        try:
            chain = await self._open(opening, timeout_s, prompt)
        except RuyiFlowError as error:
            cause = next((cause for kind, cause in _REFUSALS.items() if isinstance(error, kind)), None)
            if cause is not None:
                self._counters.refusals.add(cause)
            raise
        self._counters.admissions.add()
        self._counters.queue_s.observe(self._clock.now() - came)
        return chain

    async def _open(self, opening: SessionOpen, timeout_s: float | None, prompt: Sequence[int]) -> Chain:
        self._check_open()
        capacity = self._stages.capacity
        total = capacity.pool.num_positions
        if total < opening.max_positions <= capacity.context:
            raise RequestError(
                f"this request needs {opening.max_positions} positions; node {self._name!r} has {total} in all "
                "(limits.max_positions): lower max_new_tokens or raise the limit"
            )
        if self._limits.deepest is not None:
            opening = replace(opening, policy=opening.policy.limited_to(self._limits.deepest))
        covers_next = opening.policy.routing.fallback or self._budget is not None
        span = current_span.get()
        try:
            with span.child("queue"):
                admitted = await self._admission.admit(opening.max_positions, lambda: self._take(opening, prompt))
        except CapacityError as error:
            raise CapacityError(f"node {self._name!r} is full: {error}", node=self._name) from None
        lease = admitted if isinstance(admitted, Lease) else admitted.session.lease
        try:
            self._check_open()  # the session may have waited
            if isinstance(admitted, Lease):
                session = self._stages.open(opening, lease, covers_next=covers_next)
            else:
                opening, session = await self._take_back(opening, admitted, covers_next, is_named=not prompt)
            open_next = None if self._connect is None else self._connect(opening, timeout_s)
        except CacheMiss:
            raise
        except BaseException:  # whatever it is, nobody else would give the lease back
            if isinstance(admitted, Lease):
                lease.give_back()
            else:
                self._worker.submit(lease.give_back)  # after the copy of its caches, which may still run
            raise
        next_stage = NextStage(
            session,
            open_next,
            recoveries=self._recoveries,
            gate=None if self._budget is None else self._budget.spend,
            ahead=self._ahead,
            clock=self._clock,
            uplink=self._uplink,
        )
        return Chain(
            session,
            self._worker,
            self._name,
            next_stage=next_stage,
            costs=self._costs,
            clock=self._clock,
            park=partial(self._park, opening.key, bool(prompt)),
            span=span,
            counters=self._counters,
        )

    def _take(self, opening: SessionOpen, prompt: Sequence[int]) -> Taken[Session] | None:
        """Take back a parked session, if there is one that the new one can go on from.

        Raises:
            CacheMiss: the one that the handshake names is not there.
        """
        if prompt:
            if not opening.key or opening.sampling.prompt_logprobs is not None:  # which needs the whole prompt
                return None
            # The end of a prompt from which the first exit is chosen runs again, in one piece.
            spare = READ_TOKENS if opening.policy.routing.start is not None else 0
            known = prompt[: len(prompt) - spare]
            return self._parking.take(known, None, opening.max_positions)
        if not opening.position:
            return None
        taken = self._parking.take_key(opening.key, opening.position, opening.max_positions)
        if taken is None:
            raise CacheMiss(f"node {self._name!r} has no such session parked", node=self._name)
        return taken

    async def _take_back(
        self, opening: SessionOpen, taken: Taken[Session], covers_next: bool, *, is_named: bool
    ) -> tuple[SessionOpen, Session]:
        """Let a session that was parked go on with another answer, from what is common and fits the policy.

        Raises:
            CacheMiss: it is less than the caller reckons with. The session is parked again.
        """
        session = taken.session
        opening = replace(opening, key=taken.key)
        if taken.moved_from is not None:
            moved = self._clock.event()

            def move() -> None:
                session.use_pages(taken.moved_from)
                moved.set()

            self._worker.submit(move)  # before any step that may use the old pages
            await self._clock.wait(moved, math.inf)
        else:
            session.use_pages(None)
        reused = session.reusable(opening.policy, taken.common, covers_next=covers_next)
        if is_named and reused < opening.position:
            session.rewind(reused)
            self._worker.submit(partial(self._park, opening.key, False, session))
            raise CacheMiss(
                f"node {self._name!r} can reuse {reused} positions of the session", node=self._name, position=reused
            )
        session.rewind(reused)
        session.begin(opening, covers_next=covers_next)
        return opening, session

    def _park(self, key: bytes, is_entry: bool, session: Session) -> None:
        """Keep a session that has ended; called where no step of it can run any more."""
        session.settle()
        if not key or self.draining:
            session.close()
            return
        self._parking.park(key, session.token_ids if is_entry else (), session)

    def _check_open(self) -> None:
        if self.draining:
            raise NodeUnavailable(f"node {self._name!r} is shutting down and takes no new sessions", node=self._name)


class _ByteBudget:
    """The bytes that a node may still send to the next one: a token bucket that holds at most one minute's worth.

    Only the event loop spends them.

    Args:
        bytes_per_minute: refill rate, and size of the bucket.
        row_bytes: bytes of one position.
        clock: measures the minutes.
    """

    def __init__(self, bytes_per_minute: int, row_bytes: int, clock: Clock) -> None:
        self._most, self._row_bytes, self._clock = float(bytes_per_minute), row_bytes, clock
        self._left, self._then = self._most, clock.now()

    def spend(self, positions: int) -> Reason | None:
        """Take the bytes of so many positions, or return why they must not be sent."""
        now = self._clock.now()
        self._left = min(self._most, self._left + (now - self._then) * self._most / 60)
        self._then = now
        need = positions * self._row_bytes
        if need > self._left:
            return Reason.BUDGET
        self._left -= need
        return None
