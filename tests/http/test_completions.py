"""/v1/completions and /tokenize: prompts of every kind, echo and log-probabilities, as evaluators ask."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from ruyi_flow.client import AsyncClient
from ruyi_flow.http.fields import MAX_CHOICES
from ruyi_flow.http.serving import Listening
from ruyi_flow.reply import Reply
from ruyi_flow.testing import Cluster

PATH = "/v1/completions"
PLAIN = {"model": "spoken", "temperature": 0, "max_tokens": 5, "ignore_eos": True}
IDS = [71, 72, 73, 74]


async def ask(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    reply = await http.post(PATH, json={**PLAIN, **fields})
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


async def stream(http: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    async with http.stream("POST", PATH, json={**PLAIN, **fields, "stream": True}) as reply:
        lines = [line.removeprefix("data: ") async for line in reply.aiter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


async def sdk(three: Cluster, prompt: Any, **options: Any) -> Reply:
    async with AsyncClient(three.topology) as client:
        return await client.generate(prompt, raw=True, max_new_tokens=5, eos_token_ids=(), **options)


async def test_several_prompts_and_choices_come_in_order(three: Cluster, http: httpx.AsyncClient) -> None:
    replies = [await sdk(three, prompt) for prompt in ("abc", "xy")]
    answer = await ask(http, prompt=["abc", "xy"], n=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == [r.text for r in replies for _ in range(2)]
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 20,
        "total_tokens": 25,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    chunks = await stream(http, prompt=["abc", "xy"], n=2)
    for index in range(4):
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in choices) == replies[index // 2].text
        assert choices[-1]["finish_reason"] == "length"


async def test_token_ids_are_prompts(three: Cluster, http: httpx.AsyncClient) -> None:
    reply = await sdk(three, IDS)
    assert (await ask(http, prompt=IDS))["choices"][0]["text"] == reply.text
    answer = await ask(http, prompt=[IDS, [75]])
    assert answer["choices"][0]["text"] == reply.text and len(answer["choices"]) == 2


async def test_seeds_make_choices_that_differ_and_repeat(three: Cluster, http: httpx.AsyncClient) -> None:
    answer = await ask(http, prompt="abc", n=3, temperature=1, seed=7)
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [(await sdk(three, "abc", temperature=1.0, seed=7 + i)).text for i in range(3)]
    assert len(set(texts)) > 1
    assert (await ask(http, prompt="abc", seed=-1, temperature=1))["choices"]


@pytest.mark.parametrize("top", [0, 1, 3])
async def test_logprobs_are_those_of_the_sdk(three: Cluster, http: httpx.AsyncClient, top: int) -> None:
    reply = await sdk(three, "abc", logprobs=top, prompt_logprobs=top)
    assert reply.prompt is not None
    of = [*(token.logprobs for token in reply.prompt.tokens), *(token.logprobs for token in reply.tokens)]
    [choice] = (await ask(http, prompt="abc", logprobs=top, echo=True))["choices"]
    assert choice["text"] == "abc" + reply.text
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c", *(token.logprobs.text for token in reply.tokens if token.logprobs)]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx([one.logprob for one in of if one], abs=1e-4)
    assert logprobs["text_offset"][:4] == [0, 1, 2, 3]
    if not top:
        assert logprobs["top_logprobs"] is None
        return
    assert logprobs["top_logprobs"][0] is None
    for text, logprob, found in list(
        zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    )[1:]:
        assert found[text] >= logprob and len(found) <= top + 1
    for logprob, found in list(zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))[3:]:
        assert logprob == max(found.values())  # greedy: the same number, as evaluation tools compare them
    chunks = await stream(http, prompt="abc", logprobs=top, echo=True)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert [offset for part in parts for offset in part["text_offset"]] == logprobs["text_offset"]
    assert [token for part in parts for token in part["tokens"]] == logprobs["tokens"]


async def test_a_prompt_can_be_scored_without_an_answer(http: httpx.AsyncClient) -> None:
    scored = await ask(http, prompt=[IDS], logprobs=1, echo=True, max_tokens=0)
    [choice] = scored["choices"]
    assert choice["text"] == "hijk" and choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["token_logprobs"]) == 4
    assert scored["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 0,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    one_more = await ask(http, prompt=[IDS], logprobs=1, echo=True, max_tokens=1)  # as lm-evaluation-harness asks
    assert one_more["choices"][0]["logprobs"]["token_logprobs"][:-1] == pytest.approx(
        choice["logprobs"]["token_logprobs"], abs=1e-4, nan_ok=True
    )
    texts = [chunk["choices"][0]["text"] for chunk in await stream(http, prompt=[IDS], echo=True, max_tokens=0)]
    assert "".join(texts) == "hijk"


async def test_a_prompt_is_repeated_as_it_was(http: httpx.AsyncClient) -> None:
    for prompt, text in (("né", "né"), ([71, 127, 102], "hé")):
        answer = await ask(http, prompt=prompt, echo=True)
        plain = await ask(http, prompt=prompt)
        assert answer["choices"][0]["text"] == text + plain["choices"][0]["text"]
        assert answer["choices"][0]["logprobs"] is None


async def test_stop_strings_end_an_answer(http: httpx.AsyncClient) -> None:
    text = (await ask(http, prompt="abc", max_tokens=40))["choices"][0]["text"]
    end = next(char for char in text[3:] if char.isascii())
    [choice] = (await ask(http, prompt="abc", max_tokens=40, stop=["no such", end]))["choices"]
    assert choice["text"] == text[: text.index(end)] and choice["finish_reason"] == "stop"
    assert (await ask(http, prompt="abc", max_tokens=40, stop=end))["choices"] == [choice]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1, -2]]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": ["a"] * (MAX_CHOICES + 1)}, "prompt"),
        ({"prompt": ["a"] * 20, "n": 16}, "n"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "suffix": "z"}, "suffix"),
    ],
    ids=str,
)
async def test_a_field_that_cannot_be_is_named(http: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    reply = await http.post(PATH, json={"model": "spoken", **fields})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param, reply.text


async def test_logprobs_of_the_prompt_need_one_exit_that_reads_all(http: httpx.AsyncClient) -> None:
    reply = await http.post(PATH, json=PLAIN | {"model": "spoken@token", "prompt": "abc", "logprobs": 1, "echo": True})
    assert reply.status_code == 400 and "requires mode" in reply.json()["error"]["message"]


async def test_the_openai_client_reads_it(server: Listening) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        options: Any = {"model": "spoken@exit-4", "prompt": "abc", "temperature": 0, "max_tokens": 16}
        whole = await client.completions.create(**options, logprobs=2)
        assert whole.choices[0].logprobs and whole.usage and whole.usage.completion_tokens
        chunks = await client.completions.create(**options, stream=True)
        text = "".join([chunk.choices[0].text async for chunk in chunks])
        assert text == whole.choices[0].text


async def test_tokenize_tells_the_tokens(http: httpx.AsyncClient) -> None:
    reply = await http.post("/tokenize", json={"prompt": "hé", "model": "spoken"})
    assert reply.json() == {
        "count": 3,
        "max_model_len": 512,
        "tokens": [71, 127, 102],
        "token_strs": ["h", "\ufffd", "\ufffd"],
    }
    reply = await http.post("/tokenize", json={"messages": [{"role": "developer", "content": "hi"}]})
    assert "".join(reply.json()["token_strs"]) == "<system>hi|"
    for body, param in (
        ({}, "prompt"),
        ({"prompt": "a", "messages": []}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "a", "add_special_tokens": False}, "add_special_tokens"),
        ({"prompt": "a", "model": "none"}, "model"),
    ):
        reply = await http.post("/tokenize", json=body)
        assert reply.status_code in (400, 404) and reply.json()["error"]["param"] == param


async def test_offsets_count_characters_also_of_several_tokens(http: httpx.AsyncClient) -> None:
    [choice] = (await ask(http, prompt="né日a", logprobs=0, echo=True))["choices"]
    offsets = choice["logprobs"]["text_offset"]
    # The parts of two characters in a row cannot be told apart; what follows them is exact.
    assert offsets[:8] == [0, 1, 1, 1, 1, 1, 3, 4] and choice["text"][:4] == "né日a"
    parts = [c["choices"][0]["logprobs"] for c in await stream(http, prompt="né日a", logprobs=0, echo=True)]
    assert [offset for part in parts if part for offset in part["text_offset"]] == offsets
