"""A session that loses any node, at any message, any number of times, gives the tokens that it would have given."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ruyi_flow.errors import (
    CacheMiss,
    CapacityError,
    DeadlineExceeded,
    NodeError,
    NodeFault,
    NodeUnavailable,
    RequestCancelled,
    WireError,
)
from ruyi_flow.loop.chain import Chain, decode
from ruyi_flow.loop.next_stage import NextStage
from ruyi_flow.requests import SamplingParams
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.runtime.stage import ShardSession
from ruyi_flow.runtime.worker import InlineWorker
from ruyi_flow.testing import open_session
from ruyi_flow.types import Block, Decision, Mode, Stage, Verdict
from tests.loop.test_chain import CUTS, EXITS, World, routings, turns
from tests.loop.test_next_stage import Patient

T = TypeVar("T")

Dies = Callable[[], NodeError | None]
"""Says at each message whether the node dies at it, and how."""


class Mortal:
    """A next stage that dies at some messages, before or after it has done what they ask.

    Args:
        stage: the stage.
        dies: called before a message and after it.
    """

    def __init__(self, stage: Stage, dies: Dies) -> None:
        self._stage, self._dies, self._dead = stage, dies, False

    async def advance(self, block: Block) -> Verdict:
        return await self._run(lambda: self._stage.advance(block))

    async def feed(self, block: Block) -> None:
        await self._run(lambda: self._stage.feed(block))

    async def arrived(self) -> None:
        await self._run(self._stage.arrived)

    async def rewind(self, position: int) -> None:
        await self._run(lambda: self._stage.rewind(position))

    async def close(self) -> None:
        await self._stage.close()

    async def _run(self, call: Callable[[], Awaitable[T]]) -> T:
        assert not self._dead, "a stage that is lost is not used again"
        self._die()
        result = await call()
        self._die()
        return result

    def _die(self) -> None:
        if (error := self._dies()) is not None:
            self._dead = True
            raise error


@pytest.fixture(scope="module")
def world(five: Path) -> World:
    return World(five)


def open_mortal(
    world: World, cut: int, policy: Policy, prompt: int, size: int, dies: Dies, *, ahead: int = 0
) -> tuple[Chain, list[ShardSession], Patient]:
    """The entry node's chain over mortal next stages, the sessions that are opened over time, and the recoveries."""
    pieces, sessions, patient = world.cuts[cut], list[ShardSession](), Patient()

    def node(i: int, policy: Policy) -> Chain:
        params = SamplingParams(eos_token_ids=())
        session = open_session(pieces[i], policy, params, prompt_length=prompt, max_positions=size)
        sessions.append(session)
        make = None if i + 1 == len(pieces) else partial(mortal, i + 1)
        return Chain(
            session, InlineWorker(), f"n{i}", next_stage=NextStage(session, make, ahead=ahead, recoveries=patient)
        )

    def mortal(i: int, policy: Policy, position: int) -> Stage:
        if position:
            raise CacheMiss("a node that died has nothing parked")
        return Mortal(node(i, policy), dies)

    return node(0, policy), sessions, patient


async def run(
    world: World,
    cut: int,
    policy: Policy,
    prompt: list[int],
    count: int,
    dies: Dies,
    *,
    ahead: int = 0,
    resumed: list[tuple[int, int]] | None = None,
) -> tuple[list[Decision], Patient]:
    """Decided tokens, and what was lost meanwhile."""
    chain, sessions, patient = open_mortal(world, cut, policy, len(prompt), len(prompt) + count, dies, ahead=ahead)
    decisions: list[Decision] = []
    async with world.closing(cut, chain, sessions):
        async for settled in decode(chain, prompt, count, resumed or ()):
            decisions += settled.decisions
            await turns()
    return decisions, patient


