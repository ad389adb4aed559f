"""Cost of messages of many sessions over one link: on a stream for each session, and batched on one stream."""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import time
from collections.abc import AsyncGenerator
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ruyi_flow.config.security import Keys
from ruyi_flow.config.topology import Topology
from ruyi_flow.requests import GenerateRequest, SessionOpen
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.serving.node import access_to
from ruyi_flow.testing import with_keys
from ruyi_flow.transport.peer import Peer
from ruyi_flow.transport.remote import RemoteStage
from ruyi_flow.transport.server import Access, Server
from ruyi_flow.types import Block, Decision, Encoding, Event, Hop, NodeStatus, Reason, Stage, Tokenized, Verdict

_HIDDEN_SIZE, _MAX_MESSAGE_BYTES, _ROUNDS = 576, 4 * 1024 * 1024, 60


class _Step:
    """A node whose steps take no time: it answers the blocks of all sessions once every session has sent one."""

    def __init__(self, sessions: int) -> None:
        self.name, self.dtype, self.device = "deep", torch.bfloat16, torch.device("cpu")
        self._sessions, self._waiting = sessions, list[asyncio.Future[None]]()

    async def open_session(self, opening: SessionOpen, timeout_s: float | None) -> Stage:
        return self

    async def advance(self, block: Block) -> Verdict:
        if block.wants:
            self._waiting.append(asyncio.get_running_loop().create_future())
            mine = self._waiting[-1]
            if len(self._waiting) == self._sessions:
                for future in self._waiting:
                    future.set_result(None)
                self._waiting.clear()
            await mine
        return Verdict((Decision(5, 29, 0.5, Reason.DEEPEST),), (Hop("deep", 0.01, 0.001),))

    async def feed(self, block: Block) -> None: ...

    async def arrived(self) -> None: ...

    async def rewind(self, position: int) -> None: ...

    async def close(self) -> None: ...

    def generate(self, request: GenerateRequest, timeout_s: float | None) -> AsyncGenerator[Event, None]:
        raise NotImplementedError

    async def tokenize(self, request: GenerateRequest) -> Tokenized:
        raise NotImplementedError

    def load(self) -> float:
        return 0.0

    async def status(self, *, measure_link: bool) -> NodeStatus:
        raise NotImplementedError


def _serve(sessions: int, connection: Connection, access: Access | None = None) -> None:
    async def serve() -> None:
        server = Server(_Step(sessions), "127.0.0.1:0", max_message_bytes=_MAX_MESSAGE_BYTES, access=access)
        await server.start()
        connection.send(server.address)
        await asyncio.Event().wait()

    asyncio.run(serve())


async def _round_ms(address: str, sessions: int, together: bool, keys: Keys | None = None) -> float:
    """Return the milliseconds of a round in which every session sends a state and receives a verdict."""
    peer = Peer("deep", address, max_message_bytes=_MAX_MESSAGE_BYTES, keys=keys)
    if not together:
        peer.batches.accepts = lambda message: False  # type: ignore[method-assign]
    policy = Policy.resolve(Routing(), (5, 29))
    opening = SessionOpen(
        family="family",
        first_layer=6,
        hidden_size=_HIDDEN_SIZE,
        encoding=Encoding.BF16,
        max_positions=4096,
        prompt_length=1,
        policy=policy,
    )
    stages = [RemoteStage(peer, opening, timeout_s=30) for _ in range(sessions)]
    states = torch.zeros(1, _HIDDEN_SIZE, dtype=torch.bfloat16)

    async def run_rounds(stage: RemoteStage, start: int, count: int) -> None:
        for position in range(start, start + count):
            await stage.advance(Block(position, states, (5,), (position,)))

    await asyncio.gather(*(run_rounds(stage, 0, 10) for stage in stages))
    began = time.perf_counter()
    await asyncio.gather(*(run_rounds(stage, 10, _ROUNDS) for stage in stages))
    seconds = time.perf_counter() - began
    for stage in stages:
        await stage.close()
    await peer.close()
    return 1e3 * seconds / _ROUNDS


async def bench_tls(rounds: int) -> dict[str, Any]:
    """Milliseconds that TLS adds to a round trip of one session with one bf16 state, measured in turn with plain."""
    context = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as folder:
        nodes = [{"name": name, "address": "127.0.0.1:0", "exits": [e]} for name, e in (("shallow", 5), ("deep", 29))]
        parsed = Topology.parse({"family": "none", "nodes": nodes, "links": [{"from": "shallow", "to": "deep"}]})
        topology = with_keys(parsed, Path(folder))
        secured: dict[str, tuple[Access | None, Keys | None]] = {
            "plain": (None, None),
            "tls": (access_to(topology, "deep"), topology.keys_of("shallow")),
        }
        processes, addresses = [], {}
        for name, (access, _) in secured.items():
            receiver, sender = context.Pipe()
            processes.append(context.Process(target=_serve, args=(1, sender, access), daemon=True))
            processes[-1].start()
            addresses[name] = await asyncio.to_thread(receiver.recv)
        times: dict[str, list[float]] = {"plain": [], "tls": []}
        for _ in range(10 * rounds):
            for name, (_, keys) in secured.items():
                times[name].append(await _round_ms(addresses[name], 1, False, keys))
        for process in processes:
            process.terminate()
    added = [tls - plain for plain, tls in zip(times["plain"], times["tls"], strict=True)]
    found = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    return found | {"added_ms": statistics.median(added), "goal": "added_ms <= 0.1"}


async def bench_messages(rounds: int) -> dict[str, Any]:
    """Milliseconds of a round of n sessions, one bf16 state each: own streams against one batched stream."""
    found: dict[str, Any] = {}
    context = multiprocessing.get_context("spawn")
    for sessions in (2, 4, 16, 64):
        receiver, sender = context.Pipe()
        process = context.Process(target=_serve, args=(sessions, sender), daemon=True)
        process.start()
        address = await asyncio.to_thread(receiver.recv)
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            for together in times:
                times[together].append(await _round_ms(address, sessions, together))
        process.terminate()
        found[f"{sessions}_own_ms"], found[f"{sessions}_together_ms"] = map(statistics.median, times.values())
        found[f"{sessions}_ratio"] = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
    return found
