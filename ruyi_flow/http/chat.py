"""/v1/chat/completions: messages in, an answer out, whole or streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ruyi_flow.http.asking import Exchange, Site, details_of, finish_reason, finite, head_of, read_body
from ruyi_flow.http.events import DONE, EventStream, JsonResponse, event
from ruyi_flow.http.schemas import Asked, chat_request
from ruyi_flow.http.usage import Record
from ruyi_flow.types import Final, Token

__all__ = ["chat_completions"]


async def chat_completions(site: Site, request: Request, record: Record) -> Response:
    """Answer a chat.

    Raises:
        HttpError: the request is not one that this server honours.
        RuyiFlowError: it could not be answered.
    """
    asked: Asked = await read_body(request, lambda body: chat_request(body, site.default_max_tokens))
    exchange = Exchange(site, asked, record, "chatcmpl-")
    if asked.stream:
        return EventStream(_chunks(site, exchange), record)
    choices = []
    for index, answer in enumerate(await exchange.complete()):
        assert answer.final is not None
        choices.append(
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.final.text, "refusal": None},
                "logprobs": _logprobs(asked, answer.tokens),
                "finish_reason": finish_reason(answer.final),
                **details_of(site, asked, answer.tokens),
            }
        )
    head = head_of(exchange, "chat.completion")
    return JsonResponse({**head, "choices": choices, "usage": exchange.usage(), **exchange.details()})


async def _chunks(site: Site, exchange: Exchange) -> AsyncGenerator[bytes, None]:
    asked, head = exchange.asked, head_of(exchange, "chat.completion.chunk")
    no_usage = {"usage": None} if asked.include_usage else {}
    shows_each = asked.details or "logprobs" in asked.options
    begun: set[int] = set()

    def chunk(index: int, delta: dict[str, str], tokens: Sequence[Token] = (), end: Final | None = None) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": _logprobs(asked, tokens) if tokens else None,
            "finish_reason": None if end is None else finish_reason(end),
            **(details_of(site, asked, tokens) if tokens else {}),
        }
        is_last = end is not None and exchange.is_complete and not asked.include_usage
        return event({**head, "choices": [choice], **no_usage, **(exchange.details() if is_last else {})})

    async with aclosing(exchange.events()) as events:
        async for index, one in events:
            data = b""
            if index not in begun:
                begun.add(index)
                data = chunk(index, {"role": "assistant", "content": ""})
            if isinstance(one, Token) and (one.text or shows_each):
                data += chunk(index, {"content": one.text}, [one])
            elif isinstance(one, Final):
                data += chunk(index, {}, end=one)
            if data:
                yield data
    if asked.include_usage:
        yield event({**head, "choices": [], "usage": exchange.usage(), **exchange.details()})
    yield DONE


def _logprobs(asked: Asked, tokens: Sequence[Token]) -> dict[str, Any] | None:
    if "logprobs" not in asked.options:
        return None
    content = []
    for token in tokens:
        if (of := token.logprobs) is not None:
            top = [_one(one.text, one.logprob) for one in of.top]
            content.append({**_one(of.text, of.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _one(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": finite(logprob), "bytes": _bytes(text)}


def _bytes(text: str) -> list[int] | None:
    """Return a token's bytes; None for a part of a character, whose text does not tell them."""
    return None if "\ufffd" in text else list(text.encode())
