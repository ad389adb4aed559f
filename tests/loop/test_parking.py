"""Parked sessions: which one a request finds, how long it is kept, and that nobody finds another user's."""

import contextlib
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ruyi_flow.errors import CapacityError, ContextLengthError
from ruyi_flow.loop.capacity import Capacity, Lease
from ruyi_flow.loop.chain import decode
from ruyi_flow.loop.pages import PAGE_SIZE, PageRun
from ruyi_flow.loop.parking import LEAST_COMMON, Parking
from ruyi_flow.requests import SamplingParams
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.runtime.stage import ShardSession
from ruyi_flow.sim.clock import VirtualTime
from ruyi_flow.types import Mode
from tests.loop.test_chain import CUTS, EXITS, World, turns
from tests.loop.test_rewind import REWINDABLE, TURNS, Turn, go_on


@dataclass
class Held:
    """A session, as far as parking is concerned."""

    lease: Lease
    token_ids: list[int]
    positions: list[int] = field(default_factory=list)

    def close(self) -> None:
        self.lease.give_back()


class Node:
    """A node's capacity and its parked sessions, in virtual time."""

    def __init__(self, max_positions: int = 1024, park_s: float = 60.0, max_parked: int = 100) -> None:
        self.capacity = Capacity(max_positions, 4, 1000)
        self.time = VirtualTime()
        self.parking: Parking[Held] = Parking(park_s, max_parked, self.time)
        self.keys = iter(range(10_000))

    def park(self, token_ids: list[int], user: str | None = None, key: bytes | None = None) -> Held:
        """Park a session that contains these tokens."""
        session = Held(self.capacity.lease(len(token_ids)), token_ids, [len(token_ids), len(token_ids) // 2])
        self.parking.park(key or b"%d" % next(self.keys), token_ids, session, user)
        return session

    def finds(self, token_ids: list[int], user: str | None = None) -> tuple[list[int], int] | None:
        """What a request finds: the tokens of the session and the number of common positions; the session ends then."""
        taken = self.parking.take(token_ids, user, len(token_ids))
        if taken is None:
            return None
        taken.session.close()
        return taken.session.token_ids, taken.common

    def sleep(self, seconds: float) -> None:
        if seconds:
            self.time.env.run(until=self.time.now() + seconds)


@pytest.fixture
def node() -> Node:
    return Node()


CHAT = list(range(100, 150))


def test_the_next_turn_of_a_chat_finds_the_one_before(node: Node) -> None:
    session = node.park(CHAT, key=b"chat")
    assert len(node.parking) == 1 and not node.capacity.leases
    taken = node.parking.take([*CHAT, 7, 8, 9], None, 120)
    assert taken is not None
    assert (taken.session, taken.key, taken.common, taken.moved_from) == (session, b"chat", 50, None)
    assert list(node.capacity.leases.values()) == [session.lease] and session.lease.pages.count == 2
    assert len(node.parking) == 0 and node.parking.take([*CHAT, 7], None, 120) is None, "it is found once"


def test_the_last_token_of_a_request_runs_again(node: Node) -> None:
    node.park(CHAT)
    assert node.finds(CHAT) == (CHAT, 49)


def test_a_request_that_differs_at_the_end_goes_on_from_what_is_common(node: Node) -> None:
    node.park(CHAT)
    assert node.finds([*CHAT[:30], 1, 2, 3]) == (CHAT, 30)


@pytest.mark.parametrize(("common", "found"), [(LEAST_COMMON - 1, False), (LEAST_COMMON, True)])
def test_a_few_common_tokens_are_not_worth_it(node: Node, common: int, found: bool) -> None:
    session = CHAT[:LEAST_COMMON]
    node.park(session)
    request = [*session[:common], 1, 2, 3]
    assert node.finds(request) == ((session, common) if found else None)


def test_a_request_too_short_to_have_enough_in_common_finds_nothing(node: Node) -> None:
    node.park(CHAT)
    assert node.finds(CHAT[:LEAST_COMMON]) is None and node.finds([5]) is None
    node.park(CHAT[: LEAST_COMMON - 1])
    assert node.finds(CHAT[: LEAST_COMMON - 1]) is None


@pytest.mark.parametrize(("common", "found"), [(24, False), (25, True)])
def test_a_conversation_is_not_destroyed_for_another_that_begins_alike(node: Node, common: int, found: bool) -> None:
    node.park(CHAT)
    assert (node.finds([*CHAT[:common], *range(60)]) is not None) == found
    assert len(node.parking) == (not found)


def test_the_longest_common_prefix_is_taken(node: Node) -> None:
    other, same, longer = [*CHAT[:30], 1, 2, 3], CHAT[:40], [*CHAT, *range(200, 300)]
    for session in (other, same, longer):
        node.park(session)
    assert node.finds([*CHAT, 9]) == (same, 40), "more is common with a longer one, but most of it would be lost"
    assert node.finds([*CHAT, 9]) == (other, 30)
    assert node.finds([*longer, 9]) == (longer, 150)


def test_of_equal_ones_the_one_parked_longest_ago_is_taken(node: Node) -> None:
    first, second = node.park(CHAT), node.park([*CHAT, 1])
    for session in (first, second):
        taken = node.parking.take([*CHAT, 2, 3], None, 60)
        assert taken is not None and taken.session is session


def test_users_never_find_each_others_sessions(node: Node) -> None:
    for user in ("ann", "bob", None, ""):
        assert node.finds([*CHAT, 1], user) is None
        node.park(CHAT, user)
        assert len(node.parking) == 1
        for other in {"ann", "bob", None, "", "ANN", "ann "} - {user}:
            assert node.finds([*CHAT, 1], other) is None
        assert node.finds([*CHAT, 1], user) == (CHAT, 50)


def test_a_deeper_node_finds_its_part_by_the_key_alone(node: Node) -> None:
    session = Held(node.capacity.lease(50), [], [50, 50])
    node.parking.park(b"secret", [], session)
    assert node.parking.take_key(b"another", 40, 100) is None
    assert node.finds([*CHAT, 1]) is None
    taken = node.parking.take_key(b"secret", 40, 100)
    assert taken is not None and taken.session is session and taken.common == 40
    assert node.parking.take_key(b"secret", 40, 100) is None


@pytest.mark.parametrize(("common", "max_positions", "kept"), [(60, 100, 50), (50, 45, 45), (0, 100, 0)])
def test_no_more_is_kept_than_there_is_and_than_there_is_room_for(
    node: Node, common: int, max_positions: int, kept: int
) -> None:
    node.park(CHAT, key=b"key")
    taken = node.parking.take_key(b"key", common, max_positions)
    assert taken is not None and taken.common == kept


def test_a_key_stands_for_the_session_that_was_parked_last(node: Node) -> None:
    old, new = node.park(CHAT, key=b"key"), node.park([1, *CHAT], key=b"key")
    assert not old.lease.parked and len(node.parking) == 1
    taken = node.parking.take_key(b"key", 51, 100)
    assert taken is not None and taken.session is new
    node.capacity.check_integrity()


def test_a_session_that_must_move_says_from_where(node: Node) -> None:
    node.park(CHAT)
    node.capacity.lease(64)
    taken = node.parking.take([*CHAT, 1], None, 2 * PAGE_SIZE)
    assert taken is not None and taken.moved_from == PageRun(0, 0, 1)
    assert taken.session.lease.pages == PageRun(0, 2, 2)


def test_a_session_without_room_stays_parked(node: Node) -> None:
    node.park(CHAT, key=b"key")
    running = node.capacity.lease(900)
    for kind, positions in ((CapacityError, 200), (ContextLengthError, 1001)):
        with pytest.raises(kind):
            node.parking.take([*CHAT, 1], None, positions)
        with pytest.raises(kind):
            node.parking.take_key(b"key", 50, positions)
    assert len(node.parking) == 1
    running.give_back()
    assert node.finds([*CHAT, 1]) == (CHAT, 50)


def test_an_evicted_session_is_forgotten() -> None:
    node = Node(max_positions=2 * PAGE_SIZE)
    node.park(CHAT, key=b"old")
    node.park([1, *CHAT])
    running = node.capacity.lease(64)
    assert len(node.parking) == 1
    assert node.parking.take_key(b"old", 50, 60) is None
    running.give_back()
    assert node.finds([1, *CHAT, 2]) == ([1, *CHAT], 51)


def test_a_key_that_was_parked_again_survives_the_end_of_the_session_before() -> None:
    node = Node(max_positions=2 * PAGE_SIZE)
    old = node.park(CHAT, key=b"key")
    evicted = node.parking._forget
    new = node.park([1, *CHAT], key=b"key")
    evicted(b"key", old.lease)
    assert new.lease.parked and len(node.parking) == 1


def test_taking_a_session_back_evicts_others_but_not_itself(node: Node) -> None:
    sessions = [node.park([i, *CHAT]) for i in range(4)]
    taken = node.parking.take([1, *CHAT, 5], None, 900)
    assert taken is not None and taken.session is sessions[1]
    assert [session.lease.parked for session in sessions] == [True, False, False, False], "it stays where it is"
    assert len(node.parking) == 1
    node.capacity.check_integrity()


def test_a_session_is_closed_when_its_time_is_over(node: Node) -> None:
    first = node.park(CHAT, key=b"first")
    node.sleep(40)
    second = node.park([1, *CHAT])
    node.sleep(19.9)
    assert len(node.parking) == 2
    node.sleep(0.1)
    assert len(node.parking) == 1 and not first.lease.parked and second.lease.parked
    node.sleep(40)
    assert node.finds([1, *CHAT, 2]) is None and not second.lease.parked
    assert not node.capacity.parked


def test_a_key_is_worth_nothing_when_its_time_is_over(node: Node) -> None:
    node.park(CHAT, key=b"key")
    node.sleep(60)
    assert node.parking.take_key(b"key", 50, 100) is None


def test_a_session_that_is_taken_back_and_parked_again_starts_anew(node: Node) -> None:
    first = node.park(CHAT, key=b"first")
    second = node.park([1, *CHAT])
    node.sleep(50)
    taken = node.parking.take_key(b"first", 50, 60)
    assert taken is not None
    node.parking.park(b"first", CHAT, first)
    node.sleep(20)
    assert len(node.parking) == 1 and first.lease.parked and not second.lease.parked


def test_no_more_sessions_are_parked_than_allowed() -> None:
    node = Node(max_parked=2)
    sessions = [node.park([i, *CHAT]) for i in range(3)]
    assert [session.lease.parked for session in sessions] == [False, True, True]
    assert len(node.parking) == 2


@pytest.mark.parametrize(("park_s", "max_parked"), [(0, 10), (60, 0)])
def test_a_node_that_parks_nothing_closes_its_sessions(park_s: float, max_parked: int) -> None:
    node = Node(park_s=park_s, max_parked=max_parked)
    session = node.park(CHAT)
    assert len(node.parking) == 0 and not session.lease.parked and not node.capacity.leases


def test_a_session_that_has_run_nothing_is_closed(node: Node) -> None:
    session = Held(node.capacity.lease(50), [], [0, 0])
    node.parking.park(b"key", [], session)
    assert len(node.parking) == 0 and not node.capacity.leases and not session.lease.parked


def test_a_session_is_found_by_the_positions_that_have_run(node: Node) -> None:
    for request, common in (([*CHAT, 1], 24), ([*CHAT[:24], 1, 2], 24)):
        session = Held(node.capacity.lease(60), CHAT, [24, 12])
        node.parking.park(b"key", CHAT, session)
        assert node.finds(request) == (CHAT, common)


def test_clearing_closes_them_all(node: Node) -> None:
    sessions = [node.park([i, *CHAT]) for i in range(3)]
    node.parking.clear()
    assert len(node.parking) == 0 and not any(session.lease.parked for session in sessions)
    node.capacity.check_integrity()


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(lambda parts: [t for p in parts for t in [p] * 9])
"""Sequences that have prefixes of several lengths in common."""


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.sampled_from("pptls"), TOKENS, st.sampled_from(["ann", "bob"]), st.integers(0, 5)), max_size=40
    )
)
def test_whatever_happens_a_request_finds_the_best_session_of_its_user(
    steps: list[tuple[str, list[int], str, int]],
) -> None:
    node = Node(max_positions=6 * PAGE_SIZE, park_s=10, max_parked=5)
    parked: list[tuple[Held, str, float]] = []
    running: list[Held] = []
    for action, token_ids, user, extra in steps:
        now = node.time.now()
        if action == "s":
            node.sleep(extra)
        elif action == "p" and len(running) < 4:
            try:
                parked.append((node.park(token_ids, user), user, now))
            except CapacityError:
                pass
        elif action == "t":
            request = [*token_ids, 7]
            best, most = None, LEAST_COMMON - 1
            for session, owner, since in parked:
                alike = [a == b for a, b in zip(session.token_ids, token_ids, strict=False)]
                common = [*alike, False].index(False)
                fits = session.lease.parked and owner == user and now < since + 10
                if fits and common > most and 2 * common >= len(session.token_ids):
                    best, most = session, common
            try:
                taken = node.parking.take(request, user, len(request) + 30 * extra)
            except CapacityError:
                assert best is not None and best.lease.parked
                taken = None
            else:
                assert (taken is None) == (best is None)
            if taken is not None:
                assert (taken.session, taken.common) == (best, most)
                running.append(taken.session)
        elif action == "l" and running:
            running.pop(0).close()
        parked = [entry for entry in parked if entry[0].lease.parked]
        assert len(node.parking) <= min(5, len(parked))
        node.capacity.check_integrity()
        assert len(node.parking) == len(node.capacity.parked)
        assert list(node.capacity.leases.values()) == [session.lease for session in running]


