"""Nodes and links that fail in the simulator, replicas, drains and parked sessions: with times that can be computed."""

from pathlib import Path
from typing import Any

import pytest

from ruyi_flow.sim.profile import Profile
from ruyi_flow.sim.run import Simulation
from ruyi_flow.sim.scenario import Scenario
from tests.sim.conftest import Simulate, data, profile, stage

TRIP_S, DEEP_S, SHALLOW_S = 0.02, 0.023, 0.01
"""Round trip of the link, and the times of a token on the two nodes: the last branch takes 3 ms of the first."""

TOKEN_S = TRIP_S + DEEP_S + SHALLOW_S

ROW_S = 1e-3
BY_ROWS = Profile("measured", "a test", "family", 32, 4096, tuple(stage(p, p - 2, 0.01, ROW_S) for p in (2, 4, 6)))
"""Each position takes a millisecond in each stage."""


def one_answer(*, tokens: int = 100, entry: dict[str, Any] | None = None, **deep: Any) -> dict[str, Any]:
    """Return a scenario of one request, at second 1, in which the second node decides every token.

    Args:
        tokens: tokens of the answer; the prompt has 10.
        entry, deep: more keys of the two nodes.
    """
    asked = data(
        ((2,), (4, 6)),
        policy={"mode": "exact", "draft": 0},
        load={"arrivals": {"kind": "even", "rate": 1}, "requests": 1}
        | {"prompts": {"tokens": 10}, "answers": {"tokens": tokens}},
    )
    asked["nodes"][0] |= entry or {}
    asked["nodes"][1] |= deep
    return asked


def whole(found: dict[str, Any], tokens: int = 100) -> bool:
    """Return whether the answer is complete and has the last exit's tokens."""
    return bool(found["failed"] == 0 and found["tokens"] == tokens and found["agreement"] == 1)


def in_use(simulate: Simulate) -> int:
    """Return the number of the replica, from 1, that the one answer's session opens on."""
    found = [simulate(one_answer(replicas=2, down=[{"at_s": 3, "for_s": 1, "replicas": [r]}])).metrics for r in (1, 2)]
    assert sorted(one["recoveries"]["count"] for one in found) == [0, 1]
    return 1 + int(found[1]["recoveries"]["count"])


# ---- a node is lost ----


def test_an_answer_goes_on_on_another_replica_after_a_crash(simulate: Simulate) -> None:
    used = in_use(simulate)
    without = simulate(one_answer(replicas=2)).metrics
    found = simulate(one_answer(replicas=2, down=[{"at_s": 3, "for_s": 5, "replicas": [used]}])).metrics
    assert whole(found) and whole(without) and found["losses"] == {"reset": 1}
    assert found["recoveries"]["causes"] == {"reset": 1} and found["nodes"]["n1"]["outages"] == 1
    # The 38th token is lost 0.039 s after it was begun, 1 s + 37 tokens after the beginning; half a round trip later it
    # is known. The other replica has nothing parked, says so, and gets everything.
    asked = 1 + 37 * TOKEN_S
    gap = 3 - asked + TRIP_S / 2 + TRIP_S + TRIP_S + DEEP_S
    assert found["gap_s"]["worst"] == pytest.approx(gap)
    assert found["total_s"]["mean"] - without["total_s"]["mean"] == pytest.approx(gap - TOKEN_S)
    assert found["recoveries"]["positions"] == 1 + 10 + 37, "the question that missed, and the log"
    sent = found["links"]["n0-n1"]["bytes_up"] - without["links"]["n0-n1"]["bytes_up"]
    each = 2 * 32 + profile().position_bytes
    again = (profile().up_bytes + each) + (profile().open_bytes + profile().up_bytes + each)
    assert sent == again + profile().open_bytes + (10 + 36) * each, "what was lost, what missed, and the log"


