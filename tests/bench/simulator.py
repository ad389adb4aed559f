"""Time and memory of the simulator itself, by the number of simulated tokens."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

SIZES = (10_000, 100_000, 1_000_000)
"""Approximate numbers of simulated tokens."""

SCENARIO = Path("configs/sim/three-tiers.yaml")
_TOKENS_PER_REQUEST = 50
"""Mean tokens of a request in that scenario."""


def bench_simulator(rounds: int) -> dict[str, Any]:
    """Seconds and memory of a three-tier scenario: medians, every run in its own process."""
    return _by_size(SIZES, rounds) | {"goal": "1,000,000 tokens in at most 60 s, memory independent of the tokens"}


def bench_simulator_long(rounds: int) -> dict[str, Any]:
    """Seconds and memory of up to ten million simulated tokens, one run each."""
    return _by_size((1_000_000, 3_000_000, 10_000_000), 1) | {"goal": "the same time per token"}


def _by_size(sizes: tuple[int, ...], rounds: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {}
    with context.Pool(1, maxtasksperchild=1) as pool:
        for size in sizes:
            runs = [pool.apply(_simulated, (size,)) for _ in range(rounds)]
            tokens, all_seconds = runs[0][0], sorted(seconds for _, seconds, _ in runs)
            seconds = statistics.median(all_seconds)
            found |= {
                f"{size}_tokens": tokens,
                f"{size}_seconds": seconds,
                f"{size}_all_seconds": json.dumps([round(s, 1) for s in all_seconds]),
                f"{size}_us_a_token": 1e6 * seconds / tokens,
                f"{size}_more_memory_mb": max(grown for _, _, grown in runs),
            }
    slopes = [found[f"{b}_seconds"] - found[f"{a}_seconds"] for a, b in zip(sizes, sizes[1:], strict=False)]
    counts = [found[f"{b}_tokens"] - found[f"{a}_tokens"] for a, b in zip(sizes, sizes[1:], strict=False)]
    found["slopes_us_a_token"] = json.dumps([round(1e6 * s / n, 1) for s, n in zip(slopes, counts, strict=True)])
    return found


def _simulated(tokens: int) -> tuple[int, float, float]:
    """Return tokens, seconds, and the MB by which the process grew after the first tenth."""
    import psutil

    from ruyi_flow.sim.run import Simulation
    from ruyi_flow.sim.scenario import Scenario

    scenario = Scenario.read(SCENARIO, [f"load.requests={max(1, tokens // _TOKENS_PER_REQUEST)}"])
    sizes: list[int] = []
    began = time.perf_counter()

    def progress(done: int, total: int) -> None:
        if done > total / 10:
            sizes.append(psutil.Process().memory_info().rss)

    metrics = Simulation(scenario, where=str(SCENARIO)).run(progress).metrics
    seconds = time.perf_counter() - began
    return metrics["tokens"], seconds, (max(sizes) - sizes[0]) / 1e6 if sizes else 0.0
