"""A family's profile on this machine: the times of its stages, and the overheads of nodes around them."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from ruyi_flow.bench.measurement import Report, describe_machine, no_report
from ruyi_flow.bench.profile.cores import CONTENDERS, concurrent_step_times, estimate_cores
from ruyi_flow.bench.profile.messages import message_sizes
from ruyi_flow.bench.profile.nodes import measure_overheads, measure_pauses
from ruyi_flow.bench.profile.stages import NEAR_CONTEXT, ROWS, SESSIONS, measure_stages
from ruyi_flow.errors import ConfigError
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint, parse_dtype
from ruyi_flow.family.loading import load_slice
from ruyi_flow.loop.session import Pass
from ruyi_flow.loop.steps import Task
from ruyi_flow.requests import SamplingParams
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.runtime.stage import Shard
from ruyi_flow.runtime.worker import ThreadWorker
from ruyi_flow.sim.profile import Profile
from ruyi_flow.testing import open_session
from ruyi_flow.types import Weights

__all__ = ["profile_family"]

_FAR_CONTEXT = 1024
"""Longer of the two contexts whose difference gives the cost of attention."""


def profile_family(
    family: str,
    *,
    dtype: str = "bfloat16",
    weights: Weights | None = None,
    threads: int = 1,
    rounds: int = 7,
    report: Report = no_report,
) -> Profile:
    """Measure every stage of a family in this process, and the overheads around steps with two node processes.

    Stages run one after the other, from the first to the last, so that each finds the CPU caches as in serving.

    Args:
        family: folder of the family, or its name in the store.
        dtype: number format of hidden states: bfloat16, float32 or float16.
        weights: number format of the weight matrices. Default: as in the family.
        threads: CPU threads of each process.
        rounds: runs of each measurement, of which the median counts.
        report: called with the progress.

    Raises:
        CheckpointError: the family cannot be read.
        ConfigError: the family's context is too short, or this machine cannot run it with these settings.
    """
    checkpoint = Checkpoint(store.locate(family))
    config = checkpoint.config
    torch.set_num_threads(threads)
    report("loading the family", 0, 0)
    model = load_slice(checkpoint, config.exits, dtype=parse_dtype(dtype), device=torch.device("cpu"), weights=weights)
    far = min(_FAR_CONTEXT, config.max_positions - 2 * ROWS[-1])
    if far <= NEAR_CONTEXT:
        raise ConfigError(f"family {family!r} has a context of {config.max_positions}; profiles need at least 1024")
    capacity = far + 2 * ROWS[-1] + (SESSIONS + 2) * (NEAR_CONTEXT + 2 * ROWS[-1])
    shard = Shard(model, max_positions=capacity, max_sessions=SESSIONS + 2)
    stages = measure_stages(shard, far, rounds, report)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    found = Profile(
        kind="measured",
        source=f"ruyi-flow profile {family}",
        family=checkpoint.fingerprint,
        hidden_size=config.hidden_size,
        context=config.max_positions,
        stages=stages,
        dtype=dtype,
        weights="" if weights is None else str(weights),
        threads=threads,
        machine=describe_machine(threads) | {"weight_bytes": weight_bytes},
        step_s=asyncio.run(_handover_s(shard, threads)),
        **message_sizes(config.hidden_size, config.vocab_size, Policy.resolve(Routing(), config.exits)),
    )
    del shard, model
    options: dict[str, Any] = {"dtype": dtype, "weights": weights, "threads": threads}
    alone = concurrent_step_times(family, **options, processes=1, rounds=rounds, report=report)
    concurrent_s, _ = concurrent_step_times(family, **options, processes=CONTENDERS, rounds=rounds, report=report)
    found.machine["cores_for_nodes"] = round(estimate_cores(alone, concurrent_s), 3)
    if len(config.exits) > 1:
        node_options = {"family": family, **options}
        overheads = asyncio.run(measure_overheads(config.exits, node_options, report))
        found = replace(found, **overheads, **asyncio.run(measure_pauses(stages, node_options, report)))
    return found


async def _handover_s(shard: Shard, threads: int) -> float:
    """Median seconds that a task spends on its way to the compute thread and back."""
    worker = ThreadWorker(threads)
    session = open_session(
        shard, Policy.resolve(Routing(draft=0), shard.exits), SamplingParams(), prompt_length=1, max_positions=256
    )
    seconds = []

    def task() -> Task[None]:
        yield Pass(session, 0, session.embed((1,)), ())

    try:
        for _ in range(60):
            session.token_ids.append(1)
            began = time.perf_counter()
            _, _, computed_s = await worker.run(task())
            seconds.append(time.perf_counter() - began - computed_s)
    finally:
        await asyncio.to_thread(worker.shutdown)
        session.close()
    return statistics.median(seconds)
