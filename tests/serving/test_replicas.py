"""Replicas: sessions spread over them, stay, and move when one of them dies, hangs or drains."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import CapacityError
from ruyi_flow.serving.engine import Engine
from ruyi_flow.serving.node import serve
from ruyi_flow.testing import Relay, cluster, cut_topology
from ruyi_flow.transport import replicas as module
from ruyi_flow.transport.replicas import Replicas
from tests.conftest import until

PROMPT = [5, 6, 7, 8]
CUTS = [[2], [4, 6]]
LONG: dict[str, Any] = {"max_new_tokens": 60, "eos_token_ids": ()}


def relays(*names: str) -> dict[str, Relay]:
    return {name: Relay(delay_s=0.002) for name in names}


async def test_sessions_go_to_both_replicas(tiny: Path) -> None:
    async with cluster(cut_topology(tiny, CUTS), replicas={"n1": 2}) as nodes, AsyncClient(nodes.topology) as client:
        replies = await asyncio.gather(*(client.generate([5, 6, n], **LONG) for n in range(3, 15)))
        admitted = [nodes.engines[name].counters.admissions.total for name in ("n1/1", "n1/2")]
        assert sum(admitted) == 12 and min(admitted) >= 1
        assert not any(hop.recoveries for reply in replies for hop in reply.stats.hops)
        await nodes.settle()


async def test_the_turns_of_a_conversation_stay_on_their_replicas(tiny: Path) -> None:
    topology = cut_topology(tiny, CUTS)
    async with cluster(topology, replicas={"n0": 2, "n1": 2}) as nodes, AsyncClient(nodes.topology) as client:
        for first in range(3, 9):
            prompt = [first, *range(3, 43)]
            for turn in range(4):
                reply = await client.generate(prompt, max_new_tokens=6, eos_token_ids=())
                assert (reply.stats.reused > 0) == (turn > 0)
                assert turn == 0 or reply.stats.hops[1].positions < 40, "the next node has its part, too"
                prompt += [*reply.token_ids, 7, 8]
                await nodes.settle()
        parked = [engine.front_door.parked for engine in nodes.engines.values()]
        assert sum(parked) == 12


@pytest.mark.parametrize("how", ["cut", "frozen"])
@pytest.mark.parametrize("node", ["n0", "n1"])
async def test_a_replica_that_is_gone_is_replaced_by_another(tiny: Path, node: str, how: str) -> None:
    links = relays(f"{node}/1", f"{node}/2")
    async with cluster(cut_topology(tiny, CUTS), links, replicas={node: 2}) as nodes:
        async with AsyncClient(nodes.topology) as client:
            expected = (await client.generate(PROMPT, **LONG)).token_ids
            stream = client.stream(PROMPT, **LONG)
            async for _ in stream:
                if len(stream.tokens) == 10:
                    used = max(links, key=lambda name: nodes.engines[name].counters.admissions.total)
                    busy = [name for name in links if nodes.engines[name].shard.capacity.leases]
                    used = busy[0] if busy else used
                    if how == "cut":
                        links[used]._target = ("127.0.0.1", 9)  # nothing listens there
                        links[used].cut()
                    else:
                        links[used].frozen = True
            assert stream.reply.token_ids == expected
            stats = stream.reply.stats
            found = stats.recoveries if node == "n0" else [r for hop in stats.hops for r in hop.recoveries]
            assert [recovery.cause for recovery in found] == [{"cut": "reset", "frozen": "silent"}[how]]


async def test_a_replica_that_drains_loses_nothing(tiny: Path) -> None:
    topology = cut_topology(tiny, CUTS, limits={"max_positions": 2048, "grace_s": 20})
    async with cluster(topology, relays("n1/1", "n1/2"), replicas={"n1": 2}) as nodes:
        async with AsyncClient(nodes.topology) as client:
            prompts = [[5, 6, n] for n in range(3, 7)]
            options = LONG | {"max_new_tokens": 100}
            expected = [(await client.generate(prompt, **options)).token_ids for prompt in prompts]
            answers = [asyncio.create_task(client.generate(prompt, **options)) for prompt in prompts]
            first, second = nodes.engines["n1/1"], nodes.engines["n1/2"]
            await until(lambda: len(first.shard.capacity.leases) + len(second.shard.capacity.leases) == 4)
            draining = first if first.shard.capacity.leases else second
            await drain(draining)
            assert len(draining.shard.capacity.leases) == 0, "its sessions have moved long before the grace time"
            replies = await asyncio.gather(*answers)
            assert [reply.token_ids for reply in replies] == expected
            causes = {r.cause for reply in replies for hop in reply.stats.hops for r in hop.recoveries}
            assert causes == {"left"}


async def drain(engine: Engine) -> None:
    """Do what SIGTERM does to a node first, and wait until it has no sessions."""
    engine.front_door.draining = True
    server = SERVERS[id(engine)]
    await server.refuse()
    await until(lambda: not engine.shard.capacity.leases)


SERVERS: dict[int, Any] = {}


@pytest.fixture(autouse=True)
def remember_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the server of each engine, which `cluster` does not show."""
    from contextlib import asynccontextmanager

    from ruyi_flow import testing

    @asynccontextmanager
    async def remembered(engine: Engine, **options: Any) -> Any:
        async with serve(engine, **options) as server:
            SERVERS[id(engine)] = server
            yield server

    monkeypatch.setattr(testing, "serve", remembered)


