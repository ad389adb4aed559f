"""A session that is rewound goes on as a fresh one would: through the loop, and over nodes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ruyi_flow.loop.chain import Chain, decode
from ruyi_flow.requests import SamplingParams, SessionOpen
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.testing import cluster, cut_topology
from ruyi_flow.types import Mode
from tests.conftest import Oracle
from tests.loop.test_chain import CUTS, EXITS, Whims, World, routings, turns

Turn = tuple[int, list[int], int]
"""What happens to a sequence: the positions that are kept, the tokens that are given then, and how many follow."""

TURNS = st.lists(
    st.tuples(st.integers(0, 30), st.lists(st.integers(3, 60), min_size=1, max_size=5), st.integers(1, 8)),
    min_size=2,
    max_size=4,
)


REWINDABLE = routings.filter(lambda routing: routing.mode is not Mode.CASCADE)
"""Routings whose decisions do not depend on what was decided before a rewind."""


@pytest.fixture(scope="module")
def world(five: Path) -> World:
    return World(five)


async def go_on(
    chain: Chain, oracle: Oracle, policy: Policy, turns_: list[Turn], between: Callable[[], None] = lambda: None
) -> None:
    """Rewind, give tokens and decode, over and over; each time the oracle says what must follow.

    Args:
        between: what happens to the sessions before each turn but the first.
    """
    ids: list[int] = []
    for keep, given_ids, count in turns_:
        if ids:
            between()
            keep = min(keep, len(ids) - 1)  # the last decided token has not run
            await chain.rewind(keep)
        ids = ids[:keep] + given_ids
        found = []
        async for settled in decode(chain, given_ids, count):
            found += [(d.token, d.exit) for d in settled.decisions]
            await turns()
        assert found == oracle.decide(policy, ids, count)
        ids += [token for token, _ in found]


@pytest.mark.timeout(300)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    routing=REWINDABLE,
    cut=st.integers(0, len(CUTS) - 1),
    ahead=st.sampled_from([0, 9, 100]),
    whims=st.lists(st.booleans(), min_size=1, max_size=5),
    turns_=TURNS,
)
async def test_a_rewound_session_goes_on_as_a_fresh_one(
    world: World, routing: Routing, cut: int, ahead: int, whims: list[bool], turns_: list[Turn]
) -> None:
    policy = Policy.resolve(routing, EXITS)
    prompt_length, size = len(turns_[0][1]), sum(len(given_ids) + count for _, given_ids, count in turns_)
    opened = world.open(cut, policy, SamplingParams(), prompt_length, size, ahead, Whims(whims))
    async with world.closing(cut, *opened):
        await go_on(opened[0], world.oracle, policy, turns_)


@pytest.mark.parametrize("cuts", [[[2], [4], [6]], [[2, 4], [6]]])
@pytest.mark.parametrize(
    "routing", [Routing(Mode.EXACT, draft=3), Routing(Mode.TOKEN, threshold=0.4, draft=2)], ids=str
)
async def test_a_session_over_nodes_that_is_rewound_goes_on_as_a_fresh_one(
    tiny: Path, oracle: Oracle, cuts: list[list[int]], routing: Routing
) -> None:
    policy = Policy.resolve(routing, (2, 4, 6))
    opening = SessionOpen(policy=policy, prompt_length=4, max_positions=100)
    async with cluster(cut_topology(tiny, cuts)) as nodes:
        chain = await nodes.engines["n0"].front_door.open(opening, None)
        await go_on(chain, oracle, policy, [(0, [5, 6, 7, 8], 20), (2, [9, 10], 20), (15, [3], 8), (0, [40, 5], 8)])
        await chain.close()
        await nodes.settle()
