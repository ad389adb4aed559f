"""A link in virtual time, and a stage at its other end."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import simpy

from ruyi_flow.chain import Chain
from ruyi_flow.errors import DeadlineExceeded, NodeUnavailable
from ruyi_flow.requests import SessionOpen
from ruyi_flow.sim.profile import Profile
from ruyi_flow.sim.times import Shared, VirtualTime, until
from ruyi_flow.types import Block, Hop, Verdict

__all__ = ["Direction", "Outages", "VirtualRemote"]

_SEGMENT = 1448
"""Bytes of a TCP segment's payload on Ethernet."""

Told = Callable[[float, float, float, int], None]
"""Told of a message that came over: from when and for how long it was being sent, when it was there, its bytes."""

_LEAST_RTO_S = 0.2
"""After which TCP sends again at the earliest, when nothing later tells it of the loss (Linux)."""


class Outages:
    """When something is down.

    Args:
        spans: (from, to) in seconds, ascending and apart.
    """

    def __init__(self, spans: Sequence[tuple[float, float]] = ()) -> None:
        self._starts, self._stops = [a for a, _ in spans], [b for _, b in spans]

    def __bool__(self) -> bool:
        return bool(self._starts)

    def ends(self, now: float) -> float:
        """When the outage of this moment ends; now, when there is none."""
        i = bisect_right(self._starts, now) - 1
        return self._stops[i] if i >= 0 and now < self._stops[i] else now

    def begins(self, start: float, stop: float) -> bool:
        """Whether one begins in between."""
        return bisect_right(self._starts, stop) > bisect_right(self._starts, start)