async def test_a_full_replica_sends_its_callers_to_the_other(tiny: Path) -> None:
    topology = cut_topology(tiny, CUTS)
    limits = topology.nodes[1].limits.model_copy(update={"max_sessions": 1, "max_waiting": 0})
    few = topology.model_copy(
        update={"nodes": (topology.nodes[0], topology.nodes[1].model_copy(update={"limits": limits}))}
    )
    async with cluster(few, replicas={"n1": 2}) as nodes, AsyncClient(nodes.topology, max_retries=0) as client:
        place = nodes.engines["n1/1"].shard.capacity.lease(64)
        for _ in range(4):
            assert len((await client.generate(PROMPT, max_new_tokens=4, eos_token_ids=())).tokens) == 4
        await until(lambda: not nodes.engines["n1/2"].shard.capacity.leases)
        other = nodes.engines["n1/2"].shard.capacity.lease(64)
        with pytest.raises(CapacityError, match="'n1' is full"):
            await client.generate(PROMPT, max_new_tokens=4, eos_token_ids=())
        place.give_back()
        other.give_back()
        await nodes.settle()


async def test_a_name_with_several_addresses_stands_for_as_many_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ["10.0.0.1", "10.0.0.2"]

    async def look_up(host: str, port: int) -> Any:
        assert host == "cloud.example"
        return [(None, None, None, "", (ip, port)) for ip in [*found, *found]] + [(None, None, None, "", ("::1", port))]

    async def watch(self: Replicas, replica: Any) -> None:
        await asyncio.Event().wait()  # nothing is there to watch

    monkeypatch.setattr(module, "resolve", look_up)
    monkeypatch.setattr(Replicas, "_watch", watch)
    replicas = Replicas("cloud", ("cloud.example:7103",), max_message_bytes=2**20, recover_s=1, timeout_s=1)
    first = replicas.pick()
    assert first.address == "cloud.example:7103", "nothing is known yet, and nobody waits"
    await until(lambda: len(replicas._replicas) == 2)
    assert {replicas.pick().address for _ in range(40)} == {"10.0.0.1:7103", "10.0.0.2:7103"}
    found[:] = ["10.0.0.2", "10.0.0.3", "10.0.0.4"]
    replicas.lost("cloud", "reset")  # a replica is gone: the name is looked up again
    replicas.pick()
    await until(lambda: len(replicas._replicas) == 3)
    assert {replicas.pick().address for _ in range(60)} == {f"10.0.0.{n}:7103" for n in (2, 3, 4)}
    await replicas.close()
