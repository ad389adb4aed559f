"""A session's connection to the next node: what is sent when, and what becomes of it when the connection is lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from ruyi_flow.errors import (
    CacheMiss,
    CapacityError,
    DeadlineExceeded,
    NodeError,
    NodeUnavailable,
    RuyiFlowError,
    WireError,
)
from ruyi_flow.loop.capacity import Capacity, Lease
from ruyi_flow.loop.next_stage import NO_RECOVERY, NextStage, Recoveries, Uplink
from ruyi_flow.loop.pages import PageRun
from ruyi_flow.loop.session import Pass, Session
from ruyi_flow.requests import SessionOpen
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.types import MIN_UPLOAD_POSITIONS, Block, Decision, Hop, Mode, Reason, Recovery, Verdict

EXITS = (2, 4, 6)
PROMPT = 12
TOKEN = Routing(Mode.TOKEN, threshold=0.5)


class States:
    """The states of some positions: a stand-in for a tensor that knows which they are."""

    def __init__(self, positions: Sequence[int]) -> None:
        self.positions = tuple(positions)
        self.shape = (len(self.positions),)

    def __getitem__(self, rows: slice) -> States:
        return States(self.positions[rows])


class Stages:
    """The stages of a node whose layers compute nothing."""

    exits: tuple[int, ...] = EXITS[:2]
    is_entry = True

    def __init__(self) -> None:
        self.capacity = Capacity(512, 4, 512)

    def open(self, opening: SessionOpen, lease: Lease, *, covers_next: bool = False) -> Held:
        return Held(self, lease, opening, vocab_size=100, covers_next=covers_next)

    def run(self, parts: Sequence[tuple[Pass, int]]) -> None:
        raise AssertionError("nothing runs through the layers")


class Held(Session):
    """A session on `Stages`."""

    log: Sequence[int] = ()

    def embed(self, token_ids: Sequence[int]) -> States:
        raise AssertionError("nothing runs through the layers")

    def join(self, states: Sequence[States]) -> States:
        return States([p for each in states for p in each.positions])

    def use_pages(self, moved_from: PageRun | None) -> None:
        raise AssertionError("nothing is parked")

    def states(self, start: int, stop: int) -> States:
        assert stop <= self.log_length
        return States(self.log[start:stop])

    def write_log(self, start: int, boundary: States) -> None:
        self.log = [*self.log[:start], *boundary.positions]

    def compute(self, count: int) -> None:
        """Add positions that both stages here have run."""
        start = len(self.token_ids)
        stop = start + count
        self.token_ids += [p % 7 for p in range(start, stop)]
        self.add_boundary(0, States(range(start, stop)))
        self.add_boundary(1, self.take_unsent(0, stop))

    def question(self) -> tuple[int, ...]:
        """A question about the last position."""
        return (len(self.token_ids) - 1,)


class Peer:
    """A next stage that checks that it is told every position once and in order.

    Args:
        fails: raises what a call fails with, by the name of the call.
    """

    def __init__(self, fails: Mapping[str, RuyiFlowError] | None = None) -> None:
        self.token_ids: list[int] = []
        self.calls: list[tuple[str, int]] = []
        """Each call, with the first position that it is about."""
        self.fails: Mapping[str, RuyiFlowError] = fails or {}
        self.closed = 0
        self.gates = {name: asyncio.Event() for name in ("feed", "arrived", "advance")}
        """A call goes on when its gate is open."""
        for gate in self.gates.values():
            gate.set()

    async def _begin(self, name: str, position: int) -> None:
        self.calls.append((name, position))
        if name in self.gates:
            await self.gates[name].wait()
        if name in self.fails:
            raise self.fails[name]

    def _take(self, block: Block) -> None:
        assert block.start == len(self.token_ids), "every position comes once, and none is missing"
        states: Any = block.states
        assert states.positions == tuple(range(block.start, block.start + len(block.token_ids)))
        self.token_ids += block.token_ids

    async def advance(self, block: Block) -> Verdict:
        await self._begin("advance", block.start)
        self._take(block)
        return Verdict(tuple(Decision(p % 7, 6, 1.0, Reason.DEEPEST) for p in block.wants), (Hop("n1"),))

    async def feed(self, block: Block) -> None:
        await self._begin("feed", block.start)
        assert block.wants == ()
        self._take(block)

    async def arrived(self) -> None:
        await self._begin("arrived", len(self.token_ids))

    async def rewind(self, position: int) -> None:
        await self._begin("rewind", position)
        del self.token_ids[position:]

    async def close(self) -> None:
        self.closed += 1


class Patient:
    """Recoveries that are never given up; they record losses and recoveries."""

    timeout_s = 30.0

    def __init__(self) -> None:
        self.losses: list[str] = []
        self.recoveries: list[Recovery] = []

    def left_s(self, error: NodeError, *, began: bool, waited_s: float) -> float:
        return 1.0

    def lost(self, node: str, cause: str) -> None:
        self.losses.append(cause)

    def recovered(self, node: str, recovery: Recovery) -> None:
        self.recoveries.append(recovery)


class World:
    """A session, its connection, and the peers that the connection opens one after the other."""

    def __init__(
        self,
        *peers: Peer,
        routing: Routing = TOKEN,
        covers_next: bool = False,
        ahead: int = 0,
        uplink: Uplink | None = None,
        gate: Callable[[int], Reason | None] | None = None,
        recoveries: Recoveries = NO_RECOVERY,
    ) -> None:
        self.peers, self.policies = peers, list[Policy]()
        opening = SessionOpen(policy=Policy.resolve(routing, EXITS), prompt_length=PROMPT, max_positions=400)
        stages = Stages()
        self.session = stages.open(opening, stages.capacity.lease(400), covers_next=covers_next)
        self.uplink = uplink or Uplink()
        self.next = NextStage(
            self.session, self._make, recoveries=recoveries, gate=gate, ahead=ahead, uplink=self.uplink
        )

    def _make(self, policy: Policy, position: int) -> Peer:
        if position:
            raise CacheMiss("no peer here has parked anything")
        self.policies.append(policy)
        return self.peers[len(self.policies) - 1]

    def settle(self, computed: int) -> None:
        """Compute positions, all of which are decided here."""
        self.session.compute(computed)
        self.next.settle(len(self.session.token_ids))


async def turns() -> None:
    """Let what goes up in advance go, and arrive."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_connection_is_opened_once_and_when_it_is_needed() -> None:
    world = World(Peer())
    world.session.compute(PROMPT)
    assert world.policies == []
    for _ in range(2):
        verdict = await world.next.ask(world.session.question())
        assert isinstance(verdict, Verdict) and [d.token for d in verdict.decisions] == [world.session.token_ids[-1]]
        world.session.compute(1)
    assert world.policies == [world.session.policy]
    assert world.peers[0].calls == [("advance", 0), ("advance", PROMPT)]
    await world.next.close()
    assert world.peers[0].closed == 1


