"""Pages and their owners: whatever is allocated and released, free + used == total and no page has two owners."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruyi_flow.errors import CapacityError
from ruyi_flow.loop.pages import PAGE_SIZE, PagePool, PageRun


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 700)), max_size=60))
def test_any_sequence_of_allocations_keeps_the_pool_whole(steps: list[tuple[bool, int]]) -> None:
    pool = PagePool(1000)
    runs: list[PageRun] = []
    for owner, (release, size) in enumerate(steps):
        if release and runs:
            pool.release(runs.pop(size % len(runs)))
        else:
            taken = {page for run in runs for page in range(run.first, run.first + run.count)}
            count = next(n for n in range(1, 100) if n * PAGE_SIZE >= size)
            places = [
                first for first in range(pool.num_pages - count + 1) if taken.isdisjoint(range(first, first + count))
            ]
            if places:
                runs.append(pool.allocate(owner, size))
                assert runs[-1] == PageRun(owner, places[0], count), "the first place where it fits"
            else:
                with pytest.raises(CapacityError, match=f"needs {size} positions .*; {pool.free * PAGE_SIZE} of 1024"):
                    pool.allocate(owner, size)
        pool.check_integrity()
        assert pool.used == sum(run.count for run in runs) and pool.free == pool.num_pages - pool.used
    for run in runs:
        pool.release(run)
    assert pool.free == pool.num_pages
    assert pool.allocate(-2, pool.num_positions).count == pool.num_pages


def test_allocate_after_release_reuses_the_gap() -> None:
    pool = PagePool(4 * PAGE_SIZE)
    first, second = pool.allocate(0, PAGE_SIZE), pool.allocate(1, PAGE_SIZE)
    pool.release(first)
    assert pool.allocate(2, 10) == PageRun(2, 0, 1)
    assert pool.allocate(3, 2 * PAGE_SIZE) == PageRun(3, second.first + 1, 2)
    with pytest.raises(CapacityError, match="0 of 256 are free"):
        pool.allocate(4, 1)


def test_a_fragmented_pool_says_so() -> None:
    pool = PagePool(3 * PAGE_SIZE)
    runs = [pool.allocate(i, 1) for i in range(3)]
    pool.release(runs[0])
    pool.release(runs[2])
    with pytest.raises(CapacityError, match="but not in one contiguous run"):
        pool.allocate(9, 2 * PAGE_SIZE)


def test_integrity_notices_an_overlap() -> None:
    pool = PagePool(1000)
    pool.allocate(0, 100)
    pool._runs.append(PageRun(1, 1, 2))
    with pytest.raises(AssertionError, match="overlaps"):
        pool.check_integrity()
