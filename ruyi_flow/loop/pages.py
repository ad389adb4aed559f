"""Who owns which pages of a node's key/value memory. Bookkeeping only: no torch.

A session says at its start how many positions it may ever hold and gets one contiguous run of pages for them, or is
refused. So an admitted session can never run out of memory in the middle, on any node, and attention reads its keys and
values in place (docs/design/0001-shape.md has the reasons and what it costs).
"""

from __future__ import annotations

from dataclasses import dataclass

from ruyi_flow.errors import CapacityError

__all__ = ["PAGE_SIZE", "PagePool", "Run"]

PAGE_SIZE = 64
"""Positions in a page."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive pages of one owner."""

    owner: int
    first: int
    count: int

    @property
    def positions(self) -> slice:
        """The positions of the pool that these pages are."""
        return slice(self.first * PAGE_SIZE, (self.first + self.count) * PAGE_SIZE)


class PagePool:
    """Pages 0 … num_pages-1 and the runs that are given out, first fit.

    Args:
        max_positions: size of the pool; rounded up to whole pages.
    """

    def __init__(self, max_positions: int) -> None:
        self.num_pages = -(-max_positions // PAGE_SIZE)
        self._runs: list[Run] = []  # by first page

    @property
    def used(self) -> int:
        """Pages that have an owner."""
        return sum(run.count for run in self._runs)

    @property
    def free(self) -> int:
        """Pages that have none."""
        return self.num_pages - self.used

    @property
    def num_positions(self) -> int:
        """Positions in the pool."""
        return self.num_pages * PAGE_SIZE

    @property
    def free_positions(self) -> int:
        """Positions in pages that have no owner."""
        return self.free * PAGE_SIZE

    def allocate(self, owner: int, max_positions: int) -> Run:
        """Give a run that holds `max_positions` to an owner that has none yet.

        Raises:
            CapacityError: no free run is long enough.
        """
        assert all(run.owner != owner for run in self._runs), "one run an owner"
        count = max(1, -(-max_positions // PAGE_SIZE))
        end = 0
        for i, run in enumerate((*self._runs, Run(-1, self.num_pages, 0))):
            if run.first - end >= count:
                new = Run(owner, end, count)
                self._runs.insert(i, new)
                return new
            end = run.first + run.count
        raise CapacityError(
            f"no room for {max_positions} positions: {self.free_positions} of {self.num_positions} are free"
            + (", but not in one run" if self.free >= count else "")
        )

    def release(self, run: Run) -> None:
        """Take a run back."""
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
