"""Pages and their owners: whatever is allocated and released, free + used == total and no page has two owners; which
parked pages make room, and when."""

import math

import pytest
from hypothesis import given, settings
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
                run, evicted = pool.allocate(owner, size)
                runs.append(run)
                assert run == PageRun(owner, places[0], count) and not evicted, "the first place where it fits"
            else:
                with pytest.raises(CapacityError, match=f"needs {size} positions .*; {pool.free * PAGE_SIZE} of 1024"):
                    pool.allocate(owner, size)
        pool.check_integrity()
        assert pool.used == sum(run.count for run in runs) and pool.free == pool.num_pages - pool.used
    for run in runs:
        pool.release(run)
    assert pool.free == pool.num_pages
    assert pool.allocate(-2, pool.num_positions)[0].count == pool.num_pages


class Book:
    """The runs of a pool by owner, and when each was parked: what a pool should do, found by trying every place."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages, self.time = num_pages, 0
        self.runs: dict[int, PageRun] = {}
        self.parked: dict[int, int] = {}

    def cost(self, first: int, count: int, resumed: int | None) -> float | None:
        """When the last parked run in a place was parked; None: the place is not to be had."""
        here = [r for r in self.runs.values() if r.owner != resumed and r.first < first + count and first < r.stop]
        if first + count > self.num_pages or any(r.owner not in self.parked for r in here):
            return None
        return max((self.parked[r.owner] for r in here), default=-math.inf)

    def check(self, allocated: tuple[PageRun, list[PageRun]], count: int, resumed: PageRun | None) -> None:
        """Check that the pool chose well, and note what it did."""
        run, evicted = allocated
        owner = None if resumed is None else resumed.owner
        costs = {first: self.cost(first, count, owner) for first in range(self.num_pages)}
        best = min(cost for cost in costs.values() if cost is not None)
        assert run.count == count and costs[run.first] == best
        if resumed is not None and costs[resumed.first] == best:
            assert run.first == resumed.first, "nothing is copied without need"
        else:
            assert run.first == min(first for first, cost in costs.items() if cost == best)
        there = {r.owner for r in self.runs.values() if r.first < run.stop and run.first < r.stop} - {owner}
        assert {r.owner for r in evicted} == there and there <= self.parked.keys() - {owner}
        for gone in evicted:
            assert self.runs.pop(gone.owner) == gone
            del self.parked[gone.owner]
        if owner is not None:
            del self.parked[owner]
        self.runs[run.owner] = run


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from("aaprx"), st.integers(0, 40), st.integers(1, 500)), max_size=50))
def test_parked_pages_make_room_for_whoever_needs_it_and_for_nobody_else(steps: list[tuple[str, int, int]]) -> None:
    pool = PagePool(1000)
    book = Book(pool.num_pages)
    for owner, (action, pick, size) in enumerate(steps):
        count = -(-size // PAGE_SIZE)
        held = [run for run in book.runs.values() if run.owner not in book.parked]
        parked = [book.runs[owner] for owner in book.parked]
        before = list(pool._runs)
        if action == "p" and held:
            run = held[pick % len(held)]
            kept = pool.park(run, min(size, run.count * PAGE_SIZE))
            assert kept == PageRun(run.owner, run.first, min(count, run.count))
            book.runs[run.owner], book.parked[run.owner] = kept, owner
        elif action == "x" and book.runs:
            run = list(book.runs.values())[pick % len(book.runs)]
            pool.release(run)
            del book.runs[run.owner]
            book.parked.pop(run.owner, None)
        elif action == "a" or (action == "r" and parked):
            resumed = parked[pick % len(parked)] if action == "r" else None
            try:
                new = pool.allocate(owner, size) if resumed is None else pool.resume(resumed, size)
            except CapacityError:
                alone = PagePool(1000)
                alone._runs = [run for run in pool._runs if run in held]
                with pytest.raises(CapacityError):
                    alone.allocate(owner, size)
                assert pool._runs == before, "a refusal changes nothing"
            else:
                book.check(new, count, resumed)
        pool.check_integrity()
        assert sorted(book.runs.values(), key=lambda run: run.first) == pool._runs
        assert pool.parked == sum(book.runs[owner].count for owner in book.parked)
        assert pool.used + pool.free == pool.num_pages and pool.free_positions == pool.free * PAGE_SIZE


def parked_pool(*pages: int, total: int) -> tuple[PagePool, list[PageRun]]:
    """A pool of so many pages with parked runs of these lengths, one behind the other, the first parked first."""
    pool = PagePool(total * PAGE_SIZE)
    runs = [pool.allocate(owner, count * PAGE_SIZE)[0] for owner, count in enumerate(pages)]
    return pool, [pool.park(run, run.count * PAGE_SIZE) for run in runs]


def test_a_free_place_is_taken_before_a_parked_run_is_evicted() -> None:
    pool, _ = parked_pool(2, 2, total=6)
    assert pool.allocate(9, 2 * PAGE_SIZE) == (PageRun(9, 4, 2), [])
    assert pool.free_positions == 4 * PAGE_SIZE and pool.parked == 4


def test_the_run_that_was_parked_longest_ago_is_evicted_first() -> None:
    pool, (first, second, third) = parked_pool(2, 2, 2, total=6)
    back, _ = pool.resume(first, 128)
    pool.park(back, 128)
    assert pool.allocate(8, 128) == (PageRun(8, 2, 2), [second])
    assert pool.allocate(9, 128) == (PageRun(9, 4, 2), [third])
    assert pool.allocate(10, 128) == (PageRun(10, 0, 2), [first])


def test_a_parked_run_that_makes_no_room_is_not_evicted() -> None:
    pool = PagePool(6 * PAGE_SIZE)
    old, held = [pool.allocate(owner, 64)[0] for owner in range(2)]
    young, gap = pool.allocate(2, 64)[0], pool.allocate(3, 64)[0]
    old, young = pool.park(old, 64), pool.park(young, 64)
    pool.release(gap)
    assert pool.allocate(9, 4 * PAGE_SIZE) == (PageRun(9, 2, 4), [young])
    assert pool._runs == [old, held, PageRun(9, 2, 4)]


def test_a_run_that_comes_back_stays_where_it_is_if_there_is_room_behind_it() -> None:
    pool, (only,) = parked_pool(2, total=6)
    assert pool.resume(only, 6 * PAGE_SIZE) == (PageRun(0, 0, 6), [])
    assert (pool.used, pool.parked) == (6, 0)


def test_a_run_that_comes_back_for_less_gives_the_rest_away() -> None:
    pool, (only,) = parked_pool(4, total=6)
    assert pool.resume(only, PAGE_SIZE + 1) == (PageRun(0, 0, 2), [])
    assert pool.free == 4


def test_a_run_that_comes_back_moves_before_it_evicts_another() -> None:
    pool, (first, second) = parked_pool(2, 1, total=6)
    assert pool.resume(first, 3 * PAGE_SIZE) == (PageRun(0, 3, 3), [])
    assert pool._runs == [second, PageRun(0, 3, 3)] and pool.parked == 1


def test_a_run_that_comes_back_evicts_those_behind_it_where_it_could_not_move() -> None:
    pool, (first, second) = parked_pool(2, 2, total=5)
    assert pool.resume(first, 4 * PAGE_SIZE) == (PageRun(0, 0, 4), [second])
    assert pool.parked == 0


def test_a_run_may_move_to_pages_that_overlap_its_own() -> None:
    pool = PagePool(5 * PAGE_SIZE)
    gap, run, held = (pool.allocate(owner, pages * PAGE_SIZE)[0] for owner, pages in enumerate((1, 2, 1)))
    pool.release(gap)
    assert pool.resume(pool.park(run, 128), 3 * PAGE_SIZE) == (PageRun(1, 0, 3), [])
    assert pool._runs == [PageRun(1, 0, 3), held]


def test_a_run_that_finds_no_room_stays_parked() -> None:
    pool, (first, second) = parked_pool(1, 1, total=4)
    pool.allocate(9, 64)
    with pytest.raises(CapacityError, match=r"needs 256 positions of KV cache; 192 of 256 are free$"):
        pool.resume(first, 256)
    assert pool._runs == [first, second, PageRun(9, 2, 1)] and pool.parked == 2
    pool.check_integrity()


def test_only_a_run_in_use_is_parked_and_only_a_parked_one_comes_back() -> None:
    pool = PagePool(256)
    run, _ = pool.allocate(0, 64)
    with pytest.raises(AssertionError, match=r"^PageRun.* is not parked"):
        pool.resume(run, 64)
    with pytest.raises(AssertionError, match=r"cannot be parked as PageRun\(owner=0, first=0, count=2\)"):
        pool.park(run, 65)
    run = pool.park(run, 64)
    with pytest.raises(AssertionError, match="cannot be parked"):
        pool.park(run, 64)


def test_allocate_after_release_reuses_the_gap() -> None:
    pool = PagePool(4 * PAGE_SIZE)
    (first, _), (second, _) = pool.allocate(0, PAGE_SIZE), pool.allocate(1, PAGE_SIZE)
    pool.release(first)
    assert pool.allocate(2, 10) == (PageRun(2, 0, 1), [])
    assert pool.allocate(3, 2 * PAGE_SIZE) == (PageRun(3, second.first + 1, 2), [])
    with pytest.raises(CapacityError, match=r"^this request needs 1 positions of KV cache; 0 of 256 are free$"):
        pool.allocate(4, 1)


def test_a_fragmented_pool_says_so() -> None:
    pool = PagePool(3 * PAGE_SIZE)
    runs = [pool.allocate(i, 1)[0] for i in range(3)]
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


def test_integrity_notices_a_parked_owner_without_a_run() -> None:
    pool, [run] = parked_pool(1, total=2)
    pool.check_integrity()
    pool._runs.remove(run)
    with pytest.raises(AssertionError, match=r"^parked owners without a run: \{0\}"):
        pool.check_integrity()
