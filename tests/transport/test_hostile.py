"""A peer that breaks the rules of the wire harms nobody else: no other session, no memory, no log."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import NodeError
from ruyi_flow.runtime.stage import Shard
from ruyi_flow.serving.engine import Engine
from ruyi_flow.serving.node import Node
from ruyi_flow.testing import Cluster, cluster, cut_topology
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.checksum import seal
from ruyi_flow.transport.lifeline import Lifeline
from ruyi_flow.transport.peer import METHODS
from ruyi_flow.transport.server import Server
from ruyi_flow.types import Reason
from tests.serving.test_node import block, connect_to, options_of

LOCAL = [("grpc.use_local_subchannel_pool", 1)]


@pytest.fixture(autouse=True)
def quiet_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that a peer does is an error in a node's log."""
    with caplog.at_level(logging.INFO):
        yield
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info]
    assert not errors


@contextmanager
def held(shard: Shard) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Hold the next step of a node: an event that it has begun, and one that lets it go on."""
    begun, go_on = threading.Event(), threading.Event()

    def run(parts: Sequence[Any]) -> None:
        begun.set()
        go_on.wait(10)
        Shard.run(shard, parts)

    shard.run = run  # type: ignore[method-assign]
    try:
        yield begun, go_on
    finally:
        go_on.set()
        del shard.run


class Caller:
    """The raw calls of one connection to a node."""

    def __init__(self, channel: grpc.aio.Channel, nodes: Cluster) -> None:
        self.stream = channel.stream_stream(METHODS["Session"])
        self._nodes = nodes
        self.together = channel.stream_stream(METHODS["Together"])

    async def session(self, **changes: object) -> tuple[Any, int]:
        """Open a session; return its call and its number."""
        call = self.stream(timeout=20)
        await call.write(seal(options_of(self._nodes, **changes).SerializeToString()))
        return call, pb.SessionReply.FromString(await call.read()).opened.session


@asynccontextmanager
async def calling(nodes: Cluster, node: int = 1) -> AsyncIterator[Caller]:
    async with grpc.aio.insecure_channel(str(nodes.topology.nodes[node].address), LOCAL) as channel:
        yield Caller(channel, nodes)


def batch(*items: tuple[int, pb.SessionRequest]) -> bytes:
    sent = [pb.Item(session=n, message=m.SerializeToString()) for n, m in items]
    return seal(pb.Batch(items=sent).SerializeToString())


async def asked(call: Any, message: pb.SessionRequest) -> pb.SessionReply:
    await call.write(seal(message.SerializeToString()))
    return pb.SessionReply.FromString(await call.read())


async def test_a_step_that_still_runs_and_a_block_after_it_stay_in_their_own_pages(tiny: Path) -> None:
    """The block is checked against positions that do not include those of the step, which fills all of its pages."""
    async with cluster(cut_topology(tiny, [[2], [4, 6]])) as nodes, calling(nodes) as caller:
        shard = nodes.engines["n1"].shard
        hostile, number = await caller.session(max_positions=64)
        victim, _ = await caller.session(max_positions=64)
        [_, run] = [lease.pages for lease in shard.capacity.leases.values()]
        alone = [await asked(victim, block(wants=(1,))), await asked(victim, block(start=2, wants=(1,)))]
        await asked(victim, pb.SessionRequest(rewind=pb.Rewind(position=2)))
        cache = shard.memory.view(torch.int32)[:, :, :, run.positions]  # the unused memory may contain NaN
        before = cache.clone()
        with held(shard) as (begun, go_on):
            batches = caller.together()
            await batches.write(batch((number, block(ids=(5,) * 64, rows=64, wants=()))))
            assert await asyncio.to_thread(begun.wait, 10)
            batches.cancel()
            await asyncio.sleep(0.2)  # the node learns of it
            await hostile.write(seal(block(ids=(9,), rows=1, wants=()).SerializeToString()))
            await asyncio.sleep(0.2)
            go_on.set()
            reply = pb.SessionReply.FromString(await hostile.read())
        assert "before the last message was answered, or after one that failed" in reply.failure.message
        assert torch.equal(cache, before)
        again = await asked(victim, block(start=2, wants=(1,)))
        assert again.verdict.decisions == alone[1].verdict.decisions
        victim.cancel()
        await nodes.settle()


async def test_a_session_that_ends_in_a_step_keeps_its_pages_until_then_and_asks_nobody(tiny: Path) -> None:
    async with cluster(cut_topology(tiny, [[2], [4], [6]])) as nodes, calling(nodes) as caller:
        shard, deeper = nodes.engines["n1"].shard, nodes.engines["n2"].shard
        batches = caller.together()
        other, _ = await caller.session()  # or the step would run on the event loop
        call, number = await caller.session()
        with held(shard) as (begun, go_on):
            await batches.write(batch((number, block()), (number, block())))
            assert await asyncio.to_thread(begun.wait, 10)
            [refused] = pb.Batch.FromString(await batches.read()).items
            assert "before the last message was answered" in refused.message.decode(errors="replace")
            call.cancel()
            await asyncio.sleep(0.2)
            assert len(shard.capacity.leases) == 2, "the step still writes to these pages"
            go_on.set()
        other.cancel()
        await nodes.settle()
        assert not deeper.capacity.leases


async def test_a_batch_is_bounded(tiny: Path) -> None:
    async with cluster(cut_topology(tiny, [[2], [4, 6]])) as nodes, calling(nodes) as caller:
        unknown = pb.Item(session=77)
        batches = caller.together()
        await batches.write(seal(pb.Batch(items=[unknown] * 1024).SerializeToString()))
        answers: list[pb.Item] = []
        while len(answers) < 1024:
            answers += pb.Batch.FromString(await batches.read()).items
        assert answers == [unknown] * 1024
        batches.cancel()
        for data, text in (
            (seal(pb.Batch(items=[unknown] * 1025).SerializeToString()), "1025 messages; at most 1024"),
            (pb.Batch(items=[pb.Item()] * 1_000_000).SerializeToString(), "2000000 bytes; at most 1048576"),
            (seal(b"\xff\xff"), "not a Batch message"),
        ):
            batches = caller.together()
            await batches.write(data)
            with pytest.raises(grpc.aio.AioRpcError, match=text) as ended:
                await batches.read()
            assert ended.value.code() is grpc.StatusCode.DATA_LOSS
        await nodes.settle()


async def test_a_caller_that_does_not_read_its_answers_is_not_read_either(tiny: Path) -> None:
    async with cluster(cut_topology(tiny, [[2], [4, 6]])) as nodes, calling(nodes) as caller:
        batches = caller.together()
        data = seal(pb.Batch(items=[pb.Item(session=2**63 + i) for i in range(1024)]).SerializeToString())
        with pytest.raises(TimeoutError):
            for _ in range(2000):  # 26 MB
                await asyncio.wait_for(batches.write(data), 2)
        batches.cancel()
        await nodes.settle()


async def test_a_malformed_batch_ends_the_call_with_its_status_while_answers_are_written(tiny: Path) -> None:
    async with cluster(cut_topology(tiny, [[2], [4, 6]])) as nodes, calling(nodes) as caller:
        data = seal(pb.Batch(items=[pb.Item(session=2**63 + i) for i in range(1024)]).SerializeToString())
        batches = caller.together()
        for _ in range(20):  # more answers than gRPC takes before they are read
            await batches.write(data)
        await batches.write(seal(b"\xff\xff"))
        await asyncio.sleep(0.5)
        with pytest.raises(grpc.aio.AioRpcError, match="not a Batch message"):
            while await batches.read() is not grpc.aio.EOF:
                pass
        await nodes.settle()


async def test_a_call_that_the_caller_ends_while_answers_are_written_ends_well(tiny: Path) -> None:
    async with cluster(cut_topology(tiny, [[2], [4, 6]])) as nodes, calling(nodes) as caller:
        for _ in range(30):
            batches = caller.together()
            await batches.write(seal(pb.Batch(items=[pb.Item(session=77)] * 8).SerializeToString()))
            await batches.done_writing()
            while await batches.read() is not grpc.aio.EOF:
                pass
            assert await batches.code() is grpc.StatusCode.OK
        await nodes.settle()


class Gone:
    """gRPC's context of a call whose connection has just been lost, which its handler has not been told yet."""

    def __init__(self, *messages: bytes) -> None:
        self._messages = [*messages, grpc.aio.EOF]

    async def read(self) -> Any:
        await asyncio.sleep(0.01)
        return self._messages.pop(0)

    async def write(self, data: bytes) -> None:
        raise grpc.aio.InternalError("Failed to execute a batch")

    async def abort(self, *_: object) -> None:
        raise grpc.aio.InternalError("Failed to execute a batch")

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("_session", b"\xff\xff"),
        ("_together", b"\xff\xff"),
        ("_together", batch((77, pb.SessionRequest()))),
        ("_generate", b"\xff\xff"),
    ],
)
async def test_a_call_whose_connection_is_lost_ends_like_one_that_is_cancelled(
    tiny: Path, call: str, message: bytes
) -> None:
    engine = await asyncio.to_thread(Engine.load, cut_topology(tiny, [[2, 4, 6]]), "n0")
    server = Server(await asyncio.to_thread(Node, engine), "127.0.0.1:0", max_message_bytes=2**20)
    with pytest.raises(asyncio.CancelledError):
        await getattr(server, call)(message, Gone(message))
    await server.stop()
    await engine.close()


