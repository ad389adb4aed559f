"""Small profiles and scenarios for the tests of the simulator."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ruyi_flow.sim.profile import Profile, StageCost
from ruyi_flow.sim.run import Result, Simulation
from ruyi_flow.sim.scenario import Scenario

EXITS = (2, 4, 6)


def stage(exit: int, first: int, step_s: float = 0.01, row_s: float = 0.0, **more: Any) -> StageCost:
    """Return a stage whose steps take step_s seconds and row_s more per row."""
    rows = (1, 512)
    return StageCost(
        exit, first, rows, (step_s + row_s, step_s + 512 * row_s), (0.001, 0.001), (0.002, 0.002 + 511 * 0.0001), **more
    )


def profile(exits: tuple[int, ...] = EXITS, **more: Any) -> Profile:
    """Return a profile of a family with these exits."""
    befores = (0, *exits)
    stages = tuple(stage(p, first) for p, first in zip(exits, befores, strict=False))
    return Profile("measured", "a test", "family", 32, 4096, stages, **more)


def data(cuts: tuple[tuple[int, ...], ...] = ((2,), (4,), (6,)), **changes: Any) -> dict[str, Any]:
    """Return the data of a scenario file with nodes n0, n1, …"""
    names = [f"n{i}" for i in range(len(cuts))]
    base: dict[str, Any] = {
        "family": "family",
        "profile": "p",
        "nodes": [{"name": name, "exits": list(cut)} for name, cut in zip(names, cuts, strict=True)],
        "links": [{"from": a, "to": b, "round_trip_ms": 20} for a, b in zip(names, names[1:], strict=False)],
        "policy": {"mode": "token", "threshold": 0.7, "draft": 2},
        "behaviour": {"agreement": {2: 0.5, 4: 0.7}},
        "load": {"arrivals": {"rate": 2.0}, "requests": 40, "prompts": {"tokens": 10}, "answers": {"tokens": 12}},
    }
    return {key: value for key, value in (base | changes).items() if value is not None}


Simulate = Callable[..., Result]


@pytest.fixture
def simulate(tmp_path: Path) -> Simulate:
    """Return a function that simulates a scenario given as data."""

    def run(given: dict[str, Any], costs: Profile | None = None, folder: Path | None = None) -> Result:
        scenario = Scenario.from_data(given, base=tmp_path, where="test.yaml")
        profiles = [costs or profile()] * len(scenario.nodes)
        return Simulation(scenario, where="test.yaml", folder=folder, profiles=profiles).run()

    return run
