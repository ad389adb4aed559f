"""What LiteLLM makes of the server. It runs in an environment that has LiteLLM and nothing of this project.

    python litellm_trial.py '{"base_url": …, "model": …, "answers": {…}, "snippet": …, "node": …, "node_pid": …}'

`answers` are the SDK's texts, and `snippet` is the code of the guide. The node is killed in the middle of a stream. A
line tells LiteLLM's version.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # prices are not fetched

litellm: Any = importlib.import_module("litellm")

GIVEN: dict[str, Any] = json.loads(sys.argv[1])
ANSWERS: dict[str, str] = GIVEN["answers"]
HI = [{"role": "user", "content": "hi"}]
COMMON: dict[str, Any] = {
    "model": f"openai/{GIVEN['model']}",
    "api_base": GIVEN["base_url"],
    "api_key": "any",
    "temperature": 0,
    "timeout": 60,
}


def text_of(chunks: list[Any]) -> str:
    """Return the text of a stream's chunks."""
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def raised(kind: type[Exception], call: Callable[[], Any]) -> Any:
    """Return the error that a call must end in."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__} was raised")


def answers() -> None:
    """Answers: whole, streamed, at once, several, plain, and as responses."""
    reply = litellm.completion(**COMMON, messages=HI, max_tokens=16)
    assert reply.choices[0].message.content == ANSWERS["hi"], reply
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 16, reply

    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(**COMMON, messages=HI, max_tokens=16, **options))
    assert text_of(chunks) == ANSWERS["hi"] and len(chunks) > 4, chunks
    whole = litellm.stream_chunk_builder(chunks, messages=HI)
    assert whole.choices[0].message.content == ANSWERS["hi"] and whole.usage.completion_tokens == 16, whole

    async def at_once() -> list[Any]:
        asked = (litellm.acompletion(**COMMON, messages=[{"role": "user", "content": t}], max_tokens=16) for t in texts)
        return list(await asyncio.gather(*asked))

    texts = ["one", "two", "three"]
    assert [reply.choices[0].message.content for reply in asyncio.run(at_once())] == [ANSWERS[t] for t in texts]

    async def streamed() -> str:
        stream = await litellm.acompletion(**COMMON, messages=HI, max_tokens=16, stream=True)
        return text_of([chunk async for chunk in stream])

    assert asyncio.run(streamed()) == ANSWERS["hi"]

    reply = litellm.completion(**COMMON, messages=HI, max_tokens=4, n=2, logprobs=True, top_logprobs=2)
    assert len(reply.choices) == 2 and len(reply.choices[0].logprobs.content) == 4, reply

    plain = COMMON | {"model": f"text-completion-openai/{GIVEN['model']}"}
    assert litellm.text_completion(**plain, prompt="hello", max_tokens=16).choices[0].text == ANSWERS["raw hello"]
    chunks = list(litellm.text_completion(**plain, prompt="hello", max_tokens=16, stream=True))
    assert "".join(chunk.choices[0].text or "" for chunk in chunks) == ANSWERS["raw hello"], chunks

    response = litellm.responses(**COMMON, input="hi", max_output_tokens=16)
    texts = [part.text for item in response.output if item.type == "message" for part in item.content]
    assert texts == [ANSWERS["hi"]], response
    events = list(litellm.responses(**COMMON, input="hi", max_output_tokens=16, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == ANSWERS["hi"], events


def errors() -> None:
    """Errors have LiteLLM's own classes, by status and code."""
    missing = raised(
        litellm.NotFoundError, lambda: litellm.completion(**COMMON | {"model": "openai/gone"}, messages=HI)
    )
    assert GIVEN["model"] in str(missing), missing
    tools = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
    refused = raised(litellm.BadRequestError, lambda: litellm.completion(**COMMON, messages=HI, tools=tools))
    assert "tools" in str(refused), refused
    long = [{"role": "user", "content": "a" * 200_000}]
    raised(litellm.ContextWindowExceededError, lambda: litellm.completion(**COMMON, messages=long))


def node_dies() -> None:
    """A node that is killed in the middle of a stream is an error, and the next answers are right."""
    exact = COMMON | {"model": f"openai/{GIVEN['model']}@exact"}
    stream = litellm.completion(**exact, messages=HI, max_tokens=50_000, stream=True)
    seen = []

    def read() -> None:
        for chunk in stream:
            seen.append(chunk)
            if len(seen) == 20:
                os.kill(GIVEN["node_pid"], signal.SIGKILL)

    broken = raised(Exception, read)
    assert not isinstance(broken, AssertionError) and len(seen) >= 20, broken
    assert GIVEN["node"] in str(broken) or "node" in str(broken), broken

    deadline = time.monotonic() + 60
    while True:
        try:
            reply = litellm.completion(**exact, messages=HI, max_tokens=16)
            break
        except (litellm.APIError, litellm.InternalServerError, litellm.ServiceUnavailableError):
            assert time.monotonic() < deadline, "the node did not come back"
            time.sleep(0.5)
    assert reply.choices[0].message.content == ANSWERS["hi"], reply


if __name__ == "__main__":
    exec(GIVEN["snippet"])
    answers()
    errors()
    node_dies()
    sys.stdout.write(f"litellm {importlib.metadata.version('litellm')}\n")
