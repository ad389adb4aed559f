"""Over HTTP: a stream whose entry node is lost goes on, and a next turn reuses the caches of the last one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from ruyi_flow.http.serving import serve
from ruyi_flow.testing import Relay, cluster, cut_topology
from tests.http.conftest import chat, client_of

PATH = "/v1/chat/completions"


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("where", ["n0", "n1"])
async def test_a_stream_goes_on_after_a_node_was_lost(spoken: Path, where: str, temperature: float) -> None:
    relay = Relay()
    async with (
        cluster(cut_topology(spoken, [[2], [4, 6]]), {where: relay}) as nodes,
        serve(nodes.topology, port=0, grace_s=1) as listening,
        client_of(listening) as http,
    ):
        body = chat(max_tokens=60, temperature=temperature, seed=5, ruyi={"details": True})
        expected = (await http.post(PATH, json=body)).json()["choices"][0]["message"]["content"]
        found: list[dict[str, Any]] = []
        async with http.stream("POST", PATH, json={**body, "stream": True}) as reply:
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    found.append(json.loads(line.removeprefix("data: ")))
                    if len(found) == 10:
                        relay.cut()
        assert not any("error" in chunk for chunk in found)
        text = "".join(choice["delta"].get("content") or "" for chunk in found for choice in chunk["choices"])
        assert text == expected
        stats = next(chunk["ruyi"]["stats"] for chunk in found if "stats" in chunk.get("ruyi", {}))
        recoveries = stats["recoveries"] if where == "n0" else [r for hop in stats["hops"] for r in hop["recoveries"]]
        assert [recovery["cause"] for recovery in recoveries] == ["reset"]
        await nodes.settle()


async def test_the_usage_tells_what_a_turn_has_reused(http: httpx.AsyncClient) -> None:
    turns = [{"role": "user", "content": "Tell me about the sky and the sea and the sun and the moon."}]
    cached = []
    for _ in range(3):
        reply = (await http.post(PATH, json={**chat(), "messages": turns})).json()
        cached.append(reply["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert cached[-1] < reply["usage"]["prompt_tokens"]
        turns += [reply["choices"][0]["message"], {"role": "user", "content": "And then?"}]
    assert cached[0] == 0 < cached[1] < cached[2]
