"""Virtual time: waiting, starting and dropping coroutines; and shared capacities."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruyi_flow.sim.clock import SharedCapacity, VirtualTime


def play(time: VirtualTime, *coroutines: Coroutine[Any, Any, Any]) -> list[Any]:
    """Run coroutines until nothing is left to happen, and return their results."""
    processes = [time.process(coroutine) for coroutine in coroutines]
    time.env.run()
    assert all(process.triggered for process in processes), "it waits for something that never comes"
    for process in processes:
        if not process.ok:
            raise process.value
    return [process.value for process in processes]


def test_an_event_is_waited_for_until_it_happens_and_no_longer_than_said() -> None:
    time = VirtualTime()
    event = time.event()

    async def waits(most_s: float) -> tuple[bool, float]:
        return await time.wait(event, most_s), time.now()

    async def sets() -> None:
        await time.sleep(2.0)
        event.set()
        event.set()

    assert play(time, waits(5.0), waits(1.5), waits(0.0), sets()) == [(True, 2.0), (False, 1.5), (False, 0.0), None]
    assert play(time, waits(3.0))[0][0], "it has happened already"
    event.clear()
    then = time.now()
    assert play(time, waits(3.0)) == [(False, then + 3.0)]
    event.clear()
    event.set()
    assert play(time, waits(3.0)) == [(True, then + 3.0)]


def test_what_is_started_runs_beside_and_gives_its_result_or_its_error() -> None:
    time = VirtualTime()

    async def later(seconds: float) -> float:
        await time.sleep(seconds)
        if seconds > 2:
            raise ValueError("too long")
        return time.now()

    async def starts() -> list[Any]:
        good, bad = time.start(later(1.0)), time.start(later(3.0))
        before = good.done()
        await time.sleep(4.0)  # the failure comes while nobody waits for it
        assert bad.done()
        with pytest.raises(ValueError, match="too long"):
            await bad
        return [before, good.done(), await good, time.now()]

    assert play(time, starts()) == [[False, True, 1.0, 4.0]]


def test_what_is_dropped_is_gone_when_the_drop_returns() -> None:
    time = VirtualTime()
    seen: list[tuple[str, float]] = []

    async def works(name: str, seconds: float) -> None:
        try:
            await time.sleep(seconds)
            seen.append((f"{name} ended", time.now()))
        finally:
            await time.sleep(0.5)
            seen.append((f"{name} cleaned up", time.now()))

    async def drops() -> float:
        long, brief = time.start(works("long", 10.0)), time.start(works("brief", 0.1))
        await time.sleep(1.0)
        await long.drop()
        assert long.done()
        seen.append(("dropped", time.now()))
        await brief.drop()
        await long.drop()
        return time.now()

    assert play(time, drops()) == [1.5]
    assert seen == [("brief ended", 0.1), ("brief cleaned up", 0.6), ("long cleaned up", 1.5), ("dropped", 1.5)]


def test_a_pause_lets_the_others_go_first() -> None:
    time = VirtualTime()
    order: list[str] = []

    async def pauses() -> None:
        order.append("a")
        await time.pause()
        order.append("c")

    async def goes() -> None:
        order.append("b")

    play(time, pauses(), goes())
    assert order == ["a", "b", "c"] and time.now() == 0


def ends(capacity: float, most: float | None, jobs: Sequence[tuple[float, float]]) -> list[float]:
    """Return when jobs, each an arrival and its units, are done."""
    time = VirtualTime()
    shared = SharedCapacity(time, capacity, most)

    async def job(at: float, units: float) -> float:
        await time.sleep(at)
        await shared.take(units)
        return time.now()

    found = play(time, *(job(at, units) for at, units in jobs))
    assert len(shared._users) == 0
    return found


@pytest.mark.parametrize(
    ("capacity", "most", "jobs", "done"),
    [
        (10.0, None, [(0, 100)], [10]),
        # Alone for 5 s, then 5 units a second each, of which both have 50 to go.
        (10.0, None, [(0, 100), (5, 50)], [15, 15]),
        # The second leaves at 8; the first has 40 left and all of it again.
        (10.0, None, [(0, 100), (4, 20)], [12, 8]),
        # Three cores' worth of work on four cores, each on one of them.
        (4.0, 1.0, [(0, 2), (0, 3), (1, 2)], [2, 3, 3]),
        # Five on four cores: 0.8 each.
        (4.0, 1.0, [(0, 4)] * 5, [5] * 5),
        # 0.8 each until the brief ones go at 1.25, then a core each.
        (4.0, 1.0, [(0, 1), (0, 1), (0, 3), (0, 3), (0, 3)], [1.25, 1.25, 3.25, 3.25, 3.25]),
        (10.0, None, [(0, 10), (3, 20), (9, 0)], [1, 5, 9]),
    ],
)
def test_a_capacity_is_shared_evenly(
    capacity: float, most: float | None, jobs: list[tuple[float, float]], done: list[float]
) -> None:
    assert ends(capacity, most, jobs) == pytest.approx(done)


def step_by_step(capacity: float, most: float, jobs: Sequence[tuple[float, float]]) -> list[float]:
    """Compute the same from the definition: all rates are constant from one arrival or departure to the next."""
    now, done = 0.0, [at for at, _ in jobs]
    left = {i: units for i, (_, units) in enumerate(jobs) if units > 0}
    while left:
        here = [i for i in left if jobs[i][0] <= now]
        to_come = [jobs[i][0] for i in left if jobs[i][0] > now]
        if not here:
            now = min(to_come)
            continue
        rate = min(most, capacity / len(here))
        end = min([now + min(left[i] for i in here) / rate, *to_come])
        for i in here:
            left[i] -= (end - now) * rate
            if left[i] <= 1e-9:
                done[i] = end
                del left[i]
        now = end
    return done


@given(
    capacity=st.floats(0.5, 20),
    share=st.floats(0.05, 1.5),
    jobs=st.lists(st.tuples(st.floats(0, 10), st.one_of(st.just(0.0), st.floats(0.01, 30))), min_size=1, max_size=12),
)
def test_virtual_service_is_processor_sharing(capacity: float, share: float, jobs: list[tuple[float, float]]) -> None:
    most = share * capacity
    assert ends(capacity, most, jobs) == pytest.approx(step_by_step(capacity, most, jobs), abs=1e-6)


def test_who_is_interrupted_leaves_its_share_to_the_others() -> None:
    time = VirtualTime()
    shared = SharedCapacity(time, 10.0)

    async def job(units: float) -> float:
        await shared.take(units)
        return time.now()

    async def drops() -> int:
        gone = time.start(job(1000.0))
        await time.sleep(4.0)
        await gone.drop()
        return len(shared._users)

    # 5 a second for 4 s, then 10.
    assert play(time, job(50.0), drops()) == [pytest.approx(7.0), 1]
