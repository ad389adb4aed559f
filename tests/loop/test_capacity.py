"""A node's capacity: what a lease holds, when it is refused, and that giving it back makes room exactly once."""

import re
import threading

import pytest

from ruyi_flow.errors import CapacityError, ContextLengthError
from ruyi_flow.loop.capacity import Capacity
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
