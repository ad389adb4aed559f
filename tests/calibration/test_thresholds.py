"""Calibrated confidence is the probability of agreement; thresholds keep their bound on new prompts."""

from typing import Any

import numpy as np
import pytest

from ruyi_flow.calibration.bounds import Sample, explain_failure, max_log_wealth, split_prompts
from ruyi_flow.calibration.curves import confidences, ece, fit_curves, raw_confidences, reliability_bins
from ruyi_flow.calibration.thresholds import Replay, choose_thresholds
from ruyi_flow.calibration.trace import ExitRecord, Header, Record, Trace
from ruyi_flow.errors import ConfigError
from ruyi_flow.routing.confidence import Calibration, Curve, Score

HEADER = Header(
    family="f" * 64,
    name="made",
    exits=(2, 4, 6),
    hidden_size=8,
    dtype="float32",
    max_new_tokens=64,
    boundary_bytes={"bf16": 16},
    scores=tuple(Score),
    temperatures=(0.7, 1.0, 1.5),
)
COSTS = {2: 1.0, 4: 2.0, 6: 3.0}


def made(prompts: int, seed: int) -> Trace:
    """Make answers of varying difficulty, with branches that are overconfident."""
    generator = np.random.default_rng(seed)
    records = []
    for number in range(prompts):
        n = int(generator.integers(30, 65))
        ease = generator.normal(1.5, 1) + generator.normal(0, 2, n)
        exits = {}
        for p, depth in zip(HEADER.exits, (0.0, 1.5, 99.0), strict=True):
            known = ease + depth + generator.normal(0, 0.5, n)
            right = generator.random(n) < 1 / (1 + np.exp(-known))
            said = [1 / (1 + np.exp(-(known + 1) * 1.5 / t)) for t in HEADER.temperatures]
            scores = np.stack([np.stack(said, -1)] * len(Score), 1).astype(np.float32)
            exits[p] = ExitRecord(np.where(right, 0, 1).astype(np.int32), scores, 1.0, 1.0)
        records.append(Record(number, f"{seed}/{number}", 5, np.zeros(n, np.int32), exits))
    return Trace.from_records(HEADER, records)


@pytest.fixture(scope="module")
def world() -> Trace:
    """Make so many prompts that shares measured on them are close to the true ones."""
    return made(3000, 99)


def test_calibrated_confidence_is_the_chance_of_agreement(world: Trace) -> None:
    calibration = fit_curves(made(400, 1))
    for score in Score:
        for p, confidence in confidences(world, calibration, score).items():
            assert ece(confidence, world.agrees[p]) < 0.02
    assert all(ece(c, world.agrees[p]) > 0.05 for p, c in raw_confidences(world).items())
    (said, was, count), *_ = reliability_bins(np.array([0.1, 0.11, 0.9]), np.array([True, False, True]), bins=10)
    assert said == pytest.approx(0.105) and (was, count) == (0.5, 2)


def test_a_curve_gives_the_same_one_by_one_and_at_once() -> None:
    curve = Curve(1.0, (0.1, 0.4, 0.9), (0.2, 0.5, 1.0))
    xs = np.linspace(-0.5, 1.5, 81)
    assert [curve(x) for x in xs] == pytest.approx(np.interp(xs, curve.scores, curve.chances).tolist())
    assert Curve(1.0, (0.3,), (0.6,))(0.1) == Curve(1.0, (0.3,), (0.6,))(0.9) == 0.6


@pytest.mark.parametrize("bound", [0.05, pytest.param(0.1, marks=pytest.mark.slow)])
def test_the_bound_holds_on_new_prompts_and_is_used(world: Trace, bound: float) -> None:
    kept, used = 0, []
    for seed in range(12):
        trace = made(1200, seed)
        calibration = fit_curves(trace)
        replay = Replay(trace, confidences(trace, calibration, Score.MARGIN), COSTS)
        choice = choose_thresholds(replay, max_disagreement=bound, seed=seed)
        found = Replay(world, confidences(world, calibration, Score.MARGIN), COSTS).outcome(choice.thresholds)
        kept += found.disagreement <= bound
        used.append(found.disagreement / bound)
        assert found.cost < 3.0 and choice.prompts == 840
    assert kept >= 11  # 95 % of 12 is 11.4
    assert np.mean(used) > 0.5


