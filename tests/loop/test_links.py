"""The loop over links that break: the right tokens; where a link stays dead, an error or a fallback; no page is lost.

More examples by hand: RUYI_FLOW_EXAMPLES=2000 pytest tests/loop/test_links.py
"""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import DeadlineExceeded, NodeUnavailable, RequestCancelled, RuyiFlowError
from ruyi_flow.local import load_family
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.testing import Cluster, Relay, cluster, cut_topology
from ruyi_flow.types import Mode, Reason, Token, Upload
from tests.conftest import Oracle
from tests.loop.test_chain import EXITS, routings

CUTS = [[[1], [3, 4, 6, 7]], [[1, 3], [4, 6], [7]]]
EXAMPLES = int(os.environ.get("RUYI_FLOW_EXAMPLES", "40"))


@dataclass
class Nodes:
    """Nodes of a family with a relay before each of them."""

    cluster: Cluster
    relays: list[Relay]
    client: AsyncClient

    async def recover(self) -> None:
        """Wait until nothing is left of the last requests, and until all links work again."""
        for relay in self.relays:
            relay.frozen = False
        async with asyncio.timeout(20):
            while True:
                try:
                    await self.client.generate([5], mode="exact", draft=0, max_new_tokens=1)
                    break
                except NodeUnavailable:
                    await asyncio.sleep(0.05)
        await self.cluster.settle(20)
        for engine in self.cluster.engines.values():
            assert engine.front_door._uplink.idle, "nobody could upload states in advance any more"


@dataclass
class Answer:
    """What a caller has received."""

    tokens: list[Token] = field(default_factory=list)
    error: RuyiFlowError | None = None


@dataclass(frozen=True)
class Event:
    """What happens to a link after so many tokens of all answers."""

    kind: str
    link: int
    after: int


@pytest.fixture
async def world(five: Path) -> AsyncIterator[tuple[Oracle, list[Nodes]]]:
    async with AsyncExitStack() as stack:
        worlds = []
        for cuts in CUTS:
            topology = cut_topology(five, cuts, timeout_s=5.0, recover_s=1.0)
            links = tuple(link.model_copy(update={"upload": Upload.AHEAD}) for link in topology.links)
            relays = [Relay(delay_s=0.001) for _ in cuts]
            by_name = {f"n{i}": relay for i, relay in enumerate(relays)}
            nodes = await stack.enter_async_context(cluster(topology.model_copy(update={"links": links}), by_name))
            worlds.append(Nodes(nodes, relays, await stack.enter_async_context(AsyncClient(nodes.topology))))
        yield Oracle(load_family(five, dtype="float32")), worlds


async def ask(
    nodes: Nodes, prompts: Sequence[list[int]], count: int, options: dict[str, Any], event: Event
) -> list[Answer]:
    """Ask all at once, and let the event happen."""
    answers, received = [Answer() for _ in prompts], 0

    async def one(prompt: list[int], answer: Answer) -> None:
        nonlocal received
        try:
            async for token in nodes.client.stream(prompt, max_new_tokens=count, eos_token_ids=(), **options):
                answer.tokens.append(token)
                received += 1
                if received == event.after:
                    await happen(nodes.relays[event.link], event.kind)
        except RuyiFlowError as error:
            answer.error = error

    if event.after == 0:
        await happen(nodes.relays[event.link], event.kind)
    await asyncio.gather(*map(one, prompts, answers))
    return answers


async def happen(relay: Relay, kind: str) -> None:
    if kind == "cut":
        relay.cut()
    elif kind in ("pause", "freeze"):
        relay.frozen = True
        if kind == "pause":
            asyncio.get_running_loop().call_later(0.05, setattr, relay, "frozen", False)


def check(
    oracle: Oracle, policy: Policy, prompt: list[int], count: int, answer: Answer, event: Event, near: int
) -> None:
    """Check an answer.

    Args:
        near: the last exit before the link that breaks.
    """
    expected = oracle.decide(policy, prompt, count)
    got = [(token.id, token.exit) for token in answer.tokens]
    sure = next((i for i, token in enumerate(answer.tokens) if token.reason is Reason.UNREACHABLE), len(got))
    assert got[:sure] == expected[:sure]
    if answer.error is None:
        assert len(got) == count
    else:
        assert event.kind == "freeze", "a link that works again is recovered from"
        assert isinstance(answer.error, (NodeUnavailable, DeadlineExceeded, RequestCancelled)), repr(answer.error)
        assert event.link == 0 or not policy.routing.fallback
    if sure < len(got):
        assert policy.routing.fallback and event.kind == "freeze" and event.link > 0
    ids = [*prompt, *(token for token, _ in got[:sure])]
    for token, exit in got[sure:]:
        assert exit <= near and token == int(oracle.family.logits(torch.tensor([ids]), exit)[0, -1].argmax())
        ids.append(token)


LONG = [list(range(3, 27)), list(range(20, 50))]
UPLOADS = Routing(Mode.CASCADE, threshold=0.5, window=8, draft=0)

quiet = st.builds(
    Routing,
    mode=st.just(Mode.CASCADE),
    threshold=st.floats(0.1, 0.6),
    window=st.sampled_from([3, 8]),
    draft=st.sampled_from([0, 2]),
)
"""Policies that seldom ask, so that states are uploaded in advance."""

events = st.builds(
    Event,
    kind=st.sampled_from(["cut", "cut", "pause", "nothing"]),
    link=st.sampled_from([1, 1, 2, 0]),
    after=st.integers(0, 12),
)


@pytest.mark.timeout(120 + 5 * EXAMPLES)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(routing=Routing(), fallback=True, cut=1, prompts=LONG, count=12, event=Event("freeze", 2, 5))
@example(routing=Routing(), fallback=False, cut=0, prompts=LONG, count=12, event=Event("freeze", 1, 5))
@example(routing=UPLOADS, fallback=False, cut=1, prompts=LONG, count=30, event=Event("nothing", 1, 0))
@example(routing=UPLOADS, fallback=False, cut=0, prompts=LONG[:1], count=30, event=Event("cut", 1, 4))
@example(routing=UPLOADS, fallback=True, cut=1, prompts=LONG[1:], count=30, event=Event("cut", 2, 8))
@given(
    routing=st.one_of(routings, quiet),
    fallback=st.booleans(),
    cut=st.integers(0, len(CUTS) - 1),
    prompts=st.lists(st.lists(st.integers(3, 60), min_size=1, max_size=30), min_size=1, max_size=3),
    count=st.integers(4, 20),
    event=events,
)
async def test_links_may_break_at_any_token(
    world: tuple[Oracle, list[Nodes]],
    routing: Routing,
    fallback: bool,
    cut: int,
    prompts: list[list[int]],
    count: int,
    event: Event,
) -> None:
    oracle, worlds = world
    nodes = worlds[cut]
    event = Event(event.kind, min(event.link, len(nodes.relays) - 1), event.after)
    options = {f.name: getattr(routing, f.name) for f in fields(routing) if getattr(routing, f.name) != f.default}
    options |= {"mode": str(routing.mode), "fallback": fallback}
    policy = Policy.resolve(Routing(**options), EXITS)
    answers = await ask(nodes, prompts, count, options, event)
    await nodes.recover()
    near = CUTS[cut][event.link - 1][-1]
    for prompt, answer in zip(prompts, answers, strict=True):
        check(oracle, policy, prompt, count, answer, event, near)
