"""A fuzzer of the wire: mutated conversations with real nodes, beside honest callers whose answers must not change.

    python -m tests.transport.fuzz --seed 1 --messages 200000

A conversation is made from valid messages by a random generator of its own, so a seed gives the same conversations.
Then fields and bytes are changed, messages are lost, doubled and reordered, sessions are mixed up, and callers vanish.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import torch
from google.protobuf.message import Message

from ruyi_flow.client import AsyncClient
from ruyi_flow.testing import Cluster, cluster, cut_topology, tiny_family
from ruyi_flow.transport import codec
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.checksum import seal
from ruyi_flow.transport.peer import METHODS, Peer
from ruyi_flow.transport.status import NODE_KEY
from tests.transport.honest import HIDDEN, PATIENCE_S, Honest, Report
from tests.transport.mutations import LARGE, changed

__all__ = ["Report", "fuzz"]

CUTS = [[2], [4], [6]]
VOCAB = 61
LIMITS = {"max_positions": 16384, "max_sessions": 48, "max_waiting": 16, "max_wait_s": 1, "grace_s": 1}
CALLERS = 8
"""Number of hostile conversations at the same time."""

MOST_MB = 800
"""Memory that the process may have more than before: caches fill up, of torch and of KV pages that are used at last."""

LONGEST_STOP_S = 0.25
"""Longest time that the event loop may stand still, where times are checked."""


class _Log(logging.Handler):
    """Takes errors and traces in the log for faults."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report, self.lines = report, logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.exc_info:
            self._report.faults.append(f"log: {self.lines.format(record)[:3000]}")


# ---- valid messages ----