async def test_callers_that_vanish_and_nodes_that_stop_leave_no_trace(tiny: Path) -> None:
    topology = cut_topology(tiny, [[2], [4, 6]], limits={"max_positions": 2048, "grace_s": 0.1})
    async with AsyncExitStack() as stack:
        nodes = await stack.enter_async_context(cluster(topology))
        for after in range(13):
            vanishing = calling(nodes)
            caller = await vanishing.__aenter__()
            call, number = await caller.session()
            batches = caller.together()
            for _ in range(3):
                await batches.write(batch((number, block()), (99, block())))
            if after % 3 == 0:
                await call.write(b"\xff\xff")
            if after == 12:
                await stack.aclose()  # the nodes stop in the middle
            await asyncio.sleep(0.001 * after)
            await vanishing.__aexit__(None, None, None)
            await nodes.settle()


@pytest.mark.parametrize("character", ["a", "é", "界", "😀", "%"])
async def test_an_error_of_any_script_reaches_the_caller(tiny: Path, character: str) -> None:
    async with cluster(cut_topology(tiny, [[2], [4, 6]])) as nodes, calling(nodes) as caller:
        call = caller.stream(timeout=10)
        reply = await asked(call, options_of(nodes, family=character * 5000))
        assert reply.failure.message.startswith("family fingerprint: the caller has " + character * 300)
        await call.done_writing()
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await call.read()
        assert ended.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert ended.value.details() == reply.failure.message


