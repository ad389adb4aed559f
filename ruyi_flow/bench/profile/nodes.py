"""Overheads around steps, measured with node processes, and profiles of running nodes, measured from outside."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import psutil

from ruyi_flow.bench.measurement import Report, no_report
from ruyi_flow.bench.nodes import generate_exactly, running_nodes
from ruyi_flow.bench.profile.messages import message_sizes
from ruyi_flow.bench.profile.stages import ROWS, non_decreasing
from ruyi_flow.client import AsyncClient
from ruyi_flow.config.topology import Topology
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.sim.profile import Profile, StageCost
from ruyi_flow.testing import Relay
from ruyi_flow.types import Stats

__all__ = ["measure_overheads", "measure_pauses", "profile_nodes"]

_DELAYS_S = (0.0, 0.01, 0.04)
"""One-way delays of links, which make nodes pause for different times between steps."""


async def measure_overheads(exits: Sequence[int], node_options: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Measure the seconds of rounds, requests and exchanges besides steps, as fields of `Profile`.

    The nodes are two processes on loopback; `node_options` are arguments of `running_nodes`.
    """
    report("groups of nodes", 0, 2 + len(_DELAYS_S))
    async with running_nodes([exits], **node_options) as client:
        await _answer(client, 16, 16)
        round_cpu = await _cpu_per_round(client, 0.0)
    report("groups of nodes", 1, 2 + len(_DELAYS_S))
    async with running_nodes([exits[:1], exits[1:]], **node_options) as client:
        await _answer(client, 16, 16)
        exchange_cpu = await _cpu_per_round(client, round_cpu)
        many_tokens = [await _answer(client, 4, 33) for _ in range(5)]
        short_prompts = [await _answer(client, 4, 1) for _ in range(9)]
        long_prompts = [await _answer(client, 100, 1) for _ in range(9)]
    round_s = statistics.median(_unaccounted_s(stats) / stats.new_tokens for stats in many_tokens)
    exchange_s = statistics.median(stats.hops[1].wire_s / stats.hops[1].messages for stats in many_tokens)
    long, short = ([stats.hops[1] for stats in answers] for answers in (long_prompts, short_prompts))
    more_s = statistics.median(hop.wire_s for hop in long) - statistics.median(hop.wire_s for hop in short)
    more_bytes = statistics.median(hop.bytes_up for hop in long) - statistics.median(hop.bytes_up for hop in short)
    return {
        "round_s": max(0.0, round_s),
        "request_s": max(0.0, statistics.median(map(_unaccounted_s, short_prompts)) - round_s),
        "exchange_s": max(0.0, exchange_s),
        "exchange_byte_s": max(0.0, more_s / more_bytes),
        "round_cpu_s": round_cpu,
        "exchange_cpu_s": exchange_cpu,
    }


async def measure_pauses(
    stages: Sequence[StageCost], node_options: Mapping[str, Any], report: Report
) -> dict[str, Any]:
    """Measure how much longer steps take after pauses than in `stages`, as fields of `Profile`.

    Node processes behind links of several delays wait for one another; `node_options` as in `measure_overheads`.
    """
    cuts = [part.tolist() for part in np.array_split([s.exit for s in stages], min(3, len(stages)))]
    warm_s = []
    for part in cuts:
        costs = [next(s for s in stages if s.exit == p) for p in part]
        last_s = costs[-1].branch_s[0] + costs[-1].head_s[0] if part is cuts[-1] else 0.0
        warm_s.append(sum(s.trunk_s[0] for s in costs) + last_s)
    pauses, cold = [], []
    for number, delay_s in enumerate(_DELAYS_S):
        report("groups of nodes", 2 + number, 2 + len(_DELAYS_S))
        relays = {i: Relay(delay_s=delay_s) for i in range(1, len(cuts))} if delay_s else None
        async with running_nodes(cuts, **node_options, relay_to=relays) as client:
            await _answer(client, 16, 16)
            found = [await _answer(client, 4, 33) for _ in range(3 if delay_s else 7)]
        token_s = statistics.median(stats.token_s for stats in found)
        steps_s = [statistics.median(s.hops[i].compute_s / s.new_tokens for s in found) for i in range(len(cuts))]
        pauses.append(token_s - statistics.mean(steps_s))
        cold.append(max(0.0, statistics.mean(a - b for a, b in zip(steps_s, warm_s, strict=True))))
    report("groups of nodes", 2 + len(_DELAYS_S), 2 + len(_DELAYS_S))
    return {"pauses_s": tuple(pauses), "cold_s": non_decreasing(cold)}


