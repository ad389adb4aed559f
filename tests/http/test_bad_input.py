"""Bad input: a clear error in OpenAI's shape, and a server that goes on."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from ruyi_flow.http import app
from ruyi_flow.http.app import MAX_BODY_BYTES
from ruyi_flow.http.serving import Listening
from tests.http.conftest import chat

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


@pytest.fixture(autouse=True)
async def goes_on(http: httpx.AsyncClient) -> AsyncIterator[None]:
    """Check after each test that the server still answers."""
    yield
    assert (await http.post(CHAT, json=chat(max_tokens=1))).status_code == 200


def error_of(reply: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json" and reply.headers["x-request-id"]
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    return error  # type: ignore[no-any-return]


DEEP = b"[" * 100_000
BODIES = {
    "nothing": b"",
    "half an object": b'{"model": "spoken", "messages": [',
    "a list": b"[]",
    "a number": b"7",
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "NaN": b'{"model": "spoken", "temperature": NaN}',
    "-Infinity": b'{"temperature": -Infinity}',
    "deep nesting": b'{"model": "spoken", "messages": ' + DEEP,
    "deep nesting of an unknown field": b'{"model": "spoken", "x": ' + DEEP + b"]" * 100_000 + b"}",
    "a number of 5,000 digits": b'{"model": "spoken", "seed": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("what", BODIES)
async def test_a_body_that_is_no_json_object_is_refused(http: httpx.AsyncClient, what: str) -> None:
    for path in (CHAT, COMPLETIONS, RESPONSES, "/tokenize"):
        error = error_of(await http.post(path, content=BODIES[what]))
        assert error["message"].startswith("the body"), error


async def test_the_content_type_does_not_matter(http: httpx.AsyncClient) -> None:
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json; charset=latin-1", ""):
        reply = await http.post(CHAT, content=json.dumps(chat(max_tokens=1)), headers={"content-type": kind})
        assert reply.status_code == 200


MESSAGE = {"role": "user", "content": "hi"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model"),
    ({"model": ""}, "model"),
    ({"model": 7}, "model"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [MESSAGE, "hi"]}, "messages[1]"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "hi", "tool_call_id": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "function", "content": "hi", "name": "f"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    ({"messages": [MESSAGE | {"name": "ann"}]}, "messages[0].name"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "messages[0].content[0].text"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"presence_penalty": -3}, "presence_penalty"),
    ({"frequency_penalty": 2.5}, "frequency_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 2**40}, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": 3}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": 1}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, "response_format"),
    ({"logit_bias": {"5": 3}}, "logit_bias"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "ash"}}, "audio"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"verbosity": "low"}, "verbosity"),
    ({"store": True}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"guided_json": {"type": "object"}}, "guided_json"),
    ({"ruyi": 3}, "ruyi"),
    ({"ruyi": {"treshold": 0.5}}, "ruyi.treshold"),
    ({"ruyi": {"policy": "/etc/passwd"}}, "ruyi.policy"),
    ({"ruyi": {"details": 1}}, "ruyi.details"),
    ({"ruyi": {"thresholds": {"two": 0.5}}}, "ruyi.thresholds"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=lambda value: str(value)[:60])
async def test_a_field_that_cannot_be_is_named(http: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    body = {name: value for name, value in chat(**fields).items() if value is not None}
    error = error_of(await http.post(CHAT, content=json.dumps(body)))
    assert error["param"] == param and param.split(".")[-1] in error["message"]


async def test_what_only_the_nodes_know_is_refused_by_them(http: httpx.AsyncClient) -> None:
    for ruyi, words in (
        ({"exit": 3}, "exit 3 is not one of the exits [2, 4, 6]"),
        ({"mode": "dream"}, "mode"),
        ({"mode": "token"}, "requires a threshold"),
        ({"draft": -1}, "draft is -1"),
    ):
        assert words in error_of(await http.post(CHAT, json=chat(ruyi=ruyi)))["message"]
    error = error_of(await http.post(CHAT, json=chat("x" * 600)))
    assert error["code"] == "context_length_exceeded" and "607" in error["message"] and "512" in error["message"]


HARMLESS = {
    "n": 1,
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "logit_bias": {},
    "store": False,
    "modalities": ["text"],
    "service_tier": "auto",
    "audio": None,
    "user": "ann",
    "metadata": {"chat": "7"},
    "safety_identifier": "x",
    "prompt_cache_key": "y",
    "reasoning": {"effort": "high"},  # not of this endpoint
    "chat_id": "unknown",
    "top_logprobs": None,
}


async def test_fields_that_change_nothing_are_accepted(http: httpx.AsyncClient) -> None:
    plain = await http.post(CHAT, json=chat())
    parts = [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]
    message = {"role": "user", "content": parts, "name": None, "tool_calls": [], "refusal": None, "id": "unknown"}
    reply = await http.post(CHAT, json=chat(**HARMLESS, messages=[message]))
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"] == plain.json()["choices"]


async def test_a_body_that_is_too_long_is_refused(http: httpx.AsyncClient, server: Listening) -> None:
    for size in (MAX_BODY_BYTES + 1, 50_000_000):
        error = error_of(await http.post(CHAT, content=b"x" * size), 413)
        assert error["code"] == "request_too_large"

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield b"x" * 1_000_000

    error_of(await http.post(CHAT, content=endless()), 413)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"POST /tokenize HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 9999999999\r\n\r\n")
    assert b" 413 " in await reader.readline()  # at once, since the client waits for leave
    writer.close()


async def test_a_body_that_does_not_arrive_is_given_up(server: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_BODY_S", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{")
    assert b" 408 " in await reader.readline()
    writer.close()


async def test_a_crowd_is_refused(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(app, "_MAX_RUNNING", 0)
        reply = await http.post(CHAT, json=chat())
    assert error_of(reply, 503)["code"] == "overloaded" and reply.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"hello\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n", 400),
        (b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"".join(b"x-%d: y\r\n" % i for i in range(20_000)), 431),
    ],
    ids=["no HTTP", "no host", "negative length", "bad chunk", "header flood"],
)
async def test_what_is_no_request_gets_an_error_of_the_same_shape(
    server: Listening, request_: bytes, status: int
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request_)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    writer.close()


async def test_paths_and_methods_that_are_none(http: httpx.AsyncClient) -> None:
    assert error_of(await http.get("/v1/nothing"), 404)["code"] == "unknown_url"
    assert "GET /v1/chat/completions" in error_of(await http.get(CHAT), 405)["message"]
    assert error_of(await http.post("/health"), 405)["code"] == "method_not_allowed"
    for path in ("/docs", "/redoc", "/openapi.json"):  # pages that would load scripts from elsewhere
        error_of(await http.get(path), 404)


async def test_paths_are_exact_and_can_be_asked_for_their_head(http: httpx.AsyncClient) -> None:
    assert error_of(await http.post(f"{CHAT}/", json=chat()), 404)["code"] == "unknown_url"
    for path in ("/health", "/ready", "/v1/models", "/v1/models/spoken"):
        reply = await http.head(path)
        assert reply.status_code == 200 and not reply.content


async def test_a_compressed_body_is_refused_by_name(http: httpx.AsyncClient) -> None:
    body = gzip.compress(json.dumps(chat()).encode())
    error = error_of(await http.post(CHAT, content=body, headers={"content-encoding": "gzip"}), 415)
    assert "Content-Encoding: gzip" in error["message"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("null", "content is null;"),
        ("true", "content is true;"),
        ("1e999", "content is Infinity;"),
        ('{"a": [1, false]}', 'content is {"a": [1, false]};'),
        ("[" * 200 + "]" * 200, "content[0] is a part of type null;"),
        ("9" * 4000, f"content is {'9' * 120}…;"),
    ],
    ids=lambda value: value[:30],
)
async def test_errors_show_values_as_json_has_them(http: httpx.AsyncClient, value: str, words: str) -> None:
    body = f'{{"model": "spoken", "messages": [{{"role": "user", "content": {value}}}]}}'
    assert words in error_of(await http.post(CHAT, content=body))["message"]


async def test_a_request_keeps_its_id(http: httpx.AsyncClient) -> None:
    given = {"mine-17": "mine-17", "x" * 129: None, "a b": None, "": None}
    for sent, expected in given.items():
        reply = await http.get("/health", headers={"x-request-id": sent})
        got = reply.headers["x-request-id"]
        assert got == expected if expected else got.startswith("req_")


async def test_a_hundred_thousand_messages_do_not_stop_the_server(http: httpx.AsyncClient) -> None:
    body = json.dumps(chat(messages=[MESSAGE] * 100_000))
    reply, health = await asyncio.gather(http.post(CHAT, content=body), http.get("/health"))
    assert error_of(reply)["message"] and health.status_code == 200