def verdict(**changes: Any) -> bytes:
    """A verdict on one question; some fields are changed."""
    decision = {"token": 5, "exit": 6, "confidence": 0.5, "reason": pb.REASON_DEEPEST} | changes
    return pb.SessionReply(
        verdict=pb.Verdict(decisions=[pb.Decision(**decision)], hops=[pb.Hop(node="n1")], position=3)
    ).SerializeToString()


CHANGED = seal(b"\x0a\x00")[:-1] + b"\x00"

ANSWERS = {
    "a wrong checksum": CHANGED,
    "no message": b"\xff\xff\xff",
    "an empty message": b"",
    "no decision": pb.SessionReply(verdict=pb.Verdict(hops=[pb.Hop(node="n1")], position=3)).SerializeToString(),
    "no node": pb.SessionReply(verdict=pb.Verdict(position=3)).SerializeToString(),
    "another position": pb.SessionReply(verdict=pb.Verdict(position=2)).SerializeToString(),
    "a token that is none": verdict(token=61),
    "an exit of another node": verdict(exit=2),
    "an exit that is none": verdict(exit=5),
    "a reason that is none": verdict(reason=99),
    "a confidence that is none": verdict(confidence=float("nan")),
    "a failure of no known kind": pb.SessionReply(failure=pb.Failure(status=99, message="x")).SerializeToString(),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
async def test_a_next_node_that_answers_garbage_is_as_good_as_none(tiny: Path, answer: bytes) -> None:
    async def session(requests: Any, context: Any) -> AsyncIterator[bytes]:
        yield seal(pb.SessionReply(opened=pb.Opened(node="n1", session=1)).SerializeToString())
        async for data in requests:
            if pb.SessionRequest.FromString(data).HasField("block"):
                yield answer if answer == CHANGED else seal(answer)

    server = grpc.aio.server()
    handlers = {"Session": grpc.stream_stream_rpc_method_handler(session)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("ruyi_flow.v1.Node", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with cluster(cut_topology(tiny, [[2], [4, 6]])) as nodes:
        await falls_back(nodes, f"127.0.0.1:{port}")
    await server.stop(0)


@pytest.mark.parametrize(
    "greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0" * 500, bytes.fromhex("000000040000000000") + b"\1" * 90]
)
async def test_a_next_node_that_speaks_another_protocol_is_as_good_as_none(tiny: Path, greeting: bytes) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        with suppress(ConnectionError):
            await reader.read()
        writer.transport.abort()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with cluster(cut_topology(tiny, [[2], [4, 6]], timeout_s=5)) as nodes:
        await falls_back(nodes, f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    server.close()
    await server.wait_closed()
    await asyncio.sleep(0.05)  # the transports end


async def falls_back(nodes: Cluster, address: str) -> None:
    """Put another server in the place of node n1, and check that answers fall back."""
    engine, there = nodes.engines["n0"], nodes.topology.nodes[1].model_copy(update={"address": address})
    connect_to(engine, there, nodes.topology.links[0])
    async with AsyncClient(nodes.topology) as client:
        reply = await client.generate([5, 6, 7], max_new_tokens=4, eos_token_ids=(), fallback=True)
        assert [t.reason for t in reply.tokens] == [Reason.UNREACHABLE] * 4
    await nodes.settle()


async def test_a_call_that_is_lost_or_cancelled_before_it_began_is_no_trace(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("grpc._cython.cygrpc")
    async with cluster(cut_topology(tiny, [[2, 4, 6]])):
        for error in (grpc.aio.InternalError('Failed "execute_batch"'), asyncio.CancelledError(), ValueError("a bug")):
            log.error("raised in core", exc_info=error)
    assert [record.exc_info[1].args for record in caplog.records if record.exc_info and record.exc_info[1]] == [
        ("a bug",)
    ]


@dataclass(eq=False)
class Waiting:
    """A session that has waited for an answer for ten seconds, as `Lifeline` knows it."""

    key: bytes
    instance: bytes = b""
    owed_bytes: int = 0
    waiting_since: float | None = field(default_factory=lambda: time.monotonic() - 10)

    def check(self, now: float) -> None:
        """Wait on."""

    def leave(self) -> None:
        """Stay."""

    def lose(self, error: NodeError) -> None:
        """Wait on."""


async def test_a_question_after_late_answers_has_a_bound_on_both_ends(tiny: Path) -> None:
    async with (
        cluster(cut_topology(tiny, [[2, 4, 6]])) as nodes,
        grpc.aio.insecure_channel(nodes.topology.entry.addresses[0], LOCAL) as channel,
    ):
        owed, asked = channel.unary_unary(METHODS["Owed"]), asyncio.Queue[int]()
        question = pb.OwedRequest(keys=[b"%d" % i for i in range(5000)])
        with pytest.raises(grpc.aio.AioRpcError, match="a question after 5000 answers; at most 4096 are allowed"):
            await owed(seal(question.SerializeToString()))

        async def ask(data: bytes, timeout: float) -> Any:
            asked.put_nowait(len(pb.OwedRequest.FromString(data).keys))
            return await owed(data, timeout=timeout)

        waiting = {Waiting(b"%d" % i) for i in range(2000)}
        ignored: dict[str, Any] = {"heard": lambda sign: None, "dropped": lambda session: None}
        lifeline = Lifeline(channel.unary_stream(METHODS["Alive"]), ask, waiting, **ignored)
        lifeline.watch()
        assert await asked.get() == 1024
        await lifeline.close()
