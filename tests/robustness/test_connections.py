"""Connections that are given up are closed at once: nothing waits for Python's garbage collector."""

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
