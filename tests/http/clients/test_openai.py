"""The `openai` package: answers, whole and streamed, sync and async."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from ruyi_flow import Client
from ruyi_flow.types import FinishReason
from tests.http.clients.served import Served

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=served.base_url, api_key="any", timeout=30, max_retries=0) as made:
        yield made


@pytest.fixture
async def asynchronous(served: Served) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=served.base_url, api_key="any", timeout=30, max_retries=0) as made:
        yield made


def test_the_models_are_those_of_the_family(client: OpenAI) -> None:
    models = [model.id for model in client.models.list()]
    assert models[:4] == ["spoken", "spoken@exit-2", "spoken@exit-4", "spoken@exit-6"]
    assert client.models.retrieve("spoken@exit-4").id == "spoken@exit-4"
    with pytest.raises(openai.NotFoundError, match="spoken@exit-2"):
        client.models.retrieve("gpt-4o")


def test_a_chat_is_the_answer_of_the_sdk(client: OpenAI, sdk: Client) -> None:
    for exit in (2, 4, 6):
        reply = client.chat.completions.create(
            model=f"spoken@exit-{exit}", messages=HI, temperature=0, max_completion_tokens=20
        )
        expected = sdk.generate("hi", exit=exit, max_new_tokens=20)
        assert reply.choices[0].message.content == expected.text
        assert reply.usage is not None and reply.usage.completion_tokens == len(expected.tokens)


async def test_many_asynchronous_chats_at_once(asynchronous: AsyncOpenAI, sdk: Client) -> None:
    questions = [f"question {i}" for i in range(12)]
    replies = await asyncio.gather(
        *(
            asynchronous.chat.completions.create(
                model="spoken", messages=[{"role": "user", "content": text}], temperature=0, max_completion_tokens=16
            )
            for text in questions
        )
    )
    expected = [(await asyncio.to_thread(sdk.generate, text, max_new_tokens=16)).text for text in questions]
    assert [reply.choices[0].message.content for reply in replies] == expected
    assert len({reply.id for reply in replies}) == len(questions)


def test_a_stream_adds_up_to_the_answer(client: OpenAI, sdk: Client) -> None:
    stream = client.chat.completions.create(
        model="spoken",
        messages=HI,
        temperature=0,
        max_completion_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == sdk.generate("hi", max_new_tokens=30).text
    assert len([text for text in texts if text]) > 5, "the tokens did not arrive one by one"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 30


async def test_an_asynchronous_stream_adds_up_to_the_answer(asynchronous: AsyncOpenAI, sdk: Client) -> None:
    stream = await asynchronous.completions.create(
        model="spoken", prompt="hello", temperature=0, max_tokens=30, stream=True
    )
    text = "".join([chunk.choices[0].text async for chunk in stream])
    assert text == (await asyncio.to_thread(sdk.generate, "hello", raw=True, max_new_tokens=30)).text


def test_the_packages_own_accumulator_reads_a_stream(client: OpenAI, sdk: Client) -> None:
    plain = sdk.generate("hi", max_new_tokens=24).text
    options: dict[str, Any] = {"model": "spoken", "messages": HI, "temperature": 0}
    options |= {"stop": plain[-1], "max_completion_tokens": 24}  # the package takes an answer cut off for an error
    with client.chat.completions.stream(**options, stream_options={"include_usage": True}) as stream:
        kinds = [event.type for event in stream]
        whole = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)
    assert whole.choices[0].message.content == plain[: plain.index(plain[-1])]
    assert whole.usage is not None and 9 < whole.usage.total_tokens <= 33


def test_log_probabilities_are_those_of_the_sdk(client: OpenAI, sdk: Client) -> None:
    options: dict[str, Any] = {"model": "spoken", "messages": HI, "temperature": 0, "max_completion_tokens": 10}
    reply = client.chat.completions.create(**options, logprobs=True, top_logprobs=4)
    streamed = [
        token
        for chunk in client.chat.completions.create(**options, logprobs=True, top_logprobs=4, stream=True)
        for choice in chunk.choices
        if choice.logprobs is not None
        for token in choice.logprobs.content or ()
    ]
    assert reply.choices[0].logprobs is not None and reply.choices[0].logprobs.content == streamed
    expected = sdk.generate("hi", max_new_tokens=10, logprobs=4).tokens
    assert len(streamed) == len(expected) == 10
    for found, token in zip(streamed, expected, strict=True):
        assert token.logprobs is not None
        assert found.logprob == pytest.approx(token.logprobs.logprob, abs=1e-5)
        assert [top.token for top in found.top_logprobs] == [top.text for top in token.logprobs.top]
        assert found.top_logprobs[0].logprob == found.logprob  # it was decided greedily


def test_choices_have_seeds_of_their_own(client: OpenAI, sdk: Client) -> None:
    options: dict[str, Any] = {"model": "spoken", "messages": HI, "temperature": 1.0, "max_completion_tokens": 16}
    reply = client.chat.completions.create(**options, n=4, seed=11)
    expected = [sdk.generate("hi", temperature=1.0, max_new_tokens=16, seed=11 + i).text for i in range(4)]
    assert [choice.message.content for choice in reply.choices] == expected and len(set(expected)) == 4
    texts = ["", "", "", ""]
    for chunk in client.chat.completions.create(**options, n=4, seed=11, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == expected


def test_a_stop_string_ends_the_answer(client: OpenAI, sdk: Client) -> None:
    plain = sdk.generate("tell me", max_new_tokens=40, frequency_penalty=1.0).text
    stop = next(plain[i : i + 2] for i in range(4, 30) if "\ufffd" not in plain[i : i + 2])
    for stream in (False, True):
        reply: Any = client.chat.completions.create(
            model="spoken",
            messages=[{"role": "user", "content": "tell me"}],
            temperature=0,
            frequency_penalty=1.0,
            max_completion_tokens=40,
            stop=["never there", stop],
            stream=stream,
        )
        chunks = list(reply) if stream else [reply]
        text = "".join(
            (c.delta.content if stream else c.message.content) or "" for chunk in chunks for c in chunk.choices
        )
        assert text == plain[: plain.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_responses(client: OpenAI, sdk: Client) -> None:
    options: dict[str, Any] = {"model": "spoken", "input": "hi", "temperature": 0, "max_output_tokens": 20}
    expected = sdk.generate("hi", max_new_tokens=20).text
    reply = client.responses.create(**options)
    assert reply.output_text == expected
    assert reply.status == "incomplete" and reply.incomplete_details is not None
    assert reply.incomplete_details.reason == "max_output_tokens"
    events = list(client.responses.create(**options, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(**options, previous_response_id="resp_1")


def test_an_answer_that_ends_by_itself_is_complete(client: OpenAI, sdk: Client) -> None:
    sampled: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 200}
    replies = ((seed, sdk.generate("hi", seed=seed, **sampled)) for seed in range(100))
    seed, expected = next((s, r) for s, r in replies if r.finish_reason is FinishReason.EOS and len(r.text) > 3)
    options: dict[str, Any] = {"model": "spoken", "temperature": 1.0, "seed": seed}
    chat = client.chat.completions.create(messages=HI, max_completion_tokens=200, **options).choices[0]
    assert (chat.message.content, chat.finish_reason) == (expected.text, "stop")
    with client.chat.completions.stream(messages=HI, max_completion_tokens=200, **options) as stream:
        assert stream.get_final_completion().choices[0].message.content == expected.text
    del options["seed"]  # OpenAI's responses have none, so an extra field says it
    response = client.responses.create(input="hi", max_output_tokens=200, extra_body={"seed": seed}, **options)
    assert (response.output_text, response.status) == (expected.text, "completed")
    with client.responses.stream(input="hi", max_output_tokens=200, extra_body={"seed": seed}, **options) as responses:
        assert responses.get_final_response().output_text == expected.text


def test_details_tell_who_decided_each_token(client: OpenAI, sdk: Client) -> None:
    ours = {"mode": "token", "threshold": 0.3, "draft": 0, "details": True}
    reply = client.chat.completions.create(
        model="spoken", messages=HI, temperature=0, max_completion_tokens=20, extra_body={"ruyi": ours}
    )
    expected = sdk.generate("hi", max_new_tokens=20, mode="token", threshold=0.3, draft=0)
    extra: Any = reply.choices[0].model_extra
    tokens = extra["ruyi"]["tokens"]
    assert [(t["id"], t["exit"], t["node"]) for t in tokens] == [(t.id, t.exit, t.node) for t in expected.tokens]
    assert len({t["node"] for t in tokens}) > 1, "the threshold does not divide the tokens"
