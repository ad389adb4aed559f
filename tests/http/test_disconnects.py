"""A client that goes away, at whatever moment: every node frees its sessions at once, and the server goes on."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from ruyi_flow.errors import NodeUnavailable
from ruyi_flow.http import events
from ruyi_flow.http.serving import Listening, serve
from ruyi_flow.http.usage import Record
from ruyi_flow.testing import Cluster, cluster, cut_topology
from tests.conftest import until
from tests.http.conftest import chat, client_of

LONG = 460
"""Tokens of an answer that takes far longer than any client here waits."""

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "streamed chat": ("/v1/chat/completions", chat(stream=True, max_tokens=LONG)),
    "whole chat": ("/v1/chat/completions", chat(max_tokens=LONG)),
    "several choices": ("/v1/chat/completions", chat(stream=True, max_tokens=LONG, n=3, temperature=1)),
    "several prompts": (
        "/v1/completions",
        {"model": "spoken", "prompt": ["ab", "cd"], "max_tokens": LONG, "ignore_eos": True},
    ),
    "response": (
        "/v1/responses",
        {"model": "spoken", "input": "hi", "stream": True, "max_output_tokens": LONG, "ignore_eos": True},
    ),
}


@pytest.fixture
async def narrow(spoken: Path) -> AsyncIterator[Cluster]:
    """Three nodes with room for three sessions, so that other requests wait in a queue."""
    limits = {"max_sessions": 3, "max_positions": 2048, "grace_s": 1}
    async with cluster(cut_topology(spoken, [[2], [4], [6]], limits=limits)) as running:
        yield running
        await running.settle()


def open_sessions(nodes: Cluster) -> int:
    return sum(len(engine.shard.capacity.leases) for engine in nodes.engines.values())


Moment = Callable[[asyncio.StreamReader], Awaitable[object]]
"""Waits for the moment at which a client goes away."""


async def hang_up(listening: Listening, kind: str, moment: Moment) -> None:
    """Send a request, and break the connection at a moment."""
    path, body = KINDS[kind]
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", listening.port)
    writer.write(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
    await moment(reader)
    writer.transport.abort()


async def test_sessions_are_freed_at_a_hundred_random_moments(narrow: Cluster) -> None:
    moments = random.Random(7)
    seen = 0

    def soon(_: asyncio.StreamReader) -> Awaitable[None]:
        return asyncio.sleep(moments.uniform(0, 0.1))

    async with serve(narrow.topology, port=0, grace_s=1) as listening:
        for _ in range(25):
            kinds = moments.choices(list(KINDS), k=4)
            asked = [asyncio.create_task(hang_up(listening, kind, soon)) for kind in kinds]
            while not all(task.done() for task in asked):
                seen += open_sessions(narrow)
                await asyncio.sleep(0.002)
            await until(lambda: not open_sessions(narrow) and not listening.site.usage.running)
            assert all(engine.front_door.waiting == 0 for engine in narrow.engines.values())
        assert seen  # the sessions had been there
        async with client_of(listening) as http:
            assert (await http.post("/v1/chat/completions", json=chat())).status_code == 200


async def test_a_queued_request_leaves_the_queue_with_its_client(narrow: Cluster) -> None:
    async with serve(narrow.topology, port=0, grace_s=1) as listening:
        now = asyncio.Event()
        asked = [asyncio.create_task(hang_up(listening, "whole chat", lambda _: now.wait())) for _ in range(6)]
        entry = narrow.engines["n0"]
        await until(lambda: entry.front_door.waiting == 3)
        now.set()
        await asyncio.gather(*asked)
        await until(lambda: not open_sessions(narrow) and not entry.front_door.waiting)


def records_of(listening: Listening) -> list[Record]:
    """Keep what is known of each request that has ended."""
    ended: list[Record] = []
    count = listening.site.usage.ended

    def note(record: Record) -> None:
        count(record)
        ended.append(record)

    listening.site.usage.ended = note  # type: ignore[method-assign]
    return ended


async def test_a_request_is_counted_once_also_when_its_client_goes_away(three: Cluster) -> None:
    async with serve(three.topology, port=0, grace_s=1) as listening:
        ended = records_of(listening)
        await hang_up(listening, "streamed chat", lambda reader: reader.readuntil(b'"role":"assistant"'))
        await until(lambda: ended)
        async with client_of(listening) as http:
            await http.post("/v1/chat/completions", json=chat(user="ann"), headers={"x-request-id": "mine-1"})
            await http.post("/v1/chat/completions", json=chat(model="none"))
            await http.get("/nowhere")
        await until(lambda: len(ended) == 4)
    gone, whole, refused, lost = ended
    assert gone.is_disconnected and gone.is_streamed and gone.new_tokens and not gone.stats
    assert (gone.endpoint, gone.model, gone.caller.name) == ("/v1/chat/completions", "spoken", "local")
    assert (whole.status, whole.error, whole.is_disconnected, whole.user) == (200, "", False, "ann")
    assert (whole.request_id, whole.prompt_tokens, whole.completion_tokens) == ("mine-1", 9, 8)
    assert whole.new_tokens == {("n2", 6): 8} and whole.finish_reasons == ["length"]
    assert whole.first_token_s is not None and 0 < whole.first_token_s <= whole.total_s
    assert (refused.status, refused.error, refused.model) == (404, "model_not_found", "")
    assert (lost.status, lost.error, lost.endpoint) == (404, "unknown_url", "other")


@pytest.mark.parametrize("fails", [False, True])
async def test_a_client_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    monkeypatch.setattr(events, "_STALLED_S", 0.05)
    record, sent, closed = Record("id", "POST"), 0, False

    async def answer() -> AsyncGenerator[bytes, None]:
        nonlocal closed
        try:
            for _ in range(100):
                yield b"data: {}\n\n"
                if fails and sent == 6:
                    raise NodeUnavailable("gone")
        finally:
            closed = True

    async def send(message: Message) -> None:  # as uvicorn's, whose buffer is full after some messages
        nonlocal sent
        sent += 1
        if sent > 6:
            await asyncio.Event().wait()

    async def receive() -> Message:
        raise AssertionError("nothing is received")

    await events.EventStream(answer(), record)({"type": "http"}, receive, send)
    assert sent == 7 and closed and record.is_disconnected
