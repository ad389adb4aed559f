"""Simulations against queueing theory, against the running system, and against themselves."""

import csv
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest

from ruyi_flow.bench.profile.messages import message_sizes
from ruyi_flow.calibration.trace import read_trace
from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import ConfigError
from ruyi_flow.evaluation.scorers import Question
from ruyi_flow.evaluation.tracing import record_trace
from ruyi_flow.local import load_family
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.sim.node import VirtualSession
from ruyi_flow.sim.profile import Profile, StageCost
from ruyi_flow.sim.run import Simulation, metrics_text
from ruyi_flow.sim.run import simulate as simulate_into
from ruyi_flow.sim.scenario import Scenario
from ruyi_flow.testing import cluster, cut_topology
from tests.conftest import Command
from tests.sim.conftest import Simulate, data, profile

# ---- queueing theory ----

ROW_S = 1e-4
ONE = Profile("measured", "theory", "family", 32, 4096, (StageCost(6, 0, (1, 2), (ROW_S, 2 * ROW_S), (0, 0), (0, 0)),))
"""A server whose steps take a fixed time per row."""


def queue(tmp_path: Path, rate: float, prompts: list[int], seed: int) -> dict[str, Any]:
    """Return a scenario of one-token requests served one by one: Poisson arrivals, service times by prompt length."""
    source, now = random.Random(seed), 0.0
    with (tmp_path / "load.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["at_s", "prompt_tokens", "answer_tokens"])
        for prompt in prompts:
            now += source.expovariate(rate)
            rows.writerow([now, prompt, 1])
    limits = {"max_sessions": 1, "max_waiting": 10**6, "max_wait_s": 1e6, "max_step_positions": 2**20}
    return data(
        ((6,),),
        nodes=[{"name": "n0", "exits": [6], "limits": limits}],
        behaviour=None,
        policy={"mode": "fixed"},
        load={"arrivals": {"kind": "replay", "file": "load.csv"}},
    )


def test_one_server_with_exponential_service_is_m_m_1(tmp_path: Path, simulate: Simulate) -> None:
    source = random.Random(1)
    prompts = [max(1, min(4000, round(source.expovariate(1 / 400)))) for _ in range(20_000)]
    mean = ROW_S * sum(prompts) / len(prompts)
    load = 0.4
    found = simulate(queue(tmp_path, load / mean, prompts, 2), ONE).metrics
    assert found["nodes"]["n0"]["utilisation"] == pytest.approx(load, rel=0.02)
    assert found["total_s"]["mean"] == pytest.approx(mean / (1 - load), rel=0.02)
    assert found["total_s"]["p90"] == pytest.approx(2.302585 * mean / (1 - load), rel=0.02)  # exponential, too


def test_one_server_with_equal_service_is_m_d_1(tmp_path: Path, simulate: Simulate) -> None:
    load, each = 0.5, 400 * ROW_S
    found = simulate(queue(tmp_path, load / each, [400] * 15_000, 3), ONE).metrics
    assert found["total_s"]["mean"] == pytest.approx(each * (1 + load / (2 * (1 - load))), rel=0.02)


def test_a_link_at_full_load_carries_its_rate(simulate: Simulate) -> None:
    asked = data(
        ((2,), (4, 6)),
        policy={"mode": "exact", "draft": 0},
        load={"arrivals": {"kind": "closed", "users": 30}, "turns": {"think_s": 0}, "requests": 1500}
        | {"prompts": {"tokens": 100}, "answers": {"tokens": 4}},
    )
    asked["links"][0] |= {"up_mbit": 0.2}
    asked["nodes"][1]["limits"] = {"max_sessions": 64, "max_positions": 2**20}
    asked["nodes"][0]["limits"] = {"max_sessions": 64, "max_positions": 2**20}
    found = simulate(asked).metrics
    assert found["links"]["n0-n1"]["up_mbit"] == pytest.approx(0.2, rel=0.02)


# ---- the running system ----


async def test_it_asks_what_the_running_system_asks(tmp_path: Path, tiny: Path, simulate: Simulate) -> None:
    prompts = [tuple(3 + (7 * i + j) % 57 for j in range(4 + 9 * i)) for i in range(5)]
    family, file = load_family(tiny, dtype="float32"), tmp_path / "trace.msgpack"
    record_trace(family, [Question(prompt) for prompt in prompts], file, max_new_tokens=12)
    _, records = read_trace(file)
    async with (
        cluster(cut_topology(tiny, [[2], [4], [6]], encoding="bf16", dtype="bfloat16")) as nodes,
        AsyncClient(nodes.topology) as client,
    ):
        modes: list[dict[str, Any]] = [{"mode": "exact", "draft": 0}, {"mode": "fixed", "exit": 4, "draft": 0}]
        for mode in modes:
            real = [
                await client.generate(prompts[r.number], max_new_tokens=len(r.answer), eos_token_ids=(), **mode)
                for r in records
            ]
            asked = data(
                trace=str(file),
                behaviour=None,
                policy=mode,
                load={"requests": len(records), "prompts": {"kind": "trace"}, "answers": {"kind": "trace"}},
            )
            sizes = message_sizes(
                family.config.hidden_size, family.config.vocab_size, Policy.resolve(Routing(), family.exits)
            )
            costs = replace(profile(**sizes), family=family.checkpoint.fingerprint)
            found = simulate(asked, costs).metrics
            hops = [hop for reply in real for hop in reply.stats.hops]
            tokens = sum(reply.stats.new_tokens for reply in real)
            assert found["tokens"] == tokens
            assert found["escalations_per_token"] * tokens == pytest.approx(sum(r.stats.escalations for r in real))
            sent = sum(hop.bytes_up for hop in hops)
            assert found["bytes_up_per_token"] * tokens == pytest.approx(sent, rel=0.02)


# ---- itself ----


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(simulate: Simulate) -> None:
    texts = [metrics_text(simulate(data(seed=seed)).metrics) for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_every_token_is_counted_once_and_every_byte(simulate: Simulate) -> None:
    for mode in ({"mode": "token", "threshold": 0.7}, {"mode": "cascade", "threshold": 0.6}, {"mode": "exact"}):
        found = simulate(data(policy={**mode, "draft": 3})).metrics
        assert found["requests"] == 40 and found["failed"] == 0 and found["tokens"] == 40 * 12
        assert sum(found["decided"].values()) == pytest.approx(1)
        carried = sum(link["bytes_up"] for link in found["links"].values())
        assert found["bytes_up_per_token"] * found["tokens"] == pytest.approx(carried)
        if mode["mode"] == "exact":
            assert found["agreement"] == 1 and found["decided"]["6"] == 1


def test_a_run_leaves_its_folder(tmp_path: Path) -> None:
    profile().save(tmp_path / "p")
    (tmp_path / "s.yaml").write_text(json.dumps(data()))
    first = simulate_into(Scenario.read(tmp_path / "s.yaml"), tmp_path / "run")
    rows = list(csv.DictReader((tmp_path / "run" / "requests.csv").read_text().splitlines()))
    assert len(rows) == 40 and sum(int(row["new_tokens"]) for row in rows) == first.metrics["tokens"]
    assert json.loads((tmp_path / "run" / "trace.json").read_text())
    again = simulate_into(Scenario.read(tmp_path / "run" / "scenario.yaml"), tmp_path / "again")
    texts = [(tmp_path / name / "metrics.json").read_bytes() for name in ("run", "again")]
    assert texts[0] == texts[1] and again.metrics == first.metrics


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_run_that_breaks_off_leaves_the_last_one_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    profile().save(tmp_path / "p")
    (tmp_path / "s.yaml").write_text(json.dumps(data()))
    simulate_into(Scenario.read(tmp_path / "s.yaml"), tmp_path / "run")
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    assert set(before) == {"scenario.yaml", "requests.csv", "trace.json", "metrics.json", "report.html"}

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("ruyi_flow.sim.run.write_report", fail)  # when all else is written
    with pytest.raises(error):
        simulate_into(Scenario.read(tmp_path / "s.yaml", ["seed=5"]), tmp_path / "run")
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before


def test_neither_torch_nor_grpc_is_imported(tmp_path: Path) -> None:
    profile().save(tmp_path / "p")
    (tmp_path / "s.yaml").write_text(json.dumps(data()))
    code = (
        "import sys\nfrom pathlib import Path\nfrom ruyi_flow.sim.run import Simulation\n"
        "from ruyi_flow.sim.scenario import Scenario\n"
        f"print(Simulation(Scenario.read({str(tmp_path / 's.yaml')!r})).run().metrics['tokens'])\n"
        "assert not {'torch', 'grpc', 'transformers'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "480\n", ran.stderr


@pytest.mark.parametrize("error", [KeyboardInterrupt, AssertionError])
def test_what_is_not_the_deployments_fault_ends_the_simulation(
    simulate: Simulate, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(VirtualSession, "look", fail)
    with pytest.raises(error):
        simulate(data())


def test_what_is_asked_before_is_not_counted_and_comes_first(simulate: Simulate) -> None:
    load = {"arrivals": {"kind": "closed", "users": 3}, "turns": {"think_s": 0}, "requests": 9}
    plain = simulate(data(load=load)).metrics
    found = simulate(data(load=load | {"before": 2})).metrics
    assert found["requests"] == plain["requests"] == 9
    assert found["simulated_s"] > plain["simulated_s"]


def test_what_does_not_count_costs_the_counted_tokens_nothing(simulate: Simulate) -> None:
    load = {"arrivals": {"kind": "closed"}, "turns": {"think_s": 0}, "answers": {"tokens": 20}, "requests": 10}
    asked = data(
        load=load, behaviour={"agreement": {2: 0.5, 4: 0.7}, "spread": 0.0}, policy={"mode": "exact", "draft": 0}
    )
    for node in asked["nodes"]:
        node |= {"idle_w": 1, "busy_w": 5, "price_per_hour": 1}
    plain = simulate(asked).metrics
    for more in ({"before": 30}, {"requests": 40, "warmup": 0.75}):
        asked["load"] = load | more
        found = simulate(asked).metrics
        assert found["requests"] == 10 and found["simulated_s"] > 3 * plain["simulated_s"]
        for key in ("joules_per_token", "usd_per_million_tokens", "tokens_per_s", "energy_j"):
            assert found[key] == pytest.approx(plain[key], rel=0.01), key
        for kind in ("nodes", "links"):
            for name, figures in plain[kind].items():
                wanted = {key: value for key, value in figures.items() if not isinstance(value, str)}
                assert {key: found[kind][name][key] for key in wanted} == pytest.approx(wanted, rel=0.01, abs=1e-9)
        carried = sum(link["bytes_up"] for link in found["links"].values())
        assert found["bytes_up_per_token"] * found["tokens"] == pytest.approx(carried)


def test_a_share_of_the_time_or_of_a_replay_is_not_counted(tmp_path: Path, simulate: Simulate) -> None:
    even = {"arrivals": {"kind": "even", "rate": 1}, "answers": {"tokens": 3}, "duration_s": 40}
    assert simulate(data(load=even)).metrics["requests"] == 40
    assert simulate(data(load=even | {"warmup": 0.495})).metrics["requests"] == 21
    (tmp_path / "log.csv").write_text("at_s\n" + "".join(f"{i}\n" for i in range(30)))
    replay = {"arrivals": {"kind": "replay", "file": "log.csv"}, "answers": {"tokens": 3}, "warmup": 0.2}
    assert simulate(data(load=replay)).metrics["requests"] == 24
    assert simulate(data(load=replay | {"requests": 10})).metrics["requests"] == 8


@pytest.mark.parametrize("arrivals", [{"kind": "closed", "users": 2}, {"kind": "even", "rate": 0.01}])
def test_a_run_lasts_as_long_as_it_says_though_nobody_waits_for_an_answer(
    simulate: Simulate, monkeypatch: pytest.MonkeyPatch, arrivals: dict[str, Any]
) -> None:
    monkeypatch.setattr("ruyi_flow.sim.run._EVENTS", 1)
    load = {"arrivals": arrivals, "turns": {"mean": 8, "think_s": 100}, "answers": {"tokens": 1}, "duration_s": 3000}
    found = simulate(data(((2, 4, 6),), load=load, policy={"mode": "fixed"})).metrics
    assert found["simulated_s"] > 2900
    assert 40 < found["requests"] < 400


@pytest.mark.parametrize(
    ("load", "total"),
    [
        ({"requests": 20, "before": 2}, 22),
        ({"arrivals": {"kind": "even"}, "duration_s": 30}, 30),
        ({"arrivals": {"kind": "replay", "file": "log.csv"}}, 3),
    ],
)
def test_progress_counts_requests_or_seconds_of_a_load_that_has_no_number_of_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: dict[str, Any], total: int
) -> None:
    monkeypatch.setattr("ruyi_flow.sim.run._EVENTS", 10)
    (tmp_path / "log.csv").write_text("at_s\n1\n2\n3\n")
    scenario = Scenario.from_data(data(load=load | {"answers": {"tokens": 5}}), base=tmp_path, where="test.yaml")
    seen: list[tuple[int, int]] = []
    Simulation(scenario, profiles=[profile()] * 3).run(lambda *done: seen.append(done))
    assert seen == sorted(seen) and {of for _, of in seen} == {total} and 0.6 * total < seen[-1][0] <= total


def test_a_step_after_a_pause_takes_longer(simulate: Simulate) -> None:
    warm, cold = profile(), profile(pauses_s=(0.01, 1.0), cold_s=(0.2, 0.5))
    assert (cold.cold(0.005), cold.cold(60.0), warm.cold(9.0)) == pytest.approx((0.1, 0.5, 0.0))
    asked = data(load={"arrivals": {"kind": "even", "rate": 0.01}, "requests": 4})
    took = [simulate(asked, costs).metrics["first_token_s"]["p50"] for costs in (warm, cold)]
    assert took[1] - took[0] >= 0.5 * 0.98


# ---- what goes wrong in a deployment ----


def test_a_node_that_is_down_fails_requests_or_leaves_them_to_shallower_ones(simulate: Simulate) -> None:
    asked = data(policy={"mode": "exact", "draft": 0})
    asked["nodes"][2]["down"] = [{"at_s": 5, "for_s": 5}]
    asked["links"][1]["recover_s"] = 0
    failing = simulate(asked).metrics
    assert 0 < failing["failed"] == failing["errors"]["NodeUnavailable"] < 40
    asked["policy"]["fallback"] = True
    falling = simulate(asked).metrics
    assert falling["failed"] == 0 and 0 < falling["decided"]["4"] and falling["decided"]["2"] == 0


def test_a_link_that_is_down_holds_messages_up_until_their_deadline(simulate: Simulate) -> None:
    asked = data(policy={"mode": "exact", "draft": 0})
    asked["links"][0]["down"] = [{"at_s": 5, "for_s": 4}]
    waiting = simulate(asked).metrics
    assert waiting["failed"] == 0 and 2.5 < waiting["total_s"]["p99"] < 6
    asked["links"][0]["timeout_s"] = 1
    late = simulate(asked).metrics
    assert late["failed"] == late["errors"]["DeadlineExceeded"] > 0


@pytest.mark.parametrize("far", [None, [{"at_s": 1e6, "for_s": 1}]])
def test_an_answer_that_is_late_fails_at_its_deadline(simulate: Simulate, far: list[dict[str, float]] | None) -> None:
    asked = data(((2,), (4, 6)), policy={"mode": "exact", "draft": 0})
    asked["load"] |= {"arrivals": {"kind": "even", "rate": 0.01}, "requests": 10, "prompts": {"tokens": 120}}
    asked["links"][0] |= {"up_mbit": 0.00125, "down": far or []}
    late = simulate(asked).metrics
    assert late["failed"] == late["errors"]["DeadlineExceeded"] == 10, "a prompt takes 54 s; there are 30"
    assert late["total_s"]["mean"] == 0 and 1030 < late["simulated_s"] < 1031
    asked["policy"]["fallback"] = True
    instead = simulate(asked).metrics
    assert instead["failed"] == 0 and 30 < instead["first_token_s"]["p50"] < 32
    asked["links"][0]["timeout_s"] = 60
    assert 54 < simulate(asked).metrics["first_token_s"]["p50"] < 55


def test_a_deadline_starts_anew_when_a_part_of_the_prompt_has_been_taken(simulate: Simulate) -> None:
    asked = data(((2,), (4, 6)), policy={"mode": "exact", "draft": 0})
    asked["load"] |= {"arrivals": {"kind": "even", "rate": 0.01}, "requests": 10, "prompts": {"tokens": 4 * 128}}
    asked["links"][0] |= {"up_mbit": 0.005, "timeout_s": 20}  # each part takes 14 s
    found = simulate(asked).metrics
    assert found["failed"] == 0 and found["first_token_s"]["p50"] > 50


def test_a_node_whose_answer_was_given_up_serves_the_others(simulate: Simulate) -> None:
    asked = data(
        ((2,), (4, 6)),
        policy={"mode": "exact", "draft": 0},
        load={"arrivals": {"kind": "closed", "users": 8}, "turns": {"think_s": 0}, "requests": 60}
        | {"prompts": {"kind": "uniform", "low": 1, "high": 1200}, "answers": {"tokens": 8}},
    )
    asked["nodes"][0]["count"] = 8
    asked["nodes"][1]["limits"] = {"max_step_positions": 16}
    asked["links"][0]["timeout_s"] = 1.2
    scenario = Scenario.from_data(asked, base=Path(), where="test.yaml")
    simulation = Simulation(scenario, profiles=[profile()] * 2)
    found = simulation.run().metrics
    assert found["requests"] == 60 and 10 < found["failed"] < 55
    there = simulation._cluster.instances[1][0]
    simulation._time.env.run(until=simulation._time.now() + 60)
    assert there.worker._busy is False and not there.worker._busy


def test_a_full_node_fails_prompts_that_come_in_parts(simulate: Simulate) -> None:
    asked = data(((2,), (4, 6)), policy={"mode": "exact", "draft": 0})
    asked["load"] |= {"prompts": {"tokens": 600}, "arrivals": {"rate": 10}}
    asked["nodes"][0]["count"] = 40
    asked["nodes"][1]["limits"] = {"max_sessions": 1, "max_waiting": 0}
    found = simulate(asked).metrics
    assert found["errors"].keys() == {"CapacityError"} and 20 < found["failed"] < 40


def test_an_entry_that_is_down_refuses_and_loses_its_sessions(simulate: Simulate) -> None:
    asked = data(load={"arrivals": {"kind": "even", "rate": 2}, "requests": 40, "answers": {"tokens": 12}})
    asked["nodes"][0]["down"] = [{"at_s": 5.3, "for_s": 5}]
    asked["client_recover_s"] = 0
    found = simulate(asked).metrics
    # Ten come while it is down; the one of second 5 is lost after some tokens.
    assert found["failed"] == found["errors"]["NodeUnavailable"] == 11
    assert 29 * 12 < found["tokens"] < 30 * 12
    asked["nodes"][0] |= {"down": [], "mtbf_s": 2, "mttr_s": 2}
    assert 5 < simulate(asked).metrics["failed"] < 35


def test_users_of_an_entry_that_is_down_ask_again_later(simulate: Simulate) -> None:
    load = {"arrivals": {"kind": "closed", "users": 2}, "turns": {"think_s": 0}, "duration_s": 30}
    asked = data(load=load)
    asked["nodes"][0]["down"] = [{"at_s": 10, "for_s": 10}]
    asked["client_recover_s"] = 0
    found = simulate(asked).metrics
    assert 20 <= found["failed"] <= 22 and found["requests"] > found["failed"] and found["simulated_s"] > 29


def test_a_links_outages_need_no_order_and_may_overlap(simulate: Simulate) -> None:
    found = []
    for down in (
        [{"at_s": 5, "for_s": 9}],
        [{"at_s": 8, "for_s": 6}, {"at_s": 5, "for_s": 4}],
        [{"at_s": 5, "for_s": 9}, {"at_s": 6, "for_s": 1}],
    ):
        asked = data(policy={"mode": "exact", "draft": 0})
        asked["links"][0]["down"] = down
        found.append(simulate(asked).metrics)
    assert found[0] == found[1] == found[2] and found[0]["total_s"]["p99"] > 8


def test_nodes_that_break_by_themselves_go_on_doing_so(simulate: Simulate) -> None:
    load = {"arrivals": {"kind": "even", "rate": 0.01}, "requests": 400, "answers": {"tokens": 1}}
    asked = data(load=load, policy={"mode": "exact", "draft": 0})
    asked["nodes"][1] |= {"mtbf_s": 2, "mttr_s": 2}  # 10,000 outages
    asked["links"][0]["recover_s"] = 0
    found = simulate(asked, folder=None)
    failed = found.metrics["failed"]
    assert 150 < failed < 260
    assert sum(found.recorder.timeline.rate("tokens")[-100:]) < 0.75 * 100 * 0.01, "at the end, too"


def test_nodes_that_break_by_themselves_are_down_for_their_share(simulate: Simulate) -> None:
    asked = data(policy={"mode": "exact", "draft": 0})
    asked["load"]["requests"] = 400
    asked["nodes"][1] |= {"mtbf_s": 9, "mttr_s": 1}
    asked["links"][0]["recover_s"] = 0
    found = simulate(asked).metrics
    assert 0.03 < found["failed"] / 400 < 0.3


def test_a_full_node_refuses_and_a_queue_lets_wait(simulate: Simulate) -> None:
    asked = data(load={"arrivals": {"kind": "even", "rate": 50}, "requests": 40, "answers": {"tokens": 12}})
    limits = {"max_sessions": 2, "max_waiting": 0}
    asked["nodes"][0]["limits"] = limits
    refused = simulate(asked).metrics
    assert refused["errors"]["CapacityError"] > 20
    asked["nodes"][0]["limits"] = limits | {"max_waiting": 100, "max_wait_s": 1000}
    assert simulate(asked).metrics["failed"] == 0


def test_nodes_on_one_machine_share_its_cores(simulate: Simulate) -> None:
    asked = data(
        ((2, 4, 6),) * 1,
        load={"arrivals": {"kind": "closed", "users": 2}, "turns": {"think_s": 0}, "requests": 20},
        policy={"mode": "fixed", "draft": 0},
    )
    asked["nodes"][0]["count"] = 2
    apart = simulate(asked).metrics["token_s"]["p50"]
    asked["hosts"] = {"box": {"cores": 1, "nodes": ["n0"]}}
    assert simulate(asked).metrics["token_s"]["p50"] == pytest.approx(2 * apart, rel=0.05)


def test_what_went_up_ahead_need_not_wait_for_the_question(simulate: Simulate) -> None:
    asked = data(
        ((2,), (4, 6)),
        policy={"mode": "token", "threshold": 0.35, "draft": 0},
        behaviour={"agreement": {2: 0.8, 4: 0.9}, "spread": 1.5},
        load={"arrivals": {"rate": 0.2}, "requests": 40, "prompts": {"tokens": 300}, "answers": {"tokens": 60}},
    )
    asked["links"][0] |= {"up_mbit": 1}
    late = simulate(asked).metrics
    asked["links"][0] |= {"upload": "ahead"}
    early = simulate(asked).metrics
    assert early["total_s"]["mean"] < 0.97 * late["total_s"]["mean"]
    assert early["links"]["n0-n1"]["bytes_up"] > late["links"]["n0-n1"]["bytes_up"]


def test_populations_are_shared_out_evenly(simulate: Simulate) -> None:
    asked = data(load={"arrivals": {"rate": 20}, "requests": 400, "answers": {"tokens": 3}})
    for node, count in zip(asked["nodes"], (100, 10, 2), strict=True):
        node["count"] = count
    found = simulate(asked).metrics["nodes"]
    assert found["n0"]["used"] > 90 and found["n1"]["used"] == 10 and found["n2"]["used"] == 2


# ---- what is wrong in a file ----


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"load": {"arrivals": {"rate": 0}, "requests": 1}}, "load.arrivals.rate: 0: must be 1e-06 or more"),
        ({"load": {"arrivals": {"rate": float("inf")}, "requests": 1}}, "load.arrivals.rate"),
        ({"load": {"arrivals": {"rate": 5e-324}, "requests": 1}}, "load.arrivals.rate: 5e-324: must be 1e-06 or more"),
        ({"load": {"warmup": 1, "requests": 1}}, "load.warmup: 1: "),
        ({"load": {"arrivals": {"rate": 1}}}, "it never ends; set requests"),
        ({"load": {"arrivals": {"rte": 1}, "requests": 1}}, "did you mean 'rate'?"),
        ({"load": None}, "load: this key is required"),
        ({"profile": None}, "nodes.0.profile: the costs of 'n0' are missing"),
        ({"behaviour": {"agreement": {2: 0.5}}}, "behaviour.agreement: has exits [2], but"),
        ({"behaviour": {"agreement": {2: 0.5, 4: 1.5}}}, "behaviour.agreement"),
        ({"trace": "t", "behaviour": {"agreement": {2: 0.5, 4: 0.6}}}, "trace and behaviour cannot be combined"),
        ({"hosts": {"h": {"cores": 2, "nodes": ["n7"]}}}, "hosts.h.nodes: no node 'n7'"),
        ({"links": [{"from": "n1", "to": "n0"}]}, "skips or goes back"),
        ({"seed": "x"}, "seed: 'x'"),
        ({"seed": -1}, "seed: -1: must be 0 or more"),
        (
            {"load": {"requests": 1, "prompts": {"kind": "lognormal", "sigma": 1e300}}},
            "load.prompts.sigma: 1e+300: must be at most 10",
        ),
        ({"load": {"requests": 1, "prompts": {"kind": "lognormal", "median": 1e300}}}, "load.prompts.median: 1e+300"),
        ({"load": {"requests": 1, 5: 4}}, "load.5: 5: a key must be a text"),
        ({"client_ms": float("inf")}, "client_ms: inf: must be a finite number"),
        ({"links": [{"from": "n0", "to": "n1", "loss": 0.5}]}, "links.0.loss: 0.5: must be below 0.5"),
        ({"links": [{"from": "n0", "to": "n1", "shared": 5}]}, "links.0.shared: 5: must be true or false"),
        (
            {"load": {"requests": 1, "arrivals": {"kind": "replay", "file": "none.csv"}}},
            "none.csv does not exist; give a CSV file",
        ),
    ],
)
def test_a_bad_scenario_fails_with_file_key_and_fix(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as failed:
        Scenario.from_data(data(**change), base=tmp_path, where="bad.yaml")
    assert says in str(failed.value) and str(failed.value).startswith("bad.yaml: ")


def test_files_that_do_not_go_with_a_scenario_are_refused(tmp_path: Path, tiny: Path) -> None:
    def build(**change: Any) -> None:
        Simulation(Scenario.from_data(data(**change), base=tmp_path, where="bad.yaml"), where="bad.yaml")

    with pytest.raises(ConfigError, match="bad.yaml: profile: .*no such profile; make it with: ruyi-flow profile"):
        build()
    with pytest.raises(ConfigError, match="bad.yaml: nodes.0.profile: .*q: no such profile"):
        build(nodes=[{"name": "n0", "exits": [2, 4, 6], "profile": "q"}], links=[])
    (tmp_path / "p").write_bytes(b"\x00\x01")
    with pytest.raises(ConfigError, match="not a profile"):
        build()
    profile().save(tmp_path / "p")
    raw = msgpack.unpackb((tmp_path / "p").read_bytes())
    for wrong in ({"hidden_size": "x"}, {"stages": 5}, {"stages": [raw["stages"][0] | {"rows": "abc"}]}):
        (tmp_path / "p").write_bytes(msgpack.packb(raw | wrong))
        with pytest.raises(ConfigError, match="not a profile .ruyi-flow profile writes one.: Input should be"):
            build()
    profile((2, 6)).save(tmp_path / "p")
    with pytest.raises(ConfigError, match=r"nodes.1.exits: the profile of 'n1' has no stage at exit 4"):
        build()
    profile().save(tmp_path / "p")
    with pytest.raises(ConfigError, match="trace: it is not known what the branches predict"):
        build(behaviour=None)
    with pytest.raises(
        ConfigError, match="bad.yaml: trace: .*t: cannot be read: No such.*; record a trace with ruyi-flow trace"
    ):
        build(behaviour=None, trace="t")
    record_trace(load_family(tiny, dtype="float32"), [Question((3, 4, 5))], tmp_path / "t", max_new_tokens=4)
    with pytest.raises(
        ConfigError, match="with fingerprint .*, but the costs of 'n0' are of a family with family; trace this family"
    ):
        build(behaviour=None, trace="t")
    with pytest.raises(ConfigError, match="unknown hardware 'h10'; known: snapdragon"):
        nodes = [{"name": "n0", "exits": [2, 4, 6], "hardware": "h10"}]
        build(profile=None, family="ruyi2", nodes=nodes, links=[])
    with pytest.raises(ConfigError, match="family: 'family' is neither a folder with a config.json nor one of ruyi-7b"):
        build(profile=None, nodes=[{"name": "n0", "exits": [2, 4, 6], "hardware": "l4"}], links=[])
    with pytest.raises(ConfigError, match="it has 8 GB"):
        nodes = [{"name": "n0", "exits": [2, 21, 39], "hardware": "raspberry-pi-5"}]
        build(profile=None, family="ruyi2", behaviour={"agreement": {2: 0.5, 21: 0.9}}, nodes=nodes, links=[])


def test_bytes_that_let_nothing_up_are_refused(simulate: Simulate) -> None:
    asked = data(((2,), (4, 6)))
    asked["links"][0] |= {"upload": "ahead", "ahead_bytes": 8}
    with pytest.raises(ConfigError, match=r"test.yaml: links.0.ahead_bytes: 8 is less than 8 positions"):
        simulate(asked)


def test_what_is_asked_must_fit_somewhere(tmp_path: Path, simulate: Simulate) -> None:
    asked = data(load={"requests": 3, "prompts": {"tokens": 5000}, "answers": {"tokens": 12}})
    with pytest.raises(
        ConfigError, match=r"test.yaml: load: no request fits: .* 5012 tokens, but the family's context is"
    ):
        simulate(asked)
    asked["load"]["prompts"] = {"kind": "uniform", "low": 20, "high": 5000}
    assert simulate(asked).metrics["failed"] < 3
    asked["nodes"][0]["limits"] = {"max_positions": 64}
    asked["load"] |= {"prompts": {"kind": "constant", "tokens": 60}}
    with pytest.raises(ConfigError, match=r"has 72 tokens, but nodes.0.limits.max_positions is 64: set shorter"):
        simulate(asked)
    (tmp_path / "log.csv").write_text("at_s,prompt_tokens,answer_tokens\n1,70,3\n2,60,4\n3,60,\n")
    asked["load"] = {"arrivals": {"kind": "replay", "file": "log.csv"}, "answers": {"tokens": 9}}
    assert simulate(asked).metrics["errors"] == {"RequestError": 2}


def test_a_replay_is_read_before_anything_is_written(tmp_path: Path) -> None:
    profile().save(tmp_path / "p")
    (tmp_path / "log.csv").write_text("at_s\n1\n2\nsoon\n")
    load = {"arrivals": {"kind": "replay", "file": "log.csv"}}
    scenario = Scenario.from_data(data(load=load), base=tmp_path, where="bad.yaml")
    with pytest.raises(ConfigError, match=r"bad.yaml: load.arrivals.file: .*log.csv, line 4: could not convert"):
        simulate_into(scenario, tmp_path / "run", where="bad.yaml")
    assert not (tmp_path / "run").exists()


def test_a_trace_of_another_family_is_refused(tmp_path: Path, tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    record_trace(load_family(tiny, dtype="float32"), [Question((3, 4, 5))], tmp_path / "t", max_new_tokens=4)

    def build(**change: Any) -> None:
        (tmp_path / "fam").mkdir(exist_ok=True)
        (tmp_path / "fam" / "config.json").write_text(json.dumps(config | change))
        nodes = [{"name": "n0", "exits": [2, 4, 6], "hardware": "l4"}]
        asked = data(profile=None, family=str(tmp_path / "fam"), nodes=nodes, links=[], behaviour=None, trace="t")
        Simulation(Scenario.from_data(asked, base=tmp_path, where="bad.yaml"), where="bad.yaml")

    build()
    with pytest.raises(ConfigError, match=r"bad.yaml: trace: .* hidden size 32, but the costs of 'n0' .* 128; trace"):
        build(hidden_size=128)
    with pytest.raises(
        ConfigError, match=r"bad.yaml: trace: .* layers per branch .*, but .* has \[1, 2, 1\]; trace this"
    ):
        build(early_exit_branch_layers=[1, 2, 1])


def test_a_topology_is_a_scenario_once_a_load_is_added(tmp_path: Path) -> None:
    (tmp_path / "topology.yaml").write_text(
        "family: family\n"
        "nodes:\n  - {name: a, address: '127.0.0.1:7101', exits: [2]}\n"
        "  - {name: b, address: '127.0.0.1:7102', exits: [4, 6], threads: 2}\n"
        "links: [{from: a, to: b, encoding: int8}]\npolicy: {mode: token, threshold: 0.5}\n"
    )
    (tmp_path / "what-if.yaml").write_text(
        "topology: topology.yaml\nprofile: p\nnodes: [{name: b, count: 1, speed: 2}]\n"
        "links: [{from: a, to: b, round_trip_ms: 30}]\n"
        "behaviour: {agreement: {2: 0.5, 4: 0.8}}\nload: {requests: 5}\n"
    )
    profile().save(tmp_path / "p")
    found = Scenario.read(tmp_path / "what-if.yaml", ["links.a-b.round_trip_ms=80", "nodes.a.count=3", "seed=4"])
    assert [(node.name, node.count, node.threads, node.speed) for node in found.nodes] == [
        ("a", 3, None, 1.0),
        ("b", 1, 2, 2.0),
    ]
    assert found.links[0].round_trip_ms == 80 and found.links[0].encoding == "int8" and found.seed == 4
    assert Simulation(found).run().metrics["requests"] == 5


def test_a_relative_family_folder_is_meant_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile().save(tmp_path / "p")
    for folder in ("here", "there", "there/below"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / "s.yaml").write_text(json.dumps(data(family="here")))
    monkeypatch.chdir(tmp_path / "there")
    assert Scenario.read(tmp_path / "s.yaml").family == str(tmp_path / "here")
    assert Scenario.read("../s.yaml", ["family=./here"]).family == str(tmp_path / "here")
    assert Scenario.read(tmp_path / "s.yaml", ["family=below"]).family == "below", "a name: it is not there"
    nodes = [{"name": "n0", "exits": [2, 4, 6], "shard": "below/shard"}]
    (tmp_path / "there" / "topology.yaml").write_text(json.dumps({"family": "./below", "nodes": nodes}))
    scenario = {key: value for key, value in data().items() if key not in ("family", "nodes", "links")}
    (tmp_path / "s.yaml").write_text(json.dumps({"topology": "there/topology.yaml", **scenario}))
    found = Scenario.read(tmp_path / "s.yaml")
    assert found.family == str(tmp_path / "there" / "below")
    assert found.nodes[0].shard == tmp_path / "there" / "below" / "shard"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("nodes.nx.count=5", "no 'nx' in nodes; it has n0, n1, n2"),
        ("links.n0-n2.loss=0.1", "no 'n0-n2' in links; it has n0-n1, n1-n2; did you mean"),
        ("nodes.n0.exits.7=3", "no '7' in nodes.n0.exits; it has 0"),
        ("seed=2020-13-45", "--set seed: '2020-13-45' is not valid YAML: month must be in 1..12"),
        ("load.requests=1:5", "YAML takes 1:5 for a number in base 60"),
        ("policy.thresholds={2: 0.5, 2: 0.6}", "the key '2' occurs twice"),
    ],
)
def test_what_cannot_be_set_is_said(tmp_path: Path, change: str, says: str) -> None:
    (tmp_path / "s.yaml").write_text(json.dumps(data()))
    with pytest.raises(ConfigError) as failed:
        Scenario.read(tmp_path / "s.yaml", [change])
    assert says in str(failed.value)


