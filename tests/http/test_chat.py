"""/v1/chat/completions: the answers are the SDK's, whole or streamed, with what OpenAI's API tells about them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from ruyi_flow.client import AsyncClient
from ruyi_flow.http.serving import Listening
from ruyi_flow.testing import Cluster
from tests.http.conftest import chat

PATH = "/v1/chat/completions"


async def ask(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    reply = await http.post(PATH, json=chat(**fields))
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


async def chunks(http: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    """Return the chunks of a streamed answer, which ends with [DONE]."""
    found = []
    async with http.stream("POST", PATH, json=chat(stream=True, **fields)) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line.removeprefix("data: ") async for line in reply.aiter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    found = [json.loads(line) for line in lines]
    assert len({chunk["id"] for chunk in found}) == 1
    return found


def text_of(found: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in found for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("spoken", {}),
        ("spoken@exit-2", {"exit": 2}),
        ("spoken@exit-4", {"exit": 4}),
        ("spoken@exact", {"mode": "exact"}),
        ("spoken@token", {"mode": "token", "threshold": 0.9}),
    ],
)
async def test_an_answer_is_the_sdks(
    three: Cluster, http: httpx.AsyncClient, model: str, options: dict[str, Any]
) -> None:
    async with AsyncClient(three.topology) as client:
        reply = await client.generate("hi", max_new_tokens=8, eos_token_ids=(), **options)
    answer = await ask(http, model=model)
    assert answer["model"] == model and answer["object"] == "chat.completion"
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": reply.text, "refusal": None}
    assert choice["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 9, "completion_tokens": 8, "total_tokens": 17}
    found = await chunks(http, model=model)
    assert text_of(found) == reply.text
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["choices"][0]["finish_reason"] for c in found] == [None] * (len(found) - 1) + ["length"]


async def test_the_openai_client_reads_it(server: Listening, three: Cluster) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        asked: Any = chat()
        extra = {"ignore_eos": asked.pop("ignore_eos")}
        whole = await client.chat.completions.create(**asked, extra_body=extra)
        stream = await client.chat.completions.create(**asked, extra_body=extra, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == whole.choices[0].message.content
        assert [model.id async for model in await client.models.list()][:2] == ["spoken", "spoken@exit-2"]
        with pytest.raises(openai.NotFoundError) as error:
            await client.chat.completions.create(**asked | {"model": "spokem"})
        assert error.value.code == "model_not_found" and "did you mean 'spoken'" in error.value.message


async def test_the_usage_comes_last_when_it_is_asked_for(http: httpx.AsyncClient) -> None:
    found = await chunks(http, stream_options={"include_usage": True})
    assert found[-1]["choices"] == []
    assert found[-1]["usage"] == {"prompt_tokens": 9, "completion_tokens": 8, "total_tokens": 17}
    assert all(chunk["usage"] is None for chunk in found[:-1])
    assert all("usage" not in chunk for chunk in await chunks(http))
