"""A link in virtual time, and a stage at its other end."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import simpy

from ruyi_flow.errors import DeadlineExceeded, NodeUnavailable
from ruyi_flow.loop.chain import Chain
from ruyi_flow.requests import SessionOpen
from ruyi_flow.sim.clock import Shared, VirtualTime, until
from ruyi_flow.sim.profile import Profile
from ruyi_flow.sim.results import TimedAmount
from ruyi_flow.types import Block, Hop, Verdict

__all__ = ["Direction", "Outages", "VirtualRemote"]

_SEGMENT = 1448
"""Bytes of a TCP segment's payload on Ethernet."""

Told = Callable[[float, float, int], None]
"""Told of a message that came over: from when it was being sent, when it was there, its bytes."""

_LEAST_RTO_S = 0.2
"""After which TCP sends again at the earliest, when nothing later tells it of the loss (Linux)."""


class Outages:
    """When something is down.

    Args:
        spans: (from, to) in seconds, by their beginnings; they may overlap, and there may be no end of them: they are
            read as time goes on.
    """

    def __init__(self, spans: Iterable[tuple[float, float]] = ()) -> None:
        self._spans = iter(spans)
        self._next = next(self._spans, None)
        self._starts: list[float] = []
        self._stops: list[float] = []

    def __bool__(self) -> bool:
        return self._next is not None or bool(self._starts)

    def ends(self, now: float) -> float:
        """When the outage of this moment ends; now, when there is none."""
        self._read(now)
        i = bisect_right(self._starts, now) - 1
        return self._stops[i] if i >= 0 and now < self._stops[i] else now

    def hit(self, since: float, now: float) -> bool:
        """Whether it is down at this moment, or went down since another."""
        return self.ends(now) > now or bisect_right(self._starts, now) > bisect_right(self._starts, since)

    def _read(self, now: float) -> None:
        """Take in what has begun, and what touches it."""
        while self._next is not None:
            start, stop = self._next
            if self._stops and start <= self._stops[-1]:
                self._stops[-1] = max(self._stops[-1], stop)
            elif start <= now:
                self._starts.append(start)
                self._stops.append(stop)
            else:
                return
            self._next = next(self._spans, None)


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
        note: takes in the bytes of every message, from when and for how long it was being sent.
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
        note: Callable[[TimedAmount], None] = lambda amount: None,
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
        self._outages, self._random, self._note, self._told = outages or Outages(), random, note, told
        self.carried = 0
        """Bytes so far."""

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
            try:
                await self._time.sleep(delay)
            except BaseException:  # what is not sent by now is given up
                self._free_s -= max(0.0, min(sending, began + sending - self._time.now()))
                raise
        while self._outages and (end := self._outages.ends(now := self._time.now())) > now:
            await self._time.sleep(end - now)
        self._note((began, count, sending))
        if self._told is not None:
            self._told(began, self._time.now(), count)

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
        timeout_s: deadline of one answer, from when it is asked or, if that is later, from when the node had taken in
            what was fed before.
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
        self._opened = False
        self._fed: list[simpy.Process] = []
        """Messages under way that nobody waits for, and the last one of all."""
        self._owed: list[Hop] = []
        """What such messages took, to be told with the next answer."""
        self._since = time.now()
        self._asker: simpy.Process | None = None
        """Who waits for an answer."""
        self._waiting_since = 0.0
        self._alarm: simpy.Event | None = None

    async def advance(self, block: Block) -> Verdict:
        """See `Stage.advance`.

        Raises:
            DeadlineExceeded: no answer in time; raised at that time, and what is under way for it is given up.
            NodeUnavailable: the node went down; raised when a message comes there, or its answer would leave.
        """
        env = self._time.env
        self._asker, self._waiting_since = env.active_process, self._time.now()
        if self._alarm is None:
            self._set_alarm(self._timeout_s)
        try:
            verdict = await self._ask(block, self._fed[-1] if self._fed else None)
        except simpy.Interrupt as interrupt:
            if interrupt.cause is not self:
                raise
            raise DeadlineExceeded(
                f"node {self._name!r} gave no answer within {self._timeout_s:g} s", node=self._name
            ) from None
        finally:
            self._asker = None
        if not self._owed:
            return verdict
        hops = {hop.node: hop for hop in verdict.hops}
        for hop in self._owed:
            hops.setdefault(hop.node, Hop(hop.node)).add(hop)
        self._owed = []
        return Verdict(verdict.decisions, tuple(hops.values()))

    def _set_alarm(self, after_s: float) -> None:
        """One a session, as in `RemoteStage`: an event for each question would cost as much as the question."""
        self._alarm = self._time.env.timeout(after_s)
        self._alarm.callbacks.append(self._rings)

    def _rings(self, _: simpy.Event) -> None:
        """Give an answer up that is late; look again when the next one may be."""
        since = self._time.now() if self._asker is None else self._waiting_since
        left = since + self._timeout_s - self._time.now()
        if left > 0:
            self._set_alarm(left)
        elif self._asker is not None:
            self._alarm = None
            self._asker.interrupt(self)

    async def feed(self, block: Block) -> None:
        """See `Stage.feed`."""
        before = self._fed[-1] if self._fed else None
        self._fed = [process for process in self._fed if process.is_alive]
        self._fed.append(self._time.process(self._owe(block, before)))

    async def arrived(self) -> None:
        """See `Stage.arrived`."""
        if self._fed:
            await until(self._fed[-1])

    async def _owe(self, block: Block, before: simpy.Process | None) -> None:
        self._owed += (await self._ask(block, before)).hops
        self._waiting_since = self._time.now()  # it is alive

    async def rewind(self, position: int) -> None:
        """See `Stage.rewind`."""
        if self._chain is not None:
            await self._up.carry(self._profile.up_bytes, flow=self._flow)
            await self._chain.rewind(position)
            await self._down.carry(self._profile.down_bytes, flow=self._flow)

    async def close(self) -> None:
        """See `Stage.close`."""
        if self._alarm is not None and self._alarm.callbacks is not None:
            self._alarm.callbacks.clear()
        under_way = [process for process in self._fed if process.is_alive]
        for process in under_way:
            process.interrupt()
        if under_way:
            await self._time.pause()  # they end in this moment
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
        if before is not None:
            await until(before)  # messages of a session are taken in order, and fail with the first that does
        self._check_up()
        if opens:
            asked = self._time.now()
            self._chain = await self._open(self._opening)
            began += self._time.now() - asked  # waiting for room there is not the wire's time
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
        if self._outages and self._outages.hit(self._since, self._time.now()):
            raise NodeUnavailable(f"node {self._name!r} went away", node=self._name)
