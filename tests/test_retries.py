"""Retries on a full node: before the first token, within the deadline, and never of what can never fit."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ruyi_flow import resumption
from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import CapacityError, RequestError
from ruyi_flow.loop.capacity import Lease
from ruyi_flow.testing import Cluster, cluster, cut_topology
from tests.conftest import until

LONG: dict[str, Any] = {"mode": "exact", "draft": 0, "max_new_tokens": 400, "eos_token_ids": ()}
SHORT: dict[str, Any] = LONG | {"max_new_tokens": 3}


def two_nodes(family: Path, full: str) -> Any:
    """Two nodes, of which one takes one session and lets none wait."""
    topology = cut_topology(family, [[2], [4, 6]], recover_s=0)
    limits = topology.nodes[0].limits.model_copy(update={"max_sessions": 1, "max_waiting": 0})
    nodes = [node.model_copy(update={"limits": limits}) if node.name == full else node for node in topology.nodes]
    return cluster(topology.model_copy(update={"nodes": tuple(nodes)}))


def take_the_place(nodes: Cluster, name: str) -> Lease:
    """Take the one place of a node, until the lease is given back."""
    return nodes.engines[name].shard.capacity.lease(64)


def count_refusals(nodes: Cluster, name: str) -> Callable[[], int]:
    """Count from now on how often a node has no room for a session."""
    capacity, count = nodes.engines[name].shard.capacity, 0
    lease = capacity.lease

    def counted(max_positions: int) -> Any:
        nonlocal count
        try:
            return lease(max_positions)
        except CapacityError:
            count += 1
            raise

    capacity.lease = counted  # type: ignore[method-assign]
    return lambda: count


@pytest.mark.parametrize("full", ["n0", "n1"])
async def test_a_request_waits_until_a_full_node_has_room(spoken: Path, full: str) -> None:
    async with two_nodes(spoken, full) as nodes, AsyncClient(nodes.topology) as client:
        expected = (await client.generate("hi", **SHORT)).token_ids
        await nodes.settle()
        place = take_the_place(nodes, full)
        refused = count_refusals(nodes, full)
        late = asyncio.create_task(client.generate("hi", **SHORT))
        await until(lambda: refused() >= 2)
        assert not late.done()
        place.give_back()
        assert (await late).token_ids == expected
        await nodes.settle()


@pytest.mark.parametrize(("max_retries", "tries"), [(0, 1), (2, 3)])
async def test_retries_are_bounded(spoken: Path, max_retries: int, tries: int) -> None:
    async with (
        two_nodes(spoken, "n0") as nodes,
        AsyncClient(nodes.topology, max_retries=max_retries) as client,
    ):
        place = take_the_place(nodes, "n0")
        refused = count_refusals(nodes, "n0")
        with pytest.raises(CapacityError, match="node 'n0' is full") as caught:
            await client.generate("hi", **SHORT)
        assert refused() == tries and caught.value.tokens == ()
        place.give_back()


async def test_a_retry_that_would_begin_after_the_deadline_is_not_tried(
    spoken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumption, "_FIRST_WAIT_S", 1000.0)
    monkeypatch.setattr(resumption, "_LONGEST_WAIT_S", 1000.0)
    async with two_nodes(spoken, "n0") as nodes, AsyncClient(nodes.topology) as client:
        place = take_the_place(nodes, "n0")
        with pytest.raises(CapacityError, match="node 'n0' is full"):
            await client.generate("hi", timeout_s=400, **SHORT)
        place.give_back()


async def test_a_client_that_is_closed_or_cancelled_waits_no_longer(
    spoken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumption, "_FIRST_WAIT_S", 1000.0)
    monkeypatch.setattr(resumption, "_LONGEST_WAIT_S", 1000.0)
    async with two_nodes(spoken, "n0") as nodes:
        client = AsyncClient(nodes.topology, timeout_s=1e6)
        place = take_the_place(nodes, "n0")
        refused = count_refusals(nodes, "n0")
        first, second = (asyncio.create_task(client.generate("hi", **SHORT)) for _ in range(2))
        await until(lambda: refused() == 2)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await client.close()
        with pytest.raises(RequestError, match="this client is closed"):
            await second
        place.give_back()


async def test_what_can_never_fit_is_not_tried_again(spoken: Path) -> None:
    limits = {"max_positions": 64, "grace_s": 1}
    async with (
        cluster(cut_topology(spoken, [[2], [4, 6]], limits=limits)) as nodes,
        AsyncClient(nodes.topology, timeout_s=1e6) as client,
    ):
        with pytest.raises(RequestError, match="needs 403 positions; node 'n0' has 64 in all"):
            await client.generate([5, 6, 7], **LONG)


async def test_an_answer_that_has_begun_is_not_begun_again(tiny: Path) -> None:
    """The first node decides the first token; later it must ask the second one, which is full."""
    async with two_nodes(tiny, "n1") as nodes, AsyncClient(nodes.topology) as client:
        for i in range(40):
            prompt = [5, 6, i]
            alone = await client.generate(prompt, exit=2, max_new_tokens=20, eos_token_ids=())
            confidences = [token.confidence for token in alone.tokens]
            if confidences[0] > min(confidences[1:]) + 0.01:
                break
        between = (confidences[0] + min(confidences[1:])) / 2
        options: dict[str, Any] = {"mode": "token", "threshold": between, "draft": 0, "max_new_tokens": 20}
        await nodes.settle()
        place = take_the_place(nodes, "n1")
        refused = count_refusals(nodes, "n1")
        with pytest.raises(CapacityError, match="node 'n1' is full") as caught:
            await client.generate(prompt, eos_token_ids=(), **options)
        assert refused() == 1 and caught.value.tokens[0].id == alone.tokens[0].id
        place.give_back()


@pytest.mark.parametrize("max_retries", [-1, 1.5, True, "2", None])
def test_a_number_of_retries_that_cannot_be_is_refused(spoken: Path, max_retries: Any) -> None:
    with pytest.raises(RequestError, match="max_retries is .*; it must be a whole number from 0 to 1000"):
        AsyncClient(cut_topology(spoken, [[2, 4, 6]]), max_retries=max_retries)
