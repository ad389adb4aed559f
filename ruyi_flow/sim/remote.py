"""The next node's stages behind a link in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import simpy

from ruyi_flow.errors import CapacityError, DeadlineExceeded, RuyiFlowError
from ruyi_flow.loop.chain import Chain
from ruyi_flow.requests import SessionOpen
from ruyi_flow.sim.clock import SharedCapacity, VirtualTime, until
from ruyi_flow.sim.instance import Life
from ruyi_flow.sim.link import Pipe
from ruyi_flow.sim.profile import Profile
from ruyi_flow.sim.replicas import Call, VirtualReplicas
from ruyi_flow.types import MESSAGE_ROWS, Block, Hop, Verdict

__all__ = ["VirtualRemote", "Wire"]


@dataclass(frozen=True, slots=True)
class Wire:
    """What the sessions of one node share on the way to the next one."""

    pipe: Pipe
    """The link."""
    flow: int
    """Number of the node's flow on the link."""
    row_bytes: int
    """Bytes of one position's state on the link."""
    profile: Profile
    """The sending node's profile, with the sizes and costs of messages."""
    timeout_s: float
    """Deadline of an answer, counted from the question or, if later, from when the next node had taken in all states
    that were sent ahead of it."""
    cores: SharedCapacity | None = None
    """The cores of the sending node's machine, if nodes share it; both ends' work is then done on them."""
    message_s: float = 0.0
    """Processor seconds of an exchange on those cores, in addition to the profile's."""


class VirtualRemote:
    """The next node's stages behind a link: the virtual counterpart of `transport.remote.RemoteStage`.

    Args:
        time: the simulation's virtual time.
        wire: the way to the next node.
        replicas: the next node's replicas, one of which is picked.
        opening: the handshake that opens the session on the next node.
        open: opens the session in a process of the next node.
    """

    def __init__(
        self,
        time: VirtualTime,
        wire: Wire,
        replicas: VirtualReplicas,
        opening: SessionOpen,
        open: Callable[[Life, SessionOpen], Awaitable[Chain]],
    ) -> None:
        self._time, self._wire, self._name, self._opening, self._open = time, wire, replicas.name, opening, open
        self._up, self._down, self._profile = wire.pipe.up, wire.pipe.down, wire.profile
        self._row_bytes = wire.row_bytes + wire.profile.position_bytes
        self._call = Call(time, replicas, opening.key, pipe=wire.pipe)
        self._chain: Chain | None = None
        self._opened = False
        self._fed_hops: list[Hop] = []
        """Statistics of fed messages, which the next answer reports."""
        self._waiting_since = 0.0
        self._alarm: simpy.Event | None = None

    async def advance(self, block: Block) -> Verdict:
        """See `Stage.advance`.

        Raises:
            DeadlineExceeded: no answer within timeout_s. It is raised at that moment, and the question is dropped.
            NodeUnavailable: the node went down. It is raised when that is noticed.
        """
        call = self._call
        self._waiting_since = self._time.now()
        if self._alarm is None:
            self._set_alarm(self._wire.timeout_s)
        if len(block.token_ids) > MESSAGE_ROWS:
            *before, block = block.parts(MESSAGE_ROWS)
            for part in before:
                await self.feed(part)
        if call.life is None and not call.is_lost:
            call.connect()
        try:
            verdict = await call.run(self._ask(block, call.parts[-1] if call.parts else None))
        except CapacityError:
            call.replica.avoided_at = self._time.now()
            raise
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
        """End a session whose answer is late; otherwise set the alarm for when one may next be late."""
        timeout_s, now = self._wire.timeout_s, self._time.now()
        left = (self._waiting_since if self._call.is_waiting else now) + timeout_s - now
        if left > 0:
            self._set_alarm(left)
            return
        error = f"node {self._name!r} did not answer within {timeout_s:g} s (link timeout_s)"
        self._call.end(DeadlineExceeded(error, node=self._name), now)

    async def feed(self, block: Block) -> None:
        """See `Stage.feed`."""
        if len(block.token_ids) > MESSAGE_ROWS:
            for part in block.parts(MESSAGE_ROWS):
                await self.feed(part)
            return
        call = self._call
        if call.life is None and not call.is_lost:
            call.connect()
        before = call.parts[-1] if call.parts else None
        call.parts = [process for process in call.parts if process.is_alive]
        call.parts.append(self._time.process(self._send_fed(block, before)))
        await self._time.pause()  # it is written before what comes next

    async def arrived(self) -> None:
        """See `Stage.arrived`."""
        if self._call.parts:
            await until(self._call.parts[-1])

    async def _send_fed(self, block: Block, before: simpy.Process | None) -> None:
        if not self._call.is_lost:  # the next answer fails
            self._fed_hops += (await self._ask(block, before)).hops
            self._waiting_since = self._time.now()  # the node is alive

    async def rewind(self, position: int) -> None:
        """See `Stage.rewind`."""
        if self._chain is not None and not self._call.is_lost:
            await self._up.carry(self._profile.up_bytes, flow=self._wire.flow)
            await self._chain.rewind(position)
            await self._down.carry(self._profile.down_bytes, flow=self._wire.flow)

    async def close(self) -> None:
        """See `Stage.close`."""
        if self._alarm is not None and self._alarm.callbacks is not None:
            self._alarm.callbacks.clear()
        under_way = [process for process in self._call.parts if process.is_alive]
        for process in under_way:
            process.interrupt()
        self._call.close()
        if under_way:
            await self._time.pause()  # they end within this moment
        if self._chain is not None:
            await self._chain.close()

    async def _ask(self, block: Block, before: simpy.Process | None) -> Verdict:
        """Send a message to the node and return its answer."""
        profile, positions, wire = self._profile, len(block.token_ids), self._wire
        size = profile.up_bytes + positions * self._row_bytes
        extra = profile.exchange_s + profile.exchange_byte_s * size
        opens = not self._opened
        began = self._time.now()
        if opens:
            self._opened = True
            size += profile.open_bytes
            if not self._call.replica.is_connected:
                await self._up.carry(0, flow=wire.flow)
                await self._down.carry(0, flow=wire.flow)
                self._call.replica.is_connected = True
        if wire.cores is not None:
            self._time.start(wire.cores.take(max(0.0, profile.exchange_cpu_s - extra) + wire.message_s))
            await wire.cores.take(extra)
            extra = 0.0
        await self._up.carry(size, extra, wire.flow)
        if before is not None:
            await until(before)  # a session's messages are taken in order, and fail once one has failed
        if opens:
            asked, life = self._time.now(), self._call.life
            assert life is not None
            try:
                self._chain = await self._open(life, self._opening)
            except RuyiFlowError:  # a refusal is an answer
                await self._down.carry(profile.down_bytes, flow=wire.flow)
                raise
            self._call.replica.tell_load()
            began += self._time.now() - asked  # waiting for admission does not count as network time
        assert self._chain is not None
        came = self._time.now()
        verdict = await self._chain.advance(block)
        took = self._time.now() - came
        back = profile.down_bytes + profile.decision_bytes * len(verdict.decisions)
        await self._down.carry(back, flow=wire.flow)
        mine = verdict.hops[0]
        mine.messages += 1
        mine.positions += positions
        mine.bytes_up += size
        mine.bytes_down += back
        mine.wire_s += self._time.now() - began - took
        return verdict
