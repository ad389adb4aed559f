"""/v1/chat/completions: the answers are the SDK's, whole or streamed, with what OpenAI's API tells about them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from ruyi_flow.client import AsyncClient
from ruyi_flow.http.serving import Listening, serve
from ruyi_flow.testing import Cluster
from tests.http.conftest import chat, client_of

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
    assert answer["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 8,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
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
    assert found[-1]["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 8,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert all(chunk["usage"] is None for chunk in found[:-1])
    assert all("usage" not in chunk for chunk in await chunks(http))


SAMPLED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"presence_penalty": 2, "frequency_penalty": 1}, {"presence_penalty": 2.0, "frequency_penalty": 1.0}),
    ({"temperature": 0.8, "top_p": 0.7, "seed": 3}, {"temperature": 0.8, "top_p": 0.7, "seed": 3}),
    ({"temperature": 1, "top_k": 2, "seed": 5}, {"temperature": 1.0, "top_k": 2, "seed": 5}),
    ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    ({"temperature": 1e-6, "top_k": -1, "top_p": 0}, {}),
    ({"temperature": None, "top_p": None, "seed": 9}, {"temperature": 1.0, "seed": 9}),
    ({"ignore_eos": None, "min_tokens": 12, "max_tokens": 20}, {"min_new_tokens": 12, "max_new_tokens": 20}),
]


@pytest.mark.parametrize(("fields", "options"), SAMPLED, ids=str)
async def test_sampling_is_the_sdks(
    three: Cluster, http: httpx.AsyncClient, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    eos = {} if "ignore_eos" in fields else {"eos_token_ids": ()}
    async with AsyncClient(three.topology) as client:
        reply = await client.generate("hi", **({"max_new_tokens": 24} | eos | options))
    answer = await ask(http, **{"max_tokens": 24} | fields)
    assert answer["choices"][0]["message"]["content"] == reply.text
    assert answer["usage"]["completion_tokens"] == len(reply.tokens)


async def test_logprobs_are_the_sdks(three: Cluster, http: httpx.AsyncClient) -> None:
    async with AsyncClient(three.topology) as client:
        reply = await client.generate("hi", max_new_tokens=8, eos_token_ids=(), logprobs=3)
    for found in (
        (await ask(http, logprobs=True, top_logprobs=3))["choices"][0]["logprobs"]["content"],
        [
            one
            for chunk in await chunks(http, logprobs=True, top_logprobs=3)
            for one in (chunk["choices"][0]["logprobs"] or {}).get("content", ())
        ],
    ):
        assert len(found) == 8
        for one, token in zip(found, reply.tokens, strict=True):
            assert token.logprobs is not None
            assert one["token"] == token.logprobs.text
            assert one["logprob"] == pytest.approx(token.logprobs.logprob, abs=1e-4)
            assert [top["token"] for top in one["top_logprobs"]] == [top.text for top in token.logprobs.top]
            assert one["bytes"] == (None if "\ufffd" in one["token"] else list(one["token"].encode()))
            assert one["logprob"] == one["top_logprobs"][0]["logprob"]  # greedy
    [choice] = (await ask(http, logprobs=True))["choices"]
    assert [one["top_logprobs"] for one in choice["logprobs"]["content"]] == [[]] * 8


async def test_choices_are_answers_of_their_own(http: httpx.AsyncClient) -> None:
    same = await ask(http, n=3)
    assert len({choice["message"]["content"] for choice in same["choices"]}) == 1
    assert same["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 24,
        "total_tokens": 33,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    asked: dict[str, Any] = {"n": 3, "temperature": 1, "seed": 2, "max_tokens": 30}
    choices = (await ask(http, **asked))["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in choices]
    assert len(set(texts)) == 3
    found = await chunks(http, **asked)
    assert [text_of(found, index) for index in range(3)] == texts
    ends = [c["choices"][0]["index"] for c in found if c["choices"][0]["finish_reason"]]
    assert sorted(ends) == [0, 1, 2] and ends != [c["choices"][0]["index"] for c in found]


async def test_developer_is_system_and_the_newer_limit_wins(http: httpx.AsyncClient) -> None:
    user = {"role": "user", "content": "hi"}
    answers = [
        await ask(http, messages=[{"role": role, "content": "be brief"}, user], **limit)
        for role, limit in (
            ("system", {}),
            ("developer", {"max_tokens": None, "max_completion_tokens": 8}),
            ("developer", {"max_completion_tokens": 8}),
        )
    ]
    assert answers[0]["choices"] == answers[1]["choices"] == answers[2]["choices"]


async def test_an_answer_without_a_limit_has_the_servers(three: Cluster) -> None:
    async with serve(three.topology, port=0, default_max_tokens=5, grace_s=1) as listening:
        async with client_of(listening) as http:
            assert (await ask(http, max_tokens=None))["usage"]["completion_tokens"] == 5
            body = {"model": "spoken", "ignore_eos": True}
            plain = await http.post("/v1/completions", json={**body, "prompt": "hi"})
            response = await http.post("/v1/responses", json={**body, "input": "hi"})
            assert plain.json()["usage"]["completion_tokens"] == response.json()["usage"]["output_tokens"] == 5
