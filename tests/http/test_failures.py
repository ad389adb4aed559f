"""Failures: each exception of the SDK has a status that clients act on, and a bug is told and logged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ruyi_flow import errors
from ruyi_flow.http.entry import EntryNodes
from ruyi_flow.http.errors import STATUS_OF, http_error
from ruyi_flow.http.serving import serve
from ruyi_flow.testing import Relay, cluster, cut_topology
from tests.conftest import until
from tests.http.conftest import chat, client_of

PATH = "/v1/chat/completions"


def test_every_exception_of_a_request_has_a_status() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__ if name[0].isupper()]
    of_requests = [kind for kind in kinds if issubclass(kind, errors.RequestError | errors.NodeError)]
    assert set(STATUS_OF) == set(of_requests)
    for kind in of_requests:
        told = http_error(kind("what happened"))
        assert told.status == STATUS_OF[kind] and told.message == "what happened"
        assert ("retry-after" in told.headers) == (told.status == 503)
        assert (told.headers.get("x-should-retry") == "false") == (told.status == 504)
    assert http_error(errors.ConfigError("x")).status == 500


async def test_a_full_node_is_told_with_the_time_to_come_back(spoken: Path) -> None:
    limits = {"max_sessions": 1, "max_waiting": 0, "max_positions": 1024, "grace_s": 1}
    topology = cut_topology(spoken, [[2], [4, 6]], limits=limits)
    relay = Relay()
    async with cluster(topology, {"n1": relay}) as nodes, serve(nodes.topology, port=0, grace_s=1) as listening:
        async with client_of(listening) as http:
            async with http.stream("POST", PATH, json=chat(stream=True, max_tokens=400)) as first:
                lines = aiter(first.aiter_lines())  # closing it would close the connection
                await anext(lines)
                relay.frozen = True  # so that the answer goes on
                for stream in (False, True):
                    reply = await http.post(PATH, json=chat(stream=stream))
                    assert reply.status_code == 503 and reply.json()["error"]["code"] == "overloaded"
                    assert (reply.headers["retry-after"], reply.headers["retry-after-ms"]) == ("1", "1000")
            relay.frozen = False
            await until(lambda: not nodes.engines["n0"].shard.capacity.leases)
            assert (await http.post(PATH, json=chat())).status_code == 200
        await nodes.settle()


async def test_an_answer_that_takes_too_long_is_not_asked_again(spoken: Path) -> None:
    relay = Relay()
    async with (
        cluster(cut_topology(spoken, [[2], [4, 6]]), {"n1": relay}) as nodes,
        serve(nodes.topology, port=0, timeout_s=0.3, grace_s=1) as listening,
        client_of(listening) as http,
    ):
        relay.frozen = True
        reply = await http.post(PATH, json=chat())
        assert reply.status_code == 504 and reply.json()["error"]["code"] == "timeout"
        assert reply.headers["x-should-retry"] == "false"
        relay.frozen = False
        await nodes.settle()


async def test_a_bug_is_told_and_logged(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(self: EntryNodes, asks: Any) -> AsyncGenerator[Any, None]:
        await asyncio.sleep(0)
        raise ZeroDivisionError("secret")
        yield

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(EntryNodes, "events", broken)
        for stream in (False, True):
            caplog.clear()
            reply = await http.post(PATH, json=chat(stream=stream))
            assert reply.status_code == 500 and "secret" not in reply.text
            assert reply.json()["error"]["type"] == "server_error" and reply.headers["x-request-id"]
            assert caplog.text.count("ZeroDivisionError: secret") == 1
    assert (await http.post(PATH, json=chat())).status_code == 200
