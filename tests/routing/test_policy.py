"""The policy: thresholds for each mode, and what a threshold means."""

import math
from typing import Any

import pytest

from ruyi_flow.errors import RequestError
from ruyi_flow.routing.policy import NEVER, Policy, Routing, pays
from ruyi_flow.types import Mode, Reason

EXITS = (2, 4, 6)


def test_exact_never_trusts_an_early_exit() -> None:
    policy = Policy.resolve(Routing(Mode.EXACT), EXITS)
    assert policy.sure(2, 1.0) is None and policy.sure(4, 1.0) is None
    assert policy.sure(6, 0.0) is Reason.DEEPEST
    assert [policy.looks(p) for p in EXITS] == [False, False, True]


def test_fixed_trusts_one_exit_and_needs_no_deeper_one() -> None:
    policy = Policy.resolve(Routing(Mode.FIXED, exit=4), EXITS)
    assert policy.sure(2, 1.0) is None
    assert policy.sure(4, 0.0) is Reason.FIXED
    assert policy.deepest == 4


def test_token_compares_with_its_threshold() -> None:
    policy = Policy.resolve(Routing(Mode.TOKEN, thresholds={2: 0.9}), EXITS)
    assert policy.sure(2, 0.9) is Reason.CONFIDENT
    assert policy.sure(2, 0.89) is None
    assert policy.thresholds[4] == NEVER


def test_threshold_zero_is_always_sure_and_above_one_never() -> None:
    always = Policy.resolve(Routing(Mode.TOKEN, threshold=0), EXITS)
    assert always.sure(2, 0.0) is Reason.CONFIDENT
    never = Policy.resolve(Routing(Mode.TOKEN, threshold=1.01), EXITS)
    assert never.sure(2, 1.0) is None and not never.looks(2)


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        ({"mode": Mode.FIXED, "exit": 3}, "exit 3 is not one of the family's exits"),
        ({"mode": Mode.EXACT, "exit": 4}, "goes with mode 'fixed'"),
        ({"mode": Mode.EXACT, "threshold": 0.5}, "go with mode 'token'"),
        ({"mode": Mode.TOKEN}, "needs a threshold"),
        ({"mode": Mode.TOKEN, "threshold": 0.5, "thresholds": {2: 0.5}}, "not both"),
        ({"mode": Mode.TOKEN, "thresholds": {3: 0.5}}, "exit 3 is not one"),
        ({"mode": Mode.TOKEN, "thresholds": {6: 0.5}}, "exit 6 is the last one"),
        ({"mode": Mode.TOKEN, "threshold": -0.1}, "must be a number from 0"),
        ({"mode": Mode.TOKEN, "threshold": math.nan}, "must be a number from 0"),
        ({"mode": Mode.TOKEN, "threshold": 10**400}, "must be a number from 0"),
        ({"mode": Mode.EXACT, "draft": -1}, "draft is -1"),
        ({"mode": Mode.EXACT, "draft": "4"}, "draft is '4'"),
        ({"mode": Mode.FIXED, "exit": "4"}, "exit is '4'"),
        ({"mode": Mode.TOKEN, "threshold": "high"}, "a threshold is 'high'"),
        ({"mode": Mode.TOKEN, "thresholds": [0.5]}, "must map exits to numbers"),
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
    while drafts < 400 and pays(kept, expected, ask_s + drafts * step_s, chance, step_s):
        drafts, kept = drafts + 1, kept * chance
        expected += kept
    assert rate(drafts) == pytest.approx(max(map(rate, range(400))))
