"""Each node is lost at each message of an answer, in each mode."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import NodeError
from ruyi_flow.testing import Cluster, cluster, cut_topology
from ruyi_flow.types import Upload
from tests.robustness.messages import MessageRelay
from tests.robustness.traffic import TINY
from tests.robustness.trial import ready_cluster
from tests.robustness.validate import problems_at_rest, running_tasks, tasks_left

_SAMPLED = {"temperature": 0.9, "seed": 5}

MODES: dict[str, dict[str, Any]] = {
    "exact": {"mode": "exact", "draft": 0},
    "exact, drafting": {"mode": "exact", "draft": 4, **_SAMPLED},
    "token": {"mode": "token", "thresholds": {1: 0.44, 3: 0.48, 4: 0.34, 6: 0.3}, "draft": 2},
    "cascade": {
        "mode": "cascade",
        "thresholds": {1: 0.99, 3: 0.77, 4: 0.92, 6: 0.29},
        "window": 3,
        "back": 0.3,
        "draft": 0,
    },
    "cascade, drafting": {
        "mode": "cascade",
        "thresholds": {1: 0.22, 3: 0.39, 4: 0.46, 6: 0.37},
        "window": 2,
        "draft": 4,
        **_SAMPLED,
    },
    "fixed": {"mode": "fixed", "exit": 7, "draft": 1},
}
"""Options of the answers; with those in token and cascade, every exit decides some tokens."""

PROMPT = [7, 100, 23, 61, 250, 9, 33]
LONG_PROMPT = [3 + (i * 37) % 250 for i in range(150)]
TOKENS = 14


@dataclass
class World:
    """Nodes in this process, each behind a relay."""

    nodes: Cluster
    relays: list[MessageRelay]
    client: AsyncClient

    async def ask(self, prompt: list[int], options: dict[str, Any]) -> list[tuple[int, int]]:
        """Return an answer's tokens and exits."""
        return await ask(self.client, prompt, options)


async def ask(client: AsyncClient, prompt: list[int], options: dict[str, Any]) -> list[tuple[int, int]]:
    """Return an answer's tokens and exits."""
    reply = await client.generate(prompt, max_new_tokens=TOKENS, eos_token_ids=(), timeout_s=20, **options)
    return [(token.id, token.exit) for token in reply.tokens]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    topology = cut_topology(TINY.make(tmp_path / "family"), TINY.cuts)
    first, second = topology.links
    topology = topology.model_copy(update={"links": (first.model_copy(update={"upload": Upload.AHEAD}), second)})
    relays = [MessageRelay() for _ in TINY.cuts]
    async with cluster(topology, {f"n{i}": relay for i, relay in enumerate(relays)}) as nodes:
        async with AsyncClient(nodes.topology, max_retries=0) as client:
            yield World(nodes, relays, client)
        await nodes.settle()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("node", range(3))
@pytest.mark.parametrize("mode", MODES)
async def test_a_node_may_be_lost_at_each_message(world: World, mode: str, node: int) -> None:
    relay, options = world.relays[node], MODES[mode]
    await world.ask(PROMPT, options)
    before = running_tasks()
    for prompt in (PROMPT, LONG_PROMPT):
        relay.count = 0
        expected = await world.ask(prompt, options)
        assert {exit for _, exit in expected} == ({7} if mode.startswith(("exact", "fixed")) else set(TINY.exits))
        for number in range(relay.count):
            relay.lose(number)
            try:
                assert await world.ask(prompt, options) == expected, f"after message {number} was lost"
            except NodeError as error:
                raise AssertionError(f"message {number} was lost") from error
            await world.nodes.settle()
    assert not await tasks_left(before)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", MODES)
async def test_a_node_may_be_lost_while_another_one_or_itself_is_recovered(world: World, mode: str) -> None:
    options, rng = MODES[mode], random.Random(1)
    expected = await world.ask(LONG_PROMPT, options)
    for relay in world.relays:
        relay.count = 0
    assert await world.ask(LONG_PROMPT, options) == expected
    counts = [relay.count for relay in world.relays]
    for _ in range(20):
        first, second = rng.randrange(3), rng.randrange(3)
        number, next_number = rng.randrange(counts[first]), rng.randrange(6)

        def lose_both(first: int = first, second: int = second, next_number: int = next_number) -> None:
            world.relays[first].cut()
            world.relays[second].lose(next_number)

        world.relays[first].lose(number, lose_both)
        try:
            assert await world.ask(LONG_PROMPT, options) == expected, (first, number, second, next_number)
        except NodeError as error:
            raise AssertionError((first, number, second, next_number)) from error
        await world.nodes.settle()


@pytest.mark.timeout(300)
async def test_a_process_may_be_killed_at_any_message(tmp_path: Path) -> None:
    rng, restarts = random.Random(1), set[asyncio.Task[None]]()
    async with ready_cluster(tmp_path, MessageRelay) as running, AsyncClient(running.topology) as client:
        for options in MODES.values():
            for node, relay in zip(running.nodes, running.relays, strict=True):
                assert isinstance(relay, MessageRelay)
                expected: list[tuple[int, int]] | None = None
                relay.count, number = 0, 0
                for _ in range(2):

                    def kill(node: Any = node, pid: int = node.pid) -> None:
                        node.send(signal.SIGKILL)
                        restarts.add(asyncio.create_task(node.restart(pid)))

                    if expected is not None:
                        number = rng.randrange(relay.count)
                        relay.lose(number, kill)
                    try:
                        found = await ask(client, LONG_PROMPT, options)
                    except NodeError as error:
                        raise AssertionError(f"{node.name} was killed at message {number}") from error
                    expected = expected or found
                    assert found == expected, f"{node.name} was killed at message {number}"
                    await asyncio.gather(*restarts)
                    assert not await problems_at_rest(running)
