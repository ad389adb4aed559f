"""Continuous batching: order, budget, and how long anyone waits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruyi_flow.errors import ConfigError
from ruyi_flow.loop.scheduler import PATIENCE, SHORT_ROWS, Scheduler


def test_decodes_of_one_stage_go_together_in_order() -> None:
    scheduler = Scheduler(8)
    for key, stage in ((0, 0), (1, 1), (2, 0), (3, 0)):
        scheduler.add(key, stage, 1, key)
    assert scheduler.next() == [(0, 1), (2, 1), (3, 1)]
    assert scheduler.next() == [(1, 1)]
    assert scheduler.next() == [] and not scheduler


def test_decodes_wait_for_those_that_can_catch_up_and_for_nothing_else() -> None:
    scheduler = Scheduler(64)
    scheduler.add(0, 2, 1, 0)
    scheduler.add(1, 0, 1, 1)
    scheduler.add(2, 0, 500, 2)
    assert scheduler.next() == [(1, 1)], "and for no part of a long prompt that would go with them"
    scheduler.add(1, 1, 1, 1)
    assert scheduler.next() == [(1, 1)]
    scheduler.add(1, 2, 1, 1)
    assert scheduler.next() == [(0, 1), (1, 1)], "not for a long prompt"
    scheduler.add(3, 1, 1, 3)
    passed = 0
    while (step := scheduler.next())[0][0] != 3:
        passed += step[0][0] != 2
        scheduler.add(100 + passed, 0, 1, 100 + passed)
    assert passed <= PATIENCE


def test_two_sessions_at_different_depths_meet_at_the_deeper_one() -> None:
    scheduler = Scheduler(64)
    scheduler.add(0, 1, 1, 0)
    scheduler.add(1, 0, 1, 1)
    assert scheduler.next() == [(1, 1)]
    scheduler.add(1, 1, 1, 1)
    assert scheduler.next() == [(0, 1), (1, 1)]


def test_a_long_prompt_fills_what_decodes_leave_and_goes_behind_them() -> None:
    scheduler = Scheduler(256)
    scheduler.add(0, 0, 1000, 0)
    for key in range(1, 7):
        scheduler.add(key, 0, 1, key)
    assert scheduler.next() == [(0, 250), *((key, 1) for key in range(1, 7))]
    scheduler.add(7, 0, 1, 7)
    assert scheduler.next() == [(0, 255), (7, 1)]
    scheduler.add(8, 1, 1, 8)
    assert scheduler.next() == [(0, 256)] and scheduler.next() == [(8, 1)] and scheduler.next() == [(0, 239)]


def test_decodes_go_before_a_younger_prompt_and_never_starve_an_older_one() -> None:
    scheduler = Scheduler(100)
    scheduler.add(0, 0, 1, 0)
    scheduler.add(1, 0, 500, 1)
    scheduler.add(2, 0, 1, 2)
    assert scheduler.next() == [(0, 1), (2, 1), (1, 98)]
    for key in range(3, 203):
        scheduler.add(key, 0, 1, key)
    assert scheduler.next()[0] == (1, 25), "the oldest gets a quarter at the least"


@pytest.mark.parametrize(("budget", "share"), [(2, 1), (7, 1), (8, 2), (102, 25)])
def test_the_oldest_prompt_gets_a_quarter_of_a_step_in_whole_rows(budget: int, share: int) -> None:
    scheduler = Scheduler(budget)
    scheduler.add(0, 0, 500, 0)
    for key in range(1, budget + 1):
        scheduler.add(key, 0, 1, key)
    assert scheduler.next()[0] == (0, share)


def test_prompts_that_came_at_one_time_take_turns() -> None:
    scheduler = Scheduler(100)
    scheduler.add(0, 0, 200, 5)
    scheduler.add(1, 0, 200, 5)
    assert [scheduler.next() for _ in range(4)] == [[(0, 100)], [(1, 100)], [(0, 100)], [(1, 100)]]


@pytest.mark.parametrize(
    ("budget", "rows", "step"),
    [
        (400, (100, 100), [(0, 100), (1, 100)]),
        (399, (100, 100), [(0, 100)]),
        (512, (100, 200, 120), [(0, 100), (2, 120)]),
        (256, (100, 1, 200), [(0, 100), (1, 1)]),
        (512, (100, 1, 200), [(0, 100), (1, 1)]),
        (256, (1, 200, 100), [(0, 1), (1, 200)]),
    ],
)
def test_a_second_prompt_joins_only_whole_and_in_the_first_half_of_a_step(
    budget: int, rows: tuple[int, ...], step: list[tuple[int, int]]
) -> None:
    scheduler = Scheduler(budget)
    for key, count in enumerate(rows):
        scheduler.add(key, 0, count, key)
    assert scheduler.next() == step


def test_prompts_that_come_at_once_end_one_after_the_other() -> None:
    scheduler = Scheduler(256)
    for key in (0, 1, 2):
        scheduler.add(key, 0, 120, key)
    assert scheduler.next() == [(0, 120)], "a second one would only make both later"
    scheduler.add(0, 1, 120, 0)
    scheduler.add(3, 1, 1, 3)
    assert scheduler.next() == [(0, 120), (3, 1)], "it keeps its turn at the next stage"
    assert [scheduler.next() for _ in range(2)] == [[(1, 120)], [(2, 120)]]
    wide = Scheduler(512)
    for key in (0, 1, 2, 3):
        wide.add(key, 0, 120, key)
    assert wide.next() == [(0, 120), (1, 120)], "half of a wide step"


def test_short_work_is_never_cut() -> None:
    scheduler = Scheduler(4)
    scheduler.add(0, 0, 6, 0)
    scheduler.add(1, 0, 3, 1)
    scheduler.add(2, 0, SHORT_ROWS, 2)
    assert [scheduler.next() for _ in range(3)] == [[(0, 6)], [(1, 3)], [(2, SHORT_ROWS)]]


def test_work_has_rows_and_waits_once() -> None:
    scheduler = Scheduler(4)
    scheduler.add(0, 0, 3, 0)
    for key, rows in ((0, 1), (1, 0)):
        with pytest.raises(AssertionError):
            scheduler.add(key, 0, rows, 1)
    assert len(scheduler) == 1


def test_what_is_dropped_is_gone_and_a_budget_must_be_one() -> None:
    scheduler = Scheduler(4)
    scheduler.add(0, 0, 3, 0)
    scheduler.drop(0)
    scheduler.drop(5)
    assert scheduler.next() == []
    with pytest.raises(ConfigError, match="at least 1 position, not 0"):
        Scheduler(0)


@given(
    budget=st.integers(1, 300),
    arrivals=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 700), st.integers(0, 3), st.integers(0, 2)), max_size=40
    ),
)
def test_everything_runs_once_within_the_budget_and_nobody_waits_longer_than_said(
    budget: int, arrivals: list[tuple[int, int, int, int]]
) -> None:
    scheduler, done, rows, stage_of = Scheduler(budget), dict[int, int](), dict[int, int](), dict[int, int]()
    further: dict[int, int] = {}
    patience: dict[int, int] = {}
    pending = list(enumerate(arrivals))
    while pending or scheduler:
        for _ in range(pending[0][1][2] + (not scheduler) if pending else 0):
            if not pending:
                break
            key, (stage, count, _, more) = pending.pop(0)
            patience[key] = (len(scheduler) + 1) * (PATIENCE + 1)
            scheduler.add(key, stage, count, key)
            rows[key], done[key], stage_of[key], further[key] = count, 0, stage, more
        step = scheduler.next()
        assert len({stage_of[key] for key, _ in step}) == 1 and len({key for key, _ in step}) == len(step)
        assert sum(count for _, count in step) <= max(budget, step[0][1])
        for key, count in step:
            assert count > 0 and (count == rows[key] - done[key] or rows[key] - done[key] > SHORT_ROWS)
            done[key] += count
        waiting = set(patience) - {key for key, _ in step}
        for key in waiting:
            patience[key] -= 1
            assert patience[key] > 0, "it was promised a part of one of these steps"
        for key, _ in step:
            if done[key] < rows[key]:
                patience[key] = len(scheduler) * (PATIENCE + 1)
                continue
            del patience[key]
            if further[key]:  # it goes on at the next stage, before those that came later or went behind it
                further[key], stage_of[key], done[key] = further[key] - 1, stage_of[key] + 1, 0
                for other in patience:
                    patience[other] += PATIENCE + 1
                patience[key] = (len(scheduler) + 1) * (PATIENCE + 1)
                scheduler.add(key, stage_of[key], rows[key], key)
    assert done == rows
