"""The replicas of one node, as a caller sees them: which there are, and which one takes a new session."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import aclosing, suppress
from ipaddress import ip_address

import grpc

from ruyi_flow.config.security import Keys
from ruyi_flow.errors import NodeError
from ruyi_flow.loop.replicas import RecoveryTime, choose_replica, is_usable
from ruyi_flow.telemetry.counters import LinkCounters
from ruyi_flow.transport.addresses import resolve, split_address
from ruyi_flow.transport.peer import NEVER, Peer
from ruyi_flow.types import Recovery

__all__ = ["Replicas"]

_RESOLVE_S = 30.0
"""Seconds after which a name is looked up again, while sessions are opened. A replica that fails does it at once."""

_WATCH_PAUSE_S = 1.0
"""Seconds between attempts to watch a replica that cannot be reached."""


class _Replica:
    """One address of a node.

    Args:
        address: host:port.
    """

    __slots__ = ("address", "is_serving", "peer", "watching")

    def __init__(self, address: str) -> None:
        self.address = address
        self.peer: Peer | None = None
        self.is_serving: bool | None = None
        """What its health service says, where it is watched."""
        self.watching: asyncio.Task[None] | None = None

    @property
    def load(self) -> float:
        """See `Candidate.load`."""
        return 0.0 if self.peer is None else self.peer.load

    @property
    def avoided_at(self) -> float:
        """See `Candidate.avoided_at`."""
        return NEVER if self.peer is None else self.peer.avoided_at

    @property
    def refuses(self) -> bool:
        """See `Candidate.refuses`."""
        peer = self.peer
        return self.is_serving is False or (peer is not None and peer.is_draining and not peer.is_lost)


class Replicas:
    """The replicas of one node: `loop.next_stage.Recoveries` over connections.

    A session stays on the replica where it was opened. `loop.replicas.choose_replica` chooses the one of a new session.

    Args:
        name: the node's name.
        addresses: host:port of each; a host's name may stand for several IPv4 addresses, which are replicas too.
        max_message_bytes: the largest message that the node accepts.
        recover_s: seconds for which a lost session is taken up again, since the node was last heard.
        timeout_s: seconds that an answer may take.
        counters: where losses and recoveries are counted. Default: nowhere.
        keys: the caller's keys. Default: the connections are not encrypted.
    """

    def __init__(
        self,
        name: str,
        addresses: Sequence[str],
        *,
        max_message_bytes: int,
        recover_s: float,
        timeout_s: float,
        counters: LinkCounters | None = None,
        keys: Keys | None = None,
    ) -> None:
        self.name, self.addresses, self.timeout_s = name, tuple(addresses), timeout_s
        self._max_message_bytes, self._counters = max_message_bytes, counters
        self._recovery_time = RecoveryTime(name, recover_s)
        self._keys = keys
        self._replicas = {address: _Replica(address) for address in self.addresses}
        if counters is not None:
            counters.expect(name)
        self._random = random.Random()  # nodes must not choose alike
        self._heard_at: float | None = None
        self._resolved_at = -_RESOLVE_S
        self._resolving: asyncio.Task[None] | None = None
        self._old: list[Peer] = []
        """Connections that are given up and may not be closed yet."""
        self._is_closed = False

    @property
    def was_heard(self) -> bool:
        """Whether a replica has ever answered."""
        return self._last_heard() is not None

    @property
    def state(self) -> str:
        """State of the connection that is ready, or of the last one: idle, connecting, ready, transient_failure."""
        states = [replica.peer.state for replica in self._replicas.values() if replica.peer is not None]
        return "ready" if "ready" in states else states[-1] if states else "idle"

    def pick(self, key: bytes = b"") -> Peer:
        """Return the connection to the replica that a new session goes to.

        Args:
            key: what the turns of a conversation have in common, or nothing; see `choose_replica`.
        """
        now = time.monotonic()
        self._resolve_if_due(now)
        replicas = list(self._replicas.values())
        if len(replicas) > 1:
            for replica in replicas:
                if replica.watching is None:
                    replica.watching = asyncio.create_task(self._watch(replica), name=f"health of {self.name}")
        return self._peer(choose_replica(replicas, key, now, self._random))

    def left_s(self, error: NodeError, *, began: bool, waited_s: float) -> float:
        """Return the seconds for which another attempt makes sense; see `Recoveries.left_s`."""
        now = time.monotonic()
        self._heard_at = self._last_heard()
        return self._recovery_time.left_s(
            error,
            began=began,
            waited_s=waited_s,
            now=now,
            heard_at=self._heard_at,
            has_usable=any(is_usable(replica, now) for replica in self._replicas.values()),
        )

    def lost(self, node: str, cause: str) -> None:
        """Count a loss of the node, and look up its addresses again."""
        if self._counters is not None:
            self._counters.losses.add(node or self.name, cause)
        self._resolved_at = -_RESOLVE_S

    def recovered(self, node: str, recovery: Recovery) -> None:
        """Count a session that was taken up again."""
        self._recovery_time.recovered()
        if self._counters is not None:
            self._counters.recovered(self.name, recovery)

    async def close(self) -> None:
        """Close all connections."""
        self._is_closed = True
        tasks = [replica.watching for replica in self._replicas.values() if replica.watching is not None]
        tasks += [] if self._resolving is None else [self._resolving]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        peers = [replica.peer for replica in self._replicas.values() if replica.peer is not None]
        await asyncio.gather(*(peer.close() for peer in (*peers, *self._old)))

    def _last_heard(self) -> float | None:
        """Return when a replica was last heard, or None."""
        peers = [replica.peer for replica in self._replicas.values() if replica.peer is not None]
        return max([self._heard_at or 0.0, *(peer.heard_at or 0.0 for peer in peers)]) or None

    def _peer(self, replica: _Replica) -> Peer:
        """Return the connection to a replica; a new one if the last one is lost."""
        if replica.peer is None or replica.peer.is_lost:
            avoided_at = NEVER
            if replica.peer is not None:
                self._heard_at = max(self._heard_at or 0.0, replica.peer.heard_at or 0.0) or None
                avoided_at = replica.peer.avoided_at
                self._give_up(replica.peer)
            peer = Peer(self.name, replica.address, max_message_bytes=self._max_message_bytes, keys=self._keys)
            peer.avoided_at, peer.has_others = avoided_at, lambda: self._has_others(replica)
            replica.peer = peer
        return replica.peer

    def _give_up(self, peer: Peer) -> None:
        peer.lose()
        self._old = [old for old in self._old if not old.is_closed] + [peer]

    def _has_others(self, replica: _Replica) -> bool:
        now = time.monotonic()
        return any(other is not replica and is_usable(other, now) for other in self._replicas.values())

    def _resolve_if_due(self, now: float) -> None:
        names = [address for address in self.addresses if not _is_number(address)]
        if names and self._resolving is None and now - self._resolved_at > _RESOLVE_S:
            self._resolved_at = now
            self._resolving = asyncio.create_task(self._resolve(names), name=f"addresses of {self.name}")

    async def _resolve(self, names: Sequence[str]) -> None:
        """Look up names; one that has several IPv4 addresses stands for as many replicas."""
        try:
            found: dict[str, list[str]] = {}
            for name in names:
                host, port = split_address(name)
                with suppress(OSError):  # whoever connects to the name reports it
                    hosts = {str(one[4][0]) for one in await resolve(host, port) if ":" not in str(one[4][0])}
                    found[name] = [f"{ip}:{port}" for ip in sorted(hosts)]
            wanted: list[str] = []
            for address in self.addresses:
                several = found.get(address, [])
                if len(several) > 1:
                    wanted += several
                elif address in found or address in self._replicas or _is_number(address):
                    wanted.append(address)
                else:  # it cannot be looked up now: keep what it stood for
                    wanted += [known for known in self._replicas if known not in self.addresses]
            self._adopt(dict.fromkeys(wanted))
        finally:
            self._resolving = None

    def _adopt(self, wanted: dict[str, None]) -> None:
        """Take over a new list of addresses; sessions on others stay where they are."""
        known = self._replicas
        self._replicas = {address: known.get(address) or _Replica(address) for address in wanted}
        for address, replica in known.items():
            if address in wanted:
                continue
            if replica.watching is not None:
                replica.watching.cancel()
            if replica.peer is not None:
                self._give_up(replica.peer)

    async def _watch(self, replica: _Replica) -> None:
        """Follow what a replica's health service says of it."""
        while not self._is_closed:
            peer = self._peer(replica)
            with suppress(grpc.aio.AioRpcError):
                async with aclosing(peer.watch_health()) as answers:
                    async for replica.is_serving in answers:
                        peer.hear()
                        if not replica.is_serving and not peer.is_draining:
                            peer.leave()
            replica.is_serving = False
            peer.lose()
            await asyncio.sleep(_WATCH_PAUSE_S)


def _is_number(address: str) -> bool:
    with suppress(ValueError):
        ip_address(split_address(address)[0])
        return True
    return False
