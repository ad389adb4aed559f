"""Measurements for the simulator (stages, running nodes, links), and the simulator against real processes."""

from pathlib import Path

import pytest

from ruyi_flow.bench.fidelity import (
    METRICS,
    Comparison,
    Failure,
    Setting,
    compare,
    compare_failures,
    markdown,
    summary,
)
from ruyi_flow.bench.measurement import describe_machine
from ruyi_flow.bench.profile.cores import estimate_cores, per_step
from ruyi_flow.bench.profile.family import profile_family
from ruyi_flow.bench.profile.nodes import profile_nodes
from ruyi_flow.errors import ConfigError, NodeUnavailable
from ruyi_flow.evaluation.scorers import Question
from ruyi_flow.evaluation.tracing import record_trace
from ruyi_flow.local import load_family
from ruyi_flow.sim.profile import Profile, StepCost
from ruyi_flow.sim.run import Simulation
from ruyi_flow.sim.scenario import Scenario
from ruyi_flow.testing import cluster, cut_topology, free_ports, tiny_family
from ruyi_flow.transport.link import measure_link
from tests.conftest import Command
from tests.sim.conftest import data, profile, stage

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_family(tmp_path_factory.mktemp("long") / "family", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def measured(family: Path) -> Profile:
    return profile_family(str(family), dtype="float32", rounds=1)


def test_a_profile_has_every_stage_and_comes_back_from_its_file(
    family: Path, measured: Profile, tmp_path: Path
) -> None:
    assert measured.exits == (2, 4, 6) and [stage.first_layer for stage in measured.stages] == [0, 2, 4]
    assert measured.kind == "measured" and measured.hidden_size == 32 and measured.context == 2048
    assert all(stage.trunk_s[0] > 0 and stage.rows[-1] == 256 for stage in measured.stages)
    assert measured.exchange_s > 0 and measured.round_s > 0 and measured.machine["cores_for_nodes"] > 0
    measured.save(tmp_path / "p")
    assert Profile.load(tmp_path / "p") == measured
    scenario = Scenario.from_data(data(), base=tmp_path, where="x.yaml")
    assert Simulation(scenario).run().metrics["failed"] == 0


def test_a_tokens_line_is_what_steps_cost() -> None:
    by_position = {"attended_s": 1e-6, "context_s": 2e-6, "branch_attended_s": 3e-6, "branch_context_s": 5e-6}
    costs = StepCost(stage(2, 0, **by_position, scale_s=7e-4), 0.7)
    for x in (1, 17, 900):
        for taken, read, scaled in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)):
            whole = costs.seconds(
                1, x - 0.5, x, taken=taken, read=read, read_attended=read * x, read_context=x, scaled=scaled
            )
            assert costs.seconds_of_one(x, bool(taken), read, scaled) == pytest.approx(whole, rel=1e-12) and whole > 0


def test_a_profile_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    profile().save(tmp_path / "new" / "p")
    assert Profile.load(tmp_path / "new" / "p") == profile()
    with pytest.raises(OSError, match="new"):
        profile().save(tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--link", "localhost:99999"), "--link localhost:99999: write it as host:port"),
        (("--link", "localhost"), "--link localhost: write it as host:port"),
        (("--out", "{folder}"), "is a folder; name a file"),
        (("--out", "{folder}/file/p"), "/file is a file; name a file in a folder"),
    ],
)
def test_what_cannot_be_profiled_is_refused_before_anything_is_measured(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("ruyi_flow.bench.profile.family.profile_family", lambda *_, **__: pytest.fail("it measured"))
    code, _, err = run("profile", *(a.format(folder=tmp_path) for a in arguments))
    assert code == 2 and err.startswith("error: ") and says in err and err.count("\n") == 1


def test_cores_are_seen_by_how_much_longer_steps_take_at_once() -> None:
    assert estimate_cores((0.01, 0.01), 0.01) == 3.0, "nobody waits for anybody"
    assert estimate_cores((0.01, 1e-6), 0.03) == pytest.approx(1.0, abs=0.02), "three without pauses on one core"
    assert estimate_cores((0.01, 1e-6), 0.015) == pytest.approx(2.0, abs=0.02)


def test_each_step_counts_the_same_whichever_process_ran_it() -> None:
    assert per_step([(1.0, 2.0, 10), (1.0, 1.0, 30)]) == (0.05, 0.075)


def test_a_context_that_is_too_short_is_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="has a context of 512; profiles need at least 1024"):
        profile_family(str(tiny), dtype="float32", rounds=1)


async def test_running_nodes_and_links_are_measured_from_outside(family: Path) -> None:
    async with cluster(cut_topology(family, [[2], [4, 6]])) as nodes:
        found = await profile_nodes(nodes.topology, rounds=1)
        link = await measure_link(str(nodes.topology.nodes[1].address), rounds=3, payload=100_000)
    assert found.exits == (2, 4, 6) and [stage.first_layer for stage in found.stages] == [0, 2, 4]
    assert all(stage.trunk_s[0] > 0 for stage in found.stages)
    assert 0 < link.round_trip_ms < 10_000 and link.up_mbit > 0
    with pytest.raises(NodeUnavailable, match="no answer"):
        await measure_link(f"127.0.0.1:{free_ports(1)[0]}")


async def test_real_nodes_and_simulated_ones_are_compared(family: Path, measured: Profile, tmp_path: Path) -> None:
    prompts = [[3 + (5 * i + j) % 57 for j in range(8 + 6 * i)] for i in range(4)]
    record_trace(
        load_family(family, dtype="float32"), [Question(tuple(p)) for p in prompts], tmp_path / "t", max_new_tokens=8
    )
    setting = Setting("cascade", 4.0, 100.0, 2)
    policy = tmp_path / "none.yaml"  # cascade has its own thresholds
    found = await compare(
        str(family), measured, tmp_path / "t", prompts, policy=policy, settings=[setting], requests=6, cores=2
    )
    [one] = found
    assert set(one.measured) == set(one.simulated) == set(summary(found))
    assert one.measured["bytes_per_token"] > 0 and one.simulated["token_ms"] > 0
    assert "| cascade | 4 ms | 100 | 2 |" in markdown(found, [], describe_machine(1))
    with pytest.raises(ConfigError, match="not a trace of these prompts"):
        await compare(str(family), measured, tmp_path / "t", [*prompts, [3]], policy=policy, settings=[setting])


async def test_lost_processes_and_simulated_ones_are_compared(family: Path, measured: Profile) -> None:
    ids = [3 + i % 57 for i in range(20)]
    [one] = await compare_failures(
        str(family), measured, ids, failures=[Failure("crash", context=72)], strikes=1, cores=2
    )
    assert len(one.measured) == len(one.simulated) == 1 and one.measured[0] > 0
    usual = max(measured.stage(p).trunk_s[0] for p in measured.exits)
    assert one.simulated[0] > 1e3 * usual, "the pause has the replay in it"
    other = Comparison(Setting("exact", 5.0, 10.0, 1), dict.fromkeys(METRICS, 1.0), dict.fromkeys(METRICS, 1.0))
    assert "| SIGKILL | 1 | 72 |" in markdown([other], [one], describe_machine(1))


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "configs" / "sim").glob("*.yaml")), ids=lambda f: f.stem
)
def test_every_scenario_that_is_here_runs(file: Path) -> None:
    found = Simulation(Scenario.read(file, ["load.requests=6"]), where=str(file)).run().metrics
    assert found["requests"] == 6 and found["failed"] == 0 and found["tokens"] > 6
