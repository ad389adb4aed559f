"""The `openai` package: sync, async, streamed, retried, timed out, and cut off."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx  # what the package itself uses
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from ruyi_flow import Client
from ruyi_flow.testing import Relay, cut_topology
from ruyi_flow.types import FinishReason
from tests.conftest import until
from tests.http.clients.served import Served, serve_topology

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]

LONG = 20_000
"""Tokens of an answer that no test waits for."""


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=served.base_url, api_key="any", timeout=30, max_retries=0) as made:
        yield made


@pytest.fixture
async def asynchronous(served: Served) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=served.base_url, api_key="any", timeout=30, max_retries=0) as made:
        yield made


def patient(served: Served, **options: Any) -> OpenAI:
    """A client that counts on nothing but its own timeout."""
    return OpenAI(base_url=served.base_url, api_key="any", **{"timeout": 30, "max_retries": 0, **options})


# ---- answers


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


# ---- errors, retries, and the end of a connection


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
