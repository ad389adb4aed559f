"""Measurement of how many cores a machine offers to node processes that compute at the same time."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ruyi_flow.bench.profile.stages import NEAR_CONTEXT, filled_session, time_stages
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint, parse_dtype
from ruyi_flow.family.loading import load_slice
from ruyi_flow.runtime.stage import Shard
from ruyi_flow.types import Weights

__all__ = ["CONTENDERS", "concurrent_step_times", "estimate_cores", "per_step"]

CONTENDERS = 3
"""Processes that compete for the machine's cores in the measurement."""
_MEASURED_S = 12.0
"""Seconds during which the processes' steps are timed."""


def concurrent_step_times(
    family: str, *, dtype: str, weights: Weights | None, threads: int, processes: int
) -> tuple[float, float]:
    """Run steps with random pauses in several processes at once; return the mean seconds of a step and of a pause."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    options = {"dtype": dtype, "weights": weights, "threads": threads}
    workers = [
        context.Process(target=_run_steps, args=(family, seed, barrier, results), kwargs=options, daemon=True)
        for seed in range(processes)
    ]
    with _ctrl_c_blocked():
        for worker in workers:
            worker.start()
    try:
        return per_step([results.get(timeout=120) for _ in workers])
    finally:
        for worker in workers:
            worker.terminate()
            worker.join(10)


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Start processes in this block: Ctrl-C in a terminal reaches this process only, which ends them without traces."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the processes inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def per_step(results: Sequence[tuple[float, float, int]]) -> tuple[float, float]:
    """Return the mean seconds of a step and of a pause from each process's seconds of both and number of steps."""
    stepped_s, paused_s, counts = (sum(values) for values in zip(*results, strict=True))
    return stepped_s / counts, paused_s / counts


def _run_steps(
    family: str, seed: int, barrier: Any, results: Any, *, dtype: str, weights: Weights | None, threads: int
) -> None:
    """Alternate steps with pauses about as long as a step, like a node whose sessions wait for other nodes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    checkpoint, random_pause = Checkpoint(store.locate(family)), random.Random(seed).expovariate
    model = load_slice(
        checkpoint, checkpoint.config.exits, dtype=parse_dtype(dtype), device=torch.device("cpu"), weights=weights
    )
    shard = Shard(model, max_positions=1024, max_sessions=1)
    with torch.inference_mode():
        session = filled_session(shard, NEAR_CONTEXT)
        step_s = sum(time_stages([session], 1, "trunk"))
        barrier.wait(120)
        end, stepped_s, paused_s, count = time.perf_counter() + _MEASURED_S, 0.0, 0.0, 0
        while time.perf_counter() < end:
            session.rewind(NEAR_CONTEXT)
            stepped_s += sum(time_stages([session], 1, "trunk"))
            began = time.perf_counter()
            time.sleep(random_pause(1 / step_s))
            paused_s, count = paused_s + time.perf_counter() - began, count + 1
        results.put((stepped_s, paused_s, count))


def estimate_cores(alone: tuple[float, float], concurrent_s: float) -> float:
    """Estimate how many cores explain the slowdown of steps of `CONTENDERS` processes at once, at most as many.

    With n processes in a step, each progresses at the rate min(1, cores / n): a closed queue with one server of that
    rate (the machine-repairman model; Kleinrock 1975, 3.8), whose response time grows as the cores become fewer.

    Args:
        alone: mean seconds of a step and of a pause of one process alone.
        concurrent_s: mean seconds of a step of the processes at once.
    """
    step_s, pause_s = alone

    def response_s(cores: float) -> float:
        weight, weights, rates = 1.0, [1.0], [0.0]
        for n in range(1, CONTENDERS + 1):
            rates.append(min(n, cores) / step_s)
            weight *= (CONTENDERS - n + 1) / pause_s / rates[n]
            weights.append(weight)
        in_steps = sum(n * weight for n, weight in enumerate(weights))
        return in_steps / sum(weight * rate for weight, rate in zip(weights, rates, strict=True))

    candidates = np.linspace(0.5, CONTENDERS, 251)
    return float(min(candidates, key=lambda cores: abs(response_s(cores) - concurrent_s)))
