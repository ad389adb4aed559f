"""/v1/completions: prompts in, their continuations out, with the prompts themselves and log-probabilities if asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ruyi_flow.http.asking import (
    Exchange,
    Site,
    details_of,
    finish_reason,
    finite,
    head_of,
    read_body,
)
from ruyi_flow.http.events import DONE, EventStream, JsonResponse, event
from ruyi_flow.http.schemas import Asked, completion_request
from ruyi_flow.http.usage import Record
from ruyi_flow.types import Final, Logprobs, PromptTokens, Token

__all__ = ["completions"]


async def completions(site: Site, request: Request, record: Record) -> Response:
    """Continue prompts.

    Raises:
        HttpError: the request is not one that this server honours.
        RuyiFlowError: it could not be answered.
    """
    asked: Asked = await read_body(request, lambda body: completion_request(body, site.default_max_tokens))
    exchange = Exchange(site, asked, record, "cmpl-")
    if asked.stream:
        return EventStream(_chunks(site, exchange), record)
    await exchange.complete()
    if any(answer.prompt is not None for answer in exchange.answers):  # it may be megabytes
        return await asyncio.to_thread(_whole, site, exchange)
    return _whole(site, exchange)


def _whole(site: Site, exchange: Exchange) -> Response:
    """Return the reply with all choices."""
    asked = exchange.asked
    choices = []
    for index, answer in enumerate(exchange.answers):
        assert answer.final is not None
        choice = _Choice(asked, index)
        text = choice.begin(answer.prompt)
        tokens = choice.shown(answer.tokens)
        logprobs = choice.logprobs(answer.prompt, tokens)
        choices.append(
            {
                "index": index,
                "text": text + ("" if asked.drops_token else answer.final.text),
                "logprobs": logprobs,
                "finish_reason": "length" if asked.drops_token else finish_reason(answer.final),
                **details_of(site, asked, tokens),
            }
        )
    head = head_of(exchange, "text_completion")
    return JsonResponse({**head, "choices": choices, "usage": exchange.usage(), **exchange.details()})


async def _chunks(site: Site, exchange: Exchange) -> AsyncGenerator[bytes, None]:
    asked, head = exchange.asked, head_of(exchange, "text_completion")
    no_usage = {"usage": None} if asked.include_usage else {}
    shows_each = asked.details or "logprobs" in asked.options
    choices = [_Choice(asked, index) for index in range(len(exchange.answers))]
    begun: set[int] = set()

    def chunk(
        index: int, text: str, prompt: PromptTokens | None, tokens: Sequence[Token], end: Final | None = None
    ) -> bytes:
        choice = {
            "index": index,
            "text": text,
            "logprobs": choices[index].logprobs(prompt, tokens) if prompt or tokens else None,
            "finish_reason": None if end is None else "length" if asked.drops_token else finish_reason(end),
            **(details_of(site, asked, tokens) if tokens else {}),
        }
        is_last = end is not None and exchange.is_complete and not asked.include_usage
        return event({**head, "choices": [choice], **no_usage, **(exchange.details() if is_last else {})})

    async with aclosing(exchange.events()) as events:
        async for index, one in events:
            data = b""
            if index not in begun:
                begun.add(index)
                prompt = one if isinstance(one, PromptTokens) else None
                if asked.echo:
                    data = await asyncio.to_thread(chunk, index, choices[index].begin(prompt), prompt, ())
            if isinstance(one, Token) and (one.text or shows_each) and not asked.drops_token:
                data += chunk(index, one.text, None, [one])
            elif isinstance(one, Final):
                data += chunk(index, "", None, (), one)
            if data:
                yield data
    if asked.include_usage:
        yield event({**head, "choices": [], "usage": exchange.usage(), **exchange.details()})
    yield DONE


@dataclass(slots=True)
class _Choice:
    """The text of one choice so far, in the order in which it is told."""

    asked: Asked
    index: int
    offset: int = 0
    """Characters of the text that come before the next token."""

    def begin(self, prompt: PromptTokens | None) -> str:
        """Return the text that the choice begins with: its prompt, if that is to be repeated."""
        if not self.asked.echo:
            return ""
        given = self.asked.prompts[self.index // self.asked.n]
        assert prompt is not None or isinstance(given, str)
        return given if isinstance(given, str) else prompt.text if prompt else ""

    def shown(self, tokens: Sequence[Token]) -> Sequence[Token]:
        """Return the new tokens that belong to the choice."""
        return () if self.asked.drops_token else tokens

    def logprobs(self, prompt: PromptTokens | None, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Return the log-probabilities of the next tokens, those of the prompt first."""
        if "logprobs" not in self.asked.options:
            return None
        columns = _Columns(bool(self.asked.options["logprobs"]))
        if prompt is not None and self.asked.echo:
            text = self.begin(prompt)
            for one, offset in zip(prompt.tokens, _offsets(text, prompt), strict=True):
                columns.add(one.text, one.logprobs, offset)
            self.offset = len(text)
        for token in tokens:
            columns.add("" if token.logprobs is None else token.logprobs.text, token.logprobs, self.offset)
            self.offset += len(token.text)
        return columns.object


def _offsets(text: str, prompt: PromptTokens) -> Iterator[int]:
    """Yield where each token of a prompt begins in its text; a part of a character, where the character does."""
    end = parts = 0
    for one in prompt.tokens:
        # The tokens before may be parts of characters, of which each has at least one.
        start = text.find(one.text, end, end + parts + len(one.text))
        if start < 0 or "\ufffd" in one.text:
            yield end
            parts += 1
        else:
            yield start
            end, parts = start + len(one.text), 0


@dataclass(slots=True)
class _Columns:
    """Log-probabilities in the columns of OpenAI's completions.

    Args:
        has_top: whether the most probable tokens are told.
    """

    has_top: bool
    object: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        top: list[Any] | None = [] if self.has_top else None
        self.object = {"tokens": [], "token_logprobs": [], "top_logprobs": top, "text_offset": []}

    def add(self, text: str, of: Logprobs | None, offset: int) -> None:
        """Add a token; the first one of a prompt has no log-probability."""
        self.object["tokens"].append(text)
        self.object["token_logprobs"].append(None if of is None else finite(of.logprob))
        self.object["text_offset"].append(offset)
        if self.has_top:
            self.object["top_logprobs"].append(None if of is None else _top(of))


def _top(of: Logprobs) -> dict[str, float]:
    """Return the most probable tokens and the token itself by text; of tokens with the same text, the likeliest."""
    found: dict[str, float] = {}
    for text, logprob in [*((one.text, one.logprob) for one in of.top), (of.text, of.logprob)]:
        found[text] = max(finite(logprob), found.get(text, finite(logprob)))
    return found