async def test_without_a_connection_there_is_nothing_to_close_or_rewind() -> None:
    world = World()
    world.session.compute(PROMPT)
    await world.next.rewind(0)
    await world.next.close()
    alone = NextStage(world.session)
    await alone.close()
    with pytest.raises(AssertionError, match="^the policy's deepest exit is after the deepest node"):
        await alone.ask(world.session.question())


async def test_parts_of_a_prompt_are_fed_before_the_question() -> None:
    world = World(Peer())
    world.session.compute(8)
    await world.next.feed()
    world.session.rewind(6)
    await world.next.rewind(6)
    assert world.peers[0].calls == [("feed", 0), ("rewind", 6)]
    world.session.compute(6)
    assert isinstance(await world.next.ask(world.session.question()), Verdict)
    assert world.peers[0].calls[2:] == [("advance", 6)]


async def test_a_question_counts_while_it_is_asked() -> None:
    for fails in ({}, {"advance": WireError("no")}):
        world = World(Peer(fails))
        world.peers[0].gates["advance"].clear()
        world.session.compute(PROMPT)
        asking = asyncio.create_task(world.next.ask(world.session.question()))
        await turns()
        assert world.uplink.questions == 1 and not world.uplink.idle
        world.peers[0].gates["advance"].set()
        await asyncio.gather(asking, return_exceptions=True)
        assert world.uplink.questions == 0 and world.uplink.idle


async def test_questions_of_several_sessions_are_counted_together() -> None:
    uplink = Uplink()
    worlds = [World(Peer(), uplink=uplink) for _ in range(2)]
    asking = []
    for world in worlds:
        world.peers[0].gates["advance"].clear()
        world.session.compute(PROMPT)
        asking.append(asyncio.create_task(world.next.ask(world.session.question())))
        await turns()
    for left, world in zip((1, 0), worlds, strict=True):
        assert uplink.questions == left + 1
        world.peers[0].gates["advance"].set()
        await turns()
        assert uplink.questions == left and uplink.idle == (not left)
    await asyncio.gather(*asking)


