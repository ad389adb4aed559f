"""Plans: all cuts are considered, estimates are close to simulations, and the topology written can be deployed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ruyi_flow.calibration.trace import ExitRecord, Header, Record, Writer
from ruyi_flow.cli.options import networked
from ruyi_flow.config.policy_file import CurvePoints, PolicyFile
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import ConfigError
from ruyi_flow.routing.confidence import Score
from ruyi_flow.sim.costs import profiles_of
from ruyi_flow.sim.estimate import Estimate, Samples
from ruyi_flow.sim.plan import Candidate, Constraint, cuts, plan, with_cut
from ruyi_flow.sim.run import Simulation
from ruyi_flow.sim.scenario import Scenario
from ruyi_flow.types import Mode
from tests.conftest import Command
from tests.sim.small import EXITS, profile, scenario


def test_cuts_are_all_ways_to_share_the_exits_out() -> None:
    found = cuts((5, 11, 17, 23, 29), 3)
    assert len(found) == len(set(found)) == 1 + 4 + 4 + 6
    for cut in found:
        assert cut[0] and sum(cut, ()) == (5, 11, 17, 23, 29)
    assert cuts((2, 4), 3) == [((2, 4), (), ()), ((2,), (4,), ()), ((2,), (), (4,))]


def test_an_objective_is_constraints_joined_by_and() -> None:
    assert Constraint.parse("p95 token_s < 0.08 and agreement>=.9") == [
        Constraint("token_s", "p95", True, 0.08),
        Constraint("agreement", "", False, 0.9),
    ]
    assert Constraint("token_s", "p95", True, 0.08).excess(0.1) == pytest.approx(0.25)
    assert Constraint("agreement", "", False, 0.9).excess(0.95) == 0


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("fast", "write a metric, < or >, and a number"),
        ("p95 token < 1", "did you mean 'token_s'"),
        ("token_s < 1", "write mean, p50, p90, p95, p99 before token_s"),
        ("p42 token_s < 1", "write mean, p50"),
        ("p95 agreement > 1", "agreement has no 'p95'"),
    ],
)
def test_what_is_no_objective_is_refused(objective: str, message: str) -> None:
    with pytest.raises(ConfigError, match="--objective") as error:
        Constraint.parse(objective)
    assert message in str(error.value)


def estimate(asked: Scenario) -> Estimate:
    return Estimate(asked, profiles_of(asked, "x"), Samples.draw(asked, Simulation(asked).scripts, "x"))


QUIET = {
    "arrivals": {"kind": "even", "rate": 0.05},
    "requests": 150,
    "answers": {"tokens": 40},
    "prompts": {"tokens": 50},
}


@pytest.mark.parametrize("draft", [0, 4])
@pytest.mark.parametrize("cut", [((2,), (4,), (6,)), ((2, 4), (), (6,)), ((2, 4, 6), (), ())], ids=str)
def test_an_estimate_is_what_is_simulated_where_nobody_waits(tmp_path: Path, cut: Any, draft: int) -> None:
    """The two agree within 10 %: the draws differ, and the estimate does not model everything."""
    chosen = Candidate(cut, {2: 0.8, 4: 0.6}, draft, ())
    asked = with_cut(Scenario.read(scenario(tmp_path, load=QUIET)), cut, chosen)
    predicted, found = estimate(asked).metrics(chosen.thresholds, draft), Simulation(asked).run().metrics
    for metric in ("first_token_s", "token_s", "total_s"):
        assert predicted[metric]["mean"] == pytest.approx(found[metric]["mean"], rel=0.1), metric
    assert predicted["agreement"] == pytest.approx(found["agreement"], abs=0.02)
    for metric in ("joules_per_token", "usd_per_million_tokens", "tokens_per_s"):
        assert predicted[metric] == pytest.approx(found[metric], rel=0.1), metric
    assert predicted["bytes_up_per_token"] == pytest.approx(found["bytes_up_per_token"], rel=0.1)


def test_more_load_takes_longer_until_it_is_too_much(tmp_path: Path) -> None:
    means = []
    for rate in (0.1, 2, 6, 1000):
        asked = Scenario.read(scenario(tmp_path), [f"load.arrivals.rate={rate}"])
        means.append(estimate(asked).metrics({2: 0.8, 4: 0.6}, 0)["total_s"]["mean"])
    assert means == sorted(means) and means[0] < means[2] < means[3] == float("inf")


def test_users_who_ask_again_are_as_many_as_there_are(tmp_path: Path) -> None:
    load = {"arrivals": {"kind": "closed", "users": 4}, "requests": 200, "answers": {"tokens": 20}}
    asked = Scenario.read(scenario(tmp_path, load=load | {"turns": {"think_s": 1.0}}))
    predicted, found = estimate(asked).metrics({2: 0.7, 4: 0.7}, 4), Simulation(asked).run().metrics
    assert predicted["tokens_per_s"] / 20 * (predicted["total_s"]["mean"] + 1) == pytest.approx(4, rel=1e-3)
    assert predicted["tokens_per_s"] == pytest.approx(found["tokens_per_s"], rel=0.15)


def test_what_goes_past_a_node_that_is_left_out_takes_its_links(tmp_path: Path) -> None:
    planned = with_cut(Scenario.read(scenario(tmp_path)), ((2, 4), (), (6,)))
    (link,) = planned.links
    assert [node.name for node in planned.nodes] == ["phone", "cloud"] and planned.all_exits == EXITS
    assert (link.source, link.target, link.encoding) == ("phone", "cloud", "int8")
    assert (link.round_trip_ms, link.up_mbit, link.down_mbit) == (60, 20, None)


def test_a_plan_is_a_topology_that_can_be_deployed(run: Command, tmp_path: Path) -> None:
    path, out = scenario(tmp_path), tmp_path / "topology.yaml"
    # The phone cannot hold everything, and is too slow for it.
    profile(machine={"memory_bytes": 2000 + 2 * 10 * 16384}).save(tmp_path / "costs.msgpack")
    arguments = ("plan", str(path), "--objective", "p95 token_s < 0.2", "--finalists", "3", "--out", str(out))
    code, printed, err = run(*arguments)
    assert code == 0 and "chosen: phone" in printed and "written" in printed
    assert "cuts are not possible" in err and "limits.max_positions" in err
    made = networked(out)
    assert made == Topology.load(out) and made.all_exits == EXITS and 2 <= len(made.nodes)
    assert [node.address for node in made.nodes] == [f"127.0.0.1:{7101 + i}" for i in range(len(made.nodes))]
    routing = made.policy.routing()
    assert set(routing.thresholds or {}) == {2, 4} and routing.mode is Mode.TOKEN
    found = json.loads(run(*arguments, "--json")[1])
    assert found["met"] and len(found["finalists"]) == 3
    best = found["finalists"][0]
    assert best["exits"] == {node.name: list(node.exits) for node in made.nodes}
    assert best["simulated"]["p95 token_s"] < 0.2 and best["simulated"]["agreement"] >= 0.95
    kept = [
        f for f in found["finalists"] if f["simulated"]["p95 token_s"] < 0.2 and f["simulated"]["agreement"] >= 0.95
    ]
    assert best["simulated"]["bytes"] == min(f["simulated"]["bytes"] for f in kept)


def test_an_objective_that_nothing_meets_writes_nothing(run: Command, tmp_path: Path) -> None:
    out = tmp_path / "topology.yaml"
    objective = ("--objective", "p95 token_s < 0.0001", "--finalists", "2", "--out", str(out))
    code, printed, _ = run("plan", str(scenario(tmp_path)), *objective)
    assert code == 1 and not out.exists()
    assert "no finalist meets" in printed and "The closest: phone" in printed


def test_a_plan_with_a_policy_file_writes_another_beside_it(run: Command, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    header = Header("fam", "fam", EXITS, 64, {}, "bfloat16", 30, (Score.MAX_PROBABILITY,), (1.0,))
    with Writer(tmp_path / "trace.msgpack", header) as writer:
        for number in range(20):
            said = random.integers(1, 100, 30).astype(np.int32)
            exits = {}
            for p in EXITS:
                chance = np.ones(30) if p == EXITS[-1] else random.random(30)
                tokens = np.where(random.random(30) < chance, said, 0).astype(np.int32)
                exits[p] = ExitRecord(tokens, chance.astype(np.float32).reshape(30, 1, 1), 1.0, 1.0)
            writer.add(Record(number, str(number), 40, said, exits))
    straight = CurvePoints(temperature=1.0, scores=(0.0, 1.0), chances=(0.0, 1.0))
    old = PolicyFile(
        family="fam", score=Score.MAX_PROBABILITY, thresholds={2: 0.5, 4: 0.5}, curves={2: straight, 4: straight}
    )
    old.save(tmp_path / "policy.yaml")
    load = {"requests": 10, "prompts": {"kind": "trace"}, "answers": {"kind": "trace"}}
    changes = {"behaviour": None, "trace": "trace.msgpack", "policy": {"file": "policy.yaml", "draft": 2}, "load": load}
    path, out = scenario(tmp_path, **changes), tmp_path / "made" / "t.yaml"
    objective = ("--objective", "p95 token_s < 1 and p95 first_token_s < 5", "--minimize", "latency")
    code, printed, err = run("plan", str(path), *objective, "--finalists", "2", "--out", str(out))
    assert code == 0, printed + err
    made = PolicyFile.load(out.parent / "t.policy.yaml")
    assert made.curves == old.curves and made.thresholds != old.thresholds
    assert Topology.load(out).routing().thresholds == made.thresholds
    assert yaml.safe_load(out.read_text())["policy"]["file"] == "t.policy.yaml"


def test_what_cannot_be_planned_is_refused(tmp_path: Path) -> None:
    asked = Scenario.read(scenario(tmp_path))
    with pytest.raises(ConfigError, match="did you mean 'energy'"):
        plan(asked, "p95 token_s < 1", minimize="enrgy")
    with pytest.raises(ConfigError, match="policy: mode 'cascade' cannot be planned"):
        plan(Scenario.read(tmp_path / "scenario.yaml", ["policy.mode=cascade"]), "p95 token_s < 1")
    profile(machine={"memory_gb": 1e-6}).save(tmp_path / "costs.msgpack")
    with pytest.raises(ConfigError, match=r"no cut is possible: phone: exits .* need .* GB"):
        plan(asked, "p95 token_s < 1")
    whole = profile()
    replace(whole, stages=whole.stages[:2]).save(tmp_path / "half.msgpack")
    with pytest.raises(ConfigError, match=r"has no stage at exit 6"):
        Simulation(Scenario.read(tmp_path / "scenario.yaml", ["profile=half.msgpack"]))
    with pytest.raises(ConfigError, match=r"nodes.0.profile: has stages at exits \[2, 4\]"):
        plan(
            Scenario.read(tmp_path / "scenario.yaml", [f"nodes.phone.profile={tmp_path / 'half.msgpack'}"]),
            "mean token_s < 1",
        )


def test_a_plan_needs_a_file_before_it_searches(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = scenario(tmp_path)
    monkeypatch.setattr("ruyi_flow.sim.plan.plan", lambda *_, **__: pytest.fail("it searched"))
    for out, says in (
        (tmp_path, "is a folder; name a file"),
        (path / "x", "is a file; name a file in a"),
    ):
        code, _, err = run("plan", str(path), "--objective", "p95 token_s < 1", "--out", str(out))
        assert code == 2 and err.startswith("error: --out ") and says in err and err.count("\n") == 1
    assert not list(tmp_path.parent.glob(".*.new"))


def test_a_name_stays_a_name_where_a_folder_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, elsewhere = scenario(tmp_path), tmp_path / "elsewhere"
    (elsewhere / "fam").mkdir(parents=True)
    (elsewhere / "fam" / "config.json").write_text("{}")
    monkeypatch.chdir(elsewhere)
    asked = Scenario.read(path)
    assert asked.family == "fam" and with_cut(asked, ((2, 4), (), (6,))).family == "fam"
