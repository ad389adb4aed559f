"""Answers that arrive: their tokens, the answer so far, the complete reply, and what is left when a node fails."""

import asyncio
import copy
import pickle
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from ruyi_flow import Client
from ruyi_flow.client import AsyncClient
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import DeadlineExceeded, NodeError, NodeUnavailable, RequestError
from ruyi_flow.testing import Cluster, Relay, cluster, cut_topology
from ruyi_flow.types import Final, Reason, Token
from tests.conftest import until

OPTIONS: dict[str, Any] = {"max_new_tokens": 20, "eos_token_ids": ()}


def test_a_stream_has_the_reply_after_its_last_token(whole: Client) -> None:
    expected = whole.generate("hi", **OPTIONS)
    stream = whole.stream("hi", **OPTIONS)
    assert (stream.text, stream.tokens) == ("", ())
    first = next(stream)
    assert (stream.text, stream.tokens) == (first.text, (first,))
    with pytest.raises(RequestError, match=r"the answer is not complete: 1 tokens have arrived \(stream.text"):
        _ = stream.reply
    assert "1 tokens have arrived" in repr(stream)
    rest = list(stream)
    assert stream.reply.tokens == (first, *rest) == stream.tokens
    assert stream.reply.token_ids == expected.token_ids and stream.reply.text == expected.text == stream.text
    assert next(stream, None) is None and stream.reply.finish_reason is expected.finish_reason


async def test_an_async_stream_has_the_reply_after_its_last_token(nodes: Cluster) -> None:
    async with AsyncClient(nodes.topology) as client:
        expected = await client.generate("hi", **OPTIONS)
        stream = client.stream("hi", **OPTIONS)
        first = await anext(stream)
        assert (stream.text, stream.tokens) == (first.text, (first,))
        with pytest.raises(RequestError, match="the answer is not complete: 1 tokens have arrived"):
            _ = stream.reply
        assert [first, *[token async for token in stream]] == list(stream.tokens)
        assert stream.reply.token_ids == expected.token_ids and stream.reply.text == expected.text == stream.text
        assert await anext(stream, None) is None


def test_leaving_a_streams_block_ends_the_answer(whole: Client) -> None:
    with whole.stream("hi", max_new_tokens=400, eos_token_ids=()) as stream:
        token = next(stream)
    assert stream.tokens == (token,) and next(stream, None) is None
    with pytest.raises(RequestError, match="not complete"):
        _ = stream.reply


async def test_leaving_an_async_streams_block_ends_the_answer(nodes: Cluster) -> None:
    async with AsyncClient(nodes.topology) as client:
        options: dict[str, Any] = {"max_new_tokens": 400, "eos_token_ids": ()}
        async with client.stream("hi", **options) as stream:
            await anext(stream)
        async with aclosing(client.stream("hi", **options)) as other:
            await anext(other)
        assert len(stream.tokens) == len(other.tokens) == 1
        await nodes.settle()


def test_events_are_the_tokens_and_the_end(whole: Client) -> None:
    *tokens, end = whole.events("hi", **OPTIONS)
    reply = whole.generate("hi", **OPTIONS)
    assert [token.id for token in tokens if isinstance(token, Token)] == reply.token_ids
    assert isinstance(end, Final) and end.text == reply.text


# ---- What is left when a node fails ----


@pytest.fixture
async def slow(spoken: Path) -> AsyncIterator[tuple[Cluster, Relay]]:
    """Two nodes, with a relay before the first one that a test can freeze or cut."""
    relay = Relay()
    async with cluster(cut_topology(spoken, [[2], [4, 6]]), {"n0": relay}) as running:
        yield running, relay


@pytest.mark.parametrize("call", ["generate", "stream", "events"])
async def test_an_error_has_what_arrived_before_it(slow: tuple[Cluster, Relay], call: str) -> None:
    nodes, relay = slow
    options: dict[str, Any] = {"max_new_tokens": 450, "eos_token_ids": (), "draft": 0}
    async with AsyncClient(nodes.topology, max_retries=0, recover_s=0) as client:
        expected = (await client.generate("hi", **options | {"max_new_tokens": 5})).token_ids
        seen: list[int] = []

        async def cut_after_five() -> None:
            async for event in client.events("hi", **options):
                assert isinstance(event, Token)
                seen.append(event.id)
                if len(seen) == 5:
                    relay.cut()

        with pytest.raises(NodeUnavailable) as caught:
            if call == "events":
                await cut_after_five()
            elif call == "stream":
                stream = client.stream("hi", **options)
                async for _ in stream:
                    if len(stream.tokens) == 5:
                        relay.cut()
            else:
                await cut_when_five_came(client, relay, options)
        error = caught.value
        assert [token.id for token in error.tokens][:5] == expected
        assert error.text == "".join(token.text for token in error.tokens)
        assert str(error).endswith(f"; {len(error.tokens)} tokens had arrived before")


async def cut_when_five_came(client: AsyncClient, relay: Relay, options: dict[str, Any]) -> None:
    """`generate` shows nothing of its answer, so the link is cut once enough bytes of it came."""
    before = relay.bytes_down
    answer = asyncio.create_task(client.generate("hi", **options))
    await until(lambda: relay.bytes_down - before > 2000)
    relay.cut()
    await answer


def test_an_answer_that_timed_out_is_not_lost(spoken: Path) -> None:
    topology = Topology.parse(
        {"family": str(spoken), "nodes": [{"name": "whole", "exits": [2, 4, 6], "dtype": "float32"}]}
    )
    with Client(topology) as client:
        stream = client.stream("hi", max_new_tokens=450, eos_token_ids=(), timeout_s=2)
        with pytest.raises(DeadlineExceeded, match=r"not complete within 2 s \(timeout_s\); 3 tokens") as caught:
            for _ in range(3):
                next(stream)
            time.sleep(2.1)  # a node of this process goes on when it is asked for the next token
            list(stream)
        assert caught.value.tokens == stream.tokens and caught.value.text == stream.text


def test_errors_with_tokens_can_be_sent_to_other_processes() -> None:
    tokens = (Token(1, "a", 2, "n0", 0.5, Reason.CONFIDENT), Token(2, "b", 2, "n0", 0.5, Reason.CONFIDENT))
    error = NodeUnavailable("gone", node="n0", tokens=tokens)
    for same in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(same) is NodeUnavailable and (same.node, same.tokens, same.text) == ("n0", tokens, "ab")
        assert str(same) == "gone; 2 tokens had arrived before"
    assert str(NodeError("gone", tokens=tokens[:1])) == "gone; 1 token had arrived before"
    assert str(NodeError("gone")) == "gone" and NodeError("gone").text == ""
