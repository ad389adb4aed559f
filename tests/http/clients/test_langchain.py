"""LangChain's classes for OpenAI: answers, streams, batches, and plain completions."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import SecretStr

from ruyi_flow import Client
from tests.http.clients.served import Served

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")  # LangChain's warnings are its own


@pytest.fixture(scope="module")
def chat(served: Served) -> Any:
    """A chat model of LangChain."""
    return ChatOpenAI(
        base_url=served.base_url,
        api_key=SecretStr("any"),
        model="spoken",
        temperature=0,
        max_completion_tokens=16,
        max_retries=0,
    )


def test_a_chat_is_the_answer_of_the_sdk(chat: Any, sdk: Client) -> None:
    reply = chat.invoke([SystemMessage("Be short."), HumanMessage("hi")])
    assert isinstance(reply, AIMessage)
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hi"}]
    assert reply.content == sdk.generate(messages, max_new_tokens=16).text
    assert reply.response_metadata["finish_reason"] == "length"
    assert reply.usage_metadata is not None and reply.usage_metadata["output_tokens"] == 16


def test_a_turn_follows_the_others(chat: Any, sdk: Client) -> None:
    reply = chat.invoke([HumanMessage("hi"), AIMessage("hello"), HumanMessage([{"type": "text", "text": "bye"}])])
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
    ]
    assert reply.content == sdk.generate(messages, max_new_tokens=16).text


def test_a_stream_adds_up_to_the_answer(chat: Any, sdk: Client) -> None:
    whole = AIMessageChunk(content="")
    for chunk in chat.stream("hi", stream_usage=True):
        whole += chunk
    assert whole.content == sdk.generate("hi", max_new_tokens=16).text
    assert whole.usage_metadata is not None and whole.usage_metadata["total_tokens"] == 25


async def test_an_asynchronous_batch(chat: Any, sdk: Client) -> None:
    questions = ["one", "two", "three", "four"]
    replies = await chat.abatch(questions)
    expected = [(await asyncio.to_thread(sdk.generate, text, max_new_tokens=16)).text for text in questions]
    assert [reply.content for reply in replies] == expected


def test_log_probabilities(chat: Any) -> None:
    reply = chat.bind(logprobs=True, top_logprobs=2).invoke("hi")
    assert len(reply.response_metadata["logprobs"]["content"]) == 16


def test_a_choice_of_several(chat: Any) -> None:
    [generations] = chat.generate([[HumanMessage("hi")]], n=2, temperature=1.0, seed=3).generations
    assert len({generation.text for generation in generations}) == 2


def test_tools_are_refused_by_name(chat: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="tools"):
        chat.bind_tools([{"type": "function", "function": {"name": "now", "parameters": {}}}]).invoke("hi")


def test_a_prompt_that_is_too_long_is_known_as_such(chat: Any) -> None:
    with pytest.raises(ContextOverflowError):  # what LangChain's agents answer by shortening the history
        chat.invoke("a" * 600)


def test_completions_of_several_prompts(served: Served, sdk: Client) -> None:
    llm = OpenAI(
        base_url=served.base_url,
        api_key=SecretStr("any"),
        model="spoken@exit-4",
        temperature=0,
        max_tokens=16,
        max_retries=0,
    )
    expected = [sdk.generate(text, raw=True, exit=4, max_new_tokens=16).text for text in ("hello", "tree")]
    assert [g[0].text for g in llm.generate(["hello", "tree"]).generations] == expected
    assert "".join(llm.stream("hello")) == expected[0]