CASES = [
    Routing(Mode.EXACT, draft=3),
    Routing(Mode.EXACT, draft=0),
    Routing(Mode.FIXED, exit=6, draft=2),
    Routing(Mode.TOKEN, threshold=0.6, draft=2),
    Routing(Mode.CASCADE, threshold=0.7, window=2, draft=2),
    Routing(Mode.CASCADE, threshold=0.6, window=2, back=0.6, draft=0),
]


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("routing", CASES, ids=str)
async def test_a_node_that_dies_before_or_after_any_message_changes_no_token(
    world: World, routing: Routing, cut: int
) -> None:
    prompt, count, policy = [5, 6, 7, 9], 10, Policy.resolve(routing, EXITS)
    expected = world.oracle.decide(policy, prompt, count)
    moment = 0
    while True:
        seen = 0

        def dies(moment: int = moment) -> NodeError | None:
            nonlocal seen
            seen += 1
            return NodeUnavailable("gone", node="n1") if seen == moment + 1 else None

        decisions, patient = await run(world, cut, policy, prompt, count, dies)
        assert [(d.token, d.exit) for d in decisions] == expected, f"at message {moment}"
        assert len(patient.recoveries) == len(patient.losses)
        if moment >= seen:
            break
        moment += 1
    assert moment >= 2


@pytest.mark.timeout(300)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    routing=routings,
    cut=st.integers(0, len(CUTS) - 1),
    prompt=st.lists(st.integers(3, 60), min_size=1, max_size=12),
    count=st.integers(1, 14),
    ahead=st.sampled_from([0, 9, 100]),
    seed=st.integers(0, 2**32),
    often=st.sampled_from([0.05, 0.2]),
    restart=st.one_of(st.none(), st.integers(1, 13)),
)
async def test_nodes_that_die_again_and_again_change_no_token(
    world: World,
    routing: Routing,
    cut: int,
    prompt: list[int],
    count: int,
    ahead: int,
    seed: int,
    often: float,
    restart: int | None,
) -> None:
    policy, source = Policy.resolve(routing, EXITS), random.Random(seed)
    expected = world.oracle.decide(policy, prompt, count)
    errors = [NodeUnavailable("gone"), WireError("damaged"), RequestCancelled("left"), CapacityError("full")]

    def dies() -> NodeError | None:
        error = source.choice(errors)
        return error if source.random() < often and not (isinstance(error, WireError) and often > 0.1) else None

    resumed = None if restart is None else expected[: min(restart, count - 1)]  # the entry node died after these
    decisions, _ = await run(world, cut, policy, prompt, count, dies, ahead=ahead, resumed=resumed)
    assert [*(resumed or []), *((d.token, d.exit) for d in decisions)] == expected


async def test_a_recovery_says_why_how_long_and_what_it_cost(world: World) -> None:
    seen = 0

    def dies() -> NodeError | None:
        nonlocal seen
        seen += 1
        return {5: NodeUnavailable("gone", node="n1", cause="silent"), 7: CapacityError("full")}.get(seen)

    chain, sessions, patient = open_mortal(world, 1, Policy.resolve(Routing(draft=0), EXITS), 3, 20, dies)
    async with world.closing(1, chain, sessions):
        rounds = [settled async for settled in decode(chain, [5, 6, 7], 6)]
    found = [recovery for settled in rounds for hop in settled.hops for recovery in hop.recoveries]
    assert found == patient.recoveries and patient.losses == ["silent", "full"]
    [recovery] = found
    assert recovery.cause == "silent" and recovery.seconds > 0 and recovery.positions == 11, "1 in vain, 5, and 5"


@pytest.mark.parametrize("error", [NodeFault("a bug"), DeadlineExceeded("late"), WireError("garbage")])
async def test_what_would_fail_at_every_try_is_not_tried_for_ever(world: World, error: NodeError) -> None:
    tries = 0

    def dies() -> NodeError | None:
        nonlocal tries
        tries += 1
        return error

    chain, sessions, patient = open_mortal(world, 1, Policy.resolve(Routing(), EXITS), 3, 20, dies)
    patient.timeout_s = 0.0 if isinstance(error, DeadlineExceeded) else 30.0
    async with world.closing(1, chain, sessions):
        with pytest.raises(type(error)):
            _ = [settled async for settled in decode(chain, [5, 6, 7], 6)]
    assert tries <= 3