def test_a_run_needs_a_folder(run: Command, tmp_path: Path) -> None:
    profile().save(tmp_path / "p")
    (tmp_path / "s.yaml").write_text(json.dumps(data()))
    for out in ("s.yaml", "s.yaml/below"):
        code, _, err = run("simulate", str(tmp_path / "s.yaml"), "--out", str(tmp_path / out))
        assert code == 2 and err == f"error: --out {tmp_path / out}: {tmp_path / 's.yaml'} is a file; name a folder\n"


def test_a_tilde_is_the_home_folder_in_every_path_of_a_scenario(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "me"
    monkeypatch.setenv("HOME", str(home))
    nodes = [{"name": "a", "exits": [2, 4], "shard": "~/a"}]
    home.mkdir()
    (home / "below.yaml").write_text(json.dumps({"family": "~/f", "nodes": nodes, "policy": {"file": "~/p.yaml"}}))
    file = tmp_path / "scenario.yaml"
    load = {"requests": 1, "arrivals": {"kind": "poisson"}}
    (home / "p.yaml").write_text(
        json.dumps({"family": "x", "score": "margin", "mode": "token", "thresholds": {"2": 2.0}, "curves": {}})
    )
    file.write_text(json.dumps({"topology": "~/below.yaml", "profile": "~/costs.msgpack", "load": load}))
    found = Scenario.read(file)
    assert found.family == str(home / "f") and found.profile == home / "costs.msgpack"
    assert found.nodes[0].shard == home / "a" and found.policy.file == home / "p.yaml"
    own = {"family": "~/f", "nodes": nodes, "profile": "~/costs.msgpack", "load": load, "trace": "~/t.msgpack"}
    file.write_text(json.dumps(own))
    found = Scenario.read(file)
    assert found.nodes[0].shard == home / "a" and found.trace == home / "t.msgpack"
    for key, change in (("topology", {"topology": "~nosuchuser/x"}), ("trace", own | {"trace": "~nosuchuser/x"})):
        file.write_text(json.dumps(change))
        with pytest.raises(ConfigError, match=f"{key}: '~nosuchuser/x' cannot be a path"):
            Scenario.read(file)
