"""What every endpoint that answers shares: the request is read and checked, and its answers are asked for."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any

from starlette.requests import Request

from ruyi_flow.http.access import Access
from ruyi_flow.http.entry import Ask, EntryNodes
from ruyi_flow.http.fields import Body, parse_json
from ruyi_flow.http.models import Models
from ruyi_flow.http.schemas import Asked
from ruyi_flow.http.usage import Record, Usage
from ruyi_flow.types import Event, Final, FinishReason, PromptTokens, Stats, Token

__all__ = ["Answer", "Exchange", "Site", "details_of", "finish_reason", "finite", "head_of", "read_body"]

_LEAST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON does not have; as OpenAI and vLLM write it."""

_LARGE_BODY = 64 * 1024
"""Bytes from which a body is parsed and checked in a thread, so that it does not stop the event loop."""


@dataclass(frozen=True, slots=True)
class Site:
    """The parts of a server that its endpoints use."""

    entry: EntryNodes
    """Reaches the entry node."""
    models: Models
    """The names of models."""
    usage: Usage = field(default_factory=Usage)
    """Counts requests when they have ended."""
    access: Access = field(default_factory=Access)
    """Decides who may ask."""
    default_max_tokens: int = 1024
    """Largest number of new tokens of a request that sets none."""


@dataclass(slots=True)
class Answer:
    """One answer of a request, as far as it has arrived."""

    tokens: list[Token] = field(default_factory=list)
    """Its tokens."""
    prompt: PromptTokens | None = None
    """The prompt's tokens, if they were asked for."""
    final: Final | None = None
    """Its end."""

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(token.text for token in self.tokens) if self.final is None else self.final.text


class Exchange:
    """A request that was understood, and its answers: `n` for each prompt.

    Args:
        site: the server's parts.
        asked: the request.
        record: what is known of it, which the answers complete.
        kind: what begins the reply's id, such as chatcmpl-.
    """

    def __init__(self, site: Site, asked: Asked, record: Record, kind: str) -> None:
        model = site.models.find(asked.model)
        record.model, record.user, record.is_streamed = model.id, asked.user, asked.stream
        self.asked, self.record, self.model = asked, record, model.id
        self.id, self.created = f"{kind}{uuid.uuid4().hex}", int(time.time())
        self._entry = site.entry
        self._entry.learn()
        options = {**model.routing(asked.routing), **asked.options}
        seed = options.pop("seed", None)
        self._asks: list[Ask] = [
            (prompt, options if seed is None else {**options, "seed": (seed + i) % 2**63})
            for prompt in asked.prompts
            for i in range(asked.n)
        ]
        self.answers = [Answer() for _ in self._asks]

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the family, if it is known."""
        return self._entry.fingerprint

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """Ask for the answers; yield the events of each with its index, and keep them in `answers`.

        Raises:
            RuyiFlowError: an answer failed.
        """
        async with aclosing(self._entry.events(self._asks)) as events:
            async for index, event in events:
                answer = self.answers[index]
                if isinstance(event, Token):
                    answer.tokens.append(event)
                elif isinstance(event, Final):
                    answer.final = event
                else:
                    answer.prompt = event
                self.record.saw(event)
                yield index, event

    async def complete(self) -> list[Answer]:
        """Ask for the answers, and return them when all are complete.

        Raises:
            RuyiFlowError: an answer failed.
        """
        async with aclosing(self.events()) as events:
            async for _ in events:
                pass
        return self.answers

    @property
    def is_complete(self) -> bool:
        """Whether all answers are complete."""
        return all(answer.final is not None for answer in self.answers)

    def usage(self) -> dict[str, Any]:
        """Return the numbers of tokens: each prompt counts once, and all answers."""
        finals = [answer.final.stats for answer in self.answers if answer.final is not None]
        prompt = sum(stats.prompt_tokens for stats in finals[:: self.asked.n])
        new = 0 if self.asked.drops_token else sum(stats.new_tokens for stats in finals)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(stats.reused for stats in finals[:: self.asked.n])},
        }

    def details(self) -> dict[str, Any]:
        """Return `ruyi` of the whole reply: the statistics of its answer, or a list of those of several answers."""
        if not self.asked.details:
            return {}
        stats = [_stats_object(answer.final.stats) for answer in self.answers if answer.final is not None]
        return {"ruyi": {"stats": stats[0] if len(self.answers) == 1 else stats}}


def head_of(exchange: Exchange, kind: str) -> dict[str, Any]:
    """Return the fields that begin a reply, or each chunk of a streamed one."""
    return {
        "id": exchange.id,
        "object": kind,
        "created": exchange.created,
        "model": exchange.model,
        "system_fingerprint": exchange.fingerprint,
    }


def details_of(site: Site, asked: Asked, tokens: Sequence[Token]) -> dict[str, Any]:
    """Return `ruyi` of tokens, if it was asked for: who decided each, and why."""
    return {"ruyi": {"tokens": [_token_object(token, site) for token in tokens]}} if asked.details else {}


def _token_object(token: Token, site: Site) -> dict[str, Any]:
    return {
        "id": token.id,
        "text": token.text,
        "exit": token.exit,
        "node": token.node,
        "tier": site.entry.tier_of(token.node),
        "confidence": token.confidence,
        "reason": token.reason.value,
        "after_s": token.after_s,
        "bytes_up": token.bytes_up,
    }


def _stats_object(stats: Stats) -> dict[str, Any]:
    return {**asdict(stats), "token_s": stats.token_s}


def finish_reason(final: Final) -> str:
    """Return OpenAI's word for why an answer ended."""
    return "length" if final.finish_reason is FinishReason.LENGTH else "stop"


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can hold."""
    return max(logprob, _LEAST_LOGPROB)


async def read_body(request: Request, check: Callable[[Body], Any]) -> Any:
    """Read, parse and check the body of a request.

    Raises:
        HttpError: it is not one that this server honours.
    """
    data = await request.body()
    if len(data) < _LARGE_BODY:
        return check(parse_json(data))
    return await asyncio.to_thread(lambda: check(parse_json(data)))
