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
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import psutil
import torch
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import CapacityError, DeadlineExceeded
from ruyi_flow.testing import Cluster, cluster, cut_topology, tiny_family
from ruyi_flow.transport import codec
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.peer import METHODS, Peer
from ruyi_flow.transport.remote import RemoteStage
from ruyi_flow.transport.status import NODE_KEY
from ruyi_flow.types import Block

__all__ = ["Report", "fuzz"]

CUTS = [[2], [4], [6]]
VOCAB, HIDDEN = 61, 32
LIMITS = {"max_positions": 16384, "max_sessions": 48, "max_waiting": 16, "max_wait_s": 1, "grace_s": 1}
CALLERS = 8
"""Number of hostile conversations at the same time."""

MOST_MB = 800
"""Memory that the process may have more than before: caches fill up, of torch and of KV pages that are used at last."""

LONGEST_STOP_S = 0.25
"""Longest time that the event loop may stand still, where times are checked."""

PATIENCE_S = 60.0
"""Seconds after which a call that has no answer is a fault."""

OPTIONS: list[dict[str, Any]] = [
    {"mode": "exact", "draft": 3},
    {"mode": "token", "threshold": 0.4, "draft": 2},
    {"mode": "cascade", "threshold": 0.3, "window": 3},
    {"mode": "exact", "temperature": 0.8, "top_k": 20, "seed": 7},
    {"mode": "fixed", "exit": 4},
]
"""What the honest callers ask with."""

_Type = FieldDescriptor
INTEGERS = (0, 1, 2, 3, 4, 6, 63, 64, 65, 255, 512, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
NUMBERS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-30, 0.3, 1.0, 1.5, 1e30, 1e300)
TEXTS = ("", "x", "a" * 3000, "界" * 1500, "😀\0\n%", "ruyi")
LARGE = (
    pb.Batch(items=[pb.Item()] * 1_000_000).SerializeToString(),
    b"\x12\x00" * 500_000,
    pb.SessionRequest(block=pb.Block(token_ids=[5] * 500_000)).SerializeToString(),
    pb.SessionRequest(open=pb.Open(sampling=pb.SamplingParams(stop=[""] * 400_000))).SerializeToString(),
)


@dataclass
class Report:
    """What a run of the fuzzer has seen."""

    messages: int = 0
    """Messages sent."""
    conversations: int = 0
    honest: int = 0
    """Answers of honest callers that were checked."""
    refused: int = 0
    """Honest requests that found the nodes full."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """How hostile calls and messages were answered, and how often."""
    worst_stop_s: float = 0.0
    """Longest time that the event loop of callers and nodes computed without a pause, other processes left out."""
    grown_mb: int = 0
    """How much memory the process had more at the most than before."""
    faults: list[str] = field(default_factory=list)
    """What must not happen."""


class _Log(logging.Handler):
    """Takes errors and traces in the log for faults."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report, self.lines = report, logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.exc_info:
            self._report.faults.append(f"log: {self.lines.format(record)[:3000]}")


# ---- mutations ----


def value_of(rng: random.Random, f: FieldDescriptor) -> Any:
    """A value that a field of this type can have on the wire."""
    if f.cpp_type == _Type.CPPTYPE_STRING:
        return rng.randbytes(rng.choice((0, 1, 30, 4000))) if f.type == _Type.TYPE_BYTES else rng.choice(TEXTS)
    if f.cpp_type in (_Type.CPPTYPE_DOUBLE, _Type.CPPTYPE_FLOAT):
        return rng.choice(NUMBERS)
    if f.cpp_type == _Type.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if f.cpp_type == _Type.CPPTYPE_ENUM:
        return rng.choice((*range(8), 99, -1))
    bits = 64 if f.cpp_type == _Type.CPPTYPE_UINT64 else 32
    return rng.choice([i for i in INTEGERS if i < 2**bits])