def test_a_replay_takes_its_computing_and_its_time_on_the_link(simulate: Simulate) -> None:
    used = in_use(simulate)
    asked = one_answer(replicas=2, down=[{"at_s": 5, "for_s": 5, "replicas": [used]}])
    short = simulate(asked, BY_ROWS).metrics
    rows = short["recoveries"]["positions"] - 1
    assert whole(short) and rows > 40
    free = simulate(asked, profile()).metrics["recoveries"]["seconds"]["worst"]
    # Two stages run all rows, and the second one's branch gets them all; it takes 0.1 ms a row and its head one row.
    assert short["recoveries"]["seconds"]["worst"] - free == pytest.approx(2 * ROW_S * rows, abs=1e-4)
    asked["links"][0]["up_mbit"] = 0.1
    slow = simulate(asked, BY_ROWS).metrics
    rows = slow["recoveries"]["positions"] - 1
    sent = 2 * (profile().open_bytes + profile().up_bytes) + (1 + rows) * (64 + profile().position_bytes)
    computing = 2 * ROW_S * rows + DEEP_S
    assert slow["recoveries"]["seconds"]["worst"] == pytest.approx(2 * TRIP_S + computing + sent / 12_500, abs=1e-4)


@pytest.mark.parametrize(("for_s", "gap"), [(5, (1.25, 1.75)), (0.7, (0.65, 0.75))])
def test_a_hang_is_noticed_by_missing_signs_or_when_it_ends(
    simulate: Simulate, for_s: float, gap: tuple[float, float]
) -> None:
    down = [{"at_s": 3, "for_s": for_s, "kind": "hang", "replicas": [in_use(simulate)]}]
    found = simulate(one_answer(replicas=2, down=down)).metrics
    assert whole(found) and found["recoveries"]["causes"] == {"silent" if for_s > 2 else "reset": 1}
    noticed = found["gap_s"]["worst"] - found["recoveries"]["seconds"]["worst"]
    assert gap[0] < noticed < gap[1] + TOKEN_S


def test_a_single_node_is_asked_again_once_it_is_back(simulate: Simulate) -> None:
    found = simulate(one_answer(down=[{"at_s": 3, "for_s": 2}])).metrics
    assert whole(found) and found["recoveries"]["causes"] == {"reset": 1}
    assert 2 < found["recoveries"]["seconds"]["worst"] < 2 + 0.5 + 4 * TOKEN_S, "pauses are at most half a second"
    late = one_answer(down=[{"at_s": 3, "for_s": 2}])
    late["links"][0]["recover_s"] = 1
    lost = simulate(late).metrics
    assert lost["errors"] == {"NodeUnavailable": 1} and lost["tokens"] == 37
    late["policy"]["fallback"] = True
    instead = simulate(late).metrics
    before = int((3 - 1) / (TOKEN_S + 0.003))  # the first node's branch runs, too
    assert instead["failed"] == 0 and instead["tokens"] == 100
    assert instead["decided"]["2"] == pytest.approx(1 - before / 100)


def test_answers_survive_a_node_in_the_middle_that_fails(simulate: Simulate) -> None:
    for mode in ("exact", "token", "cascade"):
        policy = {"mode": mode, "draft": 2} | ({} if mode == "exact" else {"threshold": 0.7})
        asked = data(policy=policy)
        without = simulate(asked).metrics
        asked["nodes"][1] |= {"mtbf_s": 4, "mttr_s": 1, "replicas": 2}
        found = simulate(asked).metrics
        assert found["failed"] == 0 and found["recoveries"]["count"] > 3
        for what in ("tokens", "agreement", "decided", "escalations_per_token"):
            assert found[what] == pytest.approx(without[what], rel=0.02), "no answer changes"


def test_a_crash_loses_what_is_parked(simulate: Simulate) -> None:
    asked = _conversations(turns=8)
    kept = simulate(asked).metrics
    asked["nodes"][1]["down"] = [{"at_s": at, "for_s": 0.5} for at in range(2, 60)]
    lost = simulate(asked).metrics
    assert kept["reused_tokens"] == lost["reused_tokens"] > 0, "those on the entry node"
    assert lost["bytes_up_per_token"] > 1.5 * kept["bytes_up_per_token"], "the others were sent again"


# ---- links, drains, and the entry node ----


def test_a_link_that_is_down_for_a_moment_only_delays(simulate: Simulate) -> None:
    asked = one_answer()
    asked["links"][0]["down"] = [{"at_s": 3, "for_s": 1}]
    found = simulate(asked).metrics
    assert whole(found) and not found["losses"] and 1 < found["gap_s"]["worst"] < 1 + TOKEN_S


