"""The policy: thresholds for each mode, and what a threshold means."""

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


NO_EXIT = "exit 3 is not one of the exits [2, 4, 6]"
NO_THRESHOLD = "a threshold is {}; it must be a number from 0 (always decide) to 1 (above it: never)"
NO_MAPPING = "thresholds is {}; it must map exits to numbers, as in {{5: 0.9}}"
NO_DRAFT = "draft is {}; it must be a whole number from 0 (ask at once) to 1024"
NO_WINDOW = "window is {}; it must be a whole number of tokens from 1 to 1024"
NO_RULE = "start and scale must be a Start and a Scale; a policy file contains both"
ONLY = "{} requires mode {}; the mode is '{}'"
NONE_GIVEN = "mode '{}' requires a threshold (0 … 1): one for all exits, or one per exit"


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        ({"mode": Mode.FIXED, "exit": 3}, NO_EXIT),
        ({"mode": Mode.EXACT, "exit": 4}, ONLY.format("exit", "'fixed'", "exact")),
        ({"mode": Mode.EXACT, "threshold": 0.5}, ONLY.format("threshold", "'token' or 'cascade'", "exact")),
        ({"mode": Mode.FIXED, "thresholds": {2: 0.5}}, ONLY.format("thresholds", "'token' or 'cascade'", "fixed")),
        ({"mode": Mode.TOKEN, "threshold": 0.5, "back": 0.9}, ONLY.format("back", "'cascade'", "token")),
        ({"mode": Mode.TOKEN, "threshold": 0.5, "window": 3}, ONLY.format("window", "'cascade'", "token")),
        ({"mode": Mode.TOKEN, "threshold": 0.5, "start": Start({}, 0.5)}, ONLY.format("start", "'cascade'", "token")),
        ({"mode": Mode.TOKEN}, NONE_GIVEN.format("token")),
        ({"mode": Mode.CASCADE}, NONE_GIVEN.format("cascade")),
        (
            {"mode": Mode.TOKEN, "threshold": 0.5, "thresholds": {2: 0.5}},
            "threshold (for all exits) and thresholds (per exit) cannot be combined; give one",
        ),
        ({"mode": Mode.TOKEN, "thresholds": {2: 0.1, 3: 0.5}}, NO_EXIT),
        (
            {"mode": Mode.TOKEN, "thresholds": {6: 0.5}},
            "thresholds: exit 6 is the last one, which always decides; leave it out",
        ),
        ({"mode": Mode.TOKEN, "threshold": -0.1}, NO_THRESHOLD.format("-0.1")),
        ({"mode": Mode.TOKEN, "threshold": math.nan}, NO_THRESHOLD.format("nan")),
        ({"mode": Mode.TOKEN, "threshold": 10**9 + 1}, NO_THRESHOLD.format("1000000001")),
        ({"mode": Mode.TOKEN, "threshold": True}, NO_THRESHOLD.format("True")),
        ({"mode": Mode.TOKEN, "threshold": "high"}, NO_THRESHOLD.format("'high'")),
        ({"mode": Mode.TOKEN, "thresholds": {2: 0.5, 4: -1}}, NO_THRESHOLD.format("-1")),
        ({"mode": Mode.CASCADE, "threshold": 0.5, "back": -1}, NO_THRESHOLD.format("-1")),
        ({"mode": Mode.CASCADE, "thresholds": {2: 0.5}, "back": -1}, NO_THRESHOLD.format("-1")),
        ({"mode": Mode.TOKEN, "thresholds": [2]}, NO_MAPPING.format("[2]")),
        ({"mode": Mode.TOKEN, "thresholds": {}}, NO_MAPPING.format("{}")),
        ({"mode": Mode.TOKEN, "thresholds": {2: 0.5, "4": 0.5}}, NO_MAPPING.format("{2: 0.5, '4': 0.5}")),
        ({"mode": Mode.EXACT, "scale": Scale(Score.MARGIN, {3: Curve(1.0, (0.5,), (0.5,))})}, NO_EXIT),
        ({"mode": Mode.EXACT, "scale": 0.5}, NO_RULE),
        ({"mode": Mode.CASCADE, "threshold": 0.5, "start": "early"}, NO_RULE),
        ({"mode": Mode.CASCADE, "threshold": 0.5, "start": Start({3: (0.0,) * 5}, 0.5)}, NO_EXIT),
        ({"mode": Mode.CASCADE, "threshold": 0.5, "window": 0}, NO_WINDOW.format(0)),
        ({"mode": Mode.CASCADE, "threshold": 0.5, "window": 1025}, NO_WINDOW.format(1025)),
        ({"mode": Mode.CASCADE, "threshold": 0.5, "window": True}, NO_WINDOW.format(True)),
        ({"mode": Mode.CASCADE, "threshold": 0.5, "window": 2.0}, NO_WINDOW.format(2.0)),
        ({"draft": -1}, NO_DRAFT.format(-1)),
        ({"draft": 1025}, NO_DRAFT.format(1025)),
        ({"draft": True}, NO_DRAFT.format(True)),
        ({"draft": "4"}, NO_DRAFT.format("'4'")),
        ({"mode": Mode.FIXED, "exit": "4"}, "exit is '4'; it must be one of the family's exits, a whole number"),
        ({"fallback": 1}, "fallback is 1; it must be True or False"),
        ({"family": 7}, "family is 7; it must be the fingerprint that a policy file contains"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(routing: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        Policy.resolve(Routing(**routing), EXITS)


@pytest.mark.parametrize(
    "routing",
    [
        {"mode": "cascade", "threshold": 0.5, "window": 1, "draft": 0},
        {"mode": Mode.CASCADE, "threshold": NEVER, "window": 1024, "back": 1e9, "draft": 1024},
        {"mode": Mode.TOKEN, "thresholds": {2: 0, 4: 1e9}},
        {"mode": Mode.FIXED, "exit": 2, "family": "f"},
    ],
)
def test_options_at_their_bounds_are_taken(routing: dict[str, Any]) -> None:
    policy = Policy.resolve(Routing(**routing), EXITS)
    rest = policy.routing
    assert (rest.exit, rest.threshold, rest.thresholds, rest.family) == (None,) * 4, "they are the policy's own now"
    assert rest.mode is Mode(routing["mode"]) and isinstance(rest.mode, Mode)
    assert (rest.window, rest.back, rest.draft) == (
        routing.get("window", 8),
        routing.get("back"),
        routing.get("draft", 4),
    )


def test_a_threshold_for_all_is_one_for_each_exit_before_the_last() -> None:
    assert Policy.resolve(Routing(Mode.TOKEN, threshold=0.5), EXITS) == Policy(Routing(Mode.TOKEN), {2: 0.5, 4: 0.5}, 6)
    given = Policy.resolve(Routing(Mode.CASCADE, thresholds={4: 1}), EXITS)
    assert given == Policy(Routing(Mode.CASCADE), {2: NEVER, 4: 1.0}, 6)
    assert all(type(threshold) is float for threshold in given.thresholds.values())
    assert Policy.resolve(Routing(Mode.FIXED, exit=4), EXITS) == Policy(Routing(Mode.FIXED), {2: NEVER}, 4)


def test_a_threshold_of_one_can_be_reached() -> None:
    policy = Policy.resolve(Routing(Mode.TOKEN, thresholds={2: 1.0, 4: 1.0001}), EXITS)
    assert [policy.can_decide(p) for p in EXITS] == [True, False, True]
    assert [Judge(policy, p).never_decides for p in EXITS] == [False, True, False]
    assert judged(policy, 2, 1.0) is Reason.CONFIDENT
    averages = Policy.resolve(Routing(Mode.CASCADE, threshold=1.0, window=1), EXITS)
    judge = Judge(averages, 2)
    assert judge.decide(0, 1.0) is Reason.CONFIDENT and not judge.never_decides
    assert judge.decide(1, 0.9) is None and judge.never_decides and judge.decide(2, 1.0) is None


@given(
    threshold=st.sampled_from([0.0, 0.5, 0.625, 1.0]),
    window=st.integers(1, 4),
    back=st.one_of(st.none(), st.sampled_from([0.0, 0.5, 0.875])),
    steps=st.lists(st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.integers(0, 12)), max_size=30),
)
def test_a_cascade_decides_as_its_definition_says_also_after_rewinds(
    threshold: float, window: int, back: float | None, steps: list[float | int]
) -> None:
    routing = Routing(Mode.CASCADE, threshold=threshold, window=window, back=back)
    judge, kept = Judge(Policy.resolve(routing, EXITS), 2), list[float]()

    def decides(seen: list[float]) -> bool:
        """Whether the exit still decides after these confidences, from the start of the answer."""
        inside = True
        for end in range(1, len(seen) + 1):
            recent = ([1.0] * window + seen[:end])[-window:]
            mean = sum(recent) / window
            if inside:
                inside = mean >= threshold
            else:
                inside = back is not None and end >= window and mean >= back
        return inside

    for step in steps:
        if isinstance(step, int):
            judge.rewind(5 + step)
            del kept[step:]
        else:
            kept.append(step)
            reason = judge.decide(5 + len(kept) - 1, step)
            assert (reason is Reason.CONFIDENT) == decides(kept) and reason in (Reason.CONFIDENT, None)
        assert judge.retired == judge.never_decides == (back is None and not decides(kept))


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


def test_a_start_takes_the_thresholds_of_the_exits_before_it_away() -> None:
    start = Start({4: (0.0,) * 5}, 0.5)
    policy = Policy.resolve(Routing(Mode.CASCADE, threshold=0.5, start=start), EXITS)
    assert policy.starting_at(4) == Policy(Routing(Mode.CASCADE), {2: NEVER, 4: 0.5}, 6)
    assert policy.starting_at(6) == Policy(Routing(Mode.CASCADE), {2: NEVER, 4: NEVER}, 6)
    assert policy.starting_at(2) == Policy(Routing(Mode.CASCADE), {2: 0.5, 4: 0.5}, 6)


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
    assert policy == Policy(Routing(Mode.EXACT), {2: NEVER}, 4, limited=True)
    assert judged(policy, 4, 0.0) is Reason.LIMIT and policy.deepest == 4 and list(policy.thresholds) == [2]
    assert policy.limited_to(6) == policy
    fixed = Policy.resolve(Routing(Mode.FIXED, exit=4), EXITS)
    assert fixed.limited_to(4) == fixed, "it forbids nothing that was asked for"


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
