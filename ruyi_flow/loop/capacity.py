"""A node's capacity: how many sessions it may have, and the KV cache pages that are leased to each. Pure.

A lease whose session has ended may be parked: its pages keep the caches until another session needs the room.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable

from ruyi_flow.errors import CapacityError, ContextLengthError
from ruyi_flow.loop.pages import PagePool, PageRun

__all__ = ["Capacity", "Lease"]


class Lease:
    """One session's share of a node's capacity: one session slot and its KV cache pages. A parked lease has no slot.

    Args:
        capacity: the node's capacity, which made the lease.
        pages: the pages that belong to the lease.
    """

    __slots__ = ("_capacity", "_on_evict", "pages")

    def __init__(self, capacity: Capacity, pages: PageRun) -> None:
        self._capacity, self.pages = capacity, pages
        self._on_evict: Callable[[Lease], None] = lambda lease: None

    @property
    def alone(self) -> bool:
        """Whether no other lease exists on this node."""
        return len(self._capacity.leases) == 1

    @property
    def parked(self) -> bool:
        """Whether it is parked: false once it was taken back, evicted or given back."""
        return self.pages.owner in self._capacity.parked

    def park(self, positions: int, on_evict: Callable[[Lease], None]) -> None:
        """Keep only the pages of the first positions, until another session needs them; no step may still use them.

        Args:
            positions: number of positions whose caches are kept.
            on_evict: called with the lease after its pages were given to another session, on the thread that leased
                them.
        """
        self._capacity._park(self, positions, on_evict)

    def resume(self, max_positions: int) -> PageRun | None:
        """Take a parked lease back for a session that uses at most `max_positions`.

        Its pages may be others from now on. Then the caller copies the caches before it awaits anything but the copy,
        on the thread that runs the steps: the old pages are free, and the next session may write to them.

        Returns:
            The pages to copy the caches from, which may overlap the new ones. None: the caches are where they were.

        Raises:
            CapacityError: there are too many sessions, or too few free pages. The lease is still parked.
            ContextLengthError: the family's context is shorter. The lease is still parked.
        """
        return self._capacity._resume(self, max_positions)

    def give_back(self) -> None:
        """Return the share; its pages must not be used any more. Returning it twice is allowed."""
        self._capacity._release(self)


class Capacity:
    """The capacity of a node: a number of sessions, and KV cache positions for all of them.

    Leases are made and resumed on the event loop, parked and given back on the compute thread, so every change is made
    under a lock.

    Args:
        max_positions: KV cache positions over all sessions.
        max_sessions: number of sessions at the same time.
        context: the family's context, which is the largest number of positions of one session.
    """

    def __init__(self, max_positions: int, max_sessions: int, context: int) -> None:
        self.pool = PagePool(max_positions)
        self.max_sessions, self.context = max_sessions, context
        self.leases: dict[int, Lease] = {}
        """The leases of sessions, by the number that owns their pages."""
        self.parked: dict[int, Lease] = {}
        """The parked leases, by the number that owns their pages."""
        self.on_release: Callable[[], None] = lambda: None
        """Called, on any thread, after a lease has been given back or parked."""
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def lease(self, max_positions: int) -> Lease:
        """Lease capacity to a session that uses at most `max_positions`.

        Raises:
            CapacityError: there are too many sessions, or too few free pages.
            ContextLengthError: the family's context is shorter.
        """
        with self._lock:
            self._check(max_positions)
            number = next(self._numbers)
            pages, evicted = self.pool.allocate(number, max_positions)
            lease = self.leases[number] = Lease(self, pages)
            gone = self._forget(evicted)
        for other in gone:
            other._on_evict(other)
        return lease

    def check_integrity(self) -> None:
        """Raise AssertionError unless the pool's pages are those of the leases, parked or not."""
        with self._lock:
            self.pool.check_integrity()
            assert self.pool.used == sum(lease.pages.count for lease in self.leases.values()), "pages without a lease"
            parked = sum(lease.pages.count for lease in self.parked.values())
            assert self.pool.parked == parked, "parked pages without a lease"
            assert self.leases.keys().isdisjoint(self.parked), "a parked lease counts as a session"

    def _check(self, max_positions: int) -> None:
        if max_positions > self.context:
            raise ContextLengthError(
                f"this session needs {max_positions} positions; the family's context has {self.context}"
            )
        if len(self.leases) >= self.max_sessions:
            raise CapacityError(f"{len(self.leases)} sessions are running (limits.max_sessions)")

    def _forget(self, evicted: Iterable[PageRun]) -> list[Lease]:
        return [self.parked.pop(run.owner) for run in evicted]

    def _park(self, lease: Lease, positions: int, on_evict: Callable[[Lease], None]) -> None:
        with self._lock:
            assert self.leases.pop(lease.pages.owner, None) is lease, "only a lease that is held can be parked"
            lease.pages, lease._on_evict = self.pool.park(lease.pages, positions), on_evict
            self.parked[lease.pages.owner] = lease
        self.on_release()

    def _resume(self, lease: Lease, max_positions: int) -> PageRun | None:
        with self._lock:
            self._check(max_positions)
            old = lease.pages
            lease.pages, evicted = self.pool.resume(old, max_positions)
            self.leases[old.owner] = self.parked.pop(old.owner)
            gone = self._forget(evicted)
        for other in gone:
            other._on_evict(other)
        return None if lease.pages.first == old.first else old

    def _release(self, lease: Lease) -> None:
        owner = lease.pages.owner
        with self._lock:
            if self.leases.pop(owner, None) is None and self.parked.pop(owner, None) is None:
                return
            self.pool.release(lease.pages)
        self.on_release()
