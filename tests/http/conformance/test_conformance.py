"""Each request of requests.yaml, asked of a real server over three nodes; OpenAI's own types parse the answers."""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from openai import BaseModel
from openai.types import Completion, Model, completion_create_params
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import Response, ResponseStreamEvent, response_create_params
from openai.types.responses import response as response_types
from pydantic import TypeAdapter

from ruyi_flow import Client
from ruyi_flow.testing import cut_topology
from tests.http.clients.served import Served, events, serve_topology

TEXT = (Path(__file__).parent / "requests.yaml").read_text().replace("{{600 letters}}", "a" * 600)
REQUESTS: list[dict[str, Any]] = yaml.safe_load(TEXT)["requests"]

CHAT, TEXTS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"

SCHEMAS: dict[tuple[str, bool], TypeAdapter[Any]] = {
    (CHAT, False): TypeAdapter(chat_params.CompletionCreateParamsNonStreaming),
    (CHAT, True): TypeAdapter(chat_params.CompletionCreateParamsStreaming),
    (TEXTS, False): TypeAdapter(completion_create_params.CompletionCreateParamsNonStreaming),
    (TEXTS, True): TypeAdapter(completion_create_params.CompletionCreateParamsStreaming),
    (RESPONSES, False): TypeAdapter(response_create_params.ResponseCreateParamsNonStreaming),
    (RESPONSES, True): TypeAdapter(response_create_params.ResponseCreateParamsStreaming),
}
"""OpenAI's types of requests, by path and whether the answer is streamed."""

PARSERS: dict[tuple[str, bool], TypeAdapter[Any]] = {
    (CHAT, False): TypeAdapter(ChatCompletion),
    (CHAT, True): TypeAdapter(ChatCompletionChunk),
    (TEXTS, False): TypeAdapter(Completion),
    (TEXTS, True): TypeAdapter(Completion),
    (RESPONSES, False): TypeAdapter(Response),
    (RESPONSES, True): TypeAdapter(ResponseStreamEvent),
}
"""OpenAI's types of answers, or of each event of a stream."""

REQUIRED: dict[type, set[str]] = {
    ChatCompletion: {"id", "object", "created", "model", "choices"},
    ChatCompletionChunk: {"id", "object", "created", "model", "choices"},
    Completion: {"id", "object", "created", "model", "choices"},
    Response: {
        *("id", "object", "created_at", "error", "incomplete_details", "instructions", "metadata", "model", "output"),
        *("parallel_tool_calls", "temperature", "tool_choice", "tools", "top_p"),
    },
}
"""Fields that OpenAI's schema requires, also where they are null; the package's types have defaults for some."""

OURS = {"ruyi", "max_model_len", "store"}
"""Fields that an answer may have beyond OpenAI's types: our own, vLLM's, and one that OpenAI's server sends as well."""


