"""Sessions that share a link share messages: the same answers, and each session's end is its own."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from ruyi_flow.client import AsyncClient, Reply
from ruyi_flow.errors import DeadlineExceeded, NodeUnavailable, RuyiFlowError, WireError
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.testing import Cluster, Relay, cluster, cut_topology
from ruyi_flow.transport import batches as wire
from ruyi_flow.transport import codec
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.checksum import seal
from ruyi_flow.transport.peer import METHODS, Peer
from ruyi_flow.transport.remote import RemoteStage
from ruyi_flow.transport.status import error_of
from ruyi_flow.types import Block, Mode
from tests.conftest import Oracle, until
from tests.serving.test_node import block, options_of

PROMPTS = [[3 + i, 20 + i, 7, 50 - i] for i in range(6)]
DEEPEST = Policy.resolve(Routing(), (2, 4, 6))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many messages there were in each batch that was written, of both ends of all links."""
    sizes: list[int] = []
    real = wire.Outbox.empty_into

    async def noted(self: wire.Outbox, write: Callable[[bytes], Awaitable[None]]) -> None:
        async def written(data: bytes) -> None:
            sizes.append(len(pb.Batch.FromString(data).items))
            await write(data)

        await real(self, written)

    monkeypatch.setattr(wire.Outbox, "empty_into", noted)
    return sizes


async def ask(client: AsyncClient, prompt: list[int], tokens: int, **options: object) -> Reply:
    given: dict[str, Any] = {"mode": "exact", "draft": 0} | options
    return await client.generate(prompt, max_new_tokens=tokens, eos_token_ids=(), **given)


async def begin(client: AsyncClient, prompts: list[list[int]], **options: object) -> list[asyncio.Task[list[int]]]:
    """Long answers to all of them, each of which has its first token."""
    begun = [asyncio.Event() for _ in prompts]

    async def answer(prompt: list[int], first: asyncio.Event) -> list[int]:
        given: dict[str, Any] = {"mode": "exact", "draft": 0, "max_new_tokens": 400} | options
        found = []
        async for token in client.stream(prompt, eos_token_ids=(), **given):
            found.append(token.id)
            first.set()
        return found

    tasks = [asyncio.create_task(answer(*each)) for each in zip(prompts, begun, strict=True)]
    await asyncio.gather(*(first.wait() for first in begun))
    return tasks


def ids(reply: Reply) -> list[int]:
    return [token.id for token in reply.tokens]


async def test_what_is_ready_together_goes_together(tiny: Path, oracle: Oracle, batches: list[int]) -> None:
    async with cluster(cut_topology(tiny, [[2], [4], [6]])) as nodes, AsyncClient(nodes.topology) as client:
        replies = await asyncio.gather(*(ask(client, prompt, 24, draft=i % 3) for i, prompt in enumerate(PROMPTS)))
        for prompt, reply in zip(PROMPTS, replies, strict=True):
            assert [(t.id, t.exit) for t in reply.tokens] == oracle.decide(DEEPEST, prompt, 24)
            assert reply.stats.hops[1].bytes_up > 0 and reply.stats.hops[2].wire_s > 0
        assert max(batches) > 1 and sum(batches) > len(batches)
        await nodes.settle()


async def test_a_lone_session_keeps_to_its_own_stream(tiny: Path, batches: list[int]) -> None:
    async with cluster(cut_topology(tiny, [[2], [4], [6]])) as nodes, AsyncClient(nodes.topology) as client:
        for prompt in PROMPTS[:2]:  # one after the other
            await ask(client, prompt, 8)
        assert batches == []
        await nodes.settle()


async def test_long_messages_keep_to_their_own_stream(
    tiny: Path, oracle: Oracle, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "SHORT_BYTES", 64)  # of a block with one state of 128 bytes
    async with cluster(cut_topology(tiny, [[2], [4, 6]])) as nodes, AsyncClient(nodes.topology) as client:
        replies = await asyncio.gather(*(ask(client, prompt, 8) for prompt in PROMPTS))
        assert [ids(r) for r in replies] == [[t for t, _ in oracle.decide(DEEPEST, p, 8)] for p in PROMPTS]
        assert batches == []
        await nodes.settle()


