"""A node's capacity: what a lease holds, when it is refused, that giving it back makes room exactly once, and that a
parked lease is in nobody's way."""

import contextlib
import re
import threading
import time
from queue import SimpleQueue
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ruyi_flow.errors import CapacityError, ContextLengthError
from ruyi_flow.loop.capacity import Capacity, Lease
from ruyi_flow.loop.pages import PAGE_SIZE, PageRun


@pytest.fixture
def capacity() -> Capacity:
    return Capacity(max_positions=512, max_sessions=2, context=300)


def test_a_lease_is_one_session_and_pages_for_its_positions(capacity: Capacity) -> None:
    first, second = capacity.lease(PAGE_SIZE + 1), capacity.lease(300)
    assert (first.pages.count, second.pages.count) == (2, 5)
    assert list(capacity.leases.values()) == [first, second] and capacity.pool.used == 7
    assert first.pages.owner != second.pages.owner
    capacity.check_integrity()


def test_a_session_is_alone_while_it_has_the_only_lease(capacity: Capacity) -> None:
    first = capacity.lease(1)
    assert first.alone
    second = capacity.lease(1)
    assert not first.alone and not second.alone
    first.give_back()
    assert second.alone


@pytest.mark.parametrize(
    ("positions", "kind", "message"),
    [
        (301, ContextLengthError, "this session needs 301 positions; the family's context has 300"),
        (257, CapacityError, "this request needs 257 positions of KV cache; 256 of 512 are free"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing_behind(
    capacity: Capacity, positions: int, kind: type[Exception], message: str
) -> None:
    held = capacity.lease(256)
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        capacity.lease(positions)
    capacity.check_integrity()
    assert list(capacity.leases.values()) == [held]
    capacity.lease(256)


def test_there_are_no_more_sessions_than_allowed(capacity: Capacity) -> None:
    leases = [capacity.lease(1) for _ in range(2)]
    with pytest.raises(CapacityError, match=r"^2 sessions are running \(limits.max_sessions\)$"):
        capacity.lease(1)
    leases[0].give_back()
    capacity.lease(1)
    capacity.check_integrity()


def test_a_lease_given_back_twice_frees_its_pages_once(capacity: Capacity) -> None:
    told: list[int] = []
    first = capacity.lease(64)
    capacity.on_release = lambda: told.append(capacity.pool.used)
    first.give_back()
    assert told == [0], "whoever is told finds the pages free"
    second = capacity.lease(64)
    first.give_back()
    assert told == [0] and capacity.pool.used == 1
    assert list(capacity.leases.values()) == [second] and second.pages.owner != first.pages.owner
    capacity.check_integrity()


def test_integrity_notices_pages_without_a_lease(capacity: Capacity) -> None:
    lease = capacity.lease(64)
    capacity.leases.clear()
    with pytest.raises(AssertionError, match="^pages without a lease"):
        capacity.check_integrity()
    capacity.leases[lease.pages.owner] = lease
    capacity.pool._runs.append(PageRun(9, 7, 2))
    with pytest.raises(AssertionError, match="ends at page 9 of 8"):
        capacity.check_integrity()


def test_integrity_notices_parked_pages_without_a_lease_and_a_lease_in_two_places(capacity: Capacity) -> None:
    lease = capacity.lease(64)
    lease.park(64, ignore)
    capacity.leases[lease.pages.owner] = lease
    with pytest.raises(AssertionError, match="^pages without a lease"):
        capacity.check_integrity()
    capacity.leases.clear()
    capacity.parked.clear()
    with pytest.raises(AssertionError, match="^parked pages without a lease"):
        capacity.check_integrity()
    capacity.parked[lease.pages.owner] = lease
    capacity.check_integrity()


# ---- Parked leases ----


def ignore(lease: Lease) -> None:
    """Nobody needs to know that a lease was evicted."""


def test_a_parked_lease_keeps_the_pages_that_it_filled_and_counts_as_free(capacity: Capacity) -> None:
    lease = capacity.lease(300)
    lease.park(PAGE_SIZE + 1, ignore)
    assert lease.parked and lease.pages.count == 2 and not capacity.leases
    assert (capacity.pool.used, capacity.pool.free_positions) == (0, 512)
    capacity.check_integrity()


def test_a_parked_lease_is_no_session(capacity: Capacity) -> None:
    parked, first = capacity.lease(64), capacity.lease(64)
    assert not first.alone
    parked.park(64, ignore)
    assert first.alone
    capacity.lease(64)
    with pytest.raises(CapacityError, match=r"^2 sessions are running"):
        parked.resume(64)
    assert parked.parked
    first.give_back()
    assert parked.resume(64) is None and not parked.parked and len(capacity.leases) == 2


def test_whoever_waits_is_told_of_a_parked_lease(capacity: Capacity) -> None:
    told: list[tuple[int, int]] = []
    lease = capacity.lease(300)
    capacity.on_release = lambda: told.append((len(capacity.leases), capacity.pool.used))
    lease.park(300, ignore)
    assert told == [(0, 0)], "whoever is told finds the room"


def test_a_parked_lease_that_is_evicted_tells_its_owner_when_the_pages_are_gone() -> None:
    capacity = Capacity(max_positions=512, max_sessions=8, context=512)
    evicted: list[tuple[Lease, int]] = []
    old, young = capacity.lease(256), capacity.lease(256)
    for lease in (old, young):
        lease.park(256, lambda lease: evicted.append((lease, capacity.pool.used)))
    new = capacity.lease(200)
    assert evicted == [(old, 4)] and not old.parked and young.parked
    assert new.pages.positions == slice(0, 256)
    old.give_back()
    assert capacity.pool.used == 4, "its pages belong to another lease by now"
    capacity.lease(256)
    assert [lease for lease, _ in evicted] == [old, young]
    capacity.check_integrity()


def test_a_lease_that_moves_says_from_where(capacity: Capacity) -> None:
    parked, behind = capacity.lease(PAGE_SIZE), capacity.lease(PAGE_SIZE)
    parked.park(10, ignore)
    old = parked.pages
    assert parked.resume(2 * PAGE_SIZE) == old and parked.pages == PageRun(old.owner, 2, 2)
    behind.give_back()
    parked.park(PAGE_SIZE + 1, ignore)
    assert parked.resume(4 * PAGE_SIZE) is None and parked.pages == PageRun(old.owner, 2, 4)
    capacity.check_integrity()


def test_a_lease_that_comes_back_evicts_others_but_not_itself(capacity: Capacity) -> None:
    evicted: list[Lease] = []
    leases = []
    for _ in range(4):
        leases.append(capacity.lease(2 * PAGE_SIZE))
        leases[-1].park(2 * PAGE_SIZE, evicted.append)
    assert leases[2].resume(4 * PAGE_SIZE) == PageRun(2, 4, 2) and leases[2].pages == PageRun(2, 0, 4)
    assert evicted == leases[:2] and leases[3].parked
    capacity.check_integrity()


@pytest.mark.parametrize(
    ("positions", "kind", "message"),
    [
        (301, ContextLengthError, "this session needs 301 positions; the family's context has 300"),
        (270, CapacityError, "this request needs 270 positions of KV cache; 256 of 512 are free"),
    ],
)
def test_a_parked_lease_that_cannot_come_back_is_unharmed(
    capacity: Capacity, positions: int, kind: type[Exception], message: str
) -> None:
    capacity.lease(256)
    parked = capacity.lease(64)
    parked.park(64, ignore)
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        parked.resume(positions)
    assert parked.parked and parked.pages.count == 1 and len(capacity.leases) == 1
    capacity.check_integrity()
    assert parked.resume(256) is None


def test_a_parked_lease_can_be_given_back(capacity: Capacity) -> None:
    lease = capacity.lease(64)
    lease.park(64, ignore)
    for _ in range(2):
        lease.give_back()
    assert not lease.parked and not capacity.parked
    capacity.check_integrity()


def test_only_a_lease_that_is_held_can_be_parked(capacity: Capacity) -> None:
    lease = capacity.lease(64)
    lease.give_back()
    with pytest.raises(AssertionError, match="^only a lease that is held can be parked"):
        lease.park(64, ignore)
    capacity.check_integrity()


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from("llpprx"), st.integers(0, 40), st.integers(1, 700)), max_size=60))
def test_parked_leases_are_in_nobodys_way(steps: list[tuple[str, int, int]]) -> None:
    capacity = Capacity(max_positions=1000, max_sessions=5, context=600)
    held: list[Lease] = []
    parked: list[Lease] = []

    def refused(size: int) -> type[Exception] | None:
        """How a node refuses a session that has the leases which are held, and none that are parked."""
        other = Capacity(max_positions=1000, max_sessions=5, context=600)
        other.pool._runs = sorted((lease.pages for lease in held), key=lambda run: run.first)
        other.leases.update({lease.pages.owner: lease for lease in held})
        other._numbers = iter([-1])  # type: ignore[assignment]
        try:
            other.lease(size)
        except Exception as error:
            return type(error)
        return None

    for action, pick, size in steps:
        if action == "l":
            expected = refused(size)
            try:
                held.append(capacity.lease(size))
            except (CapacityError, ContextLengthError) as error:
                assert type(error) is expected
            else:
                assert expected is None
        elif action == "p" and held:
            lease = held.pop(pick % len(held))
            parked.append(lease)
            lease.park(min(size, lease.pages.count * PAGE_SIZE), parked.remove)
        elif action == "r" and parked:
            lease = parked[pick % len(parked)]
            before, expected = lease.pages, refused(size)
            try:
                moved_from = lease.resume(size)
            except (CapacityError, ContextLengthError) as error:
                assert type(error) is expected and lease.pages is before
            else:
                assert expected is None
                assert moved_from == (None if lease.pages.first == before.first else before)
                parked.remove(lease)
                held.append(lease)
        elif action == "x" and held + parked:
            lease = (held + parked)[pick % len(held + parked)]
            (parked if lease.parked else held).remove(lease)
            lease.give_back()
        capacity.check_integrity()
        assert list(capacity.leases.values()) == held and list(capacity.parked.values()) == parked
        assert all(lease.parked for lease in parked) and not any(lease.parked for lease in held)
        pages = [page for lease in held + parked for page in range(lease.pages.first, lease.pages.stop)]
        assert len(set(pages)) == len(pages), "no page has two owners"
        assert capacity.pool.used == sum(lease.pages.count for lease in held)
        assert capacity.pool.free + capacity.pool.used == capacity.pool.num_pages


