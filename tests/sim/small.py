"""A small deployment to simulate: a family of three exits on a phone, an edge node and a cloud node."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ruyi_flow.sim.profile import Profile, StageCost

EXITS = (2, 4, 6)


def profile(**changes: Any) -> Profile:
    """Return costs of 4 ms per stage and 1.2 ms per branch, which grow slowly up to 8 rows and fast beyond."""
    grows, rows = (1, 1.05, 1.1, 1.2, 3, 20), (1, 2, 4, 8, 64, 512)

    def times(seconds: float) -> tuple[float, ...]:
        return tuple(seconds * factor for factor in grows)

    sizes: dict[str, Any] = {"session_s": 2e-4, "weight_bytes": 1000, "kv_bytes": 10}
    stages = [StageCost(p, p - 2, rows, times(0.004), times(0.0004), times(0.0008), 1e-8, **sizes) for p in EXITS]
    made = Profile("measured", "made up for tests", "fam", 64, 2048, tuple(stages), exchange_s=0.001)
    return replace(made, **changes)


def scenario(folder: Path, **changes: Any) -> Path:
    """Write a profile and a scenario that uses it, and return the scenario's file.

    Args:
        changes: top-level keys of the scenario to set; None removes a key.
    """
    if not (folder / "costs.msgpack").exists():
        profile().save(folder / "costs.msgpack")
    data = {
        "family": "fam",
        "profile": "costs.msgpack",
        "nodes": [
            {"name": "phone", "exits": [2], "count": 8, "busy_w": 4},
            {"name": "edge", "exits": [4], "count": 2, "price_per_hour": 0.2},
            {"name": "cloud", "exits": [6], "price_per_hour": 1.2},
        ],
        "links": [
            {"from": "phone", "to": "edge", "round_trip_ms": 20, "up_mbit": 20, "encoding": "int8"},
            {"from": "edge", "to": "cloud", "round_trip_ms": 40, "up_mbit": 100},
        ],
        "policy": {"mode": "token", "threshold": 0.7, "draft": 4},
        "behaviour": {"agreement": {2: 0.5, 4: 0.7}},
        "load": {"arrivals": {"rate": 1.0}, "requests": 12, "answers": {"kind": "uniform", "low": 10, "high": 30}},
    } | changes
    path = folder / "scenario.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}, sort_keys=False))
    return path