@pytest.mark.parametrize("change", ["park", "resume", "release"])
def test_sessions_are_parked_and_taken_back_under_the_lock(
    node: Node, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    kept, locked = getattr(node.capacity.pool, change), list[bool]()

    def try_lock() -> None:
        free = node.parking._lock.acquire(blocking=False)
        locked.append(not free)
        if free:
            node.parking._lock.release()

    def watched(*args: Any) -> Any:
        thread = threading.Thread(target=try_lock)
        thread.start()
        thread.join()
        return kept(*args)

    node.park(CHAT)
    monkeypatch.setattr(node.capacity.pool, change, watched)
    taken = node.parking.take([*CHAT, 1], None, 60)
    assert taken is not None
    node.parking.park(b"key", CHAT, taken.session)
    node.parking.clear()
    assert locked and all(locked)


def test_a_thread_that_parks_and_one_that_takes_back_agree(node: Node) -> None:
    ended: SimpleQueue[Held | None] = SimpleQueue()
    parked: list[Held] = []

    def compute() -> None:
        while (session := ended.get()) is not None:
            node.parking.park(b"%d" % len(parked), session.token_ids, session)
            parked.append(session)

    thread = threading.Thread(target=compute)
    thread.start()
    leased = taken_back = 0
    while leased < 300 or taken_back < 100:
        with contextlib.suppress(CapacityError):  # four sessions wait to be parked
            ended.put(Held(node.capacity.lease(51), [leased % 30, *CHAT], [51, 51]))
            leased += 1
        with contextlib.suppress(CapacityError):
            taken = node.parking.take([taken_back % 30, *CHAT, 1], None, 2 * PAGE_SIZE)
            if taken is not None:
                assert taken.session.token_ids == [taken_back % 30, *CHAT] and taken.common == 51
                taken_back += 1
                ended.put(taken.session)
        time.sleep(0)
    ended.put(None)
    thread.join()
    assert len(parked) == leased + taken_back and not node.capacity.leases
    assert len(node.parking) == len(node.capacity.parked) == len({id(s) for s in parked if s.lease.parked})
    node.capacity.check_integrity()


# ---- On real stages: a session that comes back goes on as one that was never away ----


@pytest.fixture(scope="module")
def world(five: Path) -> World:
    return World(five)


def come_back(session: ShardSession, parking: Parking[ShardSession], key: bytes) -> None:
    """Park a session, and take it back for two pages when it cannot stay where it is."""
    shard, capacity = session.stages, session.stages.capacity
    session.max_positions = 2 * PAGE_SIZE
    parking.park(key, [], session)
    other = capacity.lease(64 if session.lease.pages.first == 0 else 192)  # page 1, or pages 3 to 5
    taken = parking.take_key(key, 2 * PAGE_SIZE, 2 * PAGE_SIZE)
    assert taken is not None and taken.session is session and taken.moved_from is not None
    session.use_pages(taken.moved_from)
    for pages in (taken.moved_from, other.pages):
        shard.memory[:, :, :, pages.positions] = torch.nan
        shard.log[pages.positions] = torch.nan
    other.give_back()
    capacity.check_integrity()


@pytest.mark.timeout(300)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    routing=REWINDABLE,
    cut=st.integers(0, len(CUTS) - 1),
    ahead=st.sampled_from([0, 9, 100]),
    turns_=TURNS,
)
async def test_a_session_that_was_parked_and_moved_goes_on_as_a_fresh_one(
    world: World, routing: Routing, cut: int, ahead: int, turns_: list[Turn]
) -> None:
    policy = Policy.resolve(routing, EXITS)
    size = sum(len(given_ids) + count for _, given_ids, count in turns_)
    chain, sessions = world.open(cut, policy, SamplingParams(), len(turns_[0][1]), size, ahead)
    parking: Parking[ShardSession] = Parking(60, 100)

    def all_come_back() -> None:
        for i, session in enumerate(sessions):
            if max(session.positions):
                come_back(session, parking, b"%d" % i)

    async with world.closing(cut, chain, sessions):
        await go_on(chain, world.oracle, policy, turns_, between=all_come_back)


