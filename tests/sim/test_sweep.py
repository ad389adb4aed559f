"""Sweeps: the same results as single simulations, nothing simulated twice, no process left behind."""

import csv
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ruyi_flow.errors import ConfigError
from ruyi_flow.sim.run import Simulation
from ruyi_flow.sim.scenario import Scenario
from ruyi_flow.sim.shapes import SMOLLM2
from ruyi_flow.sim.sweep import (
    METRICS,
    Axis,
    MeanOverSeeds,
    Point,
    half_width,
    pareto_front,
    plot_front,
    sweep,
    write_tables,
)
from tests.conftest import Command
from tests.sim.small import profile, scenario


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a=1,2,4", (1, 2, 4)),
        ("a=1:9:4", (1, 5, 9)),
        ("a=0.5:0.9:0.1", (0.5, 0.6, 0.7, 0.8, 0.9)),
        ("a=0:1:0.4", (0.0, 0.4, 0.8)),
        ("a=int8,null,bf16", ("int8", None, "bf16")),
        ("a=[2],[2, 4]", ([2], [2, 4])),
    ],
)
def test_a_grid_is_a_list_or_a_range_with_both_ends(text: str, values: tuple[object, ...]) -> None:
    assert Axis.parse(text) == Axis("a", values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "write key=1,2,4"),
        ("a=", "write key=1,2,4"),
        ("a=2:1:1", "low <= high"),
        ("a=1:2:0", "a step above 0"),
        ("a=0:1:1e-9", "use a larger step"),
        ("a=[1", "is not valid YAML: expected ',' or ']'"),
        ("a=1:5", "a range is low:high:step, as in 1:5:1"),
        ("a=1,1:05", "YAML takes 1:05 for a number in base 60"),
        ("a=2020-13-45", "month must be in 1..12"),
        ("seed=1,2", "--repeat"),
    ],
)
def test_what_is_no_grid_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="--grid") as error:
        Axis.parse(text)
    assert message in str(error.value)


@pytest.mark.parametrize(("n", "t"), [(2, 12.7062), (3, 4.3027), (4, 3.1824), (5, 2.7764), (10, 2.2622), (30, 2.0452)])
def test_half_widths_are_students(n: int, t: float) -> None:
    values = [0.0] * (n - 1) + [1.0]
    deviation = math.sqrt(1 / n)  # of such values, with n - 1
    assert half_width(values) == pytest.approx(t * deviation / math.sqrt(n), rel=1e-4)
    assert half_width([3.0]) is None


def point(name: str, answered: bool = True, **figures: float) -> Point:
    return Point({"name": name}, {key: MeanOverSeeds(figures.get(key, 0.0), None) for key in METRICS}, answered)


def test_the_front_is_what_nothing_else_beats() -> None:
    points = [
        point("fast", token_p95_s=1, bytes_up_per_token=9, agreement=0.9),
        point("slim", token_p95_s=2, bytes_up_per_token=5, agreement=0.9),
        point("beaten", token_p95_s=2, bytes_up_per_token=6, agreement=0.9),
        point("as slim", token_p95_s=2, bytes_up_per_token=5, agreement=0.9),
        point("right", token_p95_s=3, bytes_up_per_token=9, agreement=1.0),
        point("silent", answered=False, agreement=1.0),
        point("refusing", token_p95_s=0.5, agreement=1.0, failed=0.02),
    ]
    best = [p.keys["name"] for p, is_best in zip(points, pareto_front(points), strict=True) if is_best]
    assert best == ["fast", "slim", "as slim", "right"]


def test_a_sweep_finds_what_single_simulations_find(tmp_path: Path) -> None:
    path, seen = scenario(tmp_path), []
    axes = [Axis.parse("nodes.edge.count=1,2"), Axis.parse("policy.threshold=0.5,0.9")]
    points = sweep(path, axes, tmp_path / "out", repeat=2, progress=lambda *done: seen.append(done))
    assert [tuple(p.keys.values()) for p in points] == [(1, 0.5), (1, 0.9), (2, 0.5), (2, 0.9)]
    assert seen[0] == (0, 8) and seen[-1] == (8, 8)
    changed = ["nodes.edge.count=2", "policy.threshold=0.5"]
    runs = [Simulation(Scenario.read(path, [*changed, f"seed={seed}"])).run().metrics for seed in (0, 1)]
    found = points[2].statistics
    times = [m["token_s"]["p95"] for m in runs]
    assert found["token_p95_s"] == MeanOverSeeds(sum(times) / 2, half_width(times))
    assert found["beyond_first"].mean == pytest.approx(sum(1 - m["decided"]["2"] for m in runs) / 2)
    table, pareto = write_tables(tmp_path / "out", points)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == 4 and float(rows[2]["token_p95_s"]) == pytest.approx(sum(times) / 2, rel=1e-5)
    assert len(list(csv.DictReader(pareto.read_text().splitlines()))) == sum(pareto_front(points))
    pytest.importorskip("matplotlib")
    assert plot_front(tmp_path / "out", points).read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    path, out = scenario(tmp_path), tmp_path / "out"
    axes = [Axis.parse("policy.threshold=0.5,0.9")]
    first = sweep(path, axes, out, repeat=1)
    files = sorted(out.glob("*.json"))
    assert len(files) == 2
    marked = json.loads(files[0].read_text()) | {"tokens_per_s": 12345.0}
    files[0].write_text(json.dumps(marked))
    files[1].write_text('{"cut off')
    again = sweep(path, axes, out, repeat=1)
    rates = {p.statistics["tokens_per_s"].mean for p in again}
    assert 12345.0 in rates and len(rates & {p.statistics["tokens_per_s"].mean for p in first}) == 1
    profile(exchange_s=0.5).save(tmp_path / "costs.msgpack")  # the same scenario over other costs is another run
    other = sweep(path, axes, out, repeat=1)
    assert len(list(out.glob("*.json"))) == 4
    assert other[1].statistics["token_p95_s"].mean > first[1].statistics["token_p95_s"].mean


