"""The rules of replicas: which one takes a new session, when a silent one is lost, how long a lost one is waited for.
Pure: the caller says what time it is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol, TypeVar
from zlib import crc32

from ruyi_flow.errors import CapacityError, DeadlineExceeded, NodeError

__all__ = [
    "CONNECT_S",
    "SIGN_S",
    "SILENT_S",
    "TICK_S",
    "Candidate",
    "RecoveryTime",
    "choose_replica",
    "estimated_load",
    "is_usable",
]

SIGN_S = 0.5
"""Seconds between a node's signs of life."""

SILENT_S = 1.5
"""Seconds without a sign after which a node that owes an answer is lost: three signs are missing."""

CONNECT_S = 3.0
"""The same for a node that has not been heard yet: connecting takes several round trips."""

TICK_S = 0.25
"""Seconds between two looks at the time of the last sign."""

_SESSION_LOAD = 1 / 16
"""Share of a node's KV cache that a session is taken to reserve, until the node says more."""

_MOST_TIMES = 3
"""Times `recover_s` that an answer under way may wait in all for a node that is heard again and again."""

_AVOID_S = 1.0
"""Seconds for which a replica that has failed or was full gets no new sessions, if there is another one."""

_LOCALITY = 0.25
"""Share of the KV cache by which a conversation's replica may be more loaded than another one and still get it."""


class Candidate(Protocol):
    """What a caller knows of a replica."""

    @property
    def address(self) -> str:
        """The address, which tells it from the others."""
        ...

    @property
    def load(self) -> float:
        """Estimated share of its KV cache that is reserved."""
        ...

    @property
    def avoided_at(self) -> float:
        """When it last failed, or was full, and has not been heard since; -inf: never."""
        ...

    @property
    def refuses(self) -> bool:
        """Whether it is known to take no sessions: it shuts down, or its health service says so."""
        ...


C = TypeVar("C", bound=Candidate)


def is_usable(replica: Candidate, now: float) -> bool:
    """Return whether a replica may get new sessions, as far as the caller knows."""
    return not replica.refuses and now - replica.avoided_at > _AVOID_S


def choose_replica(replicas: Sequence[C], key: bytes, now: float, source: random.Random) -> C:
    """Return the replica that a new session goes to: the less loaded of two among those that are usable.

    The two are drawn at random (Mitzenmacher, The power of two choices in randomized load balancing, 2001), or by a
    hash of the conversation (Thaler and Ravishankar, Using name-based mappings to increase hit rates, 1998).

    Args:
        replicas: the node's replicas, at least one. Where none is usable, it is the one that failed longest ago, which
            is most likely back.
        key: what the turns of a conversation have in common. They go to the same replica, which may have parked the
            last turn, unless it is much more loaded than the second choice. Empty: two are drawn at random.
        now: the time.
        source: source of random numbers.
    """
    if len(replicas) == 1:
        return replicas[0]
    usable = [replica for replica in replicas if is_usable(replica, now)]
    if not usable:
        return min(replicas, key=lambda replica: replica.avoided_at)
    if key:
        two = sorted(usable, key=lambda replica: crc32(key + replica.address.encode()))[:2]
        return min(two, key=lambda replica: replica.load + _LOCALITY * (replica is not two[0]))
    return min(source.sample(usable, min(2, len(usable))), key=lambda replica: replica.load)


def estimated_load(told: float, opened: int) -> float:
    """Return a replica's load: the share of its KV cache that it last told, and the sessions opened there since."""
    return told + opened * _SESSION_LOAD


class RecoveryTime:
    """How long a node that is lost is waited for.

    Args:
        name: the node's name.
        recover_s: seconds for which a lost session is taken up again, since the node could last be reached.
    """

    def __init__(self, name: str, recover_s: float) -> None:
        self._name, self._recover_s = name, recover_s
        self._failing_since: float | None = None
        """Time of the first loss since the node was last heard or a session was taken up again."""

    def left_s(
        self, error: NodeError, *, began: bool, waited_s: float, now: float, heard_at: float | None, has_usable: bool
    ) -> float:
        """Return the seconds for which another attempt makes sense; 0 if the loss is final.

        Args:
            error: why the session was lost.
            began: whether the answer has begun, so that something would be lost.
            waited_s: seconds since the session was first lost with the present question.
            now: the time.
            heard_at: when a replica of the node was last heard, or None.
            has_usable: whether another replica may get new sessions.
        """
        if isinstance(error, DeadlineExceeded) or error.node not in (None, self._name):
            # The answer's time is over; or a deeper node is lost, and the next one has tried for long enough.
            return 0.0
        if not began and (isinstance(error, CapacityError) or heard_at is None):
            # Nothing is lost yet: a node that is full or was never there is told at once, if there is no other replica.
            return float(has_usable)
        if isinstance(error, CapacityError):
            return self._recover_s - waited_s
        if self._failing_since is None or self._failing_since < (heard_at or 0.0):
            self._failing_since = now  # not the time when it was last heard: nobody may have asked it since
        # A node that shuts down is heard as long as it lives, and refuses: the sum is bounded, too.
        most_s = _MOST_TIMES * self._recover_s if began else self._recover_s
        return max(0.0, min(self._failing_since + self._recover_s - now, most_s - waited_s))

    def recovered(self) -> None:
        """Note that a session was taken up again."""
        self._failing_since = None
