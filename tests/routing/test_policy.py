"""The policy: thresholds for each mode, and what a threshold means."""

import math
from typing import Any

import pytest

from ruyi_flow.errors import RequestError
from ruyi_flow.routing.confidence import Curve, Scale, Score
from ruyi_flow.routing.drafting import draft_pays
from ruyi_flow.routing.policy import NEVER, Judge, Policy, Routing
from ruyi_flow.routing.start import Reading, Start
from ruyi_flow.types import Mode, Reason

EXITS = (2, 4, 6)


def judged(policy: Policy, exit: int, confidence: float) -> Reason | None:
    return Judge(policy, exit).decide(0, confidence)


def test_exact_never_trusts_an_early_exit() -> None:
    policy = Policy.resolve(Routing(Mode.EXACT), EXITS)
    assert judged(policy, 2, 1.0) is None and judged(policy, 4, 1.0) is None
    assert judged(policy, 6, 0.0) is Reason.DEEPEST
    assert [policy.can_decide(p) for p in EXITS] == [False, False, True]


def test_fixed_trusts_one_exit_and_needs_no_deeper_one() -> None:
    policy = Policy.resolve(Routing(Mode.FIXED, exit=4), EXITS)
    assert judged(policy, 2, 1.0) is None
    assert judged(policy, 4, 0.0) is Reason.FIXED
    assert policy.deepest == 4


def test_token_compares_with_its_threshold() -> None:
    policy = Policy.resolve(Routing(Mode.TOKEN, thresholds={2: 0.9}), EXITS)
    assert judged(policy, 2, 0.9) is Reason.CONFIDENT
    assert judged(policy, 2, 0.89) is None
    assert policy.thresholds[4] == NEVER


