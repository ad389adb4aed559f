"""What counting and tracing cost a token: the calls alone, and traced requests against others on real nodes."""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ruyi_flow.client import AsyncClient
from ruyi_flow.loop.chain import Round
from ruyi_flow.serving.totals import Totals
from ruyi_flow.telemetry.chrome_trace import ChromeTracer, SharedTrace
from ruyi_flow.telemetry.counters import NodeCounters
from ruyi_flow.testing import cluster, cut_topology, tiny_family
from ruyi_flow.types import Decision, Hop, Reason

_CALLS = 20_000
_TOKENS = 200


async def bench_telemetry(rounds: int) -> dict[str, Any]:
    """Cost of metrics and traces a token, in microseconds, over three nodes of a tiny family.

    `counting_us` is all that three nodes count about a token that the last exit decides: steps, messages, one verified
    draft on two nodes, and the answer's totals. `traced_us` is what a recorded request pays more a token than another
    one; one in a hundred is recorded by default.
    """
    with TemporaryDirectory() as folder:
        family = await asyncio.to_thread(tiny_family, Path(folder) / "tiny")
        topology = cut_topology(family, [[2], [4], [6]])
        tracers = {
            node.name: ChromeTracer(SharedTrace(Path(folder) / "trace.json", node.name), 1.0) for node in topology.nodes
        }
        plain: list[float] = []
        traced: list[float] = []
        async with cluster(topology) as without, cluster(topology, tracers=tracers) as recorded:
            async with AsyncClient(without.topology) as first, AsyncClient(recorded.topology) as second:
                for i in range(rounds + 1):
                    for client, found in ((first, plain), (second, traced)):
                        took_us = await _token_us(client)
                        if i:
                            found.append(took_us)
        for tracer in tracers.values():
            await asyncio.to_thread(tracer.close)
    counting_us = await asyncio.to_thread(_counting_us)
    traced_us = statistics.median(b - a for a, b in zip(plain, traced, strict=True))
    token_us = statistics.median(plain)
    return {
        "counting_us": counting_us,
        "traced_us": traced_us,
        "token_us": token_us,
        "share_at_1_percent": (counting_us + 0.01 * traced_us) / token_us,
        "goal": "share_at_1_percent <= 0.02 of a token",
    }


async def _token_us(client: AsyncClient) -> float:
    options: dict[str, Any] = {"mode": "exact", "draft": 0, "max_new_tokens": _TOKENS, "eos_token_ids": ()}
    reply = await client.generate([5, 6, 7], **options)
    return 1e6 * reply.stats.token_s


def _counting_us() -> float:
    entry, middle, last = NodeCounters(), NodeCounters(), NodeCounters()
    totals = Totals(entry, {p: ("n2", "cloud") for p in (2, 4, 6)})
    hops = (Hop("n0", 0.001), Hop("n1", 0.001, wire_s=0.001), Hop("n2", 0.001))
    settled = Round((Decision(7, 6, 0.7, Reason.DEEPEST),), hops)
    began = time.perf_counter()
    for _ in range(_CALLS):
        for counters, exit in ((entry, 2), (middle, 4), (last, 6)):
            counters.steps[1].ran(exit, 0.001, 1)
        for counters, exit in ((entry, 2), (middle, 4)):
            counters.link.exchanged("next", messages=1, bytes_up=300, bytes_down=60, wire_s=0.001)
            counters.verify(exit, 0.7, is_calibrated=True, agrees=True)
        totals.add(settled, 0.01)
        totals.add_token(settled.decisions[0])
    return 1e6 * (time.perf_counter() - began) / _CALLS