async def test_a_batch_is_no_larger_than_the_node_takes(batches: list[int]) -> None:
    outbox, written = wire.Outbox(max_bytes=300), []
    for i in range(6):
        outbox.put(i, b"x" * (90 if i < 5 else 1000))

    async def write(data: bytes) -> None:
        written.append(pb.Batch.FromString(data))

    emptying = asyncio.create_task(outbox.empty_into(write))
    for _ in range(10):
        await asyncio.sleep(0)
    emptying.cancel()
    assert [[item.session for item in batch.items] for batch in written] == [[0, 1], [2, 3], [4], [5]]


async def test_sessions_that_end_early_leave_the_others_alone(tiny: Path, oracle: Oracle, batches: list[int]) -> None:
    async with cluster(cut_topology(tiny, [[2], [4], [6]])) as nodes, AsyncClient(nodes.topology) as client:
        staying = await begin(client, PROMPTS[:2], max_new_tokens=100)
        leaving = await begin(client, PROMPTS[2:5])

        def went_on(since: int) -> bool:
            return len(batches) > since or staying[0].done()

        for task in leaving:
            await until(partial(went_on, len(batches)))
            task.cancel()
        for prompt, task in zip(PROMPTS, staying, strict=False):
            assert await task == [t for t, _ in oracle.decide(DEEPEST, prompt, 100)]
        assert all(
            isinstance(r, asyncio.CancelledError) for r in await asyncio.gather(*leaving, return_exceptions=True)
        )
        await nodes.settle()


async def test_what_one_session_fails_with_is_its_own(tiny: Path, oracle: Oracle, batches: list[int]) -> None:
    relay = Relay()
    async with (
        cluster(cut_topology(tiny, [[2], [4], [6]], recover_s=0), {"n2": relay}) as nodes,
        AsyncClient(nodes.topology) as client,
    ):
        shallow = await begin(client, PROMPTS[:2], mode="fixed", exit=4, max_new_tokens=200)
        deep = await begin(client, PROMPTS[2:4])
        await until(lambda: max(batches, default=0) > 1)
        relay.cut()
        for failed in await asyncio.gather(*deep, return_exceptions=True):
            assert isinstance(failed, NodeUnavailable) and failed.node == "n2"
        policy = Policy.resolve(Routing(Mode.FIXED, exit=4), (2, 4, 6))
        for prompt, task in zip(PROMPTS, shallow, strict=False):
            assert await task == [t for t, _ in oracle.decide(policy, prompt, 200)]
        await nodes.settle()


async def test_a_lost_node_ends_every_session_and_later_ones_find_it_again(tiny: Path, oracle: Oracle) -> None:
    relay = Relay()
    async with (
        cluster(cut_topology(tiny, [[2], [4, 6]], recover_s=0), {"n1": relay}) as nodes,
        AsyncClient(nodes.topology) as client,
    ):
        running = await begin(client, PROMPTS[:4])
        relay.cut()
        for failed in await asyncio.gather(*running, return_exceptions=True):
            assert isinstance(failed, NodeUnavailable) and failed.node == "n1"
        await nodes.settle()
        replies = await asyncio.gather(*(ask(client, prompt, 8) for prompt in PROMPTS))
        assert [ids(r) for r in replies] == [[t for t, _ in oracle.decide(DEEPEST, p, 8)] for p in PROMPTS]
        await nodes.settle()


async def test_deadlines_hold_for_sessions_together(tiny: Path) -> None:
    relay = Relay(delay_s=0.02)
    async with (
        cluster(cut_topology(tiny, [[2], [4, 6]], timeout_s=1.0), {"n1": relay}) as nodes,
        AsyncClient(nodes.topology) as client,
    ):
        late = await asyncio.gather(*(ask(client, p, 400, timeout_s=0.5) for p in PROMPTS[:3]), return_exceptions=True)
        assert [type(error) for error in late] == [DeadlineExceeded] * 3
        await nodes.settle()
        running = await begin(client, PROMPTS[:3])
        relay.frozen = True
        for failed in await asyncio.gather(*running, return_exceptions=True):
            assert isinstance(failed, DeadlineExceeded) and "did not answer within 1 s" in str(failed)
        relay.frozen = False
        await nodes.settle()


