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
    with pytest.raises(CapacityError, match=r"^this request needs 1 positions of KV cache; 0 of 256 are free$"):
        pool.allocate(4, 1)


def test_a_fragmented_pool_says_so() -> None:
    pool = PagePool(3 * PAGE_SIZE)
    runs = [pool.allocate(i, 1) for i in range(3)]
    pool.release(runs[0])
    pool.release(runs[2])
    with pytest.raises(CapacityError, match=r"; 128 of 192 are free, but not in one contiguous run$"):
        pool.allocate(9, 2 * PAGE_SIZE)


def test_an_owner_has_one_run() -> None:
    pool = PagePool(1000)
    pool.allocate(7, 1)
    with pytest.raises(AssertionError, match="^one run per owner"):
        pool.allocate(7, 1)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (PageRun(1, 1, 2), r"^run .* overlaps the one before, which ends at 2"),
        (PageRun(1, 3, 0), "^run .* overlaps"),
        (PageRun(1, 14, 3), "^a run ends at page 17 of 16"),
        (PageRun(0, 2, 1), r"^an owner has two runs: \[0, 0\]"),
    ],
)
def test_integrity_notices_a_run_that_cannot_be(run: PageRun, message: str) -> None:
    pool = PagePool(1000)
    pool.allocate(0, 100)
    pool.check_integrity()
    pool._runs.append(run)
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity()