@pytest.mark.parametrize("kind", [NodeUnavailable, DeadlineExceeded, CapacityError, WireError])
async def test_with_fallback_a_lost_node_is_not_asked_again(kind: type[RuyiFlowError]) -> None:
    world = World(Peer({"advance": kind("gone")}), routing=Routing(Mode.TOKEN, threshold=0.5, fallback=True))
    world.session.compute(PROMPT)
    assert world.next.lost is None and world.next.refusal(5) is None
    assert await world.next.ask(world.session.question()) is Reason.UNREACHABLE
    assert world.next.lost is Reason.UNREACHABLE and world.next.refusal(5) is Reason.UNREACHABLE
    assert world.peers[0].closed == 1 and world.uplink.questions == 0
    await world.next.close()
    assert world.peers[0].closed == 1


@pytest.mark.parametrize("kind", [NodeUnavailable, DeadlineExceeded, CapacityError, WireError])
async def test_without_fallback_a_lost_node_ends_the_answer(kind: type[RuyiFlowError]) -> None:
    world = World(Peer({"advance": kind("gone")}))
    world.session.compute(PROMPT)
    with pytest.raises(kind, match="^gone$"):
        await world.next.ask(world.session.question())
    assert world.next.lost is None
    await world.next.close()
    assert world.peers[0].closed == 1