class Direction:
    """One direction of a link.

    Messages of one flow, a connection between two nodes, go one after the other, as they are written to its socket;
    flows share the bandwidth. A message then takes the latency with jitter; a lost segment costs one round trip more,
    or the retransmission timer where too few segments follow it to tell the sender (RFC 5681, 6298).

    Args:
        time: where.
        latency_s: one way.
        jitter_s: standard deviation of what is added to it, an absolute normal value.
        bytes_per_s: None is no limit.
        shared: whether there is more than one flow.
        loss: share of segments that are lost.
        outages: while it is down, what is under way waits.
        random: uniform numbers in 0 … 1 and normal ones.
        told: told of every message.
    """

    def __init__(
        self,
        time: VirtualTime,
        latency_s: float,
        jitter_s: float = 0.0,
        bytes_per_s: float | None = None,
        shared: bool = False,
        loss: float = 0.0,
        outages: Outages | None = None,
        random: Any = None,
        told: Told | None = None,
    ) -> None:
        self._time, self._latency_s, self._jitter_s, self._loss = time, latency_s, jitter_s, loss
        self._bytes_per_s, self._pipe = bytes_per_s, None
        if shared and bytes_per_s is not None:
            self._pipe = Shared(time, bytes_per_s)
        self._last: dict[int, simpy.Event] = {}
        """By flow: happens when its last message is sent."""
        self._free_s = 0.0
        """When the only flow's last message is sent."""
        self._outages, self._random, self._told = outages or Outages(), random, told
        self.carried = 0
        """Bytes so far."""

    @property
    def may_fail(self) -> bool:
        """Whether it is ever down."""
        return bool(self._outages)

    async def carry(self, count: int, extra_s: float = 0.0, flow: int = 0) -> None:
        """Bring a message over; `extra_s` is what its ends take beyond that."""
        self.carried += count
        began, sending, delay = self._time.now(), 0.0, self._latency_s + extra_s
        if self._pipe is not None:
            await self._in_turn(self._pipe, count, flow)
            sending = self._time.now() - began
        elif self._bytes_per_s is not None:
            sending = count / self._bytes_per_s
            began = max(self._free_s, began)
            self._free_s = began + sending
            delay += self._free_s - self._time.now()
        if self._jitter_s:
            delay += abs(self._random.gauss(0.0, self._jitter_s))
        if self._loss:
            delay += self._again_s(count)
        if delay:
            await self._time.sleep(delay)
        while self._outages and (end := self._outages.ends(now := self._time.now())) > now:
            await self._time.sleep(end - now)
        if self._told is not None:
            self._told(began, sending, self._time.now(), count)

    async def _in_turn(self, pipe: Shared, count: int, flow: int) -> None:
        before, sent = self._last.get(flow), self._time.env.event()
        self._last[flow] = sent
        try:
            if before is not None and not before.processed:
                await until(before)
            await pipe.take(count)
        finally:
            sent.succeed()

    def _again_s(self, count: int) -> float:
        """What losses add."""
        segments, trip = -(-count // _SEGMENT), 2 * self._latency_s
        lost = [i for i in range(segments) if self._random.random() < self._loss]
        if not lost:
            return 0.0
        return max(trip if segments - i > 3 else max(_LEAST_RTO_S, 2 * trip) for i in lost)


class VirtualRemote:
    """The next node's stages, over a link: a `Stage`, as `transport.remote.RemoteStage` is one.

    Args:
        time: where.
        name: of the node.
        opening: the handshake.
        open: opens the session there.
        up, down: the link.
        flow: which of the link's.
        row_bytes: of a position's state.
        profile: of the sending node: what messages weigh and cost.
        timeout_s: deadline of one answer.
        outages: of the node.
        cores: of the sending node's machine, where nodes share it: both ends' work is done on them then.
        message_s: processor time there of an exchange beyond the profile's.
    """

    def __init__(
        self,
        time: VirtualTime,
        name: str,
        opening: SessionOpen,
        open: Callable[[SessionOpen], Awaitable[Chain]],
        up: Direction,
        down: Direction,
        flow: int,
        row_bytes: int,
        profile: Profile,
        timeout_s: float,
        outages: Outages,
        cores: Shared | None = None,
        message_s: float = 0.0,
    ) -> None:
        self._cores, self._message_s = cores, message_s
        self._time, self._name, self._opening, self._open = time, name, opening, open
        self._up, self._down, self._flow, self._profile = up, down, flow, profile
        self._row_bytes, self._timeout_s, self._outages = row_bytes + profile.position_bytes, timeout_s, outages
        self._chain: Chain | None = None
        self._opened = self._closed = False
        self._fed: simpy.Process | None = None
        """The last message that nobody waits for."""
        self._owed: list[Hop] = []
        """What such messages took, to be told with the next answer."""
        self._since = time.now()

    async def advance(self, block: Block) -> Verdict:
        """See `Stage.advance`."""
        verdict = await (self._watched(block) if self._outages or self._up.may_fail else self._ask(block, self._fed))
        if not self._owed:
            return verdict
        hops = {hop.node: hop for hop in verdict.hops}
        for hop in self._owed:
            hops.setdefault(hop.node, Hop(hop.node)).add(hop)
        self._owed = []
        return Verdict(verdict.decisions, tuple(hops.values()))

    async def feed(self, block: Block) -> None:
        """See `Stage.feed`."""
        self._fed = self._time.process(self._owe(block, self._fed))

    async def arrived(self) -> None:
        """See `Stage.arrived`."""
        if self._fed is not None and not self._fed.processed:
            await until(self._fed)

    async def _owe(self, block: Block, before: simpy.Process | None) -> None:
        self._owed += (await self._ask(block, before)).hops

    async def _watched(self, block: Block) -> Verdict:
        """The answer of a node, or over a link, that may go down meanwhile."""
        asking = self._time.process(self._ask(block, self._fed))
        try:
            await until(asking | self._time.env.timeout(self._timeout_s))
        except BaseException:
            if asking.is_alive:
                asking.interrupt()
            raise
        if not asking.triggered:
            asking.interrupt()
            raise DeadlineExceeded(f"node {self._name!r} gave no answer within {self._timeout_s:g} s", node=self._name)
        verdict = asking.value
        assert isinstance(verdict, Verdict)
        return verdict

    async def rewind(self, position: int) -> None:
        """See `Stage.rewind`."""
        if self._chain is not None:
            await self._up.carry(self._profile.up_bytes, flow=self._flow)
            await self._chain.rewind(position)
            await self._down.carry(self._profile.down_bytes, flow=self._flow)

    async def close(self) -> None:
        """See `Stage.close`."""
        self._closed = True
        if self._chain is not None:
            await self._chain.close()

    async def _ask(self, block: Block, before: simpy.Process | None) -> Verdict:
        """A message to the node and what it answers."""
        profile, positions = self._profile, len(block.token_ids)
        size = profile.up_bytes + positions * self._row_bytes
        extra = profile.exchange_s + profile.exchange_byte_s * size
        opens = not self._opened
        if opens:
            self._opened = True
            size += profile.open_bytes
        began = self._time.now()
        if self._cores is not None:
            self._time.start(self._cores.take(max(0.0, profile.exchange_cpu_s - extra) + self._message_s))
            await self._cores.take(extra)
            extra = 0.0
        await self._up.carry(size, extra, self._flow)
        if before is not None and not before.processed:
            await until(before)  # messages of a session are taken in order
        self._check_up()
        if opens:
            asked = self._time.now()
            self._chain = await self._open(self._opening)
            began += self._time.now() - asked  # waiting for room there is not the wire's time
            if self._closed:
                await self._chain.close()
        assert self._chain is not None
        came = self._time.now()
        verdict = await self._chain.advance(block)
        took = self._time.now() - came
        self._check_up()
        back = profile.down_bytes + profile.decision_bytes * len(verdict.decisions)
        await self._down.carry(back, flow=self._flow)
        mine = verdict.hops[0]
        mine.messages += 1
        mine.positions += positions
        mine.bytes_up += size
        mine.bytes_down += back
        mine.wire_s += self._time.now() - began - took
        return verdict

    def _check_up(self) -> None:
        """A node that went down has lost its sessions, though it may be there again."""
        now = self._time.now()
        if self._outages and (self._outages.ends(now) > now or self._outages.begins(self._since, now)):
            raise NodeUnavailable(f"node {self._name!r} went away", node=self._name)