class Hostile:
    """The hostile callers.

    Args:
        nodes: the nodes.
        report: what they see.
    """

    def __init__(self, nodes: Cluster, report: Report) -> None:
        self._nodes, self._report = nodes, report
        self._family = nodes.engines["n0"].checkpoint.fingerprint

    def opening(self, rng: random.Random, node: int) -> pb.SessionRequest:
        """A handshake for a node."""
        deepest = rng.choice([p for cut in CUTS[node:] for p in cut])
        mode = rng.choice((pb.MODE_EXACT, pb.MODE_TOKEN, pb.MODE_CASCADE))
        message = pb.SessionRequest(
            open=pb.Open(
                protocol=codec.PROTOCOL,
                family=self._family,
                first_layer=(0, 2, 4)[node],
                node=f"n{node}",
                exits=CUTS[node],
                hidden_size=HIDDEN,
                encoding=pb.ENCODING_F32,
                max_positions=rng.choice((8, 40, 64, 100)),
                prompt_length=rng.choice((1, 4, 8)),
                sampling=pb.SamplingParams(top_p=1, repetition_penalty=1, max_new_tokens=32),
                policy=pb.Policy(thresholds={p: rng.choice((0, 0.3, 9)) for p in (2, 4)}, deepest=deepest),
            )
        )
        routing = message.open.policy.routing
        routing.mode, routing.fallback = mode, rng.random() < 0.3
        if rng.random() < 0.2:
            message.open.sampling.MergeFrom(pb.SamplingParams(temperature=0.7, top_k=9, seed=rng.randrange(99)))
        return message

    def blocks(self, rng: random.Random) -> list[Message]:
        """Blocks and rewinds as an honest caller could send them one after the other."""
        messages: list[Message] = []
        start = 0
        for _ in range(rng.randint(1, 5)):
            rows = rng.choice((1, 1, 2, 4, 8))
            scale = rng.choice((1.0,) * 60 + (math.nan, math.inf, 1e30, 0.0))
            data = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rng.randrange(99))) * scale
            message = pb.SessionRequest()
            block = message.block
            block.start = start
            block.token_ids.extend(rng.randrange(VOCAB) for _ in range(rows))
            block.wants.extend(sorted(rng.sample(range(rows), rng.randint(0, rows))))
            block.states.MergeFrom(pb.Tensor(encoding=pb.ENCODING_F32, rows=rows, data=data.numpy().tobytes()))
            messages.append(message)
            start += rows
            if rng.random() < 0.2:
                start = rng.randint(0, start)
                messages.append(pb.SessionRequest(rewind=pb.Rewind(position=start)))
        return messages

    def request(self, rng: random.Random) -> pb.GenerateRequest:
        """A user's request."""
        message = pb.GenerateRequest(sampling=pb.SamplingParams(top_p=1, repetition_penalty=1, max_new_tokens=6))
        message.token_ids.ids.extend(rng.randrange(3, VOCAB) for _ in range(rng.choice((1, 5, 20))))
        if rng.random() < 0.5:
            message.routing.MergeFrom(pb.Routing(mode=pb.MODE_TOKEN, threshold=0.4, draft=2))
        return message

    # ---- conversations ----

    async def converse(self, rng: random.Random, channels: list[grpc.aio.Channel]) -> None:
        """Have one conversation, on a connection of its own or on one that others use, too."""
        kind: Callable[..., Coroutine[Any, Any, None]]
        kind = rng.choices((self.session, self.together, self.generate, self.status), (55, 20, 23, 2))[0]
        node = 0 if kind == self.generate and rng.random() < 0.9 else rng.randrange(3)
        self._report.conversations += 1
        calls: list[Any] = []
        own = rng.random() < 0.15
        channel = self.channel(node) if own else channels[node]
        try:
            async with asyncio.timeout(PATIENCE_S):
                await kind(rng, channel, node, calls)
        except TimeoutError:
            self._report.faults.append(f"a call of {kind.__name__} has no answer after {PATIENCE_S:g} s")
        except grpc.aio.AioRpcError as error:
            self.ended(error)
        except (grpc.aio.BaseError, asyncio.InvalidStateError):  # a write after the end of the call
            self._report.outcomes["ended"] += 1
        finally:
            for call in calls:
                call.cancel()
            if own:
                await channel.close()

    def channel(self, node: int) -> grpc.aio.Channel:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        return grpc.aio.insecure_channel(str(self._nodes.topology.nodes[node].address), options)

    async def session(self, rng: random.Random, channel: Any, node: int, calls: list[Any]) -> None:
        call = channel.stream_stream(METHODS["Session"])(timeout=rng.choice((0.02, PATIENCE_S, PATIENCE_S)))
        calls.append(call)
        hasty = rng.random() < 0.3
        owed = 0
        for data in changed(rng, [self.opening(rng, node), *self.blocks(rng)]):
            await self.write(call, data)
            owed += 1
            while owed and (not hasty or rng.random() < 0.3):
                owed -= 1
                if not self.replied(await call.read()):
                    return
            if rng.random() < 0.03:
                return  # vanish
        if rng.random() < 0.7:
            await call.done_writing()
            while self.replied(await call.read()):
                pass

    async def together(self, rng: random.Random, channel: Any, node: int, calls: list[Any]) -> None:
        numbers = [rng.randrange(200) for _ in range(2)]  # foreign sessions and such as do not exist
        for _ in range(rng.randint(0, 3)):
            call = channel.stream_stream(METHODS["Session"])(timeout=PATIENCE_S)
            calls.append(call)
            await self.write(call, self.opening(rng, node).SerializeToString())
            reply = await call.read()
            if self.replied(reply):
                numbers.append(pb.SessionReply.FromString(reply).opened.session)
        batches = channel.stream_stream(METHODS["Together"])(timeout=rng.choice((0.02, PATIENCE_S, PATIENCE_S)))
        calls.append(batches)
        for _ in range(rng.randint(1, 4)):
            batch = pb.Batch()
            for _ in range(rng.choice((1, 2, 3, 8))):
                number = rng.choice(numbers)
                for data in changed(rng, self.blocks(rng)[:2], 0.3):
                    batch.items.add(session=number, message=data)
            data = changed(rng, [batch], 0.15)[0] if rng.random() < 0.9 else rng.choice(LARGE)
            await self.write(batches, data)
            if rng.random() < 0.3 and len(calls) > 1:
                calls[0].cancel()  # a session ends while its messages are answered
            if rng.random() < 0.5 and not await self.read_batch(batches):
                return
        if rng.random() < 0.3:
            await batches.done_writing()
            while await self.read_batch(batches):
                pass

    async def read_batch(self, call: Any) -> bool:
        try:  # the answer to a session that has ended may never come
            data = await asyncio.wait_for(call.read(), 0.5)
        except TimeoutError:
            return False
        if data is grpc.aio.EOF:
            return False
        for item in pb.Batch.FromString(data).items:
            self.replied(item.message or grpc.aio.EOF)
        return True

    async def generate(self, rng: random.Random, channel: Any, node: int, calls: list[Any]) -> None:
        [data] = changed(rng, [self.request(rng)])[:1] or [b""]
        call = channel.unary_stream(METHODS["Generate"])(data, timeout=rng.choice((0.02, PATIENCE_S, PATIENCE_S)))
        calls.append(call)
        self._report.messages += 1
        while (data := await call.read()) is not grpc.aio.EOF:
            reply = pb.GenerateReply.FromString(data)
            if reply.HasField("token"):
                self.decided(reply.token.id, reply.token.exit, reply.token.confidence)
            if rng.random() < 0.05:
                return  # vanish
        self._report.outcomes["answered"] += 1

    async def status(self, rng: random.Random, channel: Any, node: int, calls: list[Any]) -> None:
        self._report.messages += 1
        [sent] = changed(rng, [pb.StatusRequest(measure_link=rng.random() < 0.5)])[:1] or [b""]
        if rng.random() < 0.3:
            sent = rng.randbytes(50)
        timeout_s = rng.choice((0.02, PATIENCE_S, PATIENCE_S))
        data = await channel.unary_unary(METHODS["Status"])(sent, timeout=timeout_s)
        codec.status_from_pb(pb.StatusReply.FromString(data))

    async def write(self, call: Any, data: bytes) -> None:
        self._report.messages += 1
        await call.write(seal(data) if self._report.messages % 10 else data)

    # ---- answers ----

    def replied(self, data: Any) -> bool:
        """Check a reply, and return whether the session goes on."""
        if data is grpc.aio.EOF:
            return False
        reply = pb.SessionReply.FromString(data)
        kind: str | None = reply.WhichOneof("message")
        self._report.outcomes[str(kind)] += 1
        for d in reply.verdict.decisions:
            self.decided(d.token, d.exit, d.confidence)
        if kind == "failure" and reply.failure.status == grpc.StatusCode.INTERNAL.value[0]:
            self._report.faults.append(f"a caller is told of a bug: {reply.failure.message}")
        return kind != "failure"

    def decided(self, token: int, exit: int, confidence: float) -> None:
        if token >= VOCAB or exit not in (2, 4, 6) or not 0 <= confidence <= 1.001:
            self._report.faults.append(f"an answer contains token {token}, exit {exit}, confidence {confidence}")

    def ended(self, error: grpc.aio.AioRpcError) -> None:
        """Check the status of a call that has failed."""
        code = error.code()
        self._report.outcomes[code.name] += 1
        told = NODE_KEY in dict(error.trailing_metadata() or ())
        if code is grpc.StatusCode.UNKNOWN or (code is grpc.StatusCode.INTERNAL and told):
            self._report.faults.append(f"a call ended with {code.name}: {error.details()}")


