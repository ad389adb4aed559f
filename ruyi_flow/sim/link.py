"""A link between two nodes in virtual time, and the next node as a stage behind it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import simpy

from ruyi_flow.errors import DeadlineExceeded, NodeUnavailable
from ruyi_flow.loop.chain import Chain
from ruyi_flow.requests import SessionOpen
from ruyi_flow.sim.clock import SharedCapacity, VirtualTime, until
from ruyi_flow.sim.profile import Profile
from ruyi_flow.sim.results import AddSlice, TimedAmount
from ruyi_flow.types import Block, Hop, Verdict

__all__ = ["LEAST_RTO_S", "SEGMENT", "Direction", "Outages", "VirtualRemote"]

SEGMENT = 1448
"""Payload of a TCP segment on Ethernet, in bytes."""

LEAST_RTO_S = 0.2
"""Shortest retransmission timeout of TCP, in seconds (Linux)."""


class Outages:
    """The outages of a node or a link.

    Args:
        spans: (from, to) in seconds, ascending by their start. They may overlap and may be endless: they are consumed
            as time passes.
    """

    def __init__(self, spans: Iterable[tuple[float, float]] = ()) -> None:
        self._spans = iter(spans)
        self._next = next(self._spans, None)
        self._starts: list[float] = []
        self._stops: list[float] = []

    def __bool__(self) -> bool:
        return self._next is not None or bool(self._starts)

    def ends(self, now: float) -> float:
        """Return the second at which the present outage ends; `now` if there is none."""
        self._consume(now)
        i = bisect_right(self._starts, now) - 1
        return self._stops[i] if i >= 0 and now < self._stops[i] else now

    def hit(self, since: float, now: float) -> bool:
        """Return whether there is an outage now, or one has begun since an earlier moment."""
        return self.ends(now) > now or bisect_right(self._starts, now) > bisect_right(self._starts, since)

    def _consume(self, now: float) -> None:
        """Take in the outages that have begun by now, each merged with those that it touches."""
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

    A flow is the connection between two nodes. Its messages are sent one after the other; flows share the bandwidth
    evenly. A message arrives after the latency and the jitter. A lost segment adds one round trip, or the
    retransmission timeout where too few segments follow to reveal the loss to the sender (RFC 5681, RFC 6298).

    Args:
        time: the simulation's virtual time.
        latency_s: seconds of one way.
        jitter_s: standard deviation of the normal value whose absolute is added to the latency.
        bytes_per_s: bandwidth. Default: unlimited.
        shared: whether there is more than one flow.
        loss: share of the segments that are lost.
        outages: when the link is down; messages under way wait for the end. Default: never.
        random: source of uniform and normal values; only used with jitter or loss.
        add_bytes: takes the bytes of every message, with when and for how long it was being sent.
        add_slice: adds a message that has arrived to the Chrome trace. Default: no trace.
    """

    def __init__(
        self,
        time: VirtualTime,
        *,
        latency_s: float,
        jitter_s: float = 0.0,
        bytes_per_s: float | None = None,
        shared: bool = False,
        loss: float = 0.0,
        outages: Outages | None = None,
        random: Any = None,
        add_bytes: Callable[[TimedAmount], None] = lambda sent: None,
        add_slice: AddSlice | None = None,
    ) -> None:
        self._time, self._latency_s, self._jitter_s, self._loss = time, latency_s, jitter_s, loss
        self._bytes_per_s, self._pipe = bytes_per_s, None
        if shared and bytes_per_s is not None:
            self._pipe = SharedCapacity(time, bytes_per_s)
        self._last: dict[int, simpy.Event] = {}
        """The event of having sent the last message of each flow, where flows share the bandwidth."""
        self._free_s = 0.0
        """Second at which the last message of the only flow is sent."""
        self._outages, self._random = outages or Outages(), random
        self._add_bytes, self._add_slice = add_bytes, add_slice
        self.carried = 0
        """Bytes carried so far."""

    async def carry(self, count: int, extra_s: float = 0.0, flow: int = 0) -> None:
        """Carry a message of `count` bytes to the other end; its two ends take `extra_s` seconds more."""
        self.carried += count
        began, sending, delay = self._time.now(), 0.0, self._latency_s + extra_s
        if self._pipe is not None:
            await self._send_in_order(self._pipe, count, flow)
            sending = self._time.now() - began
        elif self._bytes_per_s is not None:
            sending = count / self._bytes_per_s
            began = max(self._free_s, began)
            self._free_s = began + sending
            delay += self._free_s - self._time.now()
        if self._jitter_s:
            delay += abs(self._random.gauss(0.0, self._jitter_s))
        if self._loss:
            delay += self._retransmission_s(count)
        if delay:
            try:
                await self._time.sleep(delay)
            except BaseException:  # the rest of the message is not sent any more
                self._free_s -= max(0.0, min(sending, began + sending - self._time.now()))
                raise
        while self._outages and (end := self._outages.ends(now := self._time.now())) > now:
            await self._time.sleep(end - now)
        self._add_bytes((began, count, sending))
        if self._add_slice is not None:
            self._add_slice("message", began, self._time.now() - began, bytes=count)

    async def _send_in_order(self, pipe: SharedCapacity, count: int, flow: int) -> None:
        before, sent = self._last.get(flow), self._time.env.event()
        self._last[flow] = sent
        try:
            if before is not None and not before.processed:
                await until(before)
            await pipe.take(count)
        finally:
            sent.succeed()

    def _retransmission_s(self, count: int) -> float:
        """Draw the seconds that lost segments add to a message."""
        segments, trip = -(-count // SEGMENT), 2 * self._latency_s
        lost = [i for i in range(segments) if self._random.random() < self._loss]
        if not lost:
            return 0.0
        return max(trip if segments - i > 3 else max(LEAST_RTO_S, 2 * trip) for i in lost)


class VirtualRemote:
    """The next node's stages behind a link: the virtual counterpart of `transport.remote.RemoteStage`.

    Args:
        time: the simulation's virtual time.
        name: the next node's name.
        opening: the handshake that opens the session on the next node.
        open: opens the session on the next node.
        up, down: the two directions of the link.
        flow: number of the session's flow on the link.
        row_bytes: bytes of one position's state on the link.
        profile: the sending node's profile, with the sizes and costs of messages.
        timeout_s: deadline of an answer, counted from the question or, if later, from when the next node had taken in
            all states that were sent ahead of it.
        outages: the next node's outages.
        cores: the cores of the sending node's machine, if nodes share it; both ends' work is then done on them.
        message_s: processor seconds of an exchange on those cores, in addition to the profile's.
    """

    def __init__(
        self,
        time: VirtualTime,
        *,
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
        cores: SharedCapacity | None = None,
        message_s: float = 0.0,
    ) -> None:
        self._cores, self._message_s = cores, message_s
        self._time, self._name, self._opening, self._open = time, name, opening, open
        self._up, self._down, self._flow, self._profile = up, down, flow, profile
        self._row_bytes, self._timeout_s, self._outages = row_bytes + profile.position_bytes, timeout_s, outages
        self._chain: Chain | None = None
        self._opened = False
        self._fed: list[simpy.Process] = []
        """The fed messages that are under way, and always the last one."""
        self._fed_hops: list[Hop] = []
        """Statistics of fed messages, which the next answer reports."""
        self._since = time.now()
        self._asker: simpy.Process | None = None
        """The process that waits for an answer."""
        self._waiting_since = 0.0
        self._alarm: simpy.Event | None = None

    async def advance(self, block: Block) -> Verdict:
        """See `Stage.advance`.

        Raises:
            DeadlineExceeded: no answer within timeout_s. It is raised at that moment, and the question is dropped.
            NodeUnavailable: the node went down. It is raised when a message arrives there or its answer would leave.
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
                f"node {self._name!r} did not answer within {self._timeout_s:g} s (link timeout_s)", node=self._name
            ) from None
        finally:
            self._asker = None
        if not self._fed_hops:
            return verdict
        hops = {hop.node: hop for hop in verdict.hops}
        for hop in self._fed_hops:
            hops.setdefault(hop.node, Hop(hop.node)).add(hop)
        self._fed_hops = []
        return Verdict(verdict.decisions, tuple(hops.values()))

    def _set_alarm(self, after_s: float) -> None:
        """Set the session's only alarm: an event for each question would cost as much as the question."""
        self._alarm = self._time.env.timeout(after_s)
        self._alarm.callbacks.append(self._on_alarm)

    def _on_alarm(self, _: simpy.Event) -> None:
        """Interrupt a question whose answer is late; otherwise set the alarm for when one may next be late."""
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
        self._fed.append(self._time.process(self._send_fed(block, before)))

    async def arrived(self) -> None:
        """See `Stage.arrived`."""
        if self._fed:
            await until(self._fed[-1])

    async def _send_fed(self, block: Block, before: simpy.Process | None) -> None:
        self._fed_hops += (await self._ask(block, before)).hops
        self._waiting_since = self._time.now()  # the node is alive

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
            await self._time.pause()  # they end within this moment
        if self._chain is not None:
            await self._chain.close()

    async def _ask(self, block: Block, before: simpy.Process | None) -> Verdict:
        """Send a message to the node and return its answer."""
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
            await until(before)  # a session's messages are taken in order, and fail once one has failed
        self._check_up()
        if opens:
            asked = self._time.now()
            self._chain = await self._open(self._opening)
            began += self._time.now() - asked  # waiting for admission does not count as network time
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
        """Fail if the node has been down since the session began: it has lost the session even if it is up again."""
        if self._outages and self._outages.hit(self._since, self._time.now()):
            raise NodeUnavailable(f"node {self._name!r} went down and lost the session", node=self._name)
