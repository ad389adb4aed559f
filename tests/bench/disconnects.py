"""How soon every node is free again after a client of the HTTP server has gone away."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from typing import Any

from ruyi_flow.bench.nodes import running_nodes
from ruyi_flow.client import AsyncClient
from ruyi_flow.http.serving import serve
from ruyi_flow.types import NodeStatus

_MOMENTS = 100
_CUTS = ((5, 11), (17, 23), (29,))


async def bench_disconnects(rounds: int) -> dict[str, Any]:
    """Seconds from a broken connection to the moment at which no node has a session, at 100 random moments.

    Three node processes of the demo family answer a long question through the server; the client hangs up within two
    seconds. The nodes are asked every few milliseconds, so the figures contain such a question.
    """
    moments, took_s, running = random.Random(1), [], 0
    async with running_nodes(_CUTS) as client, serve(client.topology, port=0) as listening:
        await _hang_up(listening.port, 2.0)  # warms up
        await _free(client)
        for _ in range(_MOMENTS):
            await _hang_up(listening.port, moments.uniform(0.0, 2.0))
            began = time.perf_counter()
            running += await _free(client) > 1
            took_s.append(time.perf_counter() - began)
    return {
        "median_s": statistics.median(took_s),
        "longest_s": max(took_s),
        "of_them_with_sessions": running,
        "goal": "longest_s <= 0.5",
    }


async def _hang_up(port: int, after_s: float) -> None:
    asked = {
        "model": "smollm2",
        "prompt": "Tell me a long story.",
        "max_tokens": 400,
        "stream": True,
        "ignore_eos": True,
    }
    body = json.dumps(asked).encode()
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await asyncio.sleep(after_s)
    writer.transport.abort()


async def _free(client: AsyncClient) -> int:
    """Ask the nodes until none has a session; return how often they were asked."""
    asked = 0
    while True:
        asked += 1
        states = (await client.status()).values()
        if not any(isinstance(state, NodeStatus) and (state.sessions or state.waiting) for state in states):
            return asked
        await asyncio.sleep(0.002)