async def _cpu_per_round(client: AsyncClient, known_s: float) -> float:
    """CPU seconds per round of the nodes and this process together, less one thread's steps and `known_s`."""
    status = [answer for answer in (await client.status()).values() if not isinstance(answer, Exception)]
    processes = [psutil.Process(), *(psutil.Process(answer.process_id) for answer in status)]
    seconds = []
    for _ in range(5):
        before = sum(sum(process.cpu_times()[:2]) for process in processes)
        stats = await _answer(client, 4, 65)
        spent = sum(sum(process.cpu_times()[:2]) for process in processes) - before
        spent -= sum(hop.compute_s for hop in stats.hops)
        seconds.append(spent / 65 - known_s)
    return max(0.0, statistics.median(seconds))


async def _answer(client: AsyncClient, prompt_tokens: int, tokens: int, **options: Any) -> Stats:
    ids = [3 + 7 * i % 50 for i in range(prompt_tokens)]  # valid in any vocabulary
    return (await generate_exactly(client, ids, tokens, **options)).stats


def _unaccounted_s(stats: Stats) -> float:
    """Seconds of an answer that neither a node's compute nor its queue nor a link accounts for."""
    return stats.total_s - sum(hop.compute_s + hop.queue_s + hop.wire_s for hop in stats.hops)


async def profile_nodes(topology: Topology, *, rounds: int = 5, report: Report = no_report) -> Profile:
    """Measure running nodes by the compute times in the statistics of answers.

    A node reports one time for all its stages, which is divided among them by their numbers of layers. The costs of
    attention and of several sessions in a step cannot be seen from outside; they are 0 in the profile.

    Args:
        topology: the running nodes.
        rounds: runs of each measurement, of which the median counts.
        report: called with the progress.

    Raises:
        NodeError: a node does not answer.
    """
    checkpoint = Checkpoint(store.locate(topology.family), topology.exits)
    config, nodes = checkpoint.config, topology.nodes
    rows = tuple(n for n in ROWS if n <= 64)
    found: dict[tuple[bool, int], list[list[float]]] = defaultdict(lambda: [[] for _ in nodes])
    requests = [(looks, n) for _ in range(rounds) for n in rows for looks in (False, True)]
    async with AsyncClient(topology) as client:
        await _answer(client, 16, 16)
        for done, (looks, n) in enumerate(requests):
            stats = await _answer(client, n, 1, **({"mode": "token", "threshold": 1.0} if looks else {}))
            if len(stats.hops) == len(nodes):  # deeper nodes are not asked when a branch is fully confident
                for i, hop in enumerate(stats.hops):
                    found[looks, n][i].append(hop.compute_s)
            report("nodes", done, len(requests))
        many_tokens = [await _answer(client, 4, 17) for _ in range(rounds)]
        report("nodes", len(requests), len(requests))
    stages: list[StageCost] = []
    for i, node in enumerate(nodes):
        first = nodes[i - 1].exits[-1] if i else 0
        layers = [b - a for a, b in zip((first, *node.exits), node.exits, strict=False)]
        trunk_s = [statistics.median(found[False, n][i]) for n in rows]
        with_branch_s = statistics.median(found[True, 1][i] or [trunk_s[0]])
        head_s = 0.0 if i + 1 == len(nodes) else max(0.0, with_branch_s - trunk_s[0]) / len(node.exits)
        for p, depth in zip(node.exits, layers, strict=True):
            stage_s = non_decreasing([depth / sum(layers) * t for t in trunk_s])
            stages.append(StageCost(p, p - depth, rows, stage_s, (0.0,) * len(rows), (head_s,) * len(rows)))
    return Profile(
        kind="measured",
        source=f"nodes {', '.join(node.name for node in nodes)}, from outside",
        family=checkpoint.fingerprint,
        hidden_size=config.hidden_size,
        context=config.max_positions,
        stages=tuple(stages),
        round_s=max(0.0, statistics.median(_unaccounted_s(stats) / stats.new_tokens for stats in many_tokens)),
        **message_sizes(config.hidden_size, config.vocab_size, Policy.resolve(Routing(), config.exits)),
    )