def test_another_shape_of_the_family_is_another_run(tmp_path: Path) -> None:
    family, out = tmp_path / "mine", tmp_path / "out"
    family.mkdir()
    nodes = [{"name": "whole", "exits": [5, 11, 17, 23, 29], "hardware": "l4"}]
    agreement = {5: 0.4, 11: 0.5, 17: 0.7, 23: 0.8}
    changes = {"family": "mine", "profile": None, "nodes": nodes, "links": None, "behaviour": {"agreement": agreement}}
    path = scenario(tmp_path, **changes)
    found = []
    for size in (1536, 3072, 1536):
        (family / "config.json").write_text(json.dumps({**SMOLLM2, "intermediate_size": size}))
        [one] = sweep(path, [Axis.parse("load.requests=2")], out, repeat=1, jobs=1)
        found.append(one.statistics["token_p95_s"].mean)
    assert found[0] < found[1] and found[0] == found[2]
    assert len(list(out.glob("*.json"))) == 2


def test_an_error_at_any_point_is_raised_before_the_first_run(tmp_path: Path) -> None:
    path, out = scenario(tmp_path), tmp_path / "out"
    for grid, message in (
        (
            "nodes.edge.count=1,99",
            "scenario.yaml at nodes.edge.count=99: nodes.1.count: 99 of 'edge' are more than the 8 of 'phone'",
        ),
        ("policy.treshold=0.5", "policy: unknown option 'treshold'; did you mean 'threshold'"),
        ("nodes.hedge.count=1", "no 'hedge' in nodes; it has phone, edge, cloud; did you mean 'edge'?"),
        ("client_ms=2020-12-25", "client_ms: datetime.date(2020, 12, 25): must be a number"),
        ("client_ms=.nan", "client_ms: must be"),
        (
            "policy.threshold=0.5,-1,-2",
            "it must be a number from 0 (always decide) to 1 (above it: never) (1 more of",
        ),
    ):
        with pytest.raises(ConfigError) as error:
            sweep(path, [Axis.parse(grid)], out)
        assert message in str(error.value)
    assert not out.exists()
    with pytest.raises(ConfigError, match="is given twice"):
        sweep(path, [Axis.parse("seeds=1"), Axis.parse("seeds=2")], out)
    with pytest.raises(ConfigError, match="--set seed=7: .*--repeat 5 for seeds 0 to 4"):
        sweep(path, [Axis.parse("policy.threshold=0.5")], out, overrides=["seed=7"])
    with pytest.raises(ConfigError, match=r"at policy.threshold=0.5: profile: .*none.msgpack cannot be read: No such"):
        every = [f"nodes.{name}.profile=costs.msgpack" for name in ("phone", "edge", "cloud")]
        sweep(path, [Axis.parse("policy.threshold=0.5")], out, overrides=[*every, "profile=none.msgpack"])
    assert not out.exists()


MISSING_RAY = "error: ruyi-flow sweep needs Ray, which is not installed: pip install 'ruyi-flow[ray]'\n"


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_a_missing_ray_is_one_line(run: Command, tmp_path: Path) -> None:
    grid = ("--grid", "nodes.edge.count=1", "--out", str(tmp_path / "out"))
    code, out, err = run("sweep", str(scenario(tmp_path)), *grid, "--ray", "auto")
    assert code == 2 and out == "" and err == MISSING_RAY


def test_the_command_prints_a_table_or_json(run: Command, tmp_path: Path) -> None:
    arguments = ("sweep", str(scenario(tmp_path)), "--grid", "policy.threshold=0.5,0.9", "--out", str(tmp_path / "out"))
    code, out, err = run(*arguments, "--repeat", "2")
    assert code == 0 and "*" in out and "±" in out and "results.csv" in err
    found = json.loads(run(*arguments, "--repeat", "2", "--json")[1])
    assert [p["keys"] for p in found["points"]] == [{"policy.threshold": 0.5}, {"policy.threshold": 0.9}]
    assert all(set(p["statistics"]) == set(METRICS) for p in found["points"])


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_behind(tmp_path: Path, number: signal.Signals) -> None:
    path, out = scenario(tmp_path), tmp_path / "out"
    command = [sys.executable, "-m", "ruyi_flow.cli", "sweep", str(path), "--out", str(out), "--jobs", "2"]
    command += ["--grid", "policy.threshold=0.05:0.95:0.01", "--set", "load.requests=200"]
    # A group of its own: Ctrl-C on a terminal reaches the whole of it.
    sweeping = subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # As on a terminal: what a shell starts in the background, these tests perhaps, ignores Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not list(out.glob("*.json")):
            assert sweeping.poll() is None, sweeping.stderr.read() if sweeping.stderr else ""
            time.sleep(0.05)
        children = psutil.Process(sweeping.pid).children(recursive=True)
        assert len(children) >= 2
        if number is signal.SIGINT:
            os.killpg(sweeping.pid, number)
        else:
            sweeping.kill()
        _, err = sweeping.communicate(timeout=30)
    finally:
        sweeping.kill()
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert sweeping.returncode == (130 if number is signal.SIGINT else -signal.SIGKILL)
    assert b"Traceback" not in err
    for file in out.glob("*.json"):
        assert json.loads(file.read_text())["tokens"]
