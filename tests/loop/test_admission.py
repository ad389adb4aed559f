"""A full node: which session waits, in which order, how long, and which is refused."""

import asyncio
from pathlib import Path

import pytest

from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import CapacityError, ContextLengthError, NodeUnavailable
from ruyi_flow.loop.admission import Admission
from ruyi_flow.loop.capacity import Capacity, Lease
from ruyi_flow.testing import cluster, cut_topology
from tests.conftest import until


@pytest.fixture
def capacity() -> Capacity:
    return Capacity(max_positions=512, max_sessions=2, context=512)


async def test_sessions_wait_in_order_until_there_is_capacity_for_the_first(capacity: Capacity) -> None:
    admission = Admission(capacity, 3, 10)
    first, second = [await admission.admit(200) for _ in range(2)]
    order: list[str] = []

    async def wait(name: str, positions: int) -> Lease:
        lease = await admission.admit(positions)
        order.append(name)
        return lease

    large, small = asyncio.create_task(wait("large", 500)), asyncio.create_task(wait("small", 64))
    await asyncio.sleep(0)
    assert admission.waiting == 2
    first.give_back()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not order, "the small one does not overtake the large one"
    second.give_back()
    (await large).give_back()
    (await small).give_back()
    assert order == ["large", "small"] and admission.waiting == 0
    capacity.check_integrity()
    assert capacity.pool.used == 0


async def test_a_lease_given_back_while_a_session_joins_the_queue_is_not_missed(
    capacity: Capacity, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[Lease] = []
    tried, lease = 0, capacity.lease

    def watched(max_positions: int) -> Lease:
        """The others end, on another thread, as soon as this one has been refused."""
        nonlocal tried
        tried += 1
        try:
            return lease(max_positions)
        except CapacityError:
            while running:
                running.pop().give_back()
            raise

    admission = Admission(capacity, 3, 10)
    running += [await admission.admit(64) for _ in range(2)]
    monkeypatch.setattr(capacity, "lease", watched)
    async with asyncio.timeout(2):
        (await admission.admit(64)).give_back()
    assert tried == 2


async def test_too_many_waiting_sessions_and_too_long_a_wait_are_refused(capacity: Capacity) -> None:
    admission = Admission(capacity, 1, 0.05)
    with pytest.raises(ContextLengthError, match="the family's context has 512"):
        await admission.admit(513)
    running = await admission.admit(64)
    late = asyncio.create_task(admission.admit(512))
    await asyncio.sleep(0)
    with pytest.raises(CapacityError, match=r"the queue is full \(1 waiting, limits.max_waiting 1\)"):
        await admission.admit(64)
    with pytest.raises(CapacityError, match=r"within 0.05 s: this request needs 512 positions of KV cache; 448 of 512"):
        await late
    assert admission.waiting == 0
    running.give_back()


async def test_a_waiter_that_is_cancelled_leaves_the_queue(capacity: Capacity) -> None:
    admission = Admission(capacity, 4, 10)
    running = [await admission.admit(64) for _ in range(2)]
    gone, stays = (asyncio.create_task(admission.admit(64)) for _ in range(2))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.sleep(0)
    running[0].give_back()
    (await stays).give_back()
    running[1].give_back()
    assert admission.waiting == 0 and capacity.pool.used == 0


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
        await until(lambda: engine.front_door.waiting)
        engine.front_door.draining = True
        await stream.aclose()
        with pytest.raises(NodeUnavailable, match="is shutting down and takes no new session"):
            await late
        await nodes.settle()
