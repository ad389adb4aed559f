"""A family's profile on this machine: its stages, and what goes on around them."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from ruyi_flow.bench.profile.cores import AT_ONCE, cores_for, steps_at_once
from ruyi_flow.bench.profile.messages import message_sizes
from ruyi_flow.bench.profile.nodes import measure_around, measure_pauses
from ruyi_flow.bench.profile.stages import NEAR, ROWS, SESSIONS, measure_stages
from ruyi_flow.bench.report import Report, machine, unseen
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

_FAR = 1024
"""The context that shows what attention costs, beside a near one."""


def profile_family(
    family: str,
    *,
    dtype: str = "bfloat16",
    weights: Weights | None = None,
    threads: int = 1,
    rounds: int = 7,
    report: Report = unseen,
) -> Profile:
    """Measure every stage of a family in this process, and what goes on around steps with two node processes.

    Stages run in turn, from the first to the last, so that each finds the caches as serving leaves them.

    Args:
        rounds: of each number of rows, the median counts.
        threads: CPU threads of every process.
        report: told how far it is.

    Raises:
        CheckpointError: the family cannot be read.
        ConfigError: the machine cannot run it so.
    """
    checkpoint = Checkpoint(store.locate(family))
    config = checkpoint.config
    torch.set_num_threads(threads)
    model = load_slice(checkpoint, config.exits, dtype=parse_dtype(dtype), device=torch.device("cpu"), weights=weights)
    far = min(_FAR, config.max_positions - 2 * ROWS[-1])
    if far <= NEAR:
        raise ConfigError(f"family {family!r} has a context of {config.max_positions}; profiles need 1024 at the least")
    room = far + 2 * ROWS[-1] + (SESSIONS + 2) * (NEAR + 2 * ROWS[-1])
    shard = Shard(model, max_positions=room, max_sessions=SESSIONS + 2)
    stages = measure_stages(shard, far, rounds, report)
    weight = sum(p.numel() * p.element_size() for p in model.parameters())
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
        machine=machine(threads) | {"weight_bytes": weight},
        step_s=asyncio.run(_handover(shard, threads)),
        **message_sizes(config.hidden_size, config.vocab_size, Policy.resolve(Routing(), config.exits)),
    )
    del shard, model
    report("steps at once", 0, 2)
    alone = steps_at_once(family, dtype, weights, threads, 1)
    report("steps at once", 1, 2)
    found.machine["cores_for_nodes"] = round(
        cores_for(alone, steps_at_once(family, dtype, weights, threads, AT_ONCE)[0]), 3
    )
    report("steps at once", 2, 2)
    if len(config.exits) > 1:
        nodes: dict[str, Any] = {"family": family, "dtype": dtype, "weights": weights, "threads": threads}
        report("nodes", 0, 2)
        around = asyncio.run(measure_around(config.exits, nodes))
        report("nodes", 1, 2)
        found = replace(found, **around, **asyncio.run(measure_pauses(stages, nodes)))
        report("nodes", 2, 2)
    return found


async def _handover(shard: Shard, threads: int) -> float:
    """What a task takes on its way to the compute thread and back."""
    worker = ThreadWorker(threads)
    session = open_session(shard, Policy.resolve(Routing(draft=0), shard.exits), SamplingParams(), 1, 256)
    took = []
    try:
        for position in range(60):
            session.token_ids.append(1)

            def task(position: int = position) -> Task[None]:
                yield Pass(session, 0, session.embed((1,)), ())

            began = time.perf_counter()
            _, _, ran = await worker.run(task())
            took.append(time.perf_counter() - began - ran)
    finally:
        worker.shutdown()
        session.close()
    return statistics.median(took)
