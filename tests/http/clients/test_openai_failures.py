"""The `openai` package: errors, retries, time limits, and connections that end early."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx  # what the package itself uses
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from ruyi_flow.testing import Relay, cut_topology
from tests.conftest import until
from tests.http.clients.served import Served, serve_topology

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]

LONG = 20_000
"""Tokens of an answer that no test waits for."""


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=served.base_url, api_key="any", timeout=30, max_retries=0) as made:
        yield made


def patient(served: Served, **options: Any) -> OpenAI:
    """A client that counts on nothing but its own timeout."""
    return OpenAI(base_url=served.base_url, api_key="any", **{"timeout": 30, "max_retries": 0, **options})


def test_errors_are_those_of_the_package(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4o", messages=HI)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model") and missing.value.request_id
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="spoken", messages=HI, response_format={"type": "json_object"})
    assert (refused.value.type, refused.value.param) == ("invalid_request_error", "response_format")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="spoken", prompt="a" * 600, stream=True)
    assert long.value.code == "context_length_exceeded"


def test_a_raw_reply_has_the_requests_id(client: OpenAI) -> None:
    options: dict[str, Any] = {"model": "spoken", "messages": HI, "max_completion_tokens": 3}
    raw = client.chat.completions.with_raw_response.create(**options)
    assert raw.request_id and raw.parse()._request_id == raw.request_id
    again = client.chat.completions.with_raw_response.create(**options)
    assert again.request_id != raw.request_id
    mine = client.chat.completions.with_raw_response.create(**options, extra_headers={"X-Request-Id": "mine-7"})
    assert mine.request_id == "mine-7"
    with client.chat.completions.with_streaming_response.create(**options, stream=True) as streamed:
        assert streamed.headers["x-request-id"] and streamed.headers["content-type"].startswith("text/event-stream")
        assert any("[DONE]" in line for line in streamed.iter_lines())


@pytest.mark.timeout(120)
def test_a_full_node_is_asked_again_when_it_says(endless: Path, tmp_path: Path) -> None:
    limits = {"max_sessions": 1, "max_waiting": 0, "max_positions": 200_000, "grace_s": 1}
    seen: list[httpx.Response] = []
    freed = threading.Event()
    with serve_topology(cut_topology(endless, [[2], [4, 6]], limits=limits), tmp_path) as served:
        busy = patient(served).chat.completions.create(
            model="endless", messages=HI, temperature=0, max_completion_tokens=LONG, stream=True
        )
        next(busy)

        def note(response: httpx.Response) -> None:
            seen.append(response)
            if response.status_code != 200 and not freed.is_set():
                freed.set()
                busy.close()

        http = httpx.Client(event_hooks={"response": [note]}, trust_env=False)
        with OpenAI(base_url=served.base_url, api_key="any", timeout=60, max_retries=8, http_client=http) as again:
            reply = again.chat.completions.create(
                model="endless", messages=HI, max_completion_tokens=4, temperature=0, stream=False
            )
        assert reply.usage is not None and reply.usage.completion_tokens == 4
        refused = [response for response in seen if response.status_code != 200]
        assert refused and {response.status_code for response in refused} <= {429, 503}
        assert all(float(response.headers["retry-after"]) > 0 for response in refused)
        assert refused[0].headers.get("x-should-retry", "true") == "true"
        served.seconds_until_idle()


def test_a_full_node_is_an_error_for_who_does_not_retry(endless: Path, tmp_path: Path) -> None:
    limits = {"max_sessions": 1, "max_waiting": 0, "max_positions": 200_000, "grace_s": 1}
    with serve_topology(cut_topology(endless, [[2], [4, 6]], limits=limits), tmp_path) as served:
        client = patient(served)
        with client.chat.completions.create(
            model="endless", messages=HI, temperature=0, max_completion_tokens=LONG, stream=True
        ) as busy:
            next(iter(busy))
            for stream in (False, True):
                with pytest.raises(openai.APIStatusError) as full:
                    client.chat.completions.create(model="endless", messages=HI, max_completion_tokens=4, stream=stream)
                assert full.value.status_code in (429, 503) and "session" in str(full.value)
        served.seconds_until_idle()


def test_who_stops_waiting_leaves_the_queue(endless: Path, tmp_path: Path) -> None:
    limits = {"max_sessions": 1, "max_waiting": 4, "max_wait_s": 30, "max_positions": 200_000, "grace_s": 1}
    with serve_topology(cut_topology(endless, [[2], [4, 6]], limits=limits), tmp_path) as served:
        options: dict[str, Any] = {"model": "endless", "messages": HI, "temperature": 0, "max_completion_tokens": LONG}
        with patient(served).chat.completions.create(**options, stream=True) as busy:
            next(iter(busy))
            for stream in (False, True):
                with pytest.raises(openai.APITimeoutError):
                    patient(served, timeout=0.5).chat.completions.create(**options, stream=stream)
            assert sum(served.sessions().values()) == 2  # those of the first request, on both nodes
        served.seconds_until_idle()  # none of the others begins now


async def test_leaving_an_asynchronous_stream_ends_its_work(far: tuple[Served, Relay]) -> None:
    served, _ = far
    async with AsyncOpenAI(base_url=served.base_url, api_key="any", timeout=30, max_retries=0) as client:
        for path in ("chat", "responses"):
            stream: Any
            if path == "chat":
                stream = await client.chat.completions.create(
                    model="endless@exact", messages=HI, temperature=0, max_completion_tokens=LONG, stream=True
                )
            else:
                stream = await client.responses.create(
                    model="endless@exact", input="hi", temperature=0, max_output_tokens=LONG, stream=True
                )
            async with stream:
                seen = 0
                async for _ in stream:
                    seen += 1
                    if seen == 10:
                        break
            await asyncio.to_thread(served.seconds_until_idle)


def test_closing_a_stream_early_ends_its_work(far: tuple[Served, Relay]) -> None:
    served, _ = far
    client = patient(served)
    options: dict[str, Any] = {
        "model": "endless@exact",
        "messages": HI,
        "temperature": 0,
        "max_completion_tokens": LONG,
    }
    for n in (1, 3):
        with client.chat.completions.create(**options, n=n, stream=True) as stream:
            next(iter(stream))
            assert all(served.sessions().values()), "a node has no session while the stream is open"
        assert served.seconds_until_idle() < 2  # the figure itself is measured elsewhere; this is no endless work


async def test_cancelling_a_task_ends_its_work(far: tuple[Served, Relay]) -> None:
    served, _ = far
    options: dict[str, Any] = {
        "model": "endless@exact",
        "messages": HI,
        "temperature": 0,
        "max_completion_tokens": LONG,
    }
    async with AsyncOpenAI(base_url=served.base_url, api_key="any", timeout=30, max_retries=0) as client:
        task = asyncio.create_task(client.chat.completions.create(**options))
        await until(lambda: all(served.sessions().values()))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(served.seconds_until_idle)


def test_the_clients_own_timeout_ends_the_work(far: tuple[Served, Relay]) -> None:
    served, _ = far
    client = patient(served, timeout=0.7)
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="endless@exact", messages=HI, temperature=0, max_completion_tokens=LONG)
    served.seconds_until_idle()


def test_the_servers_time_limit_is_not_asked_again(endless: Path, tmp_path: Path) -> None:
    relay = Relay(delay_s=0.01)
    seen: list[httpx.Response] = []
    topology = cut_topology(endless, [[2], [4], [6]], limits={"max_positions": 200_000, "grace_s": 1})
    with serve_topology(topology, tmp_path, "--timeout", "1", relays={"n2": relay}) as served:
        http = httpx.Client(event_hooks={"response": [seen.append]}, trust_env=False)
        options: dict[str, Any] = {
            "model": "endless@exact",
            "messages": HI,
            "temperature": 0,
            "max_completion_tokens": LONG,
        }
        with OpenAI(base_url=served.base_url, api_key="any", max_retries=3, http_client=http) as client:
            with pytest.raises(openai.InternalServerError) as late:
                client.chat.completions.create(**options)
            assert late.value.status_code == 504 and len(seen) == 1
            with pytest.raises(openai.APIError) as cut:
                for _ in client.chat.completions.create(**options, stream=True):
                    pass
            assert not isinstance(cut.value, openai.APIConnectionError) and len(seen) == 2
        served.seconds_until_idle()


@pytest.mark.parametrize("path", ["chat", "completions", "responses"])
def test_a_node_that_dies_in_the_middle_of_a_stream_is_an_error(far: tuple[Served, Relay], path: str) -> None:
    served, relay = far
    client = patient(served, max_retries=2)
    options: dict[str, Any] = {"model": "endless@exact", "stream": True}
    stream: Any
    if path == "chat":
        stream = client.chat.completions.create(messages=HI, temperature=0, max_completion_tokens=LONG, **options)
    elif path == "completions":
        stream = client.completions.create(prompt="hello", temperature=0, max_tokens=LONG, **options)
    else:
        stream = client.responses.create(input="hi", temperature=0, max_output_tokens=LONG, **options)
    events: list[Any] = []

    def read() -> None:
        for event in stream:
            events.append(event)
            if len(events) == 12:
                served.cut(relay)

    if path == "responses":
        read()
        assert events[-1].type in ("response.failed", "error")
        assert events[-1].type == "error" or events[-1].response.error is not None
    else:
        with pytest.raises(openai.APIError) as broken:
            read()
        assert not isinstance(broken.value, openai.APIConnectionError), "the connection broke instead of an error"
        assert "n2" in str(broken.value) or "n1" in str(broken.value)
        assert events[-1].choices[0].finish_reason is None
    served.seconds_until_idle()
    # The server goes on: the next answer finds the node again.
    deadline = time.monotonic() + 20
    while True:
        try:
            reply = client.chat.completions.create(model="endless@exact", messages=HI, max_completion_tokens=3)
            break
        except openai.APIStatusError:
            assert time.monotonic() < deadline
    assert reply.usage is not None and reply.usage.completion_tokens == 3


def test_nodes_that_are_away_are_an_error_that_may_be_asked_again(spoken: Path, tmp_path: Path) -> None:
    relay = Relay()
    with serve_topology(cut_topology(spoken, [[2], [4, 6]]), tmp_path, relays={"n0": relay}) as served:
        client = patient(served)
        assert client.chat.completions.create(model="spoken", messages=HI, max_completion_tokens=2).choices
        served.cut(relay, "127.0.0.1:9")  # where nothing listens
        with pytest.raises(openai.InternalServerError) as away:
            client.chat.completions.create(model="spoken", messages=HI, max_completion_tokens=2)
        assert away.value.status_code == 503 and float(away.value.response.headers["retry-after"]) > 0
        assert away.value.response.headers.get("x-should-retry", "true") == "true"
