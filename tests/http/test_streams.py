"""Streams: failures before and after the first event, comments while nothing comes, and the server's own end."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from ruyi_flow.config.topology import Topology
from ruyi_flow.http import events
from ruyi_flow.http.serving import serve
from ruyi_flow.testing import Relay, cluster, cut_topology
from tests.conftest import until
from tests.http.conftest import chat, client_of

PATH = "/v1/chat/completions"


async def data_of(reply: httpx.Response) -> list[Any]:
    """Return the data of a stream's events."""
    lines = [line.removeprefix("data: ") async for line in reply.aiter_lines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_a_failure_before_the_first_token_has_its_status(http: httpx.AsyncClient) -> None:
    for fields in ({"messages": [{"role": "user", "content": "x" * 600}]}, {"ruyi": {"exit": 3}}):
        reply = await http.post(PATH, json=chat(stream=True, **fields))
        assert reply.status_code == 400 and reply.headers["content-type"] == "application/json"
        assert reply.json()["error"]["type"] == "invalid_request_error"


async def test_a_node_lost_in_the_middle_ends_the_stream_with_an_error(spoken: Path) -> None:
    relay = Relay(delay_s=0.002)
    async with (
        cluster(cut_topology(spoken, [[2], [4], [6]], recover_s=0), {"n2": relay}) as nodes,
        serve(nodes.topology, port=0, grace_s=1) as listening,
    ):
        async with client_of(listening) as http, http.stream("POST", PATH, json=chat(stream=True, max_tokens=400)) as r:
            assert r.status_code == 200
            got: list[str] = []
            async for line in r.aiter_lines():
                if line and not got:
                    relay.cut()
                got += [line] if line else []
        assert "error" not in got[0] and "[DONE]" not in got[-1]
        error = json.loads(got[-1].removeprefix("data: "))["error"]
        assert error["type"] == "server_error" and error["code"] == "node_unavailable" and "n2" in error["message"]
        async with openai.AsyncOpenAI(base_url=f"{listening.url}/v1", api_key="x", max_retries=0) as client:
            asked: Any = {k: v for k, v in chat(max_tokens=400).items() if k != "ignore_eos"}
            stream = await client.chat.completions.create(**asked, stream=True, extra_body={"ignore_eos": True})
            with pytest.raises(openai.APIError, match="n2"):
                async for _ in stream:
                    relay.cut()
        await nodes.settle()


async def test_comments_keep_a_waiting_stream_awake(spoken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_COMMENT_EVERY_S", 0.05)
    relay = Relay()
    topology = cut_topology(spoken, [[2], [4], [6]], timeout_s=2, recover_s=0)
    async with cluster(topology, {"n2": relay}) as nodes, serve(nodes.topology, port=0, grace_s=1) as listening:
        async with client_of(listening) as http:
            relay.frozen = True
            async with http.stream("POST", PATH, json=chat(stream=True)) as reply:
                assert reply.status_code == 200
                lines = aiter(reply.aiter_lines())
                assert [await anext(lines) for _ in range(4)] == [": waiting", "", ": waiting", ""]
                relay.frozen = False
                rest = [line async for line in lines if line.startswith("data: ")]
            assert rest[-1] == "data: [DONE]" and len(rest) > 3
            relay.frozen = True  # now until the link's time limit: the status has been sent already
            async with http.stream("POST", PATH, json=chat(stream=True)) as reply:
                assert reply.status_code == 200
                [error] = await data_of(reply)
                assert error["error"]["type"] == "server_error"
            relay.frozen = False
        await nodes.settle()


async def test_a_stopping_server_lets_answers_end_and_refuses_new_ones(spoken: Path) -> None:
    relay = Relay()
    async with cluster(cut_topology(spoken, [[2], [4], [6]]), {"n2": relay}) as nodes, AsyncExitStack() as stack:
        listening = await stack.enter_async_context(serve(nodes.topology, port=0, grace_s=30))
        async with client_of(listening) as http:
            async with http.stream("POST", PATH, json=chat(stream=True, max_tokens=300)) as reply:
                lines = aiter(reply.aiter_lines())
                await anext(lines)
                relay.frozen = True  # so that the answer goes on
                stopping = asyncio.create_task(stack.aclose())
                await asyncio.sleep(0)
                refused = await http.post(PATH, json=chat())
                assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
                assert refused.headers["retry-after"] == "1"
                assert (await http.get("/ready")).json() == {"status": "draining"}
                assert (await http.get("/health")).status_code == 200
                relay.frozen = False
                assert [line async for line in lines if line][-1] == "data: [DONE]"
            await stopping
            with pytest.raises(httpx.ConnectError):
                await http.get("/health")


async def test_an_answer_that_outlives_the_grace_time_is_told(spoken: Path) -> None:
    relay = Relay()
    async with (
        cluster(cut_topology(spoken, [[2], [4], [6]]), {"n2": relay}) as nodes,
        AsyncExitStack() as stack,
    ):
        listening = await stack.enter_async_context(serve(nodes.topology, port=0, grace_s=0.2))
        async with client_of(listening) as http:
            async with http.stream("POST", PATH, json=chat(stream=True, max_tokens=400)) as reply:
                lines = aiter(reply.aiter_lines())
                await anext(lines)
                relay.frozen = True
                whole = asyncio.create_task(http.post(PATH, json=chat(max_tokens=400)))
                await until(lambda: listening.site.usage.running == 2)
                await stack.aclose()
                last = [line async for line in lines if line][-1]
                assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
                assert (await whole).status_code == 503
        relay.frozen = False
        await nodes.settle()


async def test_a_server_that_runs_the_family_itself_ends_its_answers_too(spoken: Path) -> None:
    topology = Topology.parse({"family": str(spoken), "nodes": [{"name": "whole", "exits": [2, 4, 6]}]})
    async with AsyncExitStack() as stack:
        listening = await stack.enter_async_context(serve(topology, port=0, grace_s=0.1))
        async with client_of(listening) as http:
            assert (await http.get("/ready")).json() == {"status": "ready", "nodes": {"whole": "serving"}}
            async with http.stream("POST", PATH, json=chat(stream=True, max_tokens=460, n=4)) as reply:
                lines = aiter(reply.aiter_lines())
                await anext(lines)
                await stack.aclose()
                last = [line async for line in lines if line][-1]
                assert "the server is shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
