"""A full node: who waits, in which order, how long, and who is refused."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import CapacityError, NodeUnavailable
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.loading import load_slice
from ruyi_flow.loop.admission import Admission
from ruyi_flow.requests import SamplingParams
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.runtime.stage import Shard, ShardSession
from ruyi_flow.testing import cluster, cut_topology

POLICY = Policy.resolve(Routing(), (2, 4, 6))


@pytest.fixture
def shard(tiny: Path) -> Shard:
    return Shard(load_slice(Checkpoint(tiny), (2, 4, 6), dtype=torch.float32), max_positions=512, max_sessions=2)


def opening(shard: Shard, positions: int) -> tuple[Callable[[], ShardSession], int]:
    return lambda: shard.open(POLICY, SamplingParams(), 1, positions), positions


async def test_sessions_wait_in_order_until_there_is_room_for_the_first(shard: Shard) -> None:
    admission = Admission(shard.rooms, 3, 10)
    first, second = [await admission.admit(*opening(shard, 200)) for _ in range(2)]
    order: list[str] = []

    async def wait(name: str, positions: int) -> ShardSession:
        session = await admission.admit(*opening(shard, positions))
        order.append(name)
        return session

    large, small = asyncio.create_task(wait("large", 500)), asyncio.create_task(wait("small", 64))
    await asyncio.sleep(0)
    assert admission.waiting == 2
    first.close()
    await asyncio.sleep(0.02)
    assert not order, "the small one does not overtake the large one"
    second.close()
    (await large).close()
    (await small).close()
    assert order == ["large", "small"] and admission.waiting == 0
    shard.rooms.check_integrity()
    assert shard.pool.used == 0


async def test_room_that_is_given_back_while_one_comes_to_the_queue_is_not_missed(shard: Shard) -> None:
    admission = Admission(shard.rooms, 3, 10)
    running = [await admission.admit(*opening(shard, 64)) for _ in range(2)]
    tried = 0

    def open() -> ShardSession:
        """The others end, on another thread, as soon as this one has been refused."""
        nonlocal tried
        tried += 1
        try:
            return opening(shard, 64)[0]()
        except CapacityError:
            while running:
                running.pop().close()
            raise

    async with asyncio.timeout(2):
        (await admission.admit(open, 64)).close()
    assert tried == 2


async def test_what_never_fits_what_is_too_many_and_what_is_too_late_is_refused(shard: Shard) -> None:
    admission = Admission(shard.rooms, 1, 0.05)
    with pytest.raises(CapacityError, match="no room for 600 positions"):
        await admission.admit(lambda: shard.pool.allocate(99, 600), 600)  # type: ignore[arg-type, return-value]
    assert admission.waiting == 0
    held = await admission.admit(*opening(shard, 64))
    late = asyncio.create_task(admission.admit(*opening(shard, 512)))
    await asyncio.sleep(0)
    with pytest.raises(CapacityError, match="1 sessions wait for room already"):
        await admission.admit(*opening(shard, 64))
    with pytest.raises(CapacityError, match=r"no room within 0.05 s: no room for 512 positions"):
        await late
    assert admission.waiting == 0
    held.close()


async def test_a_waiter_that_is_cancelled_leaves_the_queue(shard: Shard) -> None:
    admission = Admission(shard.rooms, 4, 10)
    held = [await admission.admit(*opening(shard, 64)) for _ in range(2)]
    gone, stays = (asyncio.create_task(admission.admit(*opening(shard, 64))) for _ in range(2))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.sleep(0)
    held[0].close()
    (await stays).close()
    held[1].close()
    assert admission.waiting == 0 and shard.pool.used == 0


async def test_more_requests_than_sessions_all_get_their_answers(tiny: Path) -> None:
    limits = {"max_sessions": 2, "max_positions": 256, "grace_s": 1}
    topology = cut_topology(tiny, [[2], [4, 6]], limits=limits)
    async with cluster(topology) as nodes, AsyncClient(nodes.topology) as client:
        prompts = [[5 + i, 6, 7] for i in range(7)]
        alone = [(await client.generate(p, max_new_tokens=12, eos_token_ids=())).token_ids for p in prompts]
        together = await asyncio.gather(*(client.generate(p, max_new_tokens=12, eos_token_ids=()) for p in prompts))
        assert [reply.token_ids for reply in together] == alone
        await nodes.settle()


async def test_who_waited_until_the_node_shuts_down_is_refused(tiny: Path) -> None:
    limits = {"max_sessions": 1, "max_positions": 512, "grace_s": 1}
    topology = cut_topology(tiny, [[2, 4, 6]], limits=limits)
    async with cluster(topology) as nodes, AsyncClient(nodes.topology) as client:
        stream = client.stream([5, 6, 7], max_new_tokens=200, eos_token_ids=())
        await anext(stream)
        late = asyncio.create_task(client.generate([5, 6, 7], max_new_tokens=4))
        engine = nodes.engines["n0"]
        async with asyncio.timeout(10):
            while not engine.sessions.waiting:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        engine.sessions.draining = True
        await stream.aclose()
        with pytest.raises(NodeUnavailable, match="is shutting down and takes no new session"):
            await late
        await nodes.settle()
