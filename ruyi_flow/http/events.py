"""Server-sent events: chunks as they come, comments that keep proxies awake, errors in the middle, [DONE]."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ruyi_flow.http.errors import encode, http_error
from ruyi_flow.http.usage import Record

__all__ = ["DONE", "EventStream", "JsonResponse", "error_response", "event"]

DONE = b"data: [DONE]\n\n"

_COMMENT_EVERY_S = 10.0
"""Seconds without an event after which a comment is sent.

A reply begins with its first event, so that a request that fails before it has the right status. One that waits for
longer than this begins without: then its error is an event.
"""

_STALLED_S = 60.0
"""Seconds that a client may take to accept an event; one that reads nothing for so long is as good as gone."""

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events
]


def event(data: Mapping[str, Any], name: str = "") -> bytes:
    """Return a server-sent event with an object as its data."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + encode(data) + b"\n\n"


class JsonResponse(Response):
    """A reply with a JSON object."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the object as JSON."""
        return encode(content)


def error_response(error: Exception, record: Record) -> JsonResponse:
    """Return the reply that tells an error, and note it in the request's record."""
    told = http_error(error)
    record.error = told.code or told.type
    return JsonResponse(told.body, status_code=told.status, headers=told.headers)


class EventStream(Response):
    """A reply of server-sent events.

    Args:
        events: the events as bytes. It is closed when the client goes away.
        record: what is known of the request.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], record: Record) -> None:
        self.status_code, self.background = 200, None
        self._events, self._record = events, record
        self._lock = asyncio.Lock()
        self._begun = False
        self._last = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client goes away."""
        loop = asyncio.get_running_loop()
        self._last = loop.time()
        comments = asyncio.create_task(self._comment(send))
        try:
            await self._send_all(send)
        except _Early as early:
            comments.cancel()
            await error_response(early.error, self._record)(scope, receive, send)
            return
        except _Stalled:
            self._record.is_disconnected = True
            return  # uvicorn closes the connection of a reply that is not complete
        finally:
            comments.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send) -> None:
        """Send the events; an error after the first one becomes the last event.

        Raises:
            _Early: an error came before the first event.
            _Stalled: the client does not read.
        """
        loop = asyncio.get_running_loop()
        try:
            async with aclosing(self._events) as events:
                async for data in events:
                    await self._write(send, data)
                    self._last = loop.time()
        except _Stalled:
            raise
        except Exception as error:
            if not self._begun:
                raise _Early(error) from error
            told = http_error(error)
            self._record.error = told.code or told.type
            await self._write(send, event(told.body))

    async def _write(self, send: Send, data: bytes) -> None:
        try:
            async with asyncio.timeout(_STALLED_S), self._lock:
                if not self._begun:
                    self._begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except TimeoutError:
            raise _Stalled from None

    async def _comment(self, send: Send) -> None:
        """Send a comment whenever there has been no event for a while."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._last + _COMMENT_EVERY_S - loop.time())
            if loop.time() - self._last >= _COMMENT_EVERY_S:
                self._last = loop.time()
                with suppress(_Stalled):
                    await self._write(send, b": waiting\n\n")


class _Early(Exception):
    """An error before the first event, which is told by the reply's status."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _Stalled(Exception):
    """The client does not read."""