@pytest.mark.parametrize("change", ["allocate", "park", "resume", "release"])
def test_pages_change_hands_only_under_the_lock(
    capacity: Capacity, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    kept, locked = getattr(capacity.pool, change), list[bool]()

    def watched(*args: Any) -> Any:
        locked.append(capacity._lock.locked())
        return kept(*args)

    monkeypatch.setattr(capacity.pool, change, watched)
    lease = capacity.lease(64)
    lease.park(64, ignore)
    lease.resume(64)
    lease.give_back()
    assert locked and all(locked)


def test_a_thread_that_parks_and_one_that_leases_never_share_a_page() -> None:
    capacity = Capacity(max_positions=8 * PAGE_SIZE, max_sessions=4, context=512)
    ended: SimpleQueue[Lease | None] = SimpleQueue()
    evicted: list[Lease] = []
    parked: list[Lease] = []

    def compute() -> None:
        while (lease := ended.get()) is not None:
            parked.append(lease)
            lease.park(PAGE_SIZE, evicted.append)

    thread = threading.Thread(target=compute)
    thread.start()
    leased = resumed = 0
    while leased < 1000:
        try:
            lease = capacity.lease(2 * PAGE_SIZE)
        except CapacityError:
            time.sleep(0)  # four leases wait to be parked
            continue
        leased += 1
        ended.put(lease)
        with contextlib.suppress(CapacityError, IndexError):
            back = parked[-1]
            if back.parked:
                back.resume(3 * PAGE_SIZE)
                resumed += 1
                ended.put(back)
    ended.put(None)
    thread.join()
    capacity.check_integrity()
    assert resumed and len(parked) == leased + resumed == len(evicted) + len(capacity.parked) + resumed
    assert capacity.pool.used == 0


def test_threads_that_lease_and_give_back_never_share_a_page() -> None:
    capacity = Capacity(max_positions=8 * PAGE_SIZE, max_sessions=4, context=512)
    mistakes: list[str] = []

    def work() -> None:
        for _ in range(200):
            try:
                lease = capacity.lease(2 * PAGE_SIZE)
            except CapacityError as error:
                mistakes.append(str(error))
                continue
            lease.give_back()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    capacity.check_integrity()
    assert mistakes == [] and capacity.pool.used == 0
