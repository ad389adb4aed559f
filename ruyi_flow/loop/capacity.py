"""A node's capacity: how many sessions it may have, and the KV cache pages that are leased to each. Pure."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

from ruyi_flow.errors import CapacityError, ContextLengthError
from ruyi_flow.loop.pages import PagePool, PageRun

__all__ = ["Capacity", "Lease"]


class Lease:
    """One session's share of a node's capacity: one session slot and its KV cache pages.

    Args:
        capacity: the node's capacity, which made the lease.
        pages: the pages that belong to the lease.
    """

    __slots__ = ("_capacity", "pages")

    def __init__(self, capacity: Capacity, pages: PageRun) -> None:
        self._capacity, self.pages = capacity, pages

    @property
    def alone(self) -> bool:
        """Whether no other lease exists on this node."""
        return len(self._capacity.leases) == 1

    def give_back(self) -> None:
        """Return the share; its pages must not be used any more. Returning it twice is allowed."""
        self._capacity._release(self)


class Capacity:
    """The capacity of a node: a number of sessions, and KV cache positions for all of them.

    Leases are made on the event loop and given back on the compute thread, so every change is made under a lock.

    Args:
        max_positions: KV cache positions over all sessions.
        max_sessions: number of sessions at the same time.
        context: the family's context, which is the largest number of positions of one session.
    """

    def __init__(self, max_positions: int, max_sessions: int, context: int) -> None:
        self.pool = PagePool(max_positions)
        self.max_sessions, self.context = max_sessions, context
        self.leases: dict[int, Lease] = {}
        """The leases that have not been given back, by the number that owns their pages."""
        self.on_release: Callable[[], None] = lambda: None
        """Called, on any thread, after a lease has been given back."""
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def lease(self, max_positions: int) -> Lease:
        """Lease capacity to a session that uses at most `max_positions`.

        Raises:
            CapacityError: there are too many sessions, or too few free pages.
            ContextLengthError: the family's context is shorter.
        """
        if max_positions > self.context:
            raise ContextLengthError(
                f"this session needs {max_positions} positions; the family's context has {self.context}"
            )
        with self._lock:
            if len(self.leases) >= self.max_sessions:
                raise CapacityError(f"{len(self.leases)} sessions are running (limits.max_sessions)")
            number = next(self._numbers)
            lease = self.leases[number] = Lease(self, self.pool.allocate(number, max_positions))
            return lease

    def check_integrity(self) -> None:
        """Raise AssertionError unless the pool's used pages are those of the leases."""
        with self._lock:
            self.pool.check_integrity()
            assert self.pool.used == sum(lease.pages.count for lease in self.leases.values()), "pages without a lease"

    def _release(self, lease: Lease) -> None:
        with self._lock:
            if self.leases.pop(lease.pages.owner, None) is None:
                return
            self.pool.release(lease.pages)
        self.on_release()
