"""Open WebUI's calls, as its source sends them: a chat page that nobody here wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest

from ruyi_flow import Client
from tests.http.clients.served import Served, events


@pytest.fixture(scope="module")
def page(served: Served) -> Iterator[httpx.Client]:
    """Its connection: a base URL that ends in /v1, a key that nobody checks, and headers that tell who asks."""
    headers = {
        "authorization": "Bearer sk-anything",
        "content-type": "application/json",
        "x-openwebui-user-name": "Anna%20M%C3%BCller",
        "x-openwebui-user-id": "7",
        "x-openwebui-user-role": "admin",
    }
    with httpx.Client(base_url=served.base_url, headers=headers, timeout=30, trust_env=False) as client:
        yield client


def test_its_list_of_models(page: httpx.Client) -> None:
    models = page.get("/models").raise_for_status().json()["data"]
    assert [model["id"] for model in models][:2] == ["spoken", "spoken@exit-2"]
    assert all(isinstance(model.get("name", model["id"]), str) for model in models)


@pytest.mark.parametrize("key", [None, "", "Bearer", "Bearer sk-anything", "Basic YTpi"])
def test_no_key_is_asked_for(served: Served, key: str | None) -> None:
    headers = {} if key is None else {"authorization": key}
    assert httpx.get(f"{served.base_url}/models", headers=headers, trust_env=False).status_code == 200


def test_a_chat_of_the_page(page: httpx.Client, sdk: Client) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": "hello", "reasoning_content": "", "annotations": []},
        {"role": "user", "content": "bye"},
    ]
    body = {
        "model": "spoken",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": turns,
        "temperature": 0,
        "max_tokens": 20,
        "reasoning": {"enabled": False},
        "chat_id": "0b5c",
        "session_id": "9f",
        "features": {"web_search": False},
    }
    with page.stream("POST", "/chat/completions", json=body) as reply:
        assert reply.status_code == 200, reply.read()
        assert "text/event-stream" in reply.headers["content-type"]  # by this the page knows a stream
        data = events("\n".join(reply.iter_lines()))
    assert data.pop() == "[DONE]"
    chunks = [json.loads(one) for one in data]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    messages = [
        {"role": turn["role"], "content": turn["content"] if isinstance(turn["content"], str) else "hi"}
        for turn in turns
    ]
    assert text == sdk.generate(messages, max_new_tokens=20).text
    assert chunks[-1]["usage"]["completion_tokens"] == 20


def test_a_chat_of_a_connection_that_asks_for_responses(page: httpx.Client, sdk: Client) -> None:
    """The page rewrites a chat so when the connection's type of API is "responses"."""
    body = {
        "model": "spoken",
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "hello"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "bye"}]},
        ],
        "instructions": "Be short.",
        "temperature": 0,
        "max_output_tokens": 20,
        "stream": True,
    }
    reply = page.post("/responses", json=body).raise_for_status()
    found = [json.loads(one) for one in events(reply.text)]
    text = "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta")
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
    ]
    assert text == sdk.generate(messages, max_new_tokens=20).text
    assert found[-1]["response"]["usage"]["output_tokens"] == 20


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_the_title_of_a_chat(page: httpx.Client, limit: str) -> None:
    body = {
        "model": "spoken",
        "messages": [{"role": "user", "content": "### Task:\nGenerate a title for this chat.\n\nUSER: hi"}],
        "stream": False,
        limit: 30,
        "metadata": {"task": "title_generation", "chat_id": "0b5c"},
    }
    reply = page.post("/chat/completions", json=body).raise_for_status()
    assert isinstance(reply.json()["choices"][0]["message"]["content"], str)


def test_an_error_is_shown_by_its_message(page: httpx.Client) -> None:
    body = {"model": "gone", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    reply = page.post("/chat/completions", json=body)
    assert reply.status_code == 404 and "application/json" in reply.headers["content-type"]
    assert "spoken" in reply.json()["error"]["message"]


def test_other_sites_are_given_nothing(page: httpx.Client) -> None:
    """A page in a browser may not ask this server: no reply allows another origin."""
    headers = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    for reply in (
        page.options("/chat/completions", headers=headers),
        page.get("/models", headers={"origin": "http://evil.example"}),
    ):
        assert not [name for name in reply.headers if name.startswith("access-control-")]
