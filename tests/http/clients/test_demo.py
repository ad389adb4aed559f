"""The demo family behind the server: tokens of several bytes, and characters of several tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from ruyi_flow import Client
from ruyi_flow.testing import cut_topology
from tests.http.clients.served import Served, serve_topology

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

PARIS: Any = [{"role": "user", "content": "What is the capital of France?"}]

TEXTS = ("The sky is blue because", "naïve 日本 🦊 text", "def f(x):\n    return")


@pytest.fixture(scope="module")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Three nodes of the demo family."""
    topology = cut_topology(smollm2, [[5, 11], [17, 23], [29]], limits={"max_positions": 8192, "grace_s": 1})
    with serve_topology(topology, tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture(scope="module")
def sdk(served: Served) -> Iterator[Client]:
    """The SDK, which asks the same nodes."""
    with Client(served.cluster.topology) as client:
        yield client


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    """OpenAI's client."""
    with OpenAI(base_url=served.base_url, api_key="any", timeout=120, max_retries=0) as made:
        yield made


def test_a_question_has_its_answer(client: OpenAI, sdk: Client, served: Served) -> None:
    options: dict[str, Any] = {"messages": PARIS, "temperature": 0, "max_completion_tokens": 24}
    reply = client.chat.completions.create(model=served.model, **options)
    expected = sdk.generate(PARIS[0]["content"], max_new_tokens=24)
    assert "Paris" in expected.text
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (expected.text, "stop")
    assert client.responses.create(model=served.model, input=PARIS, temperature=0).output_text == expected.text


@pytest.mark.parametrize("text", TEXTS)
def test_characters_of_several_tokens_arrive_whole(client: OpenAI, sdk: Client, served: Served, text: str) -> None:
    """The prompt is echoed token by token, and what the tokens say together is the text."""
    options: dict[str, Any] = {"prompt": text, "temperature": 0, "max_tokens": 8, "echo": True, "logprobs": 2}
    [choice] = client.completions.create(model=f"{served.model}@exit-11", **options).choices
    expected = sdk.generate(text, raw=True, exit=11, max_new_tokens=8)
    assert choice.text == text + expected.text
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.text_offset and logprobs.token_logprobs
    tokens = sdk.tokenize(text, raw=True)
    assert len(logprobs.tokens) == len(tokens.token_ids) + len(expected.tokens)
    assert tuple(logprobs.tokens[: len(tokens.texts)]) == tokens.texts
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if "\ufffd" not in token and "<|" not in token:  # a piece of a character has no text of its own
            assert choice.text[offset:].startswith(token)


def test_the_bytes_of_tokens_are_the_answers(client: OpenAI, served: Served) -> None:
    """A client that puts bytes together, as OpenAI's documentation tells, gets the text."""
    reply = client.chat.completions.create(
        model=served.model,
        messages=PARIS,
        temperature=0,
        max_completion_tokens=40,
        logprobs=True,
        top_logprobs=3,
    )
    [choice] = reply.choices
    assert choice.logprobs is not None and choice.logprobs.content
    tokens = [token for token in choice.logprobs.content if not token.token.startswith("<|")]
    assert b"".join(bytes(token.bytes or ()) for token in tokens).decode() == choice.message.content
    assert len(tokens) > 5
    for token in choice.logprobs.content:
        assert token.token == token.top_logprobs[0].token and token.logprob == token.top_logprobs[0].logprob
