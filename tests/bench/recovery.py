"""How long a user waits when a node dies or hangs in the middle of an answer, and what a parked conversation saves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from ruyi_flow.bench.nodes import generate_exactly, tokenize_prompts
from ruyi_flow.client import AsyncClient
from ruyi_flow.config.topology import Topology
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.serving.supervisor import supervise
from ruyi_flow.testing import free_ports
from ruyi_flow.types import NodeStatus

_CONTEXT = 256
"""Tokens of the prompt and the answer when the node is lost."""

_BEFORE, _AFTER = 40, 6
"""Tokens of the answer before the loss, and after it."""

_MOST_DEATHS = 3
"""Times that nodes die under one supervisor."""

_TURN = 2000
"""Tokens of the conversation whose second turn is measured."""


@asynccontextmanager
async def _two_replicas(park_s: float) -> AsyncIterator[AsyncClient]:
    """Run the demo family as a device and two replicas of a cloud, each a process, and yield a client of them."""
    exits = Checkpoint(store.locate(store.DEMO)).config.exits
    ports = free_ports(3)
    common: dict[str, Any] = {"threads": 1, "limits": {"max_positions": 8192, "grace_s": 1, "park_s": park_s}}
    written = {
        "family": store.DEMO,
        "nodes": [
            {"name": "device", "address": f"127.0.0.1:{ports[0]}", "exits": list(exits[:2]), **common},
            {
                "name": "cloud",
                "address": [f"127.0.0.1:{port}" for port in ports[1:]],
                "exits": list(exits[2:]),
                **common,
            },
        ],
        "links": [{"from": "device", "to": "cloud"}],
    }
    with TemporaryDirectory() as folder:
        path = Path(folder) / "topology.yaml"
        path.write_text(yaml.safe_dump(written), encoding="utf-8")
        topology = Topology.load(path)
        async with supervise(path, topology, lambda node, line: None) as supervisor:
            await supervisor.start()
            async with AsyncClient(topology) as client:
                yield client


async def _busy_replica(client: AsyncClient) -> int:
    """Return the process id of the cloud replica that has a session."""
    states = await client.status()
    return next(s.process_id for s in states.values() if isinstance(s, NodeStatus) and s.next_node == "" and s.sessions)


async def _gap_s(client: AsyncClient, ids: list[int], sent: int) -> tuple[float, float, list[int]]:
    """Signal the replica in use; return the wait for the next token, the usual time of one, and the tokens."""
    options: dict[str, Any] = {"mode": "exact", "draft": 0, "max_new_tokens": _BEFORE + _AFTER, "eos_token_ids": ()}
    times: list[float] = []
    killed, struck = 0, 0.0
    async with client.stream(ids, **options) as stream:
        async for _ in stream:
            times.append(time.perf_counter())
            if len(times) == _BEFORE:
                killed = await _busy_replica(client)
                struck = time.perf_counter()
                os.kill(killed, sent)
    usual = statistics.median(b - a for a, b in zip(times[10:], times[11 : _BEFORE - 1], strict=False))
    if sent == signal.SIGSTOP:  # its supervisor would notice, too
        with contextlib.suppress(ProcessLookupError):
            os.kill(killed, signal.SIGKILL)
    await _until_all_serve(client)
    return max(t for t in times[_BEFORE:][:2]) - struck, usual, [token.id for token in stream.tokens]


async def _until_all_serve(client: AsyncClient) -> None:
    async with asyncio.timeout(60):
        while any(not isinstance(s, NodeStatus) for s in (await client.status()).values()):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def bench_recovery(rounds: int) -> dict[str, Any]:
    """Wait for the next token after SIGKILL and SIGSTOP of a replica, and time to first token of a second turn.

    Demo family, bfloat16, on loopback, in mode exact, with 256 tokens of context. `replay` is the time that the other
    replica computes for the same positions, and `beyond` what the wait exceeds it and the usual time of a token by.
    """
    checkpoint = Checkpoint(store.locate(store.DEMO))
    ids = tokenize_prompts(checkpoint, ["Write a short note to a friend who moved to another city. " * 40])[0]
    results: dict[str, Any] = {}
    prompt, replays = ids[: _CONTEXT - _BEFORE], list[float]()
    for name, sent in (("kill", signal.SIGKILL), ("hang", signal.SIGSTOP)):
        gaps, same = list[float](), 0
        async with _two_replicas(park_s=0) as client:  # new ones: a supervisor gives up a node that dies too often
            expected = (await generate_exactly(client, prompt, _BEFORE + _AFTER)).token_ids
            for _ in range(3):
                whole = await generate_exactly(client, ids[:_CONTEXT], 1)
                replays.append(next(hop.compute_s for hop in whole.stats.hops if hop.node == "cloud"))
            for _ in range(min(rounds, _MOST_DEATHS)):
                gap, usual, tokens = await _gap_s(client, prompt, sent)
                gaps.append(gap - usual)
                same += tokens == list(expected)
        beyond = [gap - statistics.median(replays) for gap in gaps]
        results |= {
            f"{name}_beyond_median_s": statistics.median(beyond),
            f"{name}_beyond_worst_s": max(beyond),
            f"{name}_identical": f"{same} of {len(gaps)}",
        }
    results["replay_s"] = statistics.median(replays)
    first: dict[float, list[float]] = {0: [], 600: []}
    for park_s, found in first.items():
        async with _two_replicas(park_s=park_s) as client:
            for i in range(rounds):
                turn = [*ids[i : i + 3], *ids[3:_TURN]]
                reply = await generate_exactly(client, turn, 16)
                again = await generate_exactly(client, [*turn, *reply.token_ids, *ids[:12]], 2)
                found.append(again.stats.first_token_s)
    fresh, parked = (statistics.median(found) for found in first.values())
    return results | {
        "second_turn_fresh_s": fresh,
        "second_turn_parked_s": parked,
        "second_turn_ratio": parked / fresh,
        "goal": "kill <= 0.3 s, hang <= 2 s beyond the replay; second turn <= 0.15",
    }
