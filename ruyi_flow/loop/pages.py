"""Which pages of a node's KV cache are in use, and by whom. Bookkeeping only: no torch.

A session says at its start how many positions it may use and gets one contiguous run of pages for them, or is refused.
So an admitted session never runs out of memory in the middle, on any node, and attention reads the KV cache in place
(docs/design/0001-shape.md has the reasons and the cost).
"""

from __future__ import annotations

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
    def positions(self) -> slice:
        """The positions of the pool that these pages cover."""
        return slice(self.first * PAGE_SIZE, (self.first + self.count) * PAGE_SIZE)


class PagePool:
    """Pages 0 … num_pages-1, allocated first fit in contiguous runs.

    Args:
        max_positions: size of the pool in positions; it is rounded up to whole pages.
    """

    def __init__(self, max_positions: int) -> None:
        self.num_pages = -(-max_positions // PAGE_SIZE)
        self._runs: list[PageRun] = []  # by first page

    @property
    def used(self) -> int:
        """Number of pages that have an owner."""
        return sum(run.count for run in self._runs)

    @property
    def free(self) -> int:
        """Number of pages without an owner."""
        return self.num_pages - self.used

    @property
    def num_positions(self) -> int:
        """Number of positions in the pool."""
        return self.num_pages * PAGE_SIZE

    @property
    def free_positions(self) -> int:
        """Number of positions in pages without an owner."""
        return self.free * PAGE_SIZE

    def allocate(self, owner: int, max_positions: int) -> PageRun:
        """Allocate a run of `max_positions` for an owner that has none yet.

        Raises:
            CapacityError: no free run is long enough.
        """
        assert all(run.owner != owner for run in self._runs), "one run per owner"
        count = max(1, -(-max_positions // PAGE_SIZE))
        # Where free pages begin and end: before each run, and after the last one.
        starts = [0, *(run.first + run.count for run in self._runs)]
        stops = [*(run.first for run in self._runs), self.num_pages]
        for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            if stop - start >= count:
                new = PageRun(owner, start, count)
                self._runs.insert(i, new)
                return new
        raise CapacityError(
            f"this request needs {max_positions} positions of KV cache; "
            f"{self.free_positions} of {self.num_positions} are free"
            + (", but not in one contiguous run" if self.free >= count else "")
        )

    def release(self, run: PageRun) -> None:
        """Free a run."""
        self._runs.remove(run)

    def check_integrity(self) -> None:
        """Raise AssertionError unless free + used == total and every page has at most one owner."""
        end, used = 0, 0
        for run in self._runs:
            assert run.first >= end and run.count > 0, f"run {run} overlaps the one before, which ends at {end}"
            end, used = run.first + run.count, used + run.count
        assert end <= self.num_pages, f"a run ends at page {end} of {self.num_pages}"
        assert self.free + used == self.num_pages
        owners = [run.owner for run in self._runs]
        assert len(set(owners)) == len(owners), f"an owner has two runs: {owners}"