@pytest.fixture(scope="module")
def served(spoken: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Three nodes and a server."""
    with serve_topology(cut_topology(spoken, [[2], [4], [6]]), tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture(scope="module")
def http(served: Served) -> Iterator[httpx.Client]:
    """A plain HTTP client of the server."""
    with httpx.Client(base_url=served.url, timeout=30, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def sdk(served: Served) -> Iterator[Client]:
    """The SDK, which asks the same nodes."""
    with Client(served.cluster.topology) as client:
        yield client


def test_there_are_enough_requests_and_each_has_its_name() -> None:
    assert len({request["name"] for request in REQUESTS}) == len(REQUESTS) >= 60
    good = [request for request in REQUESTS if request["status"] == 200]
    assert 30 <= len(good) <= len(REQUESTS) - 30
    assert all(request["status"] == 200 or "error" in request for request in REQUESTS)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request["name"])
def test_each_request_has_the_right_answer(request_: dict[str, Any], http: httpx.Client, sdk: Client) -> None:
    path, body = request_["path"], request_.get("body")
    check_schema(request_)
    method = request_.get("method", "GET" if body is None and "raw" not in request_ else "POST")
    content = request_.get("raw", None if body is None else json.dumps(body))
    reply = http.request(method, path, content=content, headers={"content-type": "application/json"})
    assert reply.status_code == request_["status"], reply.text
    assert reply.headers["x-request-id"]
    if reply.status_code != 200:
        check_error(reply, request_["error"])
    elif path.startswith("/v1/models"):
        check_models(reply.json(), request_)
    elif path == "/tokenize":
        check_tokens(reply.json(), request_)
    else:
        check_answer(reply, request_, sdk)


def check_schema(request: dict[str, Any]) -> None:
    """The request fits OpenAI's schema, or does not where the file says so."""
    body = request.get("body")
    schema = SCHEMAS.get((request["path"], bool(body and body.get("stream") is True)))
    if body is None or schema is None:
        return
    if isinstance(body.get("prompt"), list) and isinstance(body["prompt"][0], list):
        body = {**body, "prompt": body["prompt"][0]}  # a lazily read list takes the first type of a union
    try:
        # Lists are checked when they are read, so they are read.
        json.dumps(schema.validate_python(body, strict=True), default=list)
    except ValueError:
        assert request.get("fits") is False
    else:
        assert request.get("fits", True)


def check_error(reply: httpx.Response, expected: dict[str, Any]) -> None:
    """The error has OpenAI's shape, and says what it should."""
    assert reply.headers["content-type"].split(";")[0] == "application/json"
    assert set(reply.json()) == {"error"}
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert {name: error[name] for name in expected.keys() - {"says"}} == {
        name: value for name, value in expected.items() if name != "says"
    }
    assert len(error["message"]) > 10 and "Traceback" not in error["message"]
    assert all(part in error["message"] for part in expected.get("says", ())), error["message"]


def check_models(found: dict[str, Any], request: dict[str, Any]) -> None:
    """The models can be read by OpenAI's client."""
    if request["path"] != "/v1/models":
        model = TypeAdapter(Model).validate_python(found, strict=True)
        assert request["path"].endswith(model.id)
        found = {"object": "list", "data": [found]}
    assert found["object"] == "list"
    models = [TypeAdapter(Model).validate_python(one, strict=True) for one in found["data"]]
    check_extra(models)
    assert {model.owned_by for model in models} == {"ruyi-flow"}
    assert {one["max_model_len"] for one in found["data"]} == {512}
    if "expect" in request:
        assert [model.id for model in models] == request["expect"]["ids"]


def check_tokens(found: dict[str, Any], request: dict[str, Any]) -> None:
    """The tokens are those of the text, one a byte."""
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) == request["expect"]["count"]
    assert found["max_model_len"] == 512
    assert "".join(found["token_strs"]) == request["body"].get("prompt", "<user>hi|")


def check_answer(reply: httpx.Response, request: dict[str, Any], sdk: Client) -> None:
    """The answer is valid and complete, and its texts are the SDK's."""
    body, expect = request["body"], request.get("expect", {})
    parser, is_stream = PARSERS[request["path"], bool(body.get("stream"))], bool(body.get("stream"))
    if is_stream:
        assert reply.headers["content-type"].split(";")[0] == "text/event-stream"
        data = events(reply.text)
        if request["path"] != RESPONSES:
            assert data.pop() == "[DONE]"
        raw = [json.loads(one) for one in data]
    else:
        raw = [reply.json()]
    # JSON, since only there a list may stand for what Python's strict types want as another kind.
    parsed = [parser.validate_json(json.dumps(as_published(one, body)), strict=True) for one in raw]
    check_extra(parsed)
    for model, given in zip(parsed, raw, strict=True):
        assert REQUIRED.get(type(model), set()) <= given.keys()
    if request["path"] == RESPONSES:
        answer = Answer.of_response(parsed, raw)
    else:
        answer = Answer.of_chunks(raw, body) if is_stream else Answer.of_object(raw[0])
    assert answer.model == expect.get("model", body["model"])
    options, prompts = expect.get("sdk"), prompts_of(request)
    if options is not None:
        wanted = expected_texts(sdk, prompts, options, body)
        assert answer.texts == wanted
    if "texts" in expect:
        assert answer.texts == expect["texts"]
    if "finish" in expect:
        assert answer.finish == [expect["finish"]] * len(answer.texts)
    if "status" in expect:
        assert answer.status == expect["status"]
    if "usage" in expect:
        assert expect["usage"].items() <= answer.usage.items()
        assert answer.usage["total_tokens"] == answer.usage["prompt_tokens"] + answer.usage["completion_tokens"]
    else:
        assert not is_stream or request["path"] == RESPONSES or not answer.usage
    if "logprobs" in expect:
        check_logprobs(answer, expect["logprobs"], body)
    else:
        assert not any(answer.logprobs)
    assert bool(answer.details) == expect.get("ruyi", False)
    if answer.details:
        assert len(answer.details) == 12 and all(
            {"id", "text", "exit", "node", "confidence", "reason"} <= token.keys() for token in answer.details
        )
        assert "".join(token["text"] for token in answer.details) == answer.texts[0]


