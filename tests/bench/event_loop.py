"""How long a node's event loop stops while clients ask for more than can be: no other session moves meanwhile."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import grpc

from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import RuyiFlowError
from ruyi_flow.family import store
from ruyi_flow.requests import GenerateRequest, SamplingParams
from ruyi_flow.serving.engine import Engine
from ruyi_flow.serving.node import serve
from ruyi_flow.testing import free_ports
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.peer import METHODS, Peer

_TICK_S = 0.002
"""Seconds between two looks at the clock; a stop is measured to this precision."""


def _serve(topology: dict[str, Any], longest: Any, busiest: Any, ready: Any, done: Any) -> None:
    """Run the topology's only node in this process.

    The event loop's longest stop is written to `longest`, and to `busiest` the most processor time that the loop itself
    used in one, which does not count what other processes and threads took of the machine.
    """

    async def run() -> None:
        parsed = Topology.parse(topology)
        async with serve(Engine.load(parsed, parsed.entry.name)):
            gc.collect()
            gc.freeze()  # as `ruyi-flow node` does
            ready.set()
            while not done.is_set():
                began, busy = time.perf_counter(), time.thread_time()
                await asyncio.sleep(_TICK_S)
                busiest.value = max(busiest.value, time.thread_time() - busy)
                longest.value = max(longest.value, time.perf_counter() - began - _TICK_S)

    asyncio.run(run())


async def bench_event_loop(rounds: int) -> dict[str, Any]:
    """Longest stop of a node's event loop, in ms: one client decodes, another sends what should do harm."""
    context = multiprocessing.get_context("spawn")
    address = f"127.0.0.1:{free_ports(1)[0]}"
    node = {"name": "n0", "exits": [5, 11, 17, 23, 29], "address": address, "threads": 1}
    longest, busiest = context.Value("d", 0.0), context.Value("d", 0.0)
    ready, done = context.Event(), context.Event()
    process = context.Process(
        target=_serve, args=({"family": store.DEMO, "nodes": [node]}, longest, busiest, ready, done), daemon=True
    )
    process.start()
    await asyncio.to_thread(ready.wait)
    honest = Peer("n0", address, max_message_bytes=4 << 20)
    hostile = Peer("n0", address, max_message_bytes=4 << 20)
    channel = grpc.aio.insecure_channel(address, [("grpc.max_receive_message_length", -1)])

    async def decode() -> None:
        request = GenerateRequest("hello", True, SamplingParams(max_new_tokens=2000, eos_token_ids=()))
        async for _ in honest.generate(request, timeout_s=600):
            pass

    async def ask(prompt: Any, **sampling: Any) -> None:
        with suppress(RuyiFlowError):
            request = GenerateRequest(prompt, True, SamplingParams(**sampling))
            async for _ in hostile.generate(request, timeout_s=30):
                pass

    async def batch(items: int) -> None:
        call = channel.stream_stream(METHODS["Together"])(timeout=30)
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(pb.Batch(items=[pb.Item(session=1)] * items).SerializeToString())
            await call.done_writing()
            while await call.read() is not grpc.aio.EOF:
                pass
        call.cancel()

    attacks: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
        "nothing_else": lambda: asyncio.sleep(3),
        "prompt_of_4_mb": lambda: ask("word " * 800_000),
        "messages_100000": lambda: ask((("user", "x"),) * 100_000),
        "token_ids_1000000": lambda: ask((5,) * 1_000_000),
        "stop_strings_16_of_1000": lambda: ask("a" * 500, max_new_tokens=64, stop=("a" * 1000,) * 16),
        "batch_of_1000000": lambda: batch(1_000_000),
        "prompt_that_fits": lambda: ask("word " * 7000, max_new_tokens=8),
    }
    found: dict[str, Any] = {}
    decoding = asyncio.create_task(decode())
    try:
        await asyncio.sleep(2)
        for name, attack in attacks.items():
            stops, busy = [], []
            for _ in range(max(1, rounds // 2)):
                longest.value = busiest.value = 0.0
                await attack()
                await asyncio.sleep(0.2)
                stops.append(longest.value * 1e3)
                busy.append(busiest.value * 1e3)
            found |= {f"{name}_ms": max(stops), f"{name}_own_ms": max(busy)}
    finally:
        decoding.cancel()
        await asyncio.gather(decoding, return_exceptions=True)
        await channel.close()
        await hostile.close()
        await honest.close()
        done.set()
        await asyncio.to_thread(process.join, 30)
        process.kill()
    return found | {"goal": "each <= 50 ms"}
