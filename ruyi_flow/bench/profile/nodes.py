"""What is around steps, measured with node processes; and running nodes, measured from outside."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import psutil

from ruyi_flow.bench.nodes import ask, daemons
from ruyi_flow.bench.profile.messages import message_sizes
from ruyi_flow.bench.profile.stages import ROWS, ascending
from ruyi_flow.bench.report import Report, unseen
from ruyi_flow.client import AsyncClient
from ruyi_flow.config.topology import Topology
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.sim.profile import Profile, StageCost
from ruyi_flow.testing import Relay
from ruyi_flow.types import Stats

__all__ = ["measure_around", "measure_pauses", "profile_nodes"]

_DELAYS_S = (0.0, 0.01, 0.04)
"""Of links, for what steps take after pauses of different lengths."""


async def measure_around(exits: Sequence[int], nodes: Mapping[str, Any]) -> dict[str, Any]:
    """What rounds, requests and exchanges take beyond steps: two node processes on loopback."""
    async with daemons([exits], **nodes) as client:
        await _asked(client, 16, 16)
        round_cpu = await _processor_time(client, 0.0)
    async with daemons([exits[:1], exits[1:]], **nodes) as client:
        await _asked(client, 16, 16)
        exchange_cpu = await _processor_time(client, round_cpu)
        many = [await _asked(client, 4, 33) for _ in range(5)]
        few = [await _asked(client, 4, 1) for _ in range(9)]
        long = [await _asked(client, 100, 1) for _ in range(9)]
    around = statistics.median(_rest(stats) / stats.new_tokens for stats in many)
    exchange = statistics.median(stats.hops[1].wire_s / stats.hops[1].messages for stats in many)
    more = statistics.median(s.hops[1].wire_s for s in long) - statistics.median(s.hops[1].wire_s for s in few)
    size = statistics.median(s.hops[1].bytes_up for s in long) - statistics.median(s.hops[1].bytes_up for s in few)
    return {
        "round_s": max(0.0, around),
        "request_s": max(0.0, statistics.median(map(_rest, few)) - around),
        "exchange_s": max(0.0, exchange),
        "exchange_byte_s": max(0.0, more / size),
        "round_cpu_s": round_cpu,
        "exchange_cpu_s": exchange_cpu,
    }


async def measure_pauses(stages: Sequence[StageCost], nodes: Mapping[str, Any]) -> dict[str, Any]:
    """What steps take more after pauses: nodes behind links of some delays, whose steps wait for one another."""
    cuts = [part.tolist() for part in np.array_split([s.exit for s in stages], min(3, len(stages)))]
    known = []
    for part in cuts:
        of = [next(s for s in stages if s.exit == p) for p in part]
        known.append(sum(s.trunk_s[0] for s in of) + (part is cuts[-1]) * (of[-1].branch_s[0] + of[-1].head_s[0]))
    pauses, cold = [], []
    for delay in _DELAYS_S:
        relays = {i: Relay(delay_s=delay) for i in range(1, len(cuts))} if delay else None
        async with daemons(cuts, **nodes, relay_to=relays) as client:
            await _asked(client, 16, 16)
            found = [await _asked(client, 4, 33) for _ in range(3 if delay else 7)]
        token = statistics.median(stats.token_s for stats in found)
        took = [statistics.median(s.hops[i].compute_s / s.new_tokens for s in found) for i in range(len(cuts))]
        pauses.append(token - statistics.mean(took))
        cold.append(max(0.0, statistics.mean(a - b for a, b in zip(took, known, strict=True))))
    return {"pauses_s": tuple(pauses), "cold_s": ascending(cold)}


async def _processor_time(client: AsyncClient, round_s: float) -> float:
    """Of a round, or beyond that of an exchange: all that nodes and this process take but for steps, of one thread."""
    status = [answer for answer in (await client.status()).values() if not isinstance(answer, Exception)]
    processes = [psutil.Process(), *(psutil.Process(answer.process_id) for answer in status)]
    took = []
    for _ in range(5):
        before = sum(sum(process.cpu_times()[:2]) for process in processes)
        stats = await _asked(client, 4, 65)
        spent = sum(sum(process.cpu_times()[:2]) for process in processes) - before
        spent -= sum(hop.compute_s for hop in stats.hops)
        took.append(spent / 65 - round_s)
    return max(0.0, statistics.median(took))


async def _asked(client: AsyncClient, prompt: int, tokens: int, **options: Any) -> Stats:
    ids = [3 + 7 * i % 50 for i in range(prompt)]  # in any vocabulary
    return (await ask(client, ids, tokens, **options)).stats


def _rest(stats: Stats) -> float:
    """Of an answer's time, what no node and no link accounts for."""
    return stats.total_s - sum(hop.compute_s + hop.queue_s + hop.wire_s for hop in stats.hops)


async def profile_nodes(topology: Topology, *, rounds: int = 5, report: Report = unseen) -> Profile:
    """Measure running nodes by what they say of the time that answers took them.

    A node does not tell its stages apart, so their time is shared out by their layers. What attention costs, and what
    several sessions in a step cost, is not seen from there: those figures are 0.

    Raises:
        NodeError: one of them does not answer.
    """
    checkpoint = Checkpoint(store.locate(topology.family), topology.exits)
    config, nodes = checkpoint.config, topology.nodes
    rows = tuple(n for n in ROWS if n <= 64)
    found: dict[tuple[bool, int], list[list[float]]] = defaultdict(lambda: [[] for _ in nodes])
    turns = [(looks, n) for _ in range(rounds) for n in rows for looks in (False, True)]
    async with AsyncClient(topology) as client:
        await _asked(client, 16, 16)
        for done, (looks, n) in enumerate(turns):
            stats = await _asked(client, n, 1, **({"mode": "token", "threshold": 1.0} if looks else {}))
            if len(stats.hops) == len(nodes):  # a branch that is entirely sure leaves deeper nodes out
                for i, hop in enumerate(stats.hops):
                    found[looks, n][i].append(hop.compute_s)
            report("nodes", done, len(turns))
        around = [await _asked(client, 4, 17) for _ in range(rounds)]
        report("nodes", len(turns), len(turns))
    stages: list[StageCost] = []
    for i, node in enumerate(nodes):
        first = nodes[i - 1].exits[-1] if i else 0
        layers = [b - a for a, b in zip((first, *node.exits), node.exits, strict=False)]
        trunk = [statistics.median(found[False, n][i]) for n in rows]
        looking = statistics.median(found[True, 1][i] or [trunk[0]])
        for p, depth in zip(node.exits, layers, strict=True):
            part = depth / sum(layers)
            head = 0.0 if i + 1 == len(nodes) else max(0.0, looking - trunk[0]) / len(node.exits)
            spent = ascending([part * t for t in trunk])
            stages.append(StageCost(p, p - depth, rows, spent, (0.0,) * len(rows), (head,) * len(rows)))
    return Profile(
        kind="measured",
        source=f"nodes {', '.join(node.name for node in nodes)}, from outside",
        family=checkpoint.fingerprint,
        hidden_size=config.hidden_size,
        context=config.max_positions,
        stages=tuple(stages),
        round_s=max(0.0, statistics.median(_rest(stats) / stats.new_tokens for stats in around)),
        **message_sizes(config.hidden_size, config.vocab_size, Policy.resolve(Routing(), config.exits)),
    )