def as_published(given: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    """Return an answer or a chunk without the nulls that OpenAI's server sends and its types of completions deny.

    A chunk that is not the last one has no reason for the end, and the first token of a prompt has no probability.
    """
    given = copy.deepcopy(given)
    for choice in given["choices"] if "prompt" in body else ():
        if body.get("stream") and choice["finish_reason"] is None:
            choice["finish_reason"] = "stop"
        if body.get("echo") and choice["logprobs"] is not None:
            assert choice["logprobs"]["token_logprobs"].pop(0) is choice["logprobs"]["top_logprobs"].pop(0) is None
    return given


def check_extra(models: Any) -> None:
    """No part of an answer has a field that OpenAI's types do not know, but for our own."""
    if isinstance(models, BaseModel):
        assert set(models.model_extra or ()) <= OURS, models.model_extra
        for name in type(models).model_fields:
            check_extra(getattr(models, name))
    elif isinstance(models, list):
        for one in models:
            check_extra(one)


def check_logprobs(answer: Answer, count: int, body: dict[str, Any]) -> None:
    """Each token has its log-probability, and the most probable ones."""
    for text, given in zip(answer.texts, answer.logprobs, strict=True):
        if "messages" in body:
            tokens = given["content"]
            assert len(tokens) == 12 and given["refusal"] is None
            for token in tokens:
                assert token["logprob"] <= 0 and len(token["top_logprobs"]) == count
                values = [one["logprob"] for one in token["top_logprobs"]]
                assert values == sorted(values, reverse=True) and all(token["logprob"] <= value for value in values[:1])
            whole = bytes(byte for token in tokens for byte in token["bytes"] or ())
            # The text of the answer does not show the tokens that have no text.
            assert whole.decode(errors="replace").replace("<|im_end|>", "").startswith(text[:1])
        else:
            values, tops = given["token_logprobs"], given["top_logprobs"]
            assert len(given["tokens"]) == len(values) == len(tops) == len(given["text_offset"])
            assert given["text_offset"] == sorted(given["text_offset"]) and given["text_offset"][0] == 0
            echoed = bool(body.get("echo"))
            assert (values[0] is None) == (tops[0] is None) == echoed
            for token, value, top in list(zip(given["tokens"], values, tops, strict=True))[echoed:]:
                assert value <= 0 and 1 <= len(top) <= count + 1
                assert top[token] >= value and max(top.values()) >= value


def prompts_of(request: dict[str, Any]) -> list[Any]:
    """Return the prompts of a request, as the SDK takes them."""
    body = request["body"]
    if request["path"] == CHAT:
        roles = {"developer": "system"}
        return [[{"role": roles.get(m["role"], m["role"]), "content": m["content"]} for m in body["messages"]]]
    if request["path"] == TEXTS:
        prompt = body["prompt"]
        return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    messages = [{"role": "user", "content": body["input"]}] if isinstance(body["input"], str) else body["input"]
    messages = [
        {"role": m["role"], "content": m["content"] if isinstance(m["content"], str) else m["content"][0]["text"]}
        for m in messages
    ]
    return [[*([{"role": "system", "content": body["instructions"]}] if "instructions" in body else []), *messages]]


def expected_texts(sdk: Client, prompts: list[Any], options: Any, body: dict[str, Any]) -> list[str]:
    """Return the SDK's answers: one for each prompt and each set of options."""
    texts = []
    for prompt in prompts:
        for one in options if isinstance(options, list) else [options]:
            text = sdk.generate(prompt, raw=isinstance(prompt, str), **one).text
            if body.get("echo"):
                read = prompt if isinstance(prompt, str) else "".join(sdk.tokenize(prompt).texts)
                text = read + text
            texts.append(text)
    return texts


class Answer:
    """An answer in one shape, however it arrived."""

    def __init__(self) -> None:
        self.model, self.status = "", ""
        self.texts: list[str] = []
        self.finish: list[str] = []
        self.logprobs: list[Any] = []
        self.usage: Mapping[str, int] = {}
        self.details: list[dict[str, Any]] = []

    @classmethod
    def of_object(cls, raw: dict[str, Any]) -> Answer:
        """Read a whole answer."""
        answer = cls()
        assert [choice["index"] for choice in raw["choices"]] == list(range(len(raw["choices"])))
        answer.model, answer.usage = raw["model"], raw["usage"]
        for choice in raw["choices"]:
            assert {"finish_reason", "index", "logprobs"} <= choice.keys()
            if "message" in choice:
                assert choice["message"]["role"] == "assistant" and choice["message"]["refusal"] is None
            answer.texts.append(choice["message"]["content"] if "message" in choice else choice["text"])
            answer.finish.append(choice["finish_reason"])
            answer.logprobs.append(choice["logprobs"])
            answer.details += choice.get("ruyi", {}).get("tokens", [])
        return answer

    @classmethod
    def of_chunks(cls, raw: list[dict[str, Any]], body: dict[str, Any]) -> Answer:
        """Read a stream's chunks."""
        answer = cls()
        [answer.model] = {chunk["model"] for chunk in raw}
        assert len({chunk["id"] for chunk in raw}) == len({chunk["created"] for chunk in raw}) == 1
        if (body.get("stream_options") or {}).get("include_usage"):
            last = raw.pop()
            assert last["choices"] == [] and all(chunk["usage"] is None for chunk in raw)
            answer.usage = last["usage"]
        assert not any(chunk.get("usage") for chunk in raw)
        texts, logprobs = defaultdict[int, str](str), defaultdict[int, list[Any]](list)
        finish: dict[int, str] = {}
        begun = set()
        for choice in (choice for chunk in raw for choice in chunk["choices"]):
            index = choice["index"]
            assert index not in finish, "a chunk after the last one of its choice"
            if "delta" in choice:
                assert index in begun or choice["delta"].get("role") == "assistant"
                begun.add(index)
            texts[index] += (choice["delta"].get("content") or "") if "delta" in choice else choice["text"]
            if choice.get("logprobs"):
                logprobs[index] += choice["logprobs"]["content"]
            if choice["finish_reason"] is not None:
                finish[index] = choice["finish_reason"]
            answer.details += choice.get("ruyi", {}).get("tokens", [])
        assert texts.keys() == finish.keys() == set(range(len(texts)))
        answer.texts = [texts[i] for i in range(len(texts))]
        answer.finish = [finish[i] for i in range(len(texts))]
        answer.logprobs = [{"content": logprobs[i], "refusal": None} if logprobs[i] else None for i in texts]
        return answer

    @classmethod
    def of_response(cls, parsed: list[Any], raw: list[dict[str, Any]]) -> Answer:
        """Read a response, or the events of a streamed one."""
        answer = cls()
        if isinstance(parsed[0], Response):
            whole = parsed[0]
        else:
            assert [event["sequence_number"] for event in raw] == list(range(raw[0]["sequence_number"], len(raw)))
            kinds = [event.type for event in parsed]
            assert kinds[:4] == [
                "response.created",
                "response.in_progress",
                "response.output_item.added",
                "response.content_part.added",
            ]
            assert kinds[-4:-1] == [
                "response.output_text.done",
                "response.content_part.done",
                "response.output_item.done",
            ]
            assert kinds[4:-4] and set(kinds[4:-4]) == {"response.output_text.delta"}
            whole = parsed[-1].response
            assert kinds[-1] == f"response.{whole.status}"
            assert "".join(event.delta for event in parsed[4:-4]) == parsed[-4].text == whole.output_text
        assert whole.status == "completed" or isinstance(whole.incomplete_details, response_types.IncompleteDetails)
        assert whole.usage is not None
        answer.model, answer.status, answer.texts = whole.model, whole.status or "", [whole.output_text]
        answer.usage = {
            "prompt_tokens": whole.usage.input_tokens,
            "completion_tokens": whole.usage.output_tokens,
            "total_tokens": whole.usage.total_tokens,
        }
        return answer
