"""Connections that are given up are closed at once; those that were idle for long are taken up again."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import NodeUnavailable
from ruyi_flow.testing import Relay, cluster, cut_topology
from tests.conftest import until
from tests.robustness.messages import MessageRelay

OPTIONS: dict[str, Any] = {"mode": "exact", "draft": 0, "max_new_tokens": 60, "eos_token_ids": ()}


@pytest.fixture
def nothing_is_collected() -> Iterator[None]:
    """Objects that keep each other alive stay."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("frozen", range(2))
async def test_a_connection_that_was_given_up_is_closed(tiny: Path, frozen: int, nothing_is_collected: None) -> None:
    relays = [Relay(delay_s=0.001), Relay(delay_s=0.001)]
    async with cluster(cut_topology(tiny, [[2], [4, 6]]), {"n0": relays[0], "n1": relays[1]}) as nodes:
        async with AsyncClient(nodes.topology) as client:
            await client.generate([5], max_new_tokens=1)  # only a client that has reached its entry node tries again
            relay, asking = relays[frozen], asyncio.create_task(client.generate([5, 6, 7], **OPTIONS))
            await asyncio.sleep(0.05)
            relay.frozen = True
            await until(lambda: relay.connections > 1)  # the silent connection is lost, and another one is tried
            relay.frozen = False
            assert len((await asking).tokens) == 60
            await until(lambda: relay.connections == 1)
        await nodes.settle()


async def test_connections_on_which_writes_fail_are_closed(tiny: Path, nothing_is_collected: None) -> None:
    relay = Relay(delay_s=0.001)
    async with cluster(cut_topology(tiny, [[2], [4, 6]]), {"n1": relay}) as nodes:
        async with AsyncClient(nodes.topology) as client:
            await client.generate([5, 6, 7], **OPTIONS)
            asking = [asyncio.create_task(client.generate([5, 6, n], **OPTIONS)) for n in range(4)]
            relay.refuses = True
            relay.cut()
            await asyncio.sleep(0.5)
            relay.refuses = False
            replies = await asyncio.gather(*asking)
            assert any(hop.recoveries for reply in replies for hop in reply.stats.hops)
            await until(lambda: relay.connections == 1)
        await nodes.settle()


async def test_an_error_that_is_kept_keeps_no_connection(tiny: Path, nothing_is_collected: None) -> None:
    relay = Relay(delay_s=0.001)
    async with cluster(cut_topology(tiny, [[2], [4, 6]]), {"n0": relay}) as nodes:
        async with AsyncClient(nodes.topology, recover_s=0) as client:
            stream = client.stream([5, 6, 7], **OPTIONS)
            await anext(stream)
            relay.frozen = True
            with pytest.raises(NodeUnavailable) as kept:
                async for _ in stream:
                    pass
            relay.frozen = False
        await until(lambda: not relay.connections)
        assert kept.value.tokens
        await nodes.settle()


@pytest.mark.parametrize("lost", range(2))
async def test_a_node_that_nobody_asked_for_long_is_waited_for_like_any_other(tiny: Path, lost: int) -> None:
    relays = [MessageRelay(), MessageRelay()]
    topology = cut_topology(tiny, [[2], [4, 6]], recover_s=0.5)
    async with cluster(topology, {"n0": relays[0], "n1": relays[1]}) as nodes:
        async with AsyncClient(nodes.topology, recover_s=0.5) as client:
            expected = (await client.generate([5, 6, 7], **OPTIONS)).token_ids
            await asyncio.sleep(0.7)  # longer than recover_s
            relays[lost].lose(0)
            assert (await client.generate([5, 6, 7], **OPTIONS)).token_ids == expected
        await nodes.settle()


async def test_a_link_that_is_dead_for_longer_than_one_attempt_takes_is_tried_again(tiny: Path) -> None:
    relay = Relay(delay_s=0.001)
    async with cluster(cut_topology(tiny, [[2], [4, 6]]), {"n1": relay}) as nodes:
        async with AsyncClient(nodes.topology) as client:
            asking = asyncio.create_task(client.generate([5, 6, 7], **OPTIONS))
            await asyncio.sleep(0.05)
            relay.frozen = True
            await until(lambda: relay.connections > 2)  # the second attempt was given up before it was connected
            relay.frozen = False
            assert len((await asking).tokens) == 60
        await nodes.settle()