def change_field(rng: random.Random, message: Message) -> None:
    """Change one field of a message, or of a message in it."""
    assert isinstance(message.DESCRIPTOR, Descriptor)
    fields = message.DESCRIPTOR.fields
    set_fields = [f for f, _ in message.ListFields()]
    f = rng.choice(set_fields if set_fields and rng.random() < 0.7 else fields)
    value = getattr(message, f.name)
    if f.message_type is not None and f.message_type.GetOptions().map_entry:
        key, of = rng.choice((0, 2, 4, 6, 5, 2**32 - 1)), f.message_type.fields_by_name["value"]
        if of.message_type is None:
            value[key] = value_of(rng, of)
        else:
            change_field(rng, value[key])
    elif f.is_repeated:
        if rng.random() < 0.3:
            del value[rng.randrange(len(value) + 1) :]
        elif f.message_type is None:
            value.extend([value_of(rng, f)] * rng.choice((1, 2, 100)))
        else:
            change_field(rng, value.add())
    elif f.message_type is not None:
        value.SetInParent()
        if rng.random() < 0.9:
            change_field(rng, value)
    elif rng.random() < 0.1:
        message.ClearField(f.name)
    else:
        setattr(message, f.name, value_of(rng, f))


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, double or insert bytes."""
    at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice(
        (
            lambda: data[:at] + rng.randbytes(1) + data[at + 1 :],
            lambda: data[:at],
            lambda: data[:to] + data[at:to] + data[to:],
            lambda: data[:at] + rng.randbytes(rng.choice((1, 8, 100))) + data[at:],
            lambda: rng.choice(LARGE) if rng.random() < 0.05 else b"",
        )
    )()


def changed(rng: random.Random, messages: list[Message], chance: float = 0.5) -> list[bytes]:
    """Change a conversation in some places, or in none."""
    while rng.random() < chance:
        i = rng.randrange(len(messages))
        if rng.random() < 0.7:
            change_field(rng, messages[i])
        elif rng.random() < 0.3:
            rng.shuffle(messages)
        elif rng.random() < 0.5:
            messages.insert(rng.randrange(len(messages) + 1), messages[i])
        elif len(messages) > 1:
            del messages[i]
    sent = [m.SerializeToString() for m in messages]
    while rng.random() < chance / 2:
        i = rng.randrange(len(sent))
        sent[i] = change_bytes(rng, sent[i])
    return sent


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
        data = await channel.unary_unary(METHODS["Status"])(rng.randbytes(rng.choice((0, 50))), timeout=PATIENCE_S)
        codec.status_from_pb(pb.StatusReply.FromString(data))

    async def write(self, call: Any, data: bytes) -> None:
        self._report.messages += 1
        await call.write(data)

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


# ---- honest callers ----

STATES = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(5))
IDS = tuple(3 + i * 7 % 50 for i in range(12))


async def over_a_hop(peer: Peer, opening: pb.Open) -> list[Any]:
    """A session with node n1 as node n0 has it: a prompt, then position after position."""
    stage = RemoteStage(peer, codec.open_from_pb(opening), timeout_s=PATIENCE_S)
    decisions: list[Any] = []
    try:
        for start, stop in ((0, 6), *((i, i + 1) for i in range(6, 12))):
            block = Block(start, STATES[start:stop], IDS[start:stop], (stop - 1,))
            decisions += (await stage.advance(block)).decisions
    finally:
        await stage.close()
    return decisions


class Honest:
    """Callers that keep to the protocol, and the answers that each of them gets when it is alone."""

    def __init__(self, client: AsyncClient, peer: Peer, opening: pb.Open, report: Report) -> None:
        self._report = report
        self._jobs: list[Callable[[], Coroutine[Any, Any, list[Any]]]] = [
            *(partial(self._ask, client, options) for options in OPTIONS),
            *[partial(over_a_hop, peer, opening)] * 3,  # these share batches
        ]
        self._alone: list[list[Any]] = []

    @staticmethod
    async def _ask(client: AsyncClient, options: dict[str, Any]) -> list[Any]:
        reply = await client.generate(
            [5, 17, 9, 33], max_new_tokens=10, eos_token_ids=(), timeout_s=PATIENCE_S, **options
        )
        return list(reply.tokens)

    async def learn(self) -> None:
        """Ask one after the other, and then all at once, so that the streams are open that sessions share."""
        self._alone = [await job() for job in self._jobs]
        await asyncio.gather(*(job() for job in self._jobs))

    async def go_on(self, which: int, done: asyncio.Event) -> None:
        """Ask again and again."""
        while not done.is_set():
            try:
                got = await self._jobs[which]()
            except (CapacityError, DeadlineExceeded):
                self._report.refused += 1
                await asyncio.sleep(0.05)
                continue
            except Exception as error:
                self._report.faults.append(f"honest caller {which}: {type(error).__name__}: {error}")
                continue
            self._report.honest += 1
            if [_what(a) for a in got] != [_what(a) for a in self._alone[which]]:
                self._report.faults.append(f"honest caller {which} got {got}, alone {self._alone[which]}")

    @property
    def count(self) -> int:
        return len(self._jobs)


def _what(answer: Any) -> tuple[int, int, float]:
    """Token, exit and confidence, rounded: sums of floating point numbers depend on who else is in a step."""
    token = answer.id if hasattr(answer, "id") else answer.token
    return token, answer.exit, round(answer.confidence, 2)


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
