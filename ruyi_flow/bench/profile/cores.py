"""How nodes that take turns share a machine's cores."""

from __future__ import annotations

import multiprocessing
import random
import statistics
import time
from typing import Any

import numpy as np
import torch

from ruyi_flow.bench.profile.stages import NEAR, filled, sweep
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint, parse_dtype
from ruyi_flow.family.loading import load_slice
from ruyi_flow.runtime.stage import Shard
from ruyi_flow.types import Weights

__all__ = ["AT_ONCE", "cores_for", "steps_at_once"]

AT_ONCE = 3
"""Processes that show how nodes share a machine's cores."""
_TURNS_S = 12.0
"""How long their steps are counted."""


def steps_at_once(family: str, dtype: str, weights: Weights | None, threads: int, count: int) -> tuple[float, float]:
    """What a step takes where so many processes do steps with pauses, and a pause; means."""
    context = multiprocessing.get_context("spawn")
    together, results = context.Barrier(count), context.Queue()
    processes = [
        context.Process(target=_take_turns, args=(family, dtype, weights, threads, i, together, results), daemon=True)
        for i in range(count)
    ]
    for process in processes:
        process.start()
    try:
        steps, pauses = zip(*(results.get(timeout=120) for _ in processes), strict=True)
        return statistics.mean(steps), statistics.mean(pauses)
    finally:
        for process in processes:
            process.join(10)


def _take_turns(
    family: str, dtype: str, weights: Weights | None, threads: int, seed: int, together: Any, results: Any
) -> None:
    """Steps with pauses between them that are about as long, as a node has them whose sessions are elsewhere."""
    torch.set_num_threads(threads)
    checkpoint, pause = Checkpoint(store.locate(family)), random.Random(seed).expovariate
    model = load_slice(
        checkpoint, checkpoint.config.exits, dtype=parse_dtype(dtype), device=torch.device("cpu"), weights=weights
    )
    shard = Shard(model, max_positions=1024, max_sessions=1)
    with torch.inference_mode():
        session = filled(shard, NEAR)
        length = sum(sweep([session], 1, "trunk"))
        together.wait(120)
        end, steps, paused, count = time.perf_counter() + _TURNS_S, 0.0, 0.0, 0
        while time.perf_counter() < end:
            session.rewind(NEAR)
            steps += sum(sweep([session], 1, "trunk"))
            began = time.perf_counter()
            time.sleep(pause(1 / length))
            paused, count = paused + time.perf_counter() - began, count + 1
        results.put((steps / count, paused / count))


def cores_for(alone: tuple[float, float], together_s: float) -> float:
    """How many cores it looks like to processes that do steps with pauses, by how much longer steps take at once; as
    many as there are processes at the most.

    With n of them in a step each is served at min(1, cores / n): the closed queue with one server of that rate (as for
    machines and their repairmen; Kleinrock 1975, 3.8), whose response time grows as the cores become fewer.
    """
    step_s, pause_s = alone

    def response(cores: float) -> float:
        share, shares, rates = 1.0, [1.0], [0.0]
        for n in range(1, AT_ONCE + 1):
            rates.append(min(n, cores) / step_s)
            share *= (AT_ONCE - n + 1) / pause_s / rates[n]
            shares.append(share)
        inside = sum(n * share for n, share in enumerate(shares))
        return inside / sum(share * rate for share, rate in zip(shares, rates, strict=True))

    tried = np.linspace(0.5, AT_ONCE, 251)
    return float(min(tried, key=lambda cores: abs(response(cores) - together_s)))
