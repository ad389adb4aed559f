"""The parked sessions of a node: their answers have ended, and their KV caches are kept while there is room. Pure.

A request whose tokens begin with those of a parked session goes on from the common prefix.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from functools import partial
from typing import Generic, NamedTuple, Protocol, TypeVar

from ruyi_flow.loop.capacity import Lease
from ruyi_flow.loop.clock import REAL_CLOCK, Clock
from ruyi_flow.loop.pages import PageRun

__all__ = ["LEAST_COMMON", "Parking", "Taken"]

LEAST_COMMON = 16
"""Least number of positions for which a parked session is taken back."""


class _Session(Protocol):
    """What parking needs of a session."""

    @property
    def lease(self) -> Lease:
        """Its capacity."""
        ...

    @property
    def positions(self) -> Sequence[int]:
        """Number of positions in the KV cache of each stage."""
        ...

    def close(self) -> None:
        """Give the capacity back."""
        ...


S = TypeVar("S", bound=_Session)


class Taken(NamedTuple, Generic[S]):
    """A session that is no longer parked. Its lease is for the positions that were asked for."""

    session: S
    """The session, as it was when it was parked."""
    key: bytes
    """The key under which the next node has parked its part."""
    common: int
    """Number of its first positions that the new request shares."""
    moved_from: PageRun | None
    """The pages from which the caches must be copied at once; see `Lease.resume`. None: they are where they were."""


class _Parked(NamedTuple, Generic[S]):
    session: S
    key: bytes
    token_ids: bytes
    user: str | None
    until: float


class Parking(Generic[S]):
    """Keeps sessions whose answers have ended, until they are taken back, evicted, too many or too old.

    Sessions are parked on the compute thread and taken back on the event loop, so every change is made under a lock.

    Args:
        park_s: seconds that a session stays parked. 0: sessions are closed instead.
        max_parked: largest number of parked sessions; those parked longest ago are closed.
        clock: measures the seconds.
    """

    def __init__(self, park_s: float, max_parked: int, clock: Clock = REAL_CLOCK) -> None:
        self._park_s, self._max_parked, self._clock = park_s, max_parked, clock
        self._parked: dict[bytes, _Parked[S]] = {}  # by key, those parked longest ago first
        self._lock = threading.RLock()  # taking a session back may evict others, which are forgotten on the same thread

    def __len__(self) -> int:
        """Return the number of parked sessions."""
        with self._lock:
            self._drop_old()
            return len(self._parked)

    def park(self, key: bytes, token_ids: Sequence[int], session: S, user: str | None = None) -> None:
        """Park a session on which no step runs any more, in place of one that was parked under the same key.

        Args:
            key: random bytes that the entry node chose for the session on every node.
            token_ids: the token of each position, by which a request finds the session. Empty on a deeper node, where
                only the key does.
            session: the session.
            user: only requests of the same user find the session.
        """
        with self._lock:
            replaced = self._parked.pop(key, None)
            if replaced is not None:
                replaced.session.close()
            positions = max(session.positions)
            if not positions or self._park_s <= 0 or self._max_parked <= 0:
                session.close()
                return
            until = self._clock.now() + self._park_s
            session.lease.park(positions, on_evict=partial(self._forget, key))
            self._parked[key] = _Parked(session, key, _packed(token_ids[:positions]), user, until)
            self._drop_old()

    def take(self, token_ids: Sequence[int], user: str | None, max_positions: int) -> Taken[S] | None:
        """Take back the user's session that has the longest common prefix with a request, and lease it the positions.

        A session is left for the conversation that it belongs to if less than half of it is common: taking it back for
        another one would save less than it destroys.

        Args:
            token_ids: the request's prompt; its last token is never common, because it must run again.
            user: the request's user.
            max_positions: largest number of positions of the request.

        Returns:
            None where no session has enough in common.

        Raises:
            CapacityError: there is no room for so many positions. The session is still parked.
            ContextLengthError: the family's context is shorter. The session is still parked.
        """
        wanted = _packed(token_ids[:-1])
        with self._lock:
            self._drop_old()
            best, common = None, LEAST_COMMON - 1
            longer = wanted[: _SIZE * (common + 1)]
            if len(longer) < _SIZE * LEAST_COMMON:
                return None
            for entry in self._parked.values():
                if entry.user != user or not entry.token_ids.startswith(longer):
                    continue
                shared = _common(entry.token_ids, wanted)
                if 2 * _SIZE * shared >= len(entry.token_ids):
                    best, common = entry, shared
                    if _SIZE * common == len(wanted):
                        break
                    longer = wanted[: _SIZE * (common + 1)]
            return None if best is None else self._take(best, common, max_positions)

    def take_key(self, key: bytes, common: int, max_positions: int) -> Taken[S] | None:
        """Take back the session that was parked under a key, and lease it the positions.

        Args:
            key: the key.
            common: number of first positions that the previous node still shares with it.
            max_positions: largest number of positions of the request.

        Returns:
            None where no session is parked under this key.

        Raises:
            CapacityError: there is no room for so many positions. The session is still parked.
            ContextLengthError: the family's context is shorter. The session is still parked.
        """
        with self._lock:
            self._drop_old()
            entry = self._parked.get(key)
            return None if entry is None else self._take(entry, common, max_positions)

    def clear(self) -> None:
        """Close every parked session."""
        with self._lock:
            while self._parked:
                self._close_oldest()

    def _take(self, entry: _Parked[S], common: int, max_positions: int) -> Taken[S]:
        moved_from = entry.session.lease.resume(max_positions)
        del self._parked[entry.key]
        kept = min(common, max(entry.session.positions), max_positions)
        return Taken(entry.session, entry.key, kept, moved_from)

    def _drop_old(self) -> None:
        now = self._clock.now()
        while self._parked:
            oldest = next(iter(self._parked.values()))
            if oldest.until > now and len(self._parked) <= self._max_parked:
                return
            self._close_oldest()

    def _close_oldest(self) -> None:
        self._parked.pop(next(iter(self._parked))).session.close()

    def _forget(self, key: bytes, lease: Lease) -> None:
        """Forget a session whose pages were given to another one."""
        with self._lock:
            entry = self._parked.get(key)
            if entry is not None and entry.session.lease is lease:
                del self._parked[key]


_SIZE = array("I").itemsize
"""Bytes of a packed token id."""


def _packed(token_ids: Sequence[int]) -> bytes:
    """Return token ids as bytes, which are compared at the speed of memory."""
    return array("I", token_ids).tobytes()


def _common(one: bytes, other: bytes) -> int:
    """Return the number of token ids that two packed sequences have in common at the start."""
    low, high = 0, min(len(one), len(other)) // _SIZE
    while low < high:
        middle = (low + high + 1) // 2
        if one[_SIZE * low : _SIZE * middle] == other[_SIZE * low : _SIZE * middle]:
            low = middle
        else:
            high = middle - 1
    return low
