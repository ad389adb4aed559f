"""Measurement of how many cores a machine offers to node processes that compute at the same time."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from ruyi_flow.bench.measurement import Report, no_report
from ruyi_flow.bench.profile.stages import NEAR_CONTEXT, filled_session, time_stages
from ruyi_flow.child_processes import child_processes
from ruyi_flow.errors import ConfigError
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint, parse_dtype
from ruyi_flow.family.loading import load_slice
from ruyi_flow.runtime.stage import Shard
from ruyi_flow.types import Weights

__all__ = ["CONTENDERS", "concurrent_step_times", "estimate_cores", "per_step"]

CONTENDERS = 3
"""Processes that compete for the machine's cores in the measurement."""
_ROUND_S = 1.75
"""Seconds of each round, during which the processes' steps are timed."""


def concurrent_step_times(
    family: str,
    *,
    dtype: str,
    weights: Weights | None,
    threads: int,
    processes: int,
    rounds: int,
    report: Report = no_report,
) -> tuple[float, float]:
    """Run steps with random pauses in several processes at once; return the mean seconds of a step and of a pause."""
    measured_s = rounds * _ROUND_S
    what = f"seconds of steps in {processes} process{'es' if processes > 1 else ''}"
    options = {"dtype": dtype, "weights": weights, "threads": threads, "measured_s": measured_s}
    with child_processes(processes, _run_steps, family, options) as connections:
        try:
            report(f"starting {processes} process{'es' if processes > 1 else ''}", 0, 0)
            for connection in connections:
                connection.recv()  # it is ready
            for seed, connection in enumerate(connections):
                connection.send(seed)
            began = time.monotonic()
            while not connections[0].poll(1.0):
                report(what, int(time.monotonic() - began), int(measured_s))
            report(what, int(measured_s), int(measured_s))
            return per_step([connection.recv() for connection in connections])
        except (EOFError, ConnectionError):
            raise ConfigError("a measuring process ended early (out of memory?); its own message is above") from None


def per_step(results: Sequence[tuple[float, float, int]]) -> tuple[float, float]:
    """Return the mean seconds of a step and of a pause from each process's seconds of both and number of steps."""
    stepped_s, paused_s, counts = (sum(values) for values in zip(*results, strict=True))
    return stepped_s / counts, paused_s / counts


def _run_steps(connection: Connection, family: str, options: Mapping[str, Any]) -> None:
    """Alternate steps with pauses about as long as a step, like a node whose sessions wait for other nodes."""
    torch.set_num_threads(options["threads"])
    checkpoint = Checkpoint(store.locate(family))
    model = load_slice(
        checkpoint,
        checkpoint.config.exits,
        dtype=parse_dtype(options["dtype"]),
        device=torch.device("cpu"),
        weights=options["weights"],
    )
    shard = Shard(model, max_positions=1024, max_sessions=1)
    with torch.inference_mode():
        session = filled_session(shard, NEAR_CONTEXT)
        step_s = sum(time_stages([session], 1, "trunk"))
        connection.send(None)
        random_pause = random.Random(connection.recv()).expovariate
        end, stepped_s, paused_s, count = time.perf_counter() + options["measured_s"], 0.0, 0.0, 0
        while time.perf_counter() < end:
            session.rewind(NEAR_CONTEXT)
            stepped_s += sum(time_stages([session], 1, "trunk"))
            began = time.perf_counter()
            time.sleep(random_pause(1 / step_s))
            paused_s, count = paused_s + time.perf_counter() - began, count + 1
        connection.send((stepped_s, paused_s, count))


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
