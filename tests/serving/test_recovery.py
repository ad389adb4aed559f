"""Answers over real nodes whose connections are reset, go dead or are damaged in the middle."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import DeadlineExceeded, NodeUnavailable, RequestError
from ruyi_flow.requests import GenerateRequest, SamplingParams
from ruyi_flow.runtime import worker
from ruyi_flow.serving.engine import Engine
from ruyi_flow.testing import Relay, cluster, cut_topology
from ruyi_flow.transport import server
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.batches import Outbox
from ruyi_flow.transport.peer import Peer
from ruyi_flow.types import Final, Token
from tests.conftest import until

PROMPT = [5, 6, 7, 8]
CUTS = [[2], [4], [6]]
MODES: dict[str, dict[str, Any]] = {
    "exact": {"mode": "exact"},
    "sampled": {"mode": "exact", "temperature": 1.0, "seed": 7},
    "token": {"mode": "token", "threshold": 0.3},
    "cascade": {"mode": "cascade", "threshold": 0.5, "window": 3, "back": 0.6},
}


async def answer(client: AsyncClient, count: int = 40, **options: Any) -> list[tuple[int, int]]:
    reply = await client.generate(PROMPT, max_new_tokens=count, eos_token_ids=(), **options)
    return [(token.id, token.exit) for token in reply.tokens]


@pytest.mark.parametrize("where", ["n0", "n1", "n2"])
@pytest.mark.parametrize("mode", MODES)
async def test_a_connection_that_is_reset_in_the_middle_changes_no_token(tiny: Path, mode: str, where: str) -> None:
    relays = {name: Relay() for name in ("n0", "n1", "n2")}
    async with cluster(cut_topology(tiny, CUTS), relays) as nodes, AsyncClient(nodes.topology) as client:
        expected = await answer(client, **MODES[mode])
        tokens: list[Token] = []
        stream = client.stream(PROMPT, max_new_tokens=40, eos_token_ids=(), **MODES[mode])
        async for token in stream:
            tokens.append(token)
            if len(tokens) in (5, 6, 20):
                relays[where].cut()
        assert [(token.id, token.exit) for token in tokens] == expected
        stats = stream.reply.stats
        assert stats.new_tokens == 40 and [token.after_s for token in tokens] == sorted(t.after_s for t in tokens)
        found = {hop.node: hop.recoveries for hop in stats.hops if hop.recoveries}
        if where == "n0":
            assert {recovery.cause for recovery in stats.recoveries} == {"reset"}
            assert stats.total_s >= tokens[-1].after_s >= stats.first_token_s
        elif mode in ("exact", "sampled"):
            assert {recovery.cause for recovery in found[where]} == {"reset"} and not stats.recoveries
            counted = nodes.engines["n0" if where == "n1" else "n1"].counters.link
            assert counted.losses.total == counted.recoveries.total == len(found[where])
        await nodes.settle()


@pytest.mark.parametrize("where", ["n0", "n1", "n2"])
async def test_a_connection_that_is_reset_over_tls_changes_no_token(tiny: Path, tmp_path: Path, where: str) -> None:
    relays = {name: Relay() for name in ("n0", "n1", "n2")}
    async with (
        cluster(cut_topology(tiny, CUTS), relays, keys=tmp_path) as nodes,
        AsyncClient(nodes.topology) as client,
    ):
        expected = await answer(client)
        tokens: list[Token] = []
        async for token in client.stream(PROMPT, max_new_tokens=40, eos_token_ids=()):
            tokens.append(token)
            if len(tokens) in (5, 20):
                relays[where].cut()
        assert [(token.id, token.exit) for token in tokens] == expected
        await nodes.settle()


@pytest.mark.parametrize("where", ["n0", "n1", "n2"])
async def test_a_connection_that_goes_dead_is_given_up_and_another_one_is_opened(tiny: Path, where: str) -> None:
    relays = {name: Relay() for name in ("n0", "n1", "n2")}
    async with cluster(cut_topology(tiny, CUTS), relays) as nodes, AsyncClient(nodes.topology) as client:
        expected = await answer(client)
        tokens: list[Token] = []
        thawing: asyncio.Task[None] | None = None

        async def thaw() -> None:
            await asyncio.sleep(3)
            relays[where].cut()  # what was written into the dead connection never arrives
            relays[where].frozen = False

        stream = client.stream(PROMPT, max_new_tokens=40, eos_token_ids=())
        async for token in stream:
            tokens.append(token)
            if len(tokens) == 8:
                relays[where].frozen, thawing = True, asyncio.create_task(thaw())
        assert thawing is not None
        await thawing
        assert [(token.id, token.exit) for token in tokens] == expected
        stats = stream.reply.stats
        recoveries = [r for hop in stats.hops for r in hop.recoveries] + list(stats.recoveries)
        assert [recovery.cause for recovery in recoveries] == ["silent"]
        await nodes.settle(40)


def stay_off_the_loop(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make an engine run even brief steps on its compute thread."""
    monkeypatch.setattr(engine.worker, "_lent", False)
    monkeypatch.setattr(engine.worker, "_brief_s", math.inf)