def test_a_session_over_a_link_that_was_down_for_long_goes_on_where_it_was(simulate: Simulate) -> None:
    asked = one_answer()
    asked["links"][0]["down"] = [{"at_s": 3, "for_s": 3}]
    found = simulate(asked).metrics
    assert whole(found) and found["recoveries"]["causes"] == {"silent": 1}
    assert found["recoveries"]["positions"] == 1, "the node has parked the rest"
    asked["links"][0] |= {"down": [{"at_s": 3, "for_s": 30}]}
    lost = simulate(asked).metrics
    assert lost["errors"] == {"NodeUnavailable": 1}
    assert 3 - 1 + 1.25 + 10 < lost["simulated_s"] - 1 < 3 - 1 + 1.75 + 10 + 3.25 + 1


def test_a_drain_moves_sessions_between_two_questions(simulate: Simulate) -> None:
    used = in_use(simulate)
    without = simulate(one_answer(replicas=2)).metrics["total_s"]["mean"]
    rolling = [
        {"at_s": 3, "for_s": 1, "kind": "drain", "replicas": [used]},
        {"at_s": 5, "for_s": 1, "kind": "drain", "replicas": [3 - used]},
    ]
    found = simulate(one_answer(replicas=2, down=rolling)).metrics
    assert whole(found) and found["recoveries"]["causes"] == {"left": 2}
    assert found["total_s"]["mean"] == pytest.approx(without + 2 * TRIP_S), "each time a question that missed"
    assert found["gap_s"]["worst"] == pytest.approx(TOKEN_S + TRIP_S)


def test_sessions_stay_on_a_node_that_drains_alone_until_the_grace_time_is_over(simulate: Simulate) -> None:
    drain = [{"at_s": 3, "for_s": 4, "kind": "drain"}]
    stays = simulate(one_answer(down=drain, limits={"grace_s": 10})).metrics
    assert whole(stays) and not stays["losses"]
    cut = simulate(one_answer(down=drain, limits={"grace_s": 1})).metrics
    assert whole(cut) and cut["recoveries"]["causes"] == {"reset": 1} and 3 < cut["gap_s"]["worst"] < 4


def test_the_client_takes_an_answer_up_when_the_entry_node_is_lost(simulate: Simulate) -> None:
    found = simulate(one_answer(entry={"down": [{"at_s": 3, "for_s": 2}]})).metrics
    assert whole(found) and found["recoveries"]["causes"] == {"reset": 1}
    assert 2 < found["recoveries"]["seconds"]["worst"] < 2.5 + 2 * TOKEN_S
    asked = one_answer(entry={"down": [{"at_s": 3, "for_s": 2}]}) | {"client_recover_s": 1}
    lost = simulate(asked).metrics
    assert lost["errors"] == {"NodeUnavailable": 1} and lost["tokens"] == 37
    for kind, cause in (("crash", "reset"), ("drain", "left"), ("hang", "silent")):
        downs = [{"at_s": 3, "for_s": 9, "kind": kind, "replicas": [r]} for r in (1, 2)]
        each = [simulate(one_answer(entry={"replicas": 2, "down": [down]})).metrics for down in downs]
        assert all(whole(one) for one in each)
        assert sorted(one["recoveries"]["count"] for one in each) == [0, 1]
        hit = max(each, key=lambda one: int(one["recoveries"]["count"]))
        assert hit["recoveries"]["causes"] == {cause: 1} and hit["gap_s"]["worst"] < 1.75 + 3 * TOKEN_S


# ---- replicas ----


def test_sessions_are_spread_over_replicas_by_load(simulate: Simulate) -> None:
    asked = one_answer(replicas=4, tokens=20)
    asked["load"] |= {"arrivals": {"rate": 4}, "requests": 200}
    asked["nodes"][0] |= {"limits": {"max_sessions": 64, "max_positions": 65536}}
    scenario = Scenario.from_data(asked, base=Path(), where="test.yaml")
    simulation = Simulation(scenario, profiles=[profile()] * 2)
    found = simulation.run().metrics
    busy = [there.worker.busy_s for there in simulation._cluster.instances[1].values()]
    assert found["failed"] == 0 and len(busy) == 4 and min(busy) > 0.15 * sum(busy)
    assert found["nodes"]["n1"]["utilisation"] == pytest.approx(sum(busy) / 4 / found["span_s"], rel=0.02)