def test_sorted_prompts_prove_no_more_than_shuffled_ones() -> None:
    """The easy ones come first, then the hard ones; the mean is twice the bound."""
    x, bound = np.repeat([0.0, 0.2], 200), 0.05
    assert np.cumsum(np.log1p(0.5 * (bound - x))).max() > -np.log(0.05)
    assert sum(max_log_wealth(0.5, Sample(x, bound), seed) > -np.log(0.05) for seed in range(200)) <= 10


def test_a_failed_test_tells_what_it_needs() -> None:
    rare = np.zeros(100)
    rare[:3] = 1.0
    assert explain_failure(Sample(rare, 0.05), 0.95).startswith("trace about ")
    assert "will not help" in explain_failure(Sample(np.full(100, 0.2), 0.05), 0.95)
    few = explain_failure(Sample(np.array([0.0, 0.0, 0.0, 0.0, 0.3]), 0.05), 0.95)
    assert few == "they are too few to tell: trace several times 88 of the same kind"
    barely = Sample(np.repeat([0.0, 0.0995], 50), 0.05)
    assert explain_failure(barely, 0.95).startswith("they barely support it")
    with pytest.raises(ConfigError, match="one prompt cannot both"):
        split_prompts(1, 0)


def test_calibrated_thresholds_beat_one_uncalibrated_one(world: Trace) -> None:
    trace = made(1200, 5)
    calibration = fit_curves(trace)
    choice = choose_thresholds(
        Replay(trace, confidences(trace, calibration, Score.MARGIN), COSTS), max_disagreement=0.1
    )
    ours = Replay(world, confidences(world, calibration, Score.MARGIN), COSTS).outcome(choice.thresholds)
    raw = Replay(world, raw_confidences(world), COSTS)
    shared = [raw.outcome(dict.fromkeys((2, 4), t)) for t in np.linspace(0.5, 1, 200)]
    cheapest = min(o.cost for o in shared if o.agreement >= ours.agreement)
    assert ours.cost <= cheapest


def test_an_outcome_is_what_a_walk_token_by_token_gives() -> None:
    trace = made(5, 3)
    confidence, thresholds = raw_confidences(trace), {2: 0.9, 4: 0.8}
    decided, wrong, early = dict.fromkeys(HEADER.exits, 0), 0, 0
    for i in range(len(trace.prompt)):
        at = next((p for p in (2, 4) if confidence[p][i] >= thresholds[p]), 6)
        decided[at] += 1
        early += at != 6
        wrong += at != 6 and not trace.agrees[at][i]
    found, n = Replay(trace, confidence, COSTS).outcome(thresholds), len(trace.prompt)
    assert found.decided == pytest.approx({p: k / n for p, k in decided.items()})
    assert found.disagreement == pytest.approx(wrong / early) and found.agreement == pytest.approx(1 - wrong / n)
    assert found.cost == pytest.approx(sum(COSTS[p] * k for p, k in decided.items()) / n)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_disagreement": 0.0}, "bound on disagreement is 0; it must lie between 0 and 1"),
        ({"confidence_level": 1.0}, "confidence level is 1; it must"),
        (
            {"max_disagreement": 0.01},
            r"30 prompts cannot show .* at most 0.01 .*: (trace about [\d,]+ more|they contradict)",
        ),
    ],
)
def test_a_bound_that_cannot_be_shown_is_refused(changes: dict[str, Any], message: str) -> None:
    trace = made(30, 4)
    with pytest.raises(ConfigError, match=message):
        choose_thresholds(Replay(trace, raw_confidences(trace), COSTS), **{"max_disagreement": 0.1} | changes)


def test_a_calibration_of_another_family_is_refused() -> None:
    trace = made(10, 6)
    with pytest.raises(ConfigError, match="belongs to family gggg"):
        confidences(trace, Calibration("g" * 64, fit_curves(trace).curves), Score.MARGIN)