@pytest.mark.parametrize("covers_next", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_the_next_stage_is_certain_unless_this_one_may_decide_in_its_place(covers_next: bool, gated: bool) -> None:
    world = World(covers_next=covers_next, gate=(lambda positions: None) if gated else None)
    assert world.next.is_certain == (not covers_next and not gated)
    assert not NextStage(world.session).is_certain, "the deepest node"


async def test_a_gate_counts_what_is_sent_until_the_next_stage_is_lost() -> None:
    asked: list[int] = []

    def gate(positions: int) -> Reason | None:
        asked.append(positions)
        return Reason.BUDGET if positions > 9 else None

    world = World(Peer({"advance": NodeUnavailable("gone")}), routing=Routing(fallback=True), gate=gate)
    assert [world.next.refusal(n) for n in (9, 10)] == [None, Reason.BUDGET]
    world.session.compute(PROMPT)
    await world.next.ask(world.session.question())
    assert world.next.refusal(9) is Reason.UNREACHABLE and asked == [9, 10]


async def test_what_is_sent_again_counts_again_at_the_gate() -> None:
    asked: list[int] = []

    def gate(positions: int) -> Reason | None:
        asked.append(positions)
        return Reason.BUDGET if sum(asked) > 30 else None

    world = World(
        Peer({"advance": NodeUnavailable("gone")}),
        Peer({"advance": NodeUnavailable("gone")}),
        Peer(),
        gate=gate,
        covers_next=True,
        recoveries=Patient(),
    )
    world.session.compute(PROMPT)
    assert world.next.refusal(PROMPT) is None
    assert await world.next.ask(world.session.question()) is Reason.BUDGET
    assert asked == [PROMPT] * 3 and world.next.lost is None, "another question may be asked when there are bytes again"


@pytest.mark.parametrize(
    ("decided", "ahead", "sent"),
    [
        (MIN_UPLOAD_POSITIONS, 100, MIN_UPLOAD_POSITIONS),
        (MIN_UPLOAD_POSITIONS - 1, 100, 0),
        (40, 100, 32),
        (40, 32, 32),
        (40, 20, 20),
        (40, MIN_UPLOAD_POSITIONS, MIN_UPLOAD_POSITIONS),
        (40, MIN_UPLOAD_POSITIONS - 1, 0),
        (40, 0, 0),
    ],
)
async def test_decided_states_go_up_in_advance_within_their_bounds(decided: int, ahead: int, sent: int) -> None:
    world = World(Peer(), ahead=ahead)
    world.settle(decided)
    await turns()
    assert world.peers[0].token_ids == world.session.token_ids[:sent]
    assert world.peers[0].calls == ([("feed", 0), ("arrived", sent)] if sent else [])
    assert world.uplink.idle
    assert isinstance(await world.next.ask(world.session.question()), Verdict)
    assert world.peers[0].token_ids == world.session.token_ids


async def test_states_in_advance_keep_to_their_budget_in_all() -> None:
    world = World(Peer(), ahead=30)
    for _ in range(5):
        world.settle(MIN_UPLOAD_POSITIONS)
        await turns()
    assert [call for call in world.peers[0].calls if call[0] == "feed"] == [("feed", 0), ("feed", 8), ("feed", 16)]


async def test_a_few_states_do_not_go_up_in_advance_however_long_the_sequence_is() -> None:
    world = World(Peer(), ahead=100)
    world.session.compute(40)
    await world.next.ask(world.session.question())
    world.settle(MIN_UPLOAD_POSITIONS - 1)
    await turns()
    assert world.peers[0].calls == [("advance", 0)]
    world.settle(1)
    await turns()
    assert world.peers[0].calls[1:] == [("feed", 40), ("arrived", 40 + MIN_UPLOAD_POSITIONS)]


async def test_only_what_is_decided_and_computed_goes_up_in_advance() -> None:
    world = World(Peer(), ahead=100)
    world.session.compute(30)
    world.next.settle(10)
    await turns()
    assert len(world.peers[0].token_ids) == 10
    world.session.token_ids += [1] * 30  # drafts whose layers have not run
    world.next.settle(60)
    await turns()
    assert len(world.peers[0].token_ids) == 30


async def test_nothing_goes_up_in_advance_where_it_may_not() -> None:
    busy, other = Uplink(questions=1), World().next
    for world in (
        World(ahead=100, uplink=busy),
        World(ahead=100, uplink=Uplink(uploader=other)),
        World(ahead=100, gate=lambda positions: Reason.BUDGET),
        World(ahead=100, routing=Routing(Mode.FIXED, exit=2)),  # nothing deeper is ever asked
    ):
        world.settle(30)
        await turns()
        assert world.policies == []
    world = World(Peer({"advance": NodeUnavailable("gone")}), routing=Routing(fallback=True), ahead=100)
    world.session.compute(PROMPT)
    await world.next.ask(world.session.question())
    world.settle(30)
    await turns()
    assert world.peers[0].calls == [("advance", 0)], "it is lost"


async def test_a_gate_is_asked_about_what_would_go_up_in_advance() -> None:
    asked: list[int] = []

    def gate(positions: int) -> Reason | None:
        asked.append(positions)
        return None

    world = World(Peer(), ahead=100, gate=gate)
    world.settle(MIN_UPLOAD_POSITIONS - 1)
    world.settle(20)
    await turns()
    world.settle(9)
    assert asked == [MIN_UPLOAD_POSITIONS - 1 + 20, 9]
    await world.next.close()


async def test_a_link_carries_one_upload_at_a_time() -> None:
    uplink = Uplink()
    one, other = World(Peer(), ahead=100, uplink=uplink), World(Peer(), ahead=100, uplink=uplink)
    for name in ("feed", "arrived"):
        one.peers[0].gates[name].clear()
    one.settle(20)
    other.settle(20)
    await turns()
    assert uplink.uploader is one.next and other.policies == []
    one.peers[0].gates["feed"].set()
    await turns()
    other.settle(1)
    assert uplink.uploader is one.next and not uplink.idle, "it is written, and may not have arrived"
    uplink.free(other.next)
    assert uplink.uploader is one.next, "another session's end does not end it"
    one.peers[0].gates["arrived"].set()
    await turns()
    assert uplink.idle
    other.settle(1)
    assert uplink.uploader is other.next
    await other.next.close()


async def test_a_question_waits_until_the_upload_is_written_but_not_until_it_has_arrived() -> None:
    world = World(Peer(), ahead=100)
    peer = world.peers[0]
    peer.gates["feed"].clear()
    peer.gates["arrived"].clear()
    world.settle(20)
    world.session.compute(1)
    asking = asyncio.create_task(world.next.ask(world.session.question()))
    await turns()
    assert peer.calls == [("feed", 0)]
    peer.gates["feed"].set()
    assert isinstance(await asking, Verdict)
    assert peer.calls == [("feed", 0), ("arrived", 20), ("advance", 20)] and world.uplink.idle
    world.settle(20)
    peer.gates["arrived"].set()
    await turns()
    assert peer.token_ids == world.session.token_ids and world.uplink.idle, "the next upload goes as the first did"


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("when", ["feed", "arrived"])
async def test_states_that_were_lost_on_their_way_are_sent_again_with_the_next_question(when: str, asked: bool) -> None:
    world = World(Peer(), Peer(), ahead=100)
    lost, found = world.peers
    if asked:
        world.session.compute(PROMPT)
        assert isinstance(await world.next.ask(world.session.question()), Verdict)
    lost.fails = {when: CapacityError("full")}
    for _ in range(2):
        world.settle(10)
        await turns()
    assert [name for name, _ in lost.calls].count("feed") == 1, "after a failure nothing goes up in advance any more"
    world.session.compute(1)
    assert isinstance(await world.next.ask(world.session.question()), Verdict)
    assert found.calls == [("advance", 0)] and found.token_ids == world.session.token_ids
    assert lost.closed == 1 and world.uplink.idle and world.next.lost is None
    await world.next.close()
    assert lost.closed == found.closed == 1


@pytest.mark.parametrize("stuck", ["feed", "arrived"])
async def test_closing_gives_up_what_is_on_its_way(stuck: str) -> None:
    world = World(Peer(), ahead=100)
    world.peers[0].gates[stuck].clear()
    world.settle(20)
    await turns()
    assert world.uplink.uploader is world.next
    await world.next.close()
    assert world.uplink.idle and world.peers[0].closed == 1


async def test_a_close_that_is_cancelled_still_closes_the_next_stage() -> None:
    world = World(Peer(), ahead=100)
    peer = world.peers[0]
    stubborn = asyncio.Event()

    async def feed(block: Block) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await stubborn.wait()

    peer.feed = feed  # type: ignore[method-assign]
    world.settle(20)
    await turns()
    closing = asyncio.create_task(world.next.close())
    await turns()
    closing.cancel()
    await turns()
    stubborn.set()
    await asyncio.gather(closing, return_exceptions=True)
    assert world.uplink.idle and peer.closed == 1


async def test_a_rewind_reaches_what_the_next_stage_has_and_nothing_else() -> None:
    world = World(Peer(), ahead=100)
    peer = world.peers[0]
    world.session.compute(PROMPT)
    await world.next.ask(world.session.question())
    await world.next.rewind(PROMPT)
    assert peer.calls == [("advance", 0)], "it has nothing after that"
    await world.next.rewind(PROMPT - 2)
    await world.next.rewind(PROMPT - 1)
    assert peer.calls[1:] == [("rewind", PROMPT - 2)]


async def test_what_a_verdict_leaves_out_is_not_rewound_again() -> None:
    world = World(Peer())
    world.session.compute(PROMPT)
    await world.next.ask(world.session.question())
    world.next.settle(PROMPT - 3)  # the next stage has rewound to what it decided
    await world.next.rewind(PROMPT - 3)
    assert world.peers[0].calls == [("advance", 0)]


async def test_a_rewind_reaches_an_upload_that_has_not_begun() -> None:
    world = World(Peer(), ahead=100)
    world.settle(20)
    world.session.rewind(9)
    await world.next.rewind(9)
    world.session.compute(4)
    assert isinstance(await world.next.ask(world.session.question()), Verdict)
    assert world.peers[0].token_ids == world.session.token_ids


async def test_states_sent_again_are_those_that_a_rewind_left() -> None:
    world = World(Peer({"advance": CapacityError("full")}), Peer(), ahead=100, recoveries=Patient())
    world.settle(20)
    await turns()
    world.session.rewind(9)
    await world.next.rewind(9)
    assert world.peers[0].calls[-1] == ("rewind", 9)
    world.session.compute(4)
    assert isinstance(await world.next.ask(world.session.question()), Verdict)
    assert world.peers[1].token_ids == world.session.token_ids and len(world.session.token_ids) == 13


@pytest.mark.parametrize("seed", range(60))
async def test_the_next_stage_gets_every_position_once_whatever_happens(seed: int) -> None:
    source = random.Random(seed)
    peers = [Peer(), Peer(), Peer()]
    if source.random() < 0.5:
        peers[0].fails = {source.choice(["feed", "arrived", "advance"]): CapacityError("full")}
    world = World(*peers, ahead=source.choice([0, 20, 100]))

    async def ask() -> None:
        world.session.compute(1)
        if "advance" in peers[0].fails:  # nothing here takes up a session after a question that fails
            peers[0].fails = {}
        assert isinstance(await world.next.ask(world.session.question()), Verdict)
        assert peers[len(world.policies) - 1].token_ids == world.session.token_ids

    for _ in range(25):
        step = source.random()
        if step < 0.5:
            world.settle(source.choice([1, 1, 5, 20]))
        elif step < 0.75 and world.next.sent < len(world.session.token_ids):
            await ask()
        elif world.session.token_ids:
            position = source.randrange(len(world.session.token_ids))
            world.session.rewind(position)
            await world.next.rewind(position)
        for _ in range(source.choice([0, 1, 5])):
            await asyncio.sleep(0)
    await ask()
    await world.next.close()
    assert world.uplink.idle and all(peer.closed == 1 for peer in peers[: len(world.policies)])