async def test_where_streams_go_different_ways_each_session_keeps_to_its_own(
    tiny: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def elsewhere(self: wire.Batches, session: int, message: bytes) -> asyncio.Future[bytes]:
        asked.append(session)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        answer.set_result(b"")  # as a node says that does not have the session
        return answer

    monkeypatch.setattr(wire.Batches, "ask", elsewhere)
    async with cluster(cut_topology(tiny, [[2], [4, 6]])) as nodes, AsyncClient(nodes.topology) as client:
        replies = await asyncio.gather(*(ask(client, prompt, 8) for prompt in PROMPTS))
        assert [ids(r) for r in replies] == [[t for t, _ in oracle.decide(DEEPEST, p, 8)] for p in PROMPTS]
        assert len(asked) == len(set(asked)) > 1
        await nodes.settle()


@pytest.fixture
async def nodes(tiny: Path) -> AsyncIterator[Cluster]:
    async with cluster(cut_topology(tiny, [[2], [4, 6]])) as running:
        yield running
        await running.settle()


async def test_sessions_at_once_may_send_states_ahead(nodes: Cluster) -> None:
    opening = codec.open_from_pb(options_of(nodes).open)
    peer = Peer("n1", str(nodes.topology.nodes[1].address), max_message_bytes=2**20)
    stages, states = [RemoteStage(peer, opening, timeout_s=10) for _ in range(2)], torch.zeros(2, 32)
    for stage in stages:
        await stage.advance(Block(0, states, (5, 6), (1,)))
    for stage in stages:
        await stage.feed(Block(2, states, (7, 8), ()))
        await stage.arrived()
        await stage.arrived()  # nothing is on its way
    for stage in stages:
        assert len((await stage.advance(Block(4, states, (9, 10), (5,)))).decisions) == 1
        await stage.close()
    await peer.close()


async def test_garbage_in_a_batch_is_refused_and_the_others_are_answered(nodes: Cluster) -> None:
    channel = grpc.aio.insecure_channel(str(nodes.topology.nodes[1].address))
    sessions = []

    async def opened() -> int:
        sessions.append(channel.stream_stream(METHODS["Session"])(timeout=10))
        await sessions[-1].write(seal(options_of(nodes).SerializeToString()))
        return int(pb.SessionReply.FromString(await sessions[-1].read()).opened.session)

    batches = channel.stream_stream(METHODS["Together"])(timeout=10)

    async def send(*items: tuple[int, pb.SessionRequest | bytes]) -> dict[int, list[bytes]]:
        batch = pb.Batch()
        for number, message in items:
            data = message if isinstance(message, bytes) else message.SerializeToString()
            batch.items.add(session=number, message=data)
        await batches.write(seal(batch.SerializeToString()))
        found: dict[int, list[bytes]] = {}
        while sum(map(len, found.values())) < len(items):
            for item in pb.Batch.FromString(await batches.read()).items:
                found.setdefault(item.session, []).append(item.message)
        return found

    def failed(data: bytes) -> RuyiFlowError:
        told = pb.SessionReply.FromString(data).failure
        return error_of(told.status, told.message, told.node)

    other = await opened()
    assert (await send((10_000, block()))) == {10_000: [b""]}, "no such session"
    for message, text in (
        (b"\xff\xff\xff", "not a SessionRequest"),
        (options_of(nodes), "open is not allowed in the middle of a session"),
        (pb.SessionRequest(), "an empty message is not allowed in the middle"),
        (block(start=3), "starts at position 3"),
    ):
        one = await opened()
        found = await send((one, message), (other, pb.SessionRequest(rewind=pb.Rewind(position=0))))
        assert isinstance(failed(found[one][0]), WireError) and text in str(failed(found[one][0]))
        assert pb.SessionReply.FromString(found[other][0]).HasField("rewound")
        [late] = (await send((one, block())))[one]
        assert "or after one that failed" in str(failed(late))
    one = await opened()
    found = await send((one, block()), (one, block(start=2)))  # the second before the first is answered
    texts = [m for m in found[one] if pb.SessionReply.FromString(m).HasField("failure")]
    assert len(texts) == 1 and "before the last message was answered" in str(failed(texts[0]))
    assert len(pb.SessionReply.FromString((await send((other, block())))[other][0]).verdict.decisions) == 1

    stranger = grpc.aio.insecure_channel(str(nodes.topology.nodes[1].address), [("grpc.use_local_subchannel_pool", 1)])
    call = stranger.stream_stream(METHODS["Together"])(timeout=10)
    foreign = pb.Batch(items=[pb.Item(session=one, message=block().SerializeToString())])
    await call.write(seal(foreign.SerializeToString()))
    assert pb.Batch.FromString(await call.read()).items[0].message == b"", "another connection's session"
    await call.write(b"\xff\xff\xff")
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await call.read()
    assert ended.value.code() is grpc.StatusCode.DATA_LOSS
    for one_call in (*sessions, batches, call):
        one_call.cancel()
    await stranger.close()
    await channel.close()