def test_a_replica_that_fails_gets_no_sessions_until_it_is_back(simulate: Simulate) -> None:
    asked = one_answer(replicas=2, tokens=5)
    asked["load"] |= {"arrivals": {"kind": "even", "rate": 2}, "requests": 40}
    asked["nodes"][1]["down"] = [{"at_s": 2.1, "for_s": 100, "replicas": [1]}]
    scenario = Scenario.from_data(asked, base=Path(), where="test.yaml")
    simulation = Simulation(scenario, profiles=[profile()] * 2)
    found = simulation.run().metrics
    first, second = simulation._cluster.instances[1].values()
    assert found["failed"] == 0 and second.worker.busy_s > 5 * first.worker.busy_s
    assert sum(found["losses"].values()) <= 1, "its health is watched"


# ---- parked sessions ----


def _conversations(turns: float = 4, **changes: Any) -> dict[str, Any]:
    return data(
        ((2,), (4, 6)),
        policy={"mode": "exact", "draft": 0},
        load={"arrivals": {"kind": "closed", "users": 1}, "turns": {"mean": turns, "think_s": 0.5}, "requests": 40}
        | {"prompts": {"tokens": 200}, "answers": {"tokens": 10}},
        **changes,
    )


def test_a_second_turn_goes_on_from_what_is_parked(simulate: Simulate) -> None:
    asked = _conversations()
    found = simulate(asked, BY_ROWS).metrics
    asked["nodes"][0]["limits"] = {"park_s": 0}
    without = simulate(asked, BY_ROWS).metrics
    assert found["failed"] == without["failed"] == 0 and without["reused_tokens"] == 0
    later = found["prompt_tokens"] - 40 * 200
    """Tokens of earlier turns in the prompts."""
    turns = later / 210
    assert found["prompt_tokens"] == without["prompt_tokens"] and turns > 20
    assert later - 40 <= found["reused_tokens"] < later, (
        "all but the last token of each earlier answer, which never ran"
    )
    assert found["first_token_s"]["p95"] < 0.5 * without["first_token_s"]["p95"]
    assert found["first_token_s"]["p95"] < 1.1 * found["first_token_s"]["p50"], "a later turn costs what the first does"
    assert found["bytes_up_per_token"] < 0.6 * without["bytes_up_per_token"]
    assert found["nodes"]["n0"]["parked"] > 0 and found["nodes"]["n1"]["parked_share"] > 0


def test_parked_sessions_are_kept_for_their_time_and_while_there_is_room(simulate: Simulate) -> None:
    asked = _conversations()
    kept = simulate(asked).metrics["reused_tokens"]
    asked["nodes"][0]["limits"] = {"park_s": 0.1}
    old = simulate(asked).metrics["reused_tokens"]
    assert 0 < old < 0.5 * kept, "the user thinks for half a second"
    asked["nodes"][0]["limits"] = {"max_positions": 4096}
    asked["load"]["arrivals"]["users"] = 8
    many = simulate(asked).metrics
    asked["nodes"][0]["limits"] = {"max_positions": 65536}
    roomy = simulate(asked).metrics
    assert many["failed"] == roomy["failed"] == 0
    assert many["reused_tokens"] < 0.8 * roomy["reused_tokens"], "some were evicted"


def test_nothing_is_parked_that_nobody_can_take_back(simulate: Simulate) -> None:
    found = simulate(one_answer()).metrics
    assert found["nodes"]["n1"]["parked"] == 0
    assert simulate(one_answer(mtbf_s=1e9)).metrics["nodes"]["n1"]["parked"] == 1


def test_a_long_replay_is_computed_while_its_rest_is_on_the_link(simulate: Simulate) -> None:
    used = in_use(simulate)
    asked = one_answer(replicas=2, tokens=300, down=[{"at_s": 12, "for_s": 5, "replicas": [used]}])
    asked["load"]["prompts"] = {"tokens": 1400}
    asked["links"][0]["up_mbit"] = 1
    found = simulate(asked, BY_ROWS).metrics
    rows = found["recoveries"]["positions"] - 1
    assert whole(found, 300) and rows > 2 * 512
    link_s, computing_s = rows * (64 + profile().position_bytes) / 125_000, 2 * ROW_S * rows
    last_s = link_s * (rows % 512) / rows
    took = found["recoveries"]["seconds"]["worst"]
    assert computing_s + 512 / rows * link_s < took < computing_s + link_s - last_s, "neither waits for the whole other"
