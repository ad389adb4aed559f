"""A full node: which session waits, in which order, how long, and which is refused."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import CapacityError, ContextLengthError, NodeUnavailable
from ruyi_flow.loop.admission import Admission
from ruyi_flow.loop.capacity import Capacity, Lease
from ruyi_flow.sim.clock import VirtualTime
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


@pytest.mark.parametrize("positions", [512, 64])
async def test_a_session_that_waits_begins_when_another_is_parked(capacity: Capacity, positions: int) -> None:
    admission = Admission(capacity, 3, 10)
    running = [await admission.admit(256) for _ in range(2)]
    late = asyncio.create_task(admission.admit(positions))
    for _ in range(5):
        await asyncio.sleep(0)
    assert admission.waiting == 1
    for lease in running:
        lease.park(150, lambda lease: None)
    async with asyncio.timeout(2):
        (await late).give_back()
    assert [lease.parked for lease in running] == [positions == 64] * 2, "they are evicted only if they are in the way"
    capacity.check_integrity()


async def test_a_session_that_waits_tries_at_every_turn_to_go_on_with_a_parked_one(capacity: Capacity) -> None:
    admission = Admission(capacity, 3, 10)
    parked, first = await admission.admit(64), await admission.admit(64)
    tries: list[bool] = []

    def resume() -> Lease | None:
        tries.append(parked.parked)
        if not parked.parked:
            return None
        parked.resume(200)
        return parked

    late = asyncio.create_task(admission.admit(200, resume))
    for _ in range(5):
        await asyncio.sleep(0)
    assert tries == [False, False], "at once, and when it is the first in the queue"
    parked.park(64, lambda lease: None)
    second = capacity.lease(64)
    for _ in range(5):
        await asyncio.sleep(0)
    assert tries == [False, False, True] and admission.waiting == 1 and parked.parked
    first.give_back()
    assert await late is parked and parked.pages.count == 4
    again = asyncio.create_task(admission.admit(64, resume))
    await asyncio.sleep(0)
    second.give_back()
    assert await again not in (parked, second, None), "nothing is parked any more: it gets a lease of its own"
    capacity.check_integrity()


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
    async with cluster(topology) as nodes, AsyncClient(nodes.topology, recover_s=0) as client:
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


# ---- In virtual time: how long they wait ----


def play(time: VirtualTime, *coroutines: Coroutine[Any, Any, Any]) -> None:
    """Run coroutines until nothing is left to happen."""
    for coroutine in coroutines:
        time.process(coroutine)
    time.env.run()


class Clerk:
    """Admits sessions in virtual time, and notes what becomes of each and when."""

    def __init__(self, capacity: Capacity, max_waiting: int, max_wait_s: float) -> None:
        self.time = VirtualTime()
        self.admission = Admission(capacity, max_waiting, max_wait_s, self.time)
        self.seen: list[tuple[str, float, str]] = []

    async def session(self, name: str, at: float, positions: int, lasts: float) -> None:
        await self.time.sleep(at)
        try:
            lease = await self.admission.admit(positions)
        except CapacityError as error:
            self.seen.append((name, self.time.now(), str(error)))
            return
        self.seen.append((name, self.time.now(), "admitted"))
        await self.time.sleep(lasts)
        lease.give_back()


def test_a_session_begins_when_there_is_room_for_it_and_those_before_it(capacity: Capacity) -> None:
    clerk = Clerk(capacity, 4, 100.0)
    play(
        clerk.time,
        clerk.session("first", 0, 256, lasts=10),
        clerk.session("second", 0, 256, lasts=20),
        clerk.session("whole", 1, 512, lasts=5),
        clerk.session("small", 2, 64, lasts=1),
        clerk.session("late", 12, 64, lasts=1),
    )
    assert clerk.seen == [
        ("first", 0, "admitted"),
        ("second", 0, "admitted"),
        ("whole", 20, "admitted"),
        ("small", 25, "admitted"),
        ("late", 25, "admitted"),
    ]
    assert capacity.pool.used == 0 and clerk.admission.waiting == 0


def test_a_wait_ends_when_it_was_said_to_and_makes_way_for_the_next(capacity: Capacity) -> None:
    clerk = Clerk(capacity, 4, 10.0)
    play(
        clerk.time,
        clerk.session("long", 0, 64, lasts=50),
        clerk.session("short", 0, 64, lasts=4),
        clerk.session("whole", 1, 512, lasts=1),
        clerk.session("small", 2, 64, lasts=1),
    )
    refusal = "no capacity became free within 10 s: this request needs 512 positions of KV cache; 448 of 512 are free"
    assert clerk.seen[2:] == [("whole", 11, refusal), ("small", 11, "admitted")]
    assert clerk.admission.waiting == 0


def test_a_session_that_waited_behind_others_says_so(capacity: Capacity) -> None:
    clerk = Clerk(capacity, 4, 10.0)
    play(
        clerk.time,
        clerk.session("long", 0, 512, lasts=50),
        clerk.session("first", 1, 64, lasts=1),
        clerk.session("second", 1, 64, lasts=1),
    )
    said = {name: text for name, _, text in clerk.seen}
    assert said["first"].startswith("no capacity became free within 10 s: this request needs 64 positions")
    assert said["second"] == "no capacity became free within 10 s: earlier requests are still waiting"
    assert [at for _, at, _ in clerk.seen] == [0, 11, 11]


@pytest.mark.parametrize("max_waiting", [0, 1, 3])
def test_a_queue_holds_as_many_as_it_was_told(capacity: Capacity, max_waiting: int) -> None:
    clerk = Clerk(capacity, max_waiting, 100.0)
    play(
        clerk.time,
        clerk.session("long", 0, 512, lasts=50),
        *(clerk.session(f"{i}", 1 + i, 64, lasts=1) for i in range(4)),
    )
    refused = {name: text for name, _, text in clerk.seen if text != "admitted"}
    assert sorted(refused) == [f"{i}" for i in range(max_waiting, 4)]
    full = f"the queue is full ({max_waiting} waiting, limits.max_waiting {max_waiting}); try again later"
    alone = "this request needs 64 positions of KV cache; 0 of 512 are free"
    assert set(refused.values()) == {full if max_waiting else alone}
    assert capacity.pool.used == 0


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 512), st.integers(1, 20)), max_size=12),
    st.integers(0, 4),
    st.integers(1, 15),
)
def test_whoever_waits_is_admitted_in_order_or_refused_on_time(
    sessions: list[tuple[int, int, int]], max_waiting: int, max_wait_s: int
) -> None:
    capacity = Capacity(max_positions=512, max_sessions=2, context=512)
    clerk = Clerk(capacity, max_waiting, max_wait_s)
    sessions.sort(key=lambda session: session[0])
    play(clerk.time, *(clerk.session(f"{i}", at, *rest) for i, (at, *rest) in enumerate(sessions)))
    assert sorted(name for name, _, _ in clerk.seen) == sorted(f"{i}" for i in range(len(sessions)))
    admitted = [int(name) for name, _, text in clerk.seen if text == "admitted"]
    assert admitted == sorted(admitted), "nobody overtakes"
    for name, at, text in clerk.seen:
        waited = at - sessions[int(name)][0]
        assert 0 <= waited <= max_wait_s
        assert text == "admitted" or waited in (0, max_wait_s)
    capacity.check_integrity()
    assert capacity.pool.used == 0 and clerk.admission.waiting == 0
