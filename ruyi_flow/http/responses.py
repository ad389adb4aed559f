"""/v1/responses: what of OpenAI's newer API can be honoured without keeping state. The rest is refused by name."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ruyi_flow.http.asking import Answer, Exchange, Site, details_of, finish_reason, read_body
from ruyi_flow.http.errors import http_error
from ruyi_flow.http.events import EventStream, JsonResponse, event
from ruyi_flow.http.schemas import Asked, responses_request
from ruyi_flow.http.usage import Record
from ruyi_flow.types import Token

__all__ = ["responses"]


async def responses(site: Site, request: Request, record: Record) -> Response:
    """Answer a request for a response.

    Raises:
        HttpError: the request is not one that this server honours.
        RuyiFlowError: it could not be answered.
    """
    asked: Asked = await read_body(request, lambda body: responses_request(body, site.default_max_tokens))
    reply = _Reply(site, Exchange(site, asked, record, "resp_"))
    if asked.stream:
        return EventStream(reply.events(), record)
    await reply.exchange.complete()
    return JsonResponse(reply.object())


class _Reply:
    """A response with its one message.

    Args:
        site: the server's parts.
        exchange: the request and its answer.
    """

    def __init__(self, site: Site, exchange: Exchange) -> None:
        self.exchange = exchange
        self._site, self._asked = site, exchange.asked
        self._id = f"msg_{uuid.uuid4().hex}"
        self._number = 0

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of the streamed response. A failure after the first one is an event too."""
        place = {"item_id": self._id, "output_index": 0, "content_index": 0}
        begun = False
        try:
            async with aclosing(self.exchange.events()) as events:
                async for _, one in events:
                    data = b""
                    if not begun:
                        begun = True
                        data += self._event("response.created", response=self.object("in_progress"))
                        data += self._event("response.in_progress", response=self.object("in_progress"))
                        item = {**self._message("in_progress"), "content": []}
                        data += self._event("response.output_item.added", output_index=0, item=item)
                        data += self._event("response.content_part.added", **place, part=_part(""))
                    if isinstance(one, Token) and (one.text or self._asked.details):
                        details = details_of(self._site, self._asked, [one])
                        data += self._event(
                            "response.output_text.delta", **place, delta=one.text, logprobs=[], **details
                        )
                    if data:
                        yield data
        except Exception as error:
            if not begun:
                raise
            told = http_error(error)
            self.exchange.record.error = told.code or told.type
            failed = {**self.object("failed"), "error": {"code": "server_error", "message": told.message}}
            yield self._event("response.failed", response=failed)
            return
        text, status = self._answer.text, self._status
        ends = self._event("response.output_text.done", **place, text=text, logprobs=[])
        ends += self._event("response.content_part.done", **place, part=_part(text))
        ends += self._event("response.output_item.done", output_index=0, item=self._message(status))
        yield ends + self._event(f"response.{status}", response=self.object())

    @property
    def _answer(self) -> Answer:
        return self.exchange.answers[0]

    @property
    def _status(self) -> str:
        assert self._answer.final is not None
        return "incomplete" if finish_reason(self._answer.final) == "length" else "completed"

    def object(self, status: str | None = None) -> dict[str, Any]:
        """Return the response; without a status, a complete one."""
        asked, body, state = self._asked, self._asked.body, status or self._status
        usage = self.exchange.usage()
        details: dict[str, Any] = {}
        if status is None and asked.details:
            tokens = details_of(self._site, asked, self._answer.tokens)["ruyi"]
            details = {"ruyi": {**tokens, **self.exchange.details()["ruyi"]}}
        return {
            "id": self.exchange.id,
            "object": "response",
            "created_at": self.exchange.created,
            "status": state,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if state == "incomplete" else None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata") or {},
            "model": self.exchange.model,
            "output": [self._message(state)] if status is None else [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": asked.options["temperature"],
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": asked.options["top_p"],
            "truncation": "disabled",
            "usage": None
            if status is not None
            else {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
            "user": body.get("user"),
            **details,
        }

    def _message(self, status: str) -> dict[str, Any]:
        content = [_part(self._answer.text)]
        return {"id": self._id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