# ---- the run ----


async def watch(report: Report) -> None:
    """Measure how long the event loop stands still, and memory."""
    process = psutil.Process()
    before = process.memory_info().rss
    while True:
        then, spent = time.perf_counter(), time.thread_time()
        await asyncio.sleep(0.01)
        late, spent = time.perf_counter() - then - 0.01, time.thread_time() - spent
        report.worst_stop_s = max(report.worst_stop_s, min(late, spent))
        report.grown_mb = max(report.grown_mb, (process.memory_info().rss - before) >> 20)


@asynccontextmanager
async def running(coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(coroutine)
    try:
        yield
    finally:
        task.cancel()


async def fuzz(family: Path, *, seed: int, messages: int) -> Report:
    """Send so many messages to three nodes of a family, and return what was seen."""
    report, done = Report(), asyncio.Event()
    log, root = _Log(report), logging.getLogger()
    root.addHandler(log)
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: report.faults.append(f"event loop: {context.get('message')}: {context.get('exception')!r}")
    )
    try:
        async with AsyncExitStack() as stack:
            nodes = await stack.enter_async_context(cluster(cut_topology(family, CUTS, limits=LIMITS)))
            client = await stack.enter_async_context(AsyncClient(nodes.topology))
            hostile = Hostile(nodes, report)
            opening = hostile.opening(random.Random(1), 1).open
            opening.max_positions, opening.prompt_length = 12, 6
            peer = Peer("n1", str(nodes.topology.nodes[1].address), max_message_bytes=2**22)
            honest = Honest(client, peer, opening, report)
            await honest.learn()
            tasks = len(asyncio.all_tasks())
            numbers = iter(range(messages))

            async def attack() -> None:
                channels = [hostile.channel(node) for node in range(3)]
                while report.messages < messages and len(report.faults) < 20:
                    await hostile.converse(random.Random(f"{seed} {next(numbers)}"), channels)
                for channel in channels:
                    await channel.close()

            async with running(watch(report)):
                asking = [asyncio.create_task(honest.go_on(i, done)) for i in range(honest.count)]
                await asyncio.gather(*(attack() for _ in range(CALLERS)))
                done.set()
                await asyncio.gather(*asking)
            await peer.close()
            try:
                await nodes.settle(20)
            except AssertionError as error:
                report.faults.append(f"after the end: {error}")
            await asyncio.sleep(0.1)
            if report.grown_mb > MOST_MB:
                report.faults.append(f"memory has grown by {report.grown_mb} MB")
            if len(asyncio.all_tasks()) > tasks:
                report.faults.append(f"{len(asyncio.all_tasks())} tasks are left of {tasks}")
    finally:
        root.removeHandler(log)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the wire of three nodes in this process.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--messages", type=int, default=5000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(fuzz(tiny_family(f"{folder}/tiny"), seed=given.seed, messages=given.messages))
    print(
        f"{report.messages} messages in {report.conversations} conversations, {time.perf_counter() - began:.0f} s\n"
        f"honest callers: {report.honest} answers checked, {report.refused} refused\n"
        f"event loop: stood still for {report.worst_stop_s:.3f} s at the most; memory: {report.grown_mb} MB more\n"
        f"answers: {dict(report.outcomes.most_common())}"
    )
    if report.worst_stop_s > LONGEST_STOP_S:
        report.faults.append(f"the event loop stood still for {report.worst_stop_s:.3f} s")
    for fault in report.faults:
        print(f"FAULT {fault}")
    raise SystemExit(bool(report.faults))


if __name__ == "__main__":
    main()