@pytest.mark.parametrize("cut", range(len(CUTS)))
@pytest.mark.parametrize(
    "routing", [Routing(Mode.EXACT, draft=3), Routing(Mode.TOKEN, threshold=0.4, draft=2)], ids=["exact", "token"]
)
async def test_the_next_turn_of_a_chat_goes_on_from_the_common_prefix_on_every_node(
    world: World, routing: Routing, cut: int
) -> None:
    policy = Policy.resolve(routing, EXITS)
    prompt = [3 + i % 50 for i in range(40)]
    chain, sessions = world.open(cut, policy, SamplingParams(), len(prompt), 100)
    parkings: list[Parking[ShardSession]] = [Parking(60, 10) for _ in CUTS[cut]]
    async with world.closing(cut, chain, sessions):
        first = [d.token async for settled in decode(chain, prompt, 20) for d in settled.decisions]
        await turns()
        for i, (session, parking) in enumerate(zip(sessions, parkings, strict=False)):
            parking.park(b"chat", session.token_ids if i == 0 else [], session)
            session.stages.capacity.lease(64).give_back()
        assert not any(piece.capacity.leases for piece in world.cuts[cut])

        request = [*prompt, *first, 7, 8, 9, 10]
        taken = parkings[0].take(request, None, 200)
        assert taken is not None and taken.session is sessions[0] and taken.common >= len(prompt) + 19
        found = [taken, *(p.take_key(taken.key, taken.common, 200) for p in parkings[1 : len(sessions)])]
        for session, again in zip(sessions, found, strict=True):
            assert again is not None and again.session is session
            session.use_pages(again.moved_from)
            session.max_positions = 200
        ran = [session.positions[0] for session in sessions]
        await chain.rewind(taken.common)
        assert min(ran) > 0 and sessions[0].positions[0] == taken.common, "nothing of it runs again"
        second = [d async for settled in decode(chain, request[taken.common :], 20) for d in settled.decisions]
        assert [(d.token, d.exit) for d in second] == world.oracle.decide(policy, request, 20)
