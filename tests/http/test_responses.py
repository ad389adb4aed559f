"""/v1/responses: the answer is that of a chat, in the shape and with the events of OpenAI's newer API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from ruyi_flow.http.serving import Listening, serve
from ruyi_flow.testing import Relay, cluster, cut_topology
from tests.http.conftest import chat, client_of

PATH = "/v1/responses"
PLAIN: dict[str, Any] = {"model": "spoken", "input": "hi", "temperature": 0, "max_output_tokens": 8, "ignore_eos": True}


async def events_of(http: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    async with http.stream("POST", PATH, json={**PLAIN, **fields, "stream": True}) as reply:
        assert reply.status_code == 200
        lines = [line async for line in reply.aiter_lines() if line]
    names = [line.removeprefix("event: ") for line in lines[::2]]
    data = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert names == [event["type"] for event in data]
    assert [event["sequence_number"] for event in data] == list(range(len(data)))
    return data


async def test_a_response_is_the_answer_of_a_chat(http: httpx.AsyncClient) -> None:
    answer = (await http.post("/v1/chat/completions", json=chat())).json()["choices"][0]["message"]["content"]
    messages = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    for given in ("hi", messages, [{"type": "message", **messages[0]}]):
        response = (await http.post(PATH, json={**PLAIN, "input": given})).json()
        [item] = response["output"]
        assert item["content"] == [{"type": "output_text", "text": answer, "annotations": [], "logprobs": []}]
        assert response["status"] == item["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
        assert response["usage"]["total_tokens"] == 17
    both = {"role": "system", "content": "be"}, {"role": "user", "content": "hi"}
    as_chat = (await http.post("/v1/chat/completions", json=chat(messages=both))).json()
    told = (await http.post(PATH, json={**PLAIN, "instructions": "be", "metadata": {"a": "b"}})).json()
    assert told["output"][0]["content"][0]["text"] == as_chat["choices"][0]["message"]["content"]
    assert told["instructions"] == "be" and told["metadata"] == {"a": "b"}


async def test_the_events_tell_the_same(http: httpx.AsyncClient) -> None:
    whole = (await http.post(PATH, json=PLAIN)).json()
    events = await events_of(http)
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = [event["delta"] for event in events if event["type"].endswith("delta")]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[4:-4] == ["output_text.delta"] * len(deltas)
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    last = events[-1]["response"]
    assert "".join(deltas) == events[-4]["text"] == last["output"][0]["content"][0]["text"]
    assert last["output"][0]["content"] == whole["output"][0]["content"] and last["usage"] == whole["usage"]


async def test_an_answer_that_ends_by_itself_is_complete(server: Listening) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        asked: Any = {"model": "spoken", "input": "hi", "temperature": 0, "max_output_tokens": 60}
        plain = await client.responses.create(**asked, extra_body={"ignore_eos": True})
        stop = next(char for char in plain.output_text[3:] if char.isascii())
        extra = {"ignore_eos": True, "stop": [stop], "ruyi": {"details": True}}
        response = await client.responses.create(**asked, extra_body=extra)
        assert response.status == "completed" and response.incomplete_details is None
        assert response.output_text == plain.output_text[: plain.output_text.index(stop)]
        assert response.model_extra and response.model_extra["ruyi"]["tokens"][0]["node"] == "n2"
        async with client.responses.stream(**asked, extra_body=extra) as stream:
            async for _ in stream:
                pass
            assert (await stream.get_final_response()).output_text == response.output_text


async def test_a_failure_in_the_middle_is_an_event(spoken: Path) -> None:
    relay = Relay(delay_s=0.002)
    async with (
        cluster(cut_topology(spoken, [[2], [4], [6]], recover_s=0), {"n2": relay}) as nodes,
        serve(nodes.topology, port=0, grace_s=1) as listening,
        client_of(listening) as http,
    ):
        body = PLAIN | {"stream": True, "max_output_tokens": 400}
        async with http.stream("POST", PATH, json=body) as reply:
            data = []
            async for line in reply.aiter_lines():
                data += [json.loads(line.removeprefix("data: "))] if line.startswith("data: ") else []
                if len(data) == 5:
                    relay.cut()
        assert data[-1]["type"] == "response.failed" and data[-1]["response"]["status"] == "failed"
        assert "n2" in data[-1]["response"]["error"]["message"]
        await nodes.settle()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"instructions": 3}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"background": True}, "background"),
        ({"store": True}, "store"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"text": {"format": {"type": "json_object"}}}, "text"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 3}, "top_logprobs"),
    ],
    ids=str,
)
async def test_what_needs_more_is_refused_by_name(http: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    reply = await http.post(PATH, json={**PLAIN, **fields})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param, reply.text
