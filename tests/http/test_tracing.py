"""Traces and log lines of requests over HTTP: one trace from the client's context to the last node."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from ruyi_flow.http.serving import serve
from ruyi_flow.testing import cluster, cut_topology
from tests.http.conftest import chat
from tests.telemetry.test_otel import Recorded, about, id_of, node_of, parent_of, trace_of

CUTS = [(2,), (4,), (6,)]
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
LOGGER = "ruyi_flow.telemetry.request_log"


def server_lines(caplog: pytest.LogCaptureFixture, id: str) -> list[dict[str, Any]]:
    return [vars(r)["request"] for r in caplog.records if r.name == LOGGER and vars(r)["request"]["id"] == id]


async def test_a_request_over_http_is_one_trace_and_one_line(spoken: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    recorded = Recorded()
    tracer = recorded.tracer("server", 0.0)
    headers = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01", "x-request-id": "mine"}
    async with cluster(cut_topology(spoken, CUTS), tracers={**recorded.tracers}) as running:
        async with serve(running.topology, port=0, tracer=tracer) as server:
            async with httpx.AsyncClient(base_url=server.url) as client:
                body = chat(max_tokens=8, user="eve\nrequest 2: ok", ruyi={"mode": "exact"})
                reply = await client.post("/v1/chat/completions", json=body, headers=headers)
                await client.get("/health", headers=headers)
                await client.get("/v1/models", headers=headers)
        await running.settle()
    assert reply.status_code == 200
    usage = reply.json()["usage"]
    (mine, *others) = [s for s in recorded.spans if s.name == "request" and node_of(s) == "server"]
    assert not others, "only what asks for an answer is traced"
    assert trace_of(mine) == int(TRACE, 16) and parent_of(mine) == 0x00F067AA0BA902B7
    told = about(mine)
    assert told["http.route"] == "/v1/chat/completions" and told["http.response.status_code"] == 200
    (entry,) = recorded.named("request", "n0")
    assert parent_of(entry) == id_of(mine) and {trace_of(s) for s in recorded.spans} == {int(TRACE, 16)}
    assert about(entry)["gen_ai.operation.name"] == "chat"
    assert about(entry)["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert {node_of(s) for s in recorded.named("session")} == {"n1", "n2"}
    (line,) = server_lines(caplog, "mine")
    assert line["trace"] == TRACE and line["status"] == "ok" and line["user"] == "local/eve\nrequest 2: ok"
    assert line["new_tokens"] == usage["completion_tokens"] and line["prompt_tokens"] == usage["prompt_tokens"]
    assert sum(line["nodes"].values()) == line["new_tokens"] and line["bytes_up"] > 0
    assert 0 < line["first_token_ms"] <= line["total_ms"]
    lines = [r.getMessage() for r in caplog.records if r.name == LOGGER]
    assert len(lines) == 2 and all(text.isprintable() for text in lines), "one of the server, one of the entry node"


async def test_a_request_that_fails_says_why(spoken: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    recorded = Recorded()
    async with cluster(cut_topology(spoken, [(2, 4, 6)])) as running:
        async with serve(running.topology, port=0, tracer=recorded.tracer("server", 1.0)) as server:
            async with httpx.AsyncClient(base_url=server.url) as client:
                for traceparent in ("00-rubbish", f"00-{TRACE}-00f067aa0ba902b7-00"):
                    headers = {"x-request-id": "mine", "traceparent": traceparent}
                    reply = await client.post("/v1/chat/completions", json=chat(n=0), headers=headers)
                    assert reply.status_code == 400
    (span,) = recorded.named("request")
    assert span.parent is None and about(span)["error.type"] and about(span)["http.response.status_code"] == 400
    first, second = server_lines(caplog, "mine")
    assert first["status"] == second["status"] == about(span)["error.type"] and first["new_tokens"] == 0
    assert second["trace"] == TRACE != first["trace"]


async def test_a_family_in_the_server_is_traced_there(spoken: Path) -> None:
    recorded = Recorded()
    topology = cut_topology(spoken, [(2, 4, 6)])
    nodes = tuple(node.model_copy(update={"address": None}) for node in topology.nodes)
    alone = topology.model_copy(update={"nodes": nodes})
    async with serve(alone, port=0, tracer=recorded.tracer("server", 1.0)) as server:
        async with httpx.AsyncClient(base_url=server.url) as client:
            reply = await client.post("/v1/chat/completions", json=chat(max_tokens=4))
    assert reply.status_code == 200
    (request,) = recorded.named("request")
    assert {s.name for s in recorded.spans} == {"request", "tokenize", "queue", "prefill", "round", "step"}
    assert len({trace_of(s) for s in recorded.spans}) == 1
    assert about(request)["gen_ai.usage.output_tokens"] == reply.json()["usage"]["completion_tokens"]