async def until_health(peer: Peer, *, serves: bool) -> None:
    """Wait until the health service says whether a node takes sessions."""
    while await peer.is_serving(timeout_s=5) != serves:  # noqa: ASYNC110 (the node is asked, which tells nothing)
        await asyncio.sleep(0.05)


async def test_a_node_whose_compute_thread_is_stuck_is_lost(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_STUCK_S", 0.5)
    topology = cut_topology(tiny, [[2], [4, 6]], recover_s=0.5)
    async with cluster(topology) as nodes, AsyncClient(nodes.topology) as client:
        engine, go_on = nodes.engines["n1"], threading.Event()
        stay_off_the_loop(engine, monkeypatch)
        expected = await answer(client, 3)
        run = engine.shard.run

        def hang(parts: Any) -> None:
            go_on.wait()
            run(parts)

        monkeypatch.setattr(engine.shard, "run", hang)
        with pytest.raises(NodeUnavailable, match="'n1' .* no sign of life"):
            await answer(client, 3)
        peer = Peer("n1", nodes.topology.nodes[1].addresses[0], max_message_bytes=2**20)
        try:
            assert engine.worker.is_stuck
            await until_health(peer, serves=False)
            with pytest.raises(DeadlineExceeded, match="did not answer within 0.6 s"):
                await peer.next_sign(timeout_s=0.6)
        finally:
            go_on.set()
        await until(lambda: not engine.worker.is_stuck)
        await until_health(peer, serves=True)
        assert not (await peer.next_sign(timeout_s=5)).draining
        await peer.close()
        assert await answer(client, 3) == expected
        await nodes.settle()


def swallow_one(monkeypatch: pytest.MonkeyPatch, kind: type, method: str, number: int) -> None:
    """Lose the message of one call of a method that sends one, whose number counts from 1."""
    send, calls = getattr(kind, method), itertools.count(1)

    def send_but_one(self: Any, *message: Any) -> Any:
        if next(calls) != number:
            return send(self, *message)
        return asyncio.sleep(0) if asyncio.iscoroutinefunction(send) else None

    monkeypatch.setattr(kind, method, send_but_one)


@pytest.mark.parametrize(
    ("kind", "method", "number", "clients", "cause"),
    [
        pytest.param(grpc.aio._call.StreamStreamCall, "write", 1, 1, "damaged", id="the handshake"),
        pytest.param(grpc.aio._call.StreamStreamCall, "write", 9, 1, "dropped", id="a question"),
        pytest.param(server._Session, "write", 9, 1, "dropped", id="a reply"),
        pytest.param(Outbox, "put", 9, 3, "dropped", id="in a batch"),
        pytest.param(Outbox, "put", 10, 3, "dropped", id="the reply in a batch"),
    ],
)
async def test_a_message_that_is_lost_on_a_connection_that_works_on_is_noticed(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, kind: type, method: str, number: int, clients: int, cause: str
) -> None:
    async with cluster(cut_topology(tiny, [[2], [4, 6]])) as nodes, AsyncClient(nodes.topology) as client:
        expected = await answer(client, draft=0)
        swallow_one(monkeypatch, kind, method, number)
        options: dict[str, Any] = {"max_new_tokens": 40, "eos_token_ids": (), "draft": 0}
        replies = await asyncio.gather(*(client.generate(PROMPT, **options) for _ in range(clients)))
        assert all([(token.id, token.exit) for token in reply.tokens] == expected for reply in replies)
        recoveries = [one for reply in replies for hop in reply.stats.hops for one in hop.recoveries]
        assert [one.cause for one in recoveries] == [cause] and recoveries[0].seconds < 5
        await nodes.settle()


class DeafRelay(Relay):
    """A relay whose connections of a moment carry nothing to the node any more, but still from it."""

    def __init__(self) -> None:
        super().__init__()
        self._last, self._deaf = 0, -1

    def deafen(self) -> None:
        """Drop what goes up from now on, on the connections that there are."""
        self._deaf = self._last

    def relayed(self, connection: int, data: bytes, *, up: bool) -> bytes:
        self._last = max(self._last, connection)
        return b"" if up and connection <= self._deaf else data


@pytest.mark.parametrize("where", ["n0", "n1"])
async def test_a_node_that_does_not_hear_is_noticed_though_it_gives_signs_of_life(tiny: Path, where: str) -> None:
    relay = DeafRelay()
    async with cluster(cut_topology(tiny, [[2], [4, 6]]), {where: relay}) as nodes:
        async with AsyncClient(nodes.topology) as client:
            expected = await answer(client, draft=0)
            stream = client.stream(PROMPT, max_new_tokens=40, eos_token_ids=(), draft=0)
            if where == "n1":
                for _ in range(10):
                    await anext(stream)
            relay.deafen()
            tokens = [*stream.tokens, *[token async for token in stream]]
            assert [(token.id, token.exit) for token in tokens] == expected
            stats = stream.reply.stats
            [recovery] = stats.recoveries if where == "n0" else stats.hops[1].recoveries
            assert recovery.cause == "dropped"
        await nodes.settle()


async def test_a_session_that_the_node_has_forgotten_is_noticed_unless_another_process_answers(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = cut_topology(tiny, [[2], [4, 6]], timeout_s=4.0)
    async with cluster(topology) as nodes, AsyncClient(nodes.topology) as client:
        expected = await answer(client, draft=0)
        monkeypatch.setattr(server.Server, "_work", lambda *_: pb.WORK_UNKNOWN)
        with monkeypatch.context() as patch:
            swallow_one(patch, server._Session, "write", 9)
            assert await answer(client, draft=0) == expected
        reply = pb.OwedReply
        monkeypatch.setattr(pb, "OwedReply", lambda **fields: reply(**fields | {"instance": b"another"}))
        swallow_one(monkeypatch, server._Session, "write", 9)
        with pytest.raises(DeadlineExceeded, match="did not answer within 4 s"):
            await answer(client, draft=0)


async def test_a_node_that_computes_for_long_is_not_lost(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(cut_topology(tiny, [[2], [4, 6]])) as nodes, AsyncClient(nodes.topology) as client:
        expected = await answer(client, 3)
        shard = nodes.engines["n1"].shard
        run, slow = shard.run, [0.0, 3.0, 0.0]

        def run_slowly(parts: Any) -> None:
            time.sleep(slow.pop() if slow else 0.0)
            run(parts)

        monkeypatch.setattr(shard, "run", run_slowly)
        stay_off_the_loop(nodes.engines["n1"], monkeypatch)
        reply = await client.generate(PROMPT, max_new_tokens=3, eos_token_ids=())
        assert [(token.id, token.exit) for token in reply.tokens] == expected
        assert not slow and not any(hop.recoveries for hop in reply.stats.hops)


async def test_what_cannot_be_recovered_in_time_is_the_error_of_the_node(tiny: Path) -> None:
    relay = Relay()
    topology = cut_topology(tiny, CUTS, recover_s=0.5)
    async with cluster(topology, {"n2": relay}) as nodes, AsyncClient(nodes.topology) as client:
        stream = client.stream(PROMPT, max_new_tokens=200, eos_token_ids=())
        await anext(stream)
        relay.frozen = True
        with pytest.raises(NodeUnavailable, match="'n2' .* no sign of life") as caught:
            async for _ in stream:
                pass
        assert caught.value.node == "n2" and len(caught.value.tokens) >= 1


@pytest.mark.parametrize(
    ("resumed", "message"),
    [
        (((61, 6),), "resumed with token 61; the family has 61 tokens"),
        (((5, 3),), "a token of exit 3, which cannot have decided it"),
        (((5, 6),) * 9, "resumed after 9 tokens of 8"),
        (((2, 6), (5, 6)), "tokens after the one that ends it"),
    ],
)
async def test_a_resume_that_cannot_be_is_refused(tiny: Path, resumed: Any, message: str) -> None:
    async with cluster(cut_topology(tiny, [[2, 4, 6]])) as nodes, AsyncClient(nodes.topology) as client:
        assert client._entry is not None
        request = GenerateRequest(tuple(PROMPT), sampling=SamplingParams(max_new_tokens=8), resumed=resumed)
        with pytest.raises(RequestError, match=message):
            _ = [event async for event in client._entry.pick().generate(request, timeout_s=10)]
        sampled = SamplingParams(max_new_tokens=8, temperature=1.0)
        with pytest.raises(RequestError, match="only be resumed with its seed"):
            request = GenerateRequest(tuple(PROMPT), sampling=sampled, resumed=((5, 6),))
            _ = [event async for event in client._entry.pick().generate(request, timeout_s=10)]


@pytest.mark.parametrize("mode", MODES)
async def test_an_answer_goes_on_after_any_of_its_tokens(spoken: Path, mode: str) -> None:
    async with cluster(cut_topology(spoken, CUTS)) as nodes, AsyncClient(nodes.topology) as client:
        assert client._entry is not None
        options = MODES[mode] | {"max_new_tokens": 12, "eos_token_ids": (), "stop": ["zzz"]}
        whole = await client.generate("hi there", **options)
        routing = {name: value for name, value in MODES[mode].items() if name not in ("temperature", "seed")}
        sampling = SamplingParams(**{name: value for name, value in options.items() if name not in routing})
        for count in range(13):
            resumed = tuple((token.id, token.exit) for token in whole.tokens[:count])
            request = GenerateRequest("hi there", sampling=sampling, routing=routing, resumed=resumed)
            events = [event async for event in client._entry.pick().generate(request, timeout_s=10)]
            tokens = [event for event in events if isinstance(event, Token)]
            assert [(t.id, t.exit, t.text) for t in tokens] == [(t.id, t.exit, t.text) for t in whole.tokens[count:]]
            assert isinstance(events[-1], Final) and events[-1].text == whole.text
            assert events[-1].stats.new_tokens == 12 and events[-1].finish_reason == whole.finish_reason
        await nodes.settle()
