"""Which pages of a node's KV cache are in use, and by whom. Bookkeeping only: no torch.

A session says at its start how many positions it may use and gets one contiguous run of pages for them, or is refused.
So an admitted session never runs out of memory in the middle, on any node, and attention reads the KV cache in place
(docs/design/0001-shape.md has the reasons and the cost).

The pages of a parked session keep what they hold, but they count as free: whoever needs room gets them.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from dataclasses import dataclass

from ruyi_flow.errors import CapacityError

__all__ = ["PAGE_SIZE", "PagePool", "PageRun"]

PAGE_SIZE = 64
"""Positions in a page."""


@dataclass(frozen=True, slots=True)
class PageRun:
    """Consecutive pages of one owner."""

    owner: int
    """Number of the lease that owns them."""
    first: int
    """Index of the first page."""
    count: int
    """Number of pages."""

    @property
    def stop(self) -> int:
        """Index of the page after the last one."""
        return self.first + self.count

    @property
    def positions(self) -> slice:
        """The positions of the pool that these pages cover."""
        return slice(self.first * PAGE_SIZE, self.stop * PAGE_SIZE)


class PagePool:
    """Pages 0 … num_pages-1, allocated first fit in contiguous runs.

    Where no free pages are long enough, parked runs are evicted from the place whose last parked one was parked longest
    ago.

    Args:
        max_positions: size of the pool in positions; it is rounded up to whole pages.
    """

    def __init__(self, max_positions: int) -> None:
        self.num_pages = -(-max_positions // PAGE_SIZE)
        self._runs: list[PageRun] = []  # by first page
        self._parked: dict[int, int] = {}  # a number that grows with every parking, by owner
        self._parkings = itertools.count()

    @property
    def used(self) -> int:
        """Number of pages whose owner is not parked."""
        return sum(run.count for run in self._runs if run.owner not in self._parked)

    @property
    def parked(self) -> int:
        """Number of pages of parked runs."""
        return sum(run.count for run in self._runs if run.owner in self._parked)

    @property
    def free(self) -> int:
        """Number of pages that a session can get, which includes parked ones."""
        return self.num_pages - self.used

    @property
    def num_positions(self) -> int:
        """Number of positions in the pool."""
        return self.num_pages * PAGE_SIZE

    @property
    def free_positions(self) -> int:
        """Number of positions in free pages, parked ones included."""
        return self.free * PAGE_SIZE

    def allocate(self, owner: int, max_positions: int) -> tuple[PageRun, list[PageRun]]:
        """Allocate a run of `max_positions` for an owner that has none yet.

        Returns:
            The run, and the parked runs that were evicted for it.

        Raises:
            CapacityError: no run is long enough, even without parked ones.
        """
        assert all(run.owner != owner for run in self._runs), "one run per owner"
        return self._allocate(owner, max_positions, None)

    def park(self, run: PageRun, positions: int) -> PageRun:
        """Shrink a run to the pages of its first positions and park it.

        Returns:
            The pages that are left of it.
        """
        kept = PageRun(run.owner, run.first, _pages(positions))
        assert run.owner not in self._parked and kept.count <= run.count, f"{run} cannot be parked as {kept}"
        self._runs[self._runs.index(run)] = kept
        self._parked[run.owner] = next(self._parkings)
        return kept

    def resume(self, parked: PageRun, max_positions: int) -> tuple[PageRun, list[PageRun]]:
        """Take a parked run back for `max_positions`: where it is if there is room behind it, else elsewhere.

        A copy costs much less than a parked session, so the run moves before another one is evicted.

        Returns:
            The run, which may overlap the parked one, and the other parked runs that were evicted for it.

        Raises:
            CapacityError: no run is long enough, even without parked ones. The parked run is as before.
        """
        assert parked.owner in self._parked, f"{parked} is not parked"
        return self._allocate(parked.owner, max_positions, parked)

    def release(self, run: PageRun) -> None:
        """Free a run."""
        self._runs.remove(run)
        self._parked.pop(run.owner, None)

    def check_integrity(self) -> None:
        """Raise AssertionError unless free + used == total and every page has at most one owner."""
        end, pages = 0, 0
        for run in self._runs:
            assert run.first >= end and run.count > 0, f"run {run} overlaps the one before, which ends at {end}"
            end, pages = run.stop, pages + run.count
        assert end <= self.num_pages, f"a run ends at page {end} of {self.num_pages}"
        assert self.free + self.used == self.num_pages and self.used + self.parked == pages
        owners = [run.owner for run in self._runs]
        assert len(set(owners)) == len(owners), f"an owner has two runs: {owners}"
        assert self._parked.keys() <= set(owners), f"parked owners without a run: {self._parked.keys() - set(owners)}"

    def _allocate(self, owner: int, max_positions: int, resumed: PageRun | None) -> tuple[PageRun, list[PageRun]]:
        count = _pages(max_positions)
        parkings = [-1, *self._parked.values()]  # ascending
        # The more runs may go, the more places there are.
        fewest = bisect_left(parkings, True, key=lambda latest: self._place(count, resumed, latest) is not None)
        first = self._place(count, resumed, parkings[fewest]) if fewest < len(parkings) else None
        if first is None:
            raise CapacityError(
                f"this request needs {max_positions} positions of KV cache; "
                f"{self.free_positions} of {self.num_positions} are free"
                + (", but not in one contiguous run" if self.free >= count else "")
            )
        new = PageRun(owner, first, count)
        evicted = [run for run in self._runs if run.owner != owner and run.first < new.stop and first < run.stop]
        gone = {owner, *(run.owner for run in evicted)}
        self._runs = sorted((new, *(run for run in self._runs if run.owner not in gone)), key=lambda run: run.first)
        for number in gone:
            self._parked.pop(number, None)
        return new, evicted

    def _place(self, count: int, resumed: PageRun | None, latest: int) -> int | None:
        """Find the first page of a place without runs in use or parked later than `latest`; the resumed one's if it is
        possible."""
        kept = [run for run in self._runs if run is not resumed and self._parked.get(run.owner, math.inf) > latest]
        # Where such places begin and end: before each run that is kept, and after the last one.
        starts, stops = [0, *(run.stop for run in kept)], [*(run.first for run in kept), self.num_pages]
        places = [(start, stop) for start, stop in zip(starts, stops, strict=True) if stop - start >= count]
        if resumed is not None and any(start <= resumed.first <= stop - count for start, stop in places):
            return resumed.first
        return places[0][0] if places else None


def _pages(positions: int) -> int:
    """Return the number of pages for so many positions, at least one."""
    return max(1, -(-positions // PAGE_SIZE))
