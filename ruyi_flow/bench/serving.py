"""A bench of many sessions at once on one node."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import numpy as np

from ruyi_flow.bench.nodes import check_whole, daemons, prompts
from ruyi_flow.bench.report import Measured, Report, Setup, ratio, settings, turns, unseen
from ruyi_flow.client import AsyncClient
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.types import Token

__all__ = ["serve"]

_THINGS = ("sky blue", "sea salty", "grass green", "sunset red", "moon bright", "ice slippery", "night dark")


async def serve(setup: Setup, *, sessions: int = 16, rate: float = 0.0, report: Report = unseen) -> Measured:
    """One node with the whole family: one session alone, then many at once, in turn.

    Args:
        sessions: how many.
        rate: of them that come in a second, on average, as a Poisson process; 0 for all at once.

    Raises:
        RuyiFlowError: an answer ended early.
    """
    checkpoint = Checkpoint(store.locate(setup.family))
    texts = [f"Question {i + 1}: why is the {_THINGS[i % len(_THINGS)]}?" for i in range(sessions)]
    asked = prompts(checkpoint, texts)
    room = max(map(len, asked)) + setup.tokens + 64  # and what the last page has left
    limits = {"max_sessions": sessions, "max_positions": max(2048, sessions * room), "grace_s": 1}
    speeds: dict[str, list[float]] = {"alone": [], "together": []}
    first: dict[str, list[float]] = {name: [] for name in speeds}
    each: dict[str, list[float]] = {name: [] for name in speeds}
    arrivals = np.random.default_rng(0)
    report("starting nodes", 0, 1)
    async with daemons(
        [checkpoint.config.exits],
        family=setup.family,
        dtype=setup.dtype,
        weights=setup.weights,
        device=setup.device,
        threads=setup.threads,
        limits=limits,
    ) as client:
        report("starting nodes", 1, 1)
        for name, counts in turns([*speeds], setup.rounds, report):
            coming = asked if name == "together" else asked[:1]
            gaps = arrivals.exponential(1 / rate, len(coming)) if rate else np.zeros(len(coming))
            gaps[0] = 0
            waits = np.cumsum(gaps).tolist()
            times = await asyncio.gather(
                *(_session(client, ids, setup.tokens, wait) for ids, wait in zip(coming, waits, strict=True))
            )
            if counts:
                ended, began = max(t[-1] for t in times), min(t[0] for t in times)
                speeds[name].append(len(coming) * setup.tokens / (ended - began))
                first[name] += [1e3 * (t[1] - t[0]) for t in times]
                each[name] += [1e3 * (t[-1] - t[1]) / (setup.tokens - 1) for t in times]
    results: dict[str, dict[str, float]] = {}
    for name, speed in speeds.items():
        results[name] = {"tokens_per_s": statistics.median(speed)}
        for what, values in (("first_token", first[name]), ("token", each[name])):
            results[name] |= {f"{what}_p{q}_ms": float(np.percentile(values, q)) for q in (50, 95)}
    results["together"] |= ratio("times_alone", speeds["together"], speeds["alone"])
    samples = {"tokens a second, all together": speeds, "ms to the first token": first, "ms a token": each}
    return Measured("serve", settings(setup, sessions=sessions, rate=rate), results, samples)


async def _session(client: AsyncClient, ids: Sequence[int], tokens: int, wait_s: float) -> list[float]:
    """When an answer was asked for, after a wait, and when each token of it came."""
    await asyncio.sleep(wait_s)
    options: dict[str, Any] = {"mode": "exact", "draft": 0, "max_new_tokens": tokens, "eos_token_ids": ()}
    times = [time.perf_counter()]
    async with aclosing(client.events(ids, **options)) as events:
        async for event in events:
            if isinstance(event, Token):
                times.append(time.perf_counter())
    check_whole("an answer", len(times) - 1, tokens)
    return times
