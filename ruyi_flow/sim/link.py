"""A link between two nodes in virtual time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import simpy

from ruyi_flow.sim.clock import SharedCapacity, VirtualTime, until
from ruyi_flow.sim.results import AddSlice, TimedAmount

__all__ = ["LEAST_RTO_S", "SEGMENT", "Direction", "Outages", "Pipe"]

SEGMENT = 1448
"""Payload of a TCP segment on Ethernet, in bytes."""

LEAST_RTO_S = 0.2
"""Shortest retransmission timeout of TCP, in seconds (Linux)."""


class Outages:
    """The outages of a link.

    Args:
        spans: (from, to) in seconds, in any order; they may overlap.
    """

    def __init__(self, spans: Iterable[tuple[float, float]] = ()) -> None:
        self.starts: list[float] = []
        """Seconds at which the link goes down, ascending."""
        self._stops: list[float] = []
        for start, stop in sorted(spans):
            if self._stops and start <= self._stops[-1]:
                self._stops[-1] = max(self._stops[-1], stop)
            else:
                self.starts.append(start)
                self._stops.append(stop)

    def __bool__(self) -> bool:
        return bool(self.starts)

    def ends(self, now: float) -> float:
        """Return the second at which the present outage ends; `now` if there is none."""
        i = bisect_right(self.starts, now) - 1
        return self._stops[i] if i >= 0 and now < self._stops[i] else now


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
        self._time, self.latency_s, self._jitter_s, self._loss = time, latency_s, jitter_s, loss
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
        began, sending, delay = self._time.now(), 0.0, self.latency_s + extra_s
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
        segments, trip = -(-count // SEGMENT), 2 * self.latency_s
        lost = [i for i in range(segments) if self._random.random() < self._loss]
        if not lost:
            return 0.0
        return max(trip if segments - i > 3 else max(LEAST_RTO_S, 2 * trip) for i in lost)


class Listener(Protocol):
    """A session over a link, which notices that the link is down when signs of life are missing."""

    def check_silence(self) -> None:
        """Note that the link is down."""
        ...


class Pipe:
    """Both directions of a link between two nodes, or of one that several nodes share.

    Args:
        time: the simulation's virtual time.
        up, down: the two directions.
        outages: when the link is down.
    """

    def __init__(self, time: VirtualTime, up: Direction, down: Direction, outages: Outages) -> None:
        self._time, self.up, self.down, self.outages = time, up, down, outages
        self.round_trip_s = up.latency_s + down.latency_s
        self.calls: dict[Listener, None] = {}
        """The sessions over the link, if it is ever down."""
        if outages:
            time.process(self._go_down())

    async def _go_down(self) -> None:
        for start in self.outages.starts:
            if start < self._time.now():
                continue
            await self._time.sleep(start - self._time.now())
            for call in tuple(self.calls):
                call.check_silence()