def test_threshold_zero_is_always_sure_and_above_one_never() -> None:
    always = Policy.resolve(Routing(Mode.TOKEN, threshold=0), EXITS)
    assert judged(always, 2, 0.0) is Reason.CONFIDENT
    never = Policy.resolve(Routing(Mode.TOKEN, threshold=1.01), EXITS)
    assert judged(never, 2, 1.0) is None and not never.can_decide(2)


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        ({"mode": Mode.FIXED, "exit": 3}, "exit 3 is not one of the family's exits"),
        ({"mode": Mode.EXACT, "exit": 4}, "requires mode 'fixed'"),
        ({"mode": Mode.EXACT, "threshold": 0.5}, "requires mode 'token' or 'cascade'"),
        ({"mode": Mode.TOKEN}, "requires a threshold"),
        ({"mode": Mode.TOKEN, "threshold": 0.5, "thresholds": {2: 0.5}}, "cannot be combined"),
        ({"mode": Mode.TOKEN, "thresholds": {3: 0.5}}, "exit 3 is not one"),
        ({"mode": Mode.TOKEN, "thresholds": {6: 0.5}}, "exit 6 is the last one"),
        ({"mode": Mode.TOKEN, "threshold": -0.1}, "must be a number from 0"),
        ({"mode": Mode.TOKEN, "threshold": math.nan}, "must be a number from 0"),
        ({"mode": Mode.TOKEN, "threshold": 10**400}, "must be a number from 0"),
        ({"mode": Mode.TOKEN, "threshold": 0.5, "back": 0.9}, "back requires mode 'cascade'; the mode is 'token'"),
        ({"mode": Mode.TOKEN, "threshold": 0.5, "window": 3}, "window requires mode 'cascade'; the mode is 'token'"),
        ({"mode": Mode.EXACT, "scale": Scale(Score.MARGIN, {3: Curve(1.0, (0.5,), (0.5,))})}, "exit 3 is not one"),
        ({"mode": Mode.CASCADE}, "mode 'cascade' requires a threshold"),
        ({"mode": Mode.CASCADE, "threshold": 0.5, "window": 0}, "window is 0"),
        ({"mode": Mode.CASCADE, "threshold": 0.5, "back": -1}, "must be a number from 0"),
        ({"mode": Mode.CASCADE, "threshold": 0.5, "start": Start({3: (0.0,) * 5}, 0.5)}, "exit 3 is not one"),
        ({"mode": Mode.CASCADE, "threshold": 0.5, "start": "early"}, "must be a Start"),
        ({"mode": Mode.EXACT, "scale": 0.5}, "must be a Start and a Scale"),
        ({"mode": Mode.EXACT, "fallback": 1}, "fallback is 1"),
        ({"mode": Mode.EXACT, "draft": -1}, "draft is -1"),
        ({"mode": Mode.EXACT, "draft": "4"}, "draft is '4'"),
        ({"mode": Mode.FIXED, "exit": "4"}, "exit is '4'"),
        ({"mode": Mode.TOKEN, "threshold": "high"}, "a threshold is 'high'"),
        ({"mode": Mode.TOKEN, "thresholds": [0.5]}, "must map exits to numbers"),
        ({"mode": Mode.TOKEN, "thresholds": {}}, "must map exits to numbers"),
        ({"family": 7}, "family is 7; it must be the fingerprint"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(routing: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Policy.resolve(Routing(**routing), EXITS)


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("ask_s", [0.001, 0.02, 0.1])
def test_drafting_stops_where_tokens_a_second_are_most(chance: float, ask_s: float) -> None:
    step_s = 0.01

    def rate(drafts: int) -> float:
        return sum(chance**i for i in range(drafts + 1)) / (ask_s + drafts * step_s)

    drafts, kept, expected = 0, 1.0, 1.0
    while drafts < 400 and draft_pays(kept, expected, ask_s + drafts * step_s, likely=chance, step_s=step_s):
        drafts, kept = drafts + 1, kept * chance
        expected += kept
    assert rate(drafts) == pytest.approx(max(map(rate, range(400))))


def test_cascade_leaves_an_answer_to_deeper_exits_for_good() -> None:
    judge = Judge(Policy.resolve(Routing(Mode.CASCADE, thresholds={2: 0.6}, window=2), EXITS), 2)
    said = [judge.decide(i, c) for i, c in enumerate((0.3, 0.9, 0.2, 1.0, 1.0))]
    assert [reason is Reason.CONFIDENT for reason in said] == [True, True, False, False, False]  # (0.9 + 0.2) / 2 < 0.6
    assert judge.retired
    judge.rewind(2)
    assert not judge.retired and judge.decide(2, 0.4) is Reason.CONFIDENT


def test_cascade_comes_back_only_when_the_policy_says_so() -> None:
    judge = Judge(Policy.resolve(Routing(Mode.CASCADE, thresholds={2: 0.6}, window=2, back=0.9), EXITS), 2)
    said = [judge.decide(i, c) for i, c in enumerate((0.1, 0.9, 0.8, 1.0, 1.0, 0.1))]
    assert [reason is None for reason in said] == [True, True, True, False, False, True]
    assert not judge.retired


def test_an_exit_below_the_start_never_decides_or_comes_back() -> None:
    policy = Policy.resolve(Routing(Mode.CASCADE, threshold=0.5, window=1, back=0.5), EXITS).starting_at(4)
    assert [Judge(policy, 2).decide(i, 1.0) for i in range(3)] == [None] * 3
    assert Judge(policy, 4).decide(0, 1.0) is Reason.CONFIDENT


def test_a_start_is_the_shallowest_exit_that_is_likely_enough() -> None:
    start = Start({2: (0.0, -1.0, 0.0, 0.0, 0.0), 4: (3.0, -1.0, 0.0, 0.0, 0.0)}, 0.5)
    assert [start.exit(Reading(9, loss, 1.0, 0.5), 6) for loss in (0.0, 2.0, 4.0)] == [2, 4, 6]
    with pytest.raises(ValueError, match="5 numbers"):
        Start({2: (1.0,)}, 0.5)


def test_a_limit_makes_its_exit_decide_everything() -> None:
    policy = Policy.resolve(Routing(Mode.EXACT), EXITS).limited_to(4)
    assert judged(policy, 4, 0.0) is Reason.LIMIT and policy.deepest == 4 and list(policy.thresholds) == [2]
    assert policy.limited_to(6) == policy


def test_a_request_replaces_the_options_of_a_mode_and_keeps_the_others() -> None:
    topology = Routing(Mode.CASCADE, threshold=0.5, window=3, draft=0, fallback=True, family="f")
    assert topology.updated({}) == topology
    assert topology.updated({"draft": 2}) == Routing(
        Mode.CASCADE, threshold=0.5, window=3, draft=2, fallback=True, family="f"
    )
    assert topology.updated({"mode": "cascade"}) == topology, "the present mode keeps its thresholds"
    assert topology.updated({"mode": "exact"}) == Routing(Mode.EXACT, draft=0, fallback=True)
    assert topology.updated({"exit": 4}) == Routing(Mode.FIXED, exit=4, draft=0, fallback=True)
    assert topology.updated({"threshold": 0.9, "draft": 1}) == Routing(
        Mode.TOKEN, threshold=0.9, draft=1, fallback=True
    )
