"""A conversation goes on from the caches of its last turn, on every node and in every mode."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from ruyi_flow.client import AsyncClient
from ruyi_flow.config.topology import Topology
from ruyi_flow.testing import Cluster, Relay, cluster, cut_topology
from tests.conftest import until

CUTS = [[2], [4], [6]]
LONG = [random.Random(1).randrange(3, 61) for _ in range(60)]
MODES: dict[str, dict[str, Any]] = {
    "exact": {"mode": "exact"},
    "sampled": {"mode": "exact", "temperature": 1.0, "seed": 7},
    "first": {"mode": "fixed", "exit": 2},
    "second": {"mode": "fixed", "exit": 4},
    "token": {"mode": "token", "threshold": 0.3},
    "cascade": {"mode": "cascade", "threshold": 0.5, "window": 3, "back": 0.6},
    "retires": {"mode": "cascade", "threshold": 0.5, "window": 2},
}


def topology(family: Path, cuts: list[list[int]] = CUTS, **limits: float) -> Topology:
    """Nodes that park sessions or, with park_s 0, do not."""
    return cut_topology(family, cuts, limits={"max_positions": 2048, "grace_s": 1, **limits})


async def ask(
    client: AsyncClient, prompt: list[int], count: int = 12, **options: Any
) -> tuple[list[tuple[int, int]], int]:
    """Tokens and exits of an answer, and how much of the prompt was reused."""
    reply = await client.generate(prompt, max_new_tokens=count, eos_token_ids=(), **options)
    return [(token.id, token.exit) for token in reply.tokens], reply.stats.reused


@pytest.mark.parametrize("mode", MODES)
async def test_each_turn_of_a_conversation_reuses_the_turns_before(tiny: Path, mode: str) -> None:
    prompt = list(LONG)
    async with (
        cluster(topology(tiny)) as nodes,
        AsyncClient(nodes.topology) as client,
        cluster(topology(tiny, park_s=0)) as fresh,
        AsyncClient(fresh.topology) as other,
    ):
        known = 0
        for turn in range(4):
            expected, none = await ask(other, prompt, **MODES[mode])
            found, reused = await ask(client, prompt, **MODES[mode])
            assert found == expected and none == 0
            assert reused >= known - 1 and (reused > 0) == (turn > 0)
            known = len(prompt) + len(found)
            prompt += [token for token, _ in found] + [7, 9, turn + 3]
            await nodes.settle()
        await fresh.settle()


@pytest.mark.parametrize("cuts", [CUTS, [[2, 4], [6]], [[2, 4, 6]]], ids=str)
async def test_another_mode_reuses_only_what_fits_and_is_right(tiny: Path, cuts: list[list[int]]) -> None:
    source = random.Random(3)
    async with (
        cluster(topology(tiny, cuts)) as nodes,
        AsyncClient(nodes.topology) as client,
        cluster(topology(tiny, cuts, park_s=0)) as fresh,
        AsyncClient(fresh.topology) as other,
    ):
        prompt, reused_in_all = list(LONG), 0
        for _ in range(24):
            options = MODES[source.choice(list(MODES))] | {"draft": source.choice([0, 3])}
            expected, _ = await ask(other, prompt, **options)
            found, reused = await ask(client, prompt, **options)
            assert found == expected, options
            reused_in_all += reused
            prompt = (prompt + [token for token, _ in found])[: source.randrange(40, 150)] + [source.randrange(3, 61)]
            await nodes.settle()
        assert reused_in_all > 500


async def test_a_question_sends_only_what_the_next_node_has_not_parked(tiny: Path) -> None:
    relay = Relay()
    async with cluster(topology(tiny, [[2], [4, 6]]), {"n1": relay}) as nodes, AsyncClient(nodes.topology) as client:
        found, _ = await ask(client, LONG, count=4)
        first = relay.bytes_up
        await nodes.settle()
        _, reused = await ask(client, [*LONG, *(token for token, _ in found), 5], count=4)
        assert reused >= len(LONG) and relay.bytes_up - first < first / 3
        await nodes.settle()
        assert [engine.front_door.parked for engine in nodes.engines.values()] == [1, 1]


def forget(nodes: Cluster, name: str) -> None:
    """Drop a node's parked sessions, as if others had needed the room."""
    nodes.engines[name].front_door.forget_parked()


@pytest.mark.parametrize("name", ["n0", "n1", "n2"])
async def test_a_parked_session_that_is_gone_costs_only_time(tiny: Path, name: str) -> None:
    async with cluster(topology(tiny)) as nodes, AsyncClient(nodes.topology) as client:
        found, _ = await ask(client, LONG)
        prompt = [*LONG, *(token for token, _ in found), 5]
        await nodes.settle()
        expected, reused = await ask(client, prompt)
        assert reused >= len(LONG)
        await nodes.settle()
        forget(nodes, name)
        again, reused = await ask(client, prompt)
        assert again == expected and (reused > 0) == (name != "n0")
        assert nodes.engines["n0"].counters.link.losses.total == 0, "nothing was lost"
        await nodes.settle()


async def test_parked_sessions_are_in_nobodys_way(tiny: Path) -> None:
    async with cluster(topology(tiny, max_positions=128, max_sessions=2)) as nodes:
        async with AsyncClient(nodes.topology, max_retries=0) as client:
            for start in range(3, 20):
                await ask(client, [start, *LONG], count=4)
                await nodes.settle()
            status = (await client.status())["n0"]
            assert getattr(status, "used_positions", None) == 0 and getattr(status, "sessions", None) == 0


async def test_a_session_that_is_cancelled_while_its_caches_move_keeps_its_pages_until_they_have(tiny: Path) -> None:
    async with cluster(topology(tiny, [[2, 4, 6]])) as nodes, AsyncClient(nodes.topology) as client:
        engine = nodes.engines["n0"]
        capacity, go_on = engine.shard.capacity, threading.Event()
        await ask(client, LONG)
        await nodes.settle()
        behind = capacity.lease(64)  # the parked session cannot grow where it is
        engine.worker.submit(go_on.wait)  # before the copy
        try:
            asking = asyncio.create_task(ask(client, LONG, count=200))
            await until(lambda: len(capacity.leases) == 2)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await asyncio.sleep(0.2)
            assert len(capacity.leases) == 2
        finally:
            go_on.set()
        await until(lambda: len(capacity.leases) == 1)
        behind.give_back()
        assert (await ask(client, LONG, count=200))[1] == 0, "it was not parked again"
        await nodes.settle()


async def test_a_session_whose_connection_was_lost_is_taken_up_where_it_was(tiny: Path) -> None:
    relay = Relay()
    async with cluster(topology(tiny, [[2], [4, 6]]), {"n1": relay}) as nodes, AsyncClient(nodes.topology) as client:
        expected, _ = await ask(client, LONG, count=40)
        await nodes.settle()
        for engine in nodes.engines.values():
            engine.front_door.forget_parked()
        count, stream = 0, client.stream(LONG, max_new_tokens=40, eos_token_ids=())
        async for _ in stream:
            count += 1
            if count == 10:
                relay.cut()
        assert [(token.id, token.exit) for token in stream.reply.tokens] == expected
        [recovery] = [r for hop in stream.reply.stats.hops for r in hop.recoveries]
        assert recovery.positions < len(LONG), "the node was there, and has kept its part"
        await nodes.settle()
