"""The faults of a trial: what goes wrong, where, at which moment and for how long, drawn from a seed."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

from tests.robustness.cluster import Cluster

__all__ = ["HARMLESS", "KINDS", "Fault", "Kind", "draw_faults"]


class Kind(StrEnum):
    """What goes wrong."""

    KILL = "kill"
    """A node is killed (SIGKILL), and started again after the length."""
    TERMINATE = "terminate"
    """A node is asked to end (SIGTERM), and started again once it has ended."""
    PAUSE = "pause"
    """A node stops for a moment (SIGSTOP, SIGCONT), too short to be taken for dead."""
    HANG = "hang"
    """A node stops for seconds, and then continues."""
    SLOW_NODE = "slow node"
    """A node stops and continues many times a second."""
    RESET = "reset"
    """All connections of a link are reset."""
    BLACKHOLE = "blackhole"
    """The connections of a link carry nothing any more, and do not end; new ones work."""
    FREEZE = "freeze"
    """A link carries nothing for seconds, and then everything, also over new connections."""
    HALF_CLOSE = "half-close"
    """One direction of a link's connections ends."""
    DELAY = "delay"
    """A link's round trip grows for some time."""
    SLOW_LINK = "slow link"
    """A link's rate falls for some time."""
    FLIP = "flip"
    """One byte on a link changes."""
    VANISH = "vanish"
    """A client goes away in the middle of its answer."""
    TWO = "two at once"
    """Two of these faults, the second one during or right after the first one."""


HARMLESS = (Kind.PAUSE, Kind.DELAY)
"""Faults by which no session may be lost."""

_OF_NODES = (Kind.KILL, Kind.TERMINATE, Kind.PAUSE, Kind.HANG, Kind.SLOW_NODE)
_OF_LINKS = (Kind.RESET, Kind.BLACKHOLE, Kind.FREEZE, Kind.HALF_CLOSE, Kind.DELAY, Kind.SLOW_LINK, Kind.FLIP)
KINDS = (*_OF_NODES, *_OF_LINKS, Kind.VANISH, Kind.TWO)
"""All kinds, in the order of the report."""

_LENGTHS_S = {
    Kind.KILL: (0.0, 0.5),
    Kind.PAUSE: (0.02, 0.8),
    Kind.HANG: (2.0, 7.0),
    Kind.SLOW_NODE: (0.5, 2.0),
    Kind.FREEZE: (2.0, 7.0),
    Kind.DELAY: (0.5, 2.0),
    Kind.SLOW_LINK: (0.5, 2.0),
}
"""Shortest and longest length of each kind of fault that has one."""


@dataclass(frozen=True)
class Fault:
    """One fault. Its fields are drawn for every kind; each kind uses those that it has."""

    kind: Kind
    target: int
    """Number of the node, or of the node that the link leads to, or of the client."""
    share: float
    """Moment: after this share of all tokens of the trial has arrived."""
    then_s: float
    """Seconds after that moment."""
    length_s: float
    """Seconds until the fault ends."""
    up: bool
    """Direction on the link: towards the deeper node."""
    offset: int
    """Bytes that still pass before the one that changes."""
    bits: int
    """Bits of that byte that change."""
    delay_s: float
    """Delay of the link meanwhile, in each direction."""
    bytes_per_s: float
    """Rate of the link meanwhile."""

    def __str__(self) -> str:
        if self.kind in _OF_NODES:
            where = f"{self.kind} of node n{self.target}"
        elif self.kind in _OF_LINKS:
            where = f"{self.kind} of the link to n{self.target}"
        else:
            where = f"client {self.target} vanishes"
        extra = {
            Kind.HALF_CLOSE: f", {'up' if self.up else 'down'}",
            Kind.FLIP: f", {'up' if self.up else 'down'}, byte {self.offset}, bits {self.bits:#04x}",
            Kind.DELAY: f", {self.delay_s * 1000:.0f} ms each way",
            Kind.SLOW_LINK: f", {self.bytes_per_s / 1000:.0f} kB/s",
        }.get(self.kind, "")
        lasts = f" for {self.length_s:.2f} s" if self.kind in _LENGTHS_S else ""
        return f"{where}{extra}{lasts}, at {self.share:.0%} of the tokens and {self.then_s * 1000:.1f} ms"

    async def happen(self, cluster: Cluster, vanish: Callable[[int], Awaitable[None]]) -> None:
        """Do it, and undo it after its length.

        Args:
            cluster: the nodes and links.
            vanish: makes the client of a number go away.
        """
        # Which replica it is follows from the bits, which are drawn like everything else.
        i = (self.target + 3 * (self.bits.bit_length() % 2)) % len(cluster.nodes)
        node, relay = cluster.nodes[i], cluster.relays[i]
        pid = node.pid
        match self.kind:
            case Kind.KILL:
                node.send(signal.SIGKILL)
                await asyncio.sleep(self.length_s)
                await node.restart(pid)
            case Kind.TERMINATE:
                node.send(signal.SIGTERM)
                await node.restart(pid)
            case Kind.PAUSE | Kind.HANG:
                node.send(signal.SIGSTOP)
                await asyncio.sleep(self.length_s)
                node.send(signal.SIGCONT)
            case Kind.SLOW_NODE:
                end = time.monotonic() + self.length_s
                while time.monotonic() < end:
                    node.send(signal.SIGSTOP)
                    await asyncio.sleep(0.03)
                    node.send(signal.SIGCONT)
                    await asyncio.sleep(0.01)
            case Kind.RESET:
                relay.reset()
            case Kind.BLACKHOLE:
                relay.blackhole()
                cluster.holes.add(relay)
            case Kind.FREEZE:
                relay.frozen = True
                await asyncio.sleep(self.length_s)
                relay.frozen = False
            case Kind.HALF_CLOSE:
                relay.half_close(up=self.up)
            case Kind.DELAY:
                before, relay.delay_s = relay.delay_s, self.delay_s
                await asyncio.sleep(self.length_s)
                relay.delay_s = before
            case Kind.SLOW_LINK:
                relay.bytes_per_s = self.bytes_per_s
                await asyncio.sleep(self.length_s)
                relay.bytes_per_s = None
            case Kind.FLIP:
                relay.flip(self.offset, up=self.up, bits=self.bits)
            case Kind.VANISH:
                await vanish(self.target)
            case Kind.TWO:
                raise AssertionError("two faults happen one by one")


def draw_faults(rng: random.Random) -> tuple[Kind, tuple[Fault, ...]]:
    """Draw the kind of a trial, and its fault or its two faults."""
    kind = rng.choice(KINDS)
    if kind is not Kind.TWO:
        return kind, (_draw_fault(rng, kind),)
    # Two nodes, or one of them twice: the second one may die while the first one's sessions are replayed.
    return kind, tuple(_draw_fault(rng, rng.choice((*_OF_NODES, *_OF_LINKS))) for _ in range(2))


def _draw_fault(rng: random.Random, kind: Kind) -> Fault:
    return Fault(
        kind,
        target=rng.randrange(3),
        share=rng.uniform(0.0, 0.9),
        then_s=rng.choice((0.0, rng.uniform(0.0, 0.01))),
        length_s=rng.uniform(*_LENGTHS_S.get(kind, (0.0, 0.0))),
        up=rng.random() < 0.5,
        offset=int(rng.choice((60, 600, 3000)) * rng.random()),
        bits=1 << rng.randrange(8),
        delay_s=rng.uniform(0.05, 0.3),
        bytes_per_s=rng.uniform(20e3, 200e3),
    )
