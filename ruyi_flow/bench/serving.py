"""A benchmark of many sessions at once on one node."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from ruyi_flow.bench.measurement import Measurement, Report, Setup, interleaved, no_report, ratios
from ruyi_flow.bench.nodes import running_nodes, token_times, tokenize_prompts
from ruyi_flow.client import AsyncClient
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint

__all__ = ["serve"]

_TOPICS = ("sky blue", "sea salty", "grass green", "sunset red", "moon bright", "ice slippery", "night dark")


async def serve(setup: Setup, *, sessions: int = 16, rate: float = 0.0, report: Report = no_report) -> Measurement:
    """Measure one node that has the whole family: one session alone and many at once, in interleaved rounds.

    Args:
        setup: settings of the benchmark.
        sessions: number of concurrent sessions.
        rate: mean arrivals per second of a Poisson process. Default 0: all sessions arrive at once.
        report: called with the progress.

    Raises:
        RuyiFlowError: an answer ended early.
    """
    checkpoint = Checkpoint(store.locate(setup.family))
    texts = [f"Question {i + 1}: why is the {_TOPICS[i % len(_TOPICS)]}?" for i in range(sessions)]
    prompts = tokenize_prompts(checkpoint, texts)
    capacity = max(map(len, prompts)) + setup.tokens + 64  # 64: the unused rest of a session's last page
    limits = {"max_sessions": sessions, "max_positions": max(2048, sessions * capacity), "grace_s": 1}
    throughput: dict[str, list[float]] = {"alone": [], "together": []}
    ttft_ms: dict[str, list[float]] = {name: [] for name in throughput}
    tpot_ms: dict[str, list[float]] = {name: [] for name in throughput}
    rng = np.random.default_rng(0)
    report("starting nodes", 0, 0)
    async with running_nodes([checkpoint.config.exits], **setup.node_options, limits=limits) as client:
        for name, is_measured in interleaved([*throughput], setup.rounds, report):
            sent = prompts if name == "together" else prompts[:1]
            gaps = rng.exponential(1 / rate, len(sent)) if rate else np.zeros(len(sent))
            gaps[0] = 0
            arrivals = np.cumsum(gaps).tolist()
            times = await asyncio.gather(
                *(_session(client, ids, setup.tokens, at) for ids, at in zip(sent, arrivals, strict=True))
            )
            if is_measured:
                ended, began = max(t[-1] for t in times), min(t[0] for t in times)
                throughput[name].append(len(sent) * setup.tokens / (ended - began))
                ttft_ms[name] += [1e3 * (t[1] - t[0]) for t in times]
                tpot_ms[name] += [1e3 * (t[-1] - t[1]) / (setup.tokens - 1) for t in times]
    results: dict[str, dict[str, float]] = {}
    for name, tokens_per_s in throughput.items():
        results[name] = {"tokens_per_s": statistics.median(tokens_per_s)}
        for what, values in (("first_token", ttft_ms[name]), ("token", tpot_ms[name])):
            results[name] |= {f"{what}_p{q}_ms": float(np.percentile(values, q)) for q in (50, 95)}
    results["together"] |= ratios("times_alone", throughput["together"], throughput["alone"])
    samples = {"tokens per second, all sessions": throughput, "ms to first token": ttft_ms, "ms per token": tpot_ms}
    return Measurement("serve", asdict(setup) | {"sessions": sessions, "rate": rate}, results, samples)


async def _session(client: AsyncClient, ids: Sequence[int], tokens: int, arrival_s: float) -> list[float]:
    """Ask after `arrival_s`; return the time of the request and of each token, in seconds of one clock."""
    await asyncio.sleep(arrival_s)
    return await token_times(client, ids, tokens)
