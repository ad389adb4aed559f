"""Statistics of a run, in memory that does not grow with it, and its Chrome trace."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruyi_flow.sim.results import Distribution, Recorder, RequestOutcome, Timeline
from ruyi_flow.types import Hop

# ---- Distribution ----


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=300))
def test_percentiles_are_within_what_is_said_of_them(values: list[float]) -> None:
    distribution = Distribution()
    for value in values:
        distribution.add(value)
    summary = distribution.summary()
    assert distribution.count == len(values) and summary["mean"] == pytest.approx(np.mean(values))
    for name, found in summary.items():
        if name != "mean":
            exact = np.quantile(values, int(name[1:]) / 100, method="lower")
            assert found == pytest.approx(exact, rel=0.00201)
    points = distribution.points(20)
    assert [share for _, share in points] == pytest.approx([i / 20 for i in range(1, 21)])
    assert [value for value, _ in points] == sorted(value for value, _ in points)
    assert points[-1][0] == pytest.approx(max(values), rel=0.00201)


def test_a_spread_of_nothing_is_zero_and_has_no_curve() -> None:
    assert Distribution().summary() == {"mean": 0, "p50": 0, "p90": 0, "p95": 0, "p99": 0}
    assert Distribution().points() == []


def test_zeros_count() -> None:
    distribution = Distribution()
    for value in (0.0, 0.0, 0.0, 8.0):
        distribution.add(value)
    assert distribution.summary() == {"mean": 2.0, "p50": 0.0, "p90": 0.0, "p95": 0.0, "p99": 0.0}
    value, share = distribution.points(4)[-1]
    assert value == pytest.approx(8.0, rel=0.002) and share == 1.0


# ---- Timeline ----


def test_amounts_go_where_they_belong() -> None:
    timeline = Timeline()
    timeline.series("a").add((0.005, 3.0, 0.0))
    timeline.series("a").add((0.02, 2.0, 0.0))
    timeline.series("b").add((0.005, 4.0, 0.02))  # 0.005 s in the first bin, 0.01 in the second, 0.005 in the third
    assert timeline.width_s == 0.01 and timeline.names == ["a", "b"]
    assert timeline.rate("a") == pytest.approx([300, 0, 200])
    assert timeline.rate("b") == pytest.approx([100, 200, 100])
    assert timeline.rate("c") == []
    timeline.series("b").add((4.0, 7.0, 0.0))
    assert timeline.width_s == 0.02, "twice as wide, to hold more than 400"
    assert timeline.rate("a") == pytest.approx([150, 100])
    assert timeline.rate("b")[:3] == pytest.approx([150, 50, 0]) and timeline.rate("b")[200] == pytest.approx(350)


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.floats(0, 5000), st.floats(0, 100), st.floats(0, 300)),
        min_size=1,
        max_size=40,
    )
)
def test_nothing_is_lost_and_bins_stay_few(amounts: list[tuple[str, float, float, float]]) -> None:
    timeline = Timeline()
    for name, at, amount, lasts in amounts:
        timeline.series(name).add((at, amount, lasts))
    for name in timeline.names:
        rates = timeline.rate(name)
        assert len(rates) <= 400 and min(rates) >= -1e-9
        mine = [row for row in amounts if row[0] == name]
        assert sum(rates) * timeline.width_s == pytest.approx(sum(row[2] for row in mine))
        # What began before any bin's end is not later than it, whatever the order of coming in.
        for i in range(0, len(rates), 50):
            start = i * timeline.width_s
            before = sum(row[2] for row in mine if row[1] + row[3] < start)
            assert sum(rates[:i]) * timeline.width_s >= before - 1e-6


# ---- Recorder ----


def answered(number: int, **about: Any) -> RequestOutcome:
    defaults: dict[str, Any] = {"at_s": float(number), "prompt_tokens": 5, "new_tokens": 3}
    defaults |= {"first_token_s": 0.5, "total_s": 1.5, "agreed": 2, "exits": {2: 2, 4: 1}}
    return RequestOutcome(number, 0, **{**defaults, **about})


def hops(**spent: dict[str, Any]) -> dict[str, Hop]:
    return {node: Hop(node, **parts) for node, parts in spent.items()}


def test_statistics_are_of_the_counted_requests(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, exits=(2, 4), nodes=("phone", "cloud"), skip=1)
    recorder.add(answered(0, total_s=99.0, agreed=0))
    recorder.add(
        answered(
            1,
            hops=hops(phone={"compute_s": 0.6}, cloud={"compute_s": 0.2, "wire_s": 0.3, "bytes_up": 30}),
            escalations=2,
        )
    )
    recorder.add(
        answered(2, total_s=2.5, hops=hops(phone={"compute_s": 1.0, "queue_s": 0.4}), admission_s={"cloud": 0.2})
    )
    recorder.add(answered(3, new_tokens=0, exits={}, first_token_s=0.0, total_s=9.0, agreed=0, error="NodeUnavailable"))
    recorder.add(
        answered(
            4,
            new_tokens=1,
            exits={4: 1},
            agreed=1,
            error="DeadlineExceeded",
            drafted=4,
            total_s=0.1,
            hops=hops(phone={"bytes_up": 5}),
        )
    )
    recorder.close()
    found = recorder.statistics()
    expected = {"requests": 4, "failed": 2, "errors": {"DeadlineExceeded": 1, "NodeUnavailable": 1}, "tokens": 7}
    expected |= {"span_s": 11.0, "tokens_per_s": 7 / 11, "decided": {"2": 4 / 7, "4": 3 / 7}, "agreement": 5 / 7}
    expected |= {"escalations_per_token": 2 / 7, "drafted": 4, "accepted": 0, "bytes_up_per_token": 35 / 7}
    assert {key: found[key] for key in expected} == expected
    assert found["total_s"]["mean"] == pytest.approx((1.5 + 2.5) / 2), "of those that were answered"
    assert found["token_s"]["mean"] == pytest.approx((0.5 + 1.0) / 2)
    assert found["spent_s"]["phone"] == pytest.approx({"room": 0, "compute": 0.8, "queue": 0.2, "wire": 0})
    assert found["spent_s"]["cloud"] == pytest.approx({"room": 0.1, "compute": 0.1, "queue": 0, "wire": 0.15})
    with (tmp_path / "requests.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["number"] for row in rows] == ["0", "1", "2", "3", "4"], "the first too"
    assert float(rows[1]["cloud_wire_s"]) == 0.3 and float(rows[2]["cloud_room_s"]) == 0.2
    assert rows[1]["exit_2"] == "2" and rows[3]["error"] == "NodeUnavailable" and rows[3]["exit_4"] == "0"
    assert float(rows[1]["agreement"]) == pytest.approx(2 / 3, abs=1e-4)


def test_a_run_without_answers_has_statistics_too() -> None:
    recorder = Recorder(None, exits=(2,), nodes=("phone",))
    assert recorder.statistics()["tokens_per_s"] == 0 and recorder.statistics()["total_s"]["p99"] == 0
    recorder.add(answered(0, new_tokens=0, exits={}, agreed=0, error="CapacityError"))
    found = recorder.statistics()
    assert (found["requests"], found["failed"], found["tokens"], found["span_s"]) == (1, 1, 0, 0)
    assert recorder.chosen == [] and recorder.slowest == []


@pytest.mark.parametrize("count", [1, 11, 12, 13, 500, 4097])
def test_few_requests_are_kept_from_all_over_the_run_and_the_slowest(count: int) -> None:
    recorder = Recorder(None, exits=(2, 4), nodes=("phone",), skip=3)
    for number in range(count + 3):
        recorder.add(answered(number, total_s=1.0 + (number * 7919) % 1009))
    kept = [one.number for one in recorder.chosen]
    assert min(count, 6) <= len(kept) <= 12 and kept[0] == 3
    steps = {b - a for a, b in zip(kept, kept[1:], strict=False)}
    assert len(steps) <= 1 and count + 3 - kept[-1] <= max(steps, default=1)
    slowest = sorted((1.0 + (n * 7919) % 1009 for n in range(3, count + 3)), reverse=True)
    assert [one.total_s for one in recorder.slowest] == slowest[:4]
