"""The application: its routes, and one middleware that every request passes."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ruyi_flow import __version__
from ruyi_flow.errors import RuyiFlowError
from ruyi_flow.http.asking import Site
from ruyi_flow.http.chat import chat_completions
from ruyi_flow.http.completions import completions
from ruyi_flow.http.errors import HttpError
from ruyi_flow.http.events import JsonResponse, error_response
from ruyi_flow.http.health import Health
from ruyi_flow.http.responses import responses
from ruyi_flow.http.tokenizing import tokenize
from ruyi_flow.http.usage import Record
from ruyi_flow.telemetry.spans import TRACEPARENT

__all__ = ["MAX_BODY_BYTES", "Gate", "application"]

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 * 1024 * 1024
"""Largest body of a request."""

_MAX_DISCARDED_BYTES = 256 * 1024 * 1024
"""Bytes of too long a body that are read and thrown away: a client sees no reply before it has sent its request."""

_BODY_S = 60.0
"""Seconds that the body of a request may take to arrive."""

_GET = ["GET", "HEAD"]
"""The methods of what is read; uvicorn sends no body to those who ask for the head alone."""

_MAX_RUNNING = 1024
"""Largest number of requests that are answered at once; each may hold a body in memory."""

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")

Endpoint = Callable[[Site, Request, Record], Awaitable[Response]]


def application(site: Site) -> Gate:
    """Make the application of a server.

    Args:
        site: the server's parts.
    """
    # The pages that FastAPI generates are off: they load scripts from the Internet.
    app = FastAPI(
        title="Ruyi Flow", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    health = Health(site)

    def post(path: str, endpoint: Endpoint) -> None:
        async def answer(request: Request) -> Response:
            return await endpoint(site, request, _record(request, path))

        app.add_api_route(path, answer, methods=["POST"], response_model=None)

    post("/v1/chat/completions", chat_completions)
    post("/v1/completions", completions)
    post("/v1/responses", responses)
    post("/tokenize", tokenize)

    @app.api_route("/v1/models", methods=_GET, response_model=None)
    async def models(request: Request) -> Response:
        _record(request, "/v1/models")
        about = await site.entry.about()
        context = None if about is None else about.context
        return JsonResponse({"object": "list", "data": [site.models.listing(m, context) for m in site.models.ids]})

    @app.api_route("/v1/models/{name:path}", methods=_GET, response_model=None)
    async def model(request: Request, name: str) -> Response:
        record = _record(request, "/v1/models/{model}")
        record.model = site.models.find(name).id
        about = await site.entry.about()
        return JsonResponse(site.models.listing(name, None if about is None else about.context))

    @app.api_route("/health", methods=_GET, response_model=None)
    async def alive(request: Request) -> Response:
        _record(request, "/health")
        return await health.health()

    @app.api_route("/ready", methods=_GET, response_model=None)
    async def ready(request: Request) -> Response:
        _record(request, "/ready")
        return await health.ready()

    @app.api_route("/metrics", methods=_GET, response_model=None)
    async def metrics(request: Request) -> Response:
        _record(request, "/metrics")
        return health.metrics(request.headers.get("accept", ""))

    async def on_error(request: Request, error: Exception) -> Response:
        return error_response(_of_route(request, error), request.scope["record"])

    for kind in (HttpError, RuyiFlowError, HTTPException, Exception):
        app.add_exception_handler(kind, on_error)
    return Gate(app, site, health)


def _record(request: Request, endpoint: str) -> Record:
    record: Record = request.scope["record"]
    record.endpoint = endpoint
    return record


def _of_route(request: Request, error: Exception) -> Exception:
    """Return OpenAI's error for one of the router: no such path, or no such method."""
    if not isinstance(error, HTTPException):
        return error
    path = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 404:
        return HttpError(404, f"there is no {path}; the API is below /v1", code="unknown_url")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return HttpError(
            405,
            f"there is no {path}; this path takes {allowed or 'another method'}",
            code="method_not_allowed",
            headers=error.headers,
        )
    return HttpError(error.status_code, str(error.detail), headers=error.headers)


class Gate:
    """The one middleware: an id and a bounded body for each request, and its end when the client goes away.

    Args:
        app: the application.
        site: the server's parts.
        health: where a drain is told.
    """

    def __init__(self, app: ASGIApp, site: Site, health: Health) -> None:
        self._app, self._site, self._health = app, site, health

    @property
    def running(self) -> int:
        """Number of requests that have not ended."""
        return self._site.usage.running

    def drain(self) -> None:
        """Take no new requests; those that are running go on."""
        self._health.draining = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return
        record = Record(_request_id(scope), scope["method"])
        scope["record"] = record
        head = (b"x-request-id", record.request_id.encode("latin-1"))
        is_complete = False

        async def tell(message: Message) -> None:
            nonlocal is_complete
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), head]
            elif not message.get("more_body", False):
                is_complete = True
            await send(message)

        usage = self._site.usage
        usage.begun(record, _header(scope, TRACEPARENT))
        try:
            try:
                record.caller = self._site.access.admit(scope)
                self._check_open(scope)
                body = await _read(scope, receive)
            except HttpError as error:
                await error_response(error, record)(scope, receive, tell)
                return
            except _Gone:
                return
            await self._answer(scope, body, receive, tell, record)
        finally:
            record.is_disconnected = record.is_disconnected or not is_complete
            usage.ended(record)

    def _check_open(self, scope: Scope) -> None:
        """Refuse what the server cannot answer now.

        Raises:
            HttpError: it drains, or has too many requests.
        """
        if scope["method"] != "POST":
            return
        retry = {"retry-after": "1", "connection": "close"}
        if self._health.draining:
            raise HttpError(503, "the server is shutting down", code="shutting_down", headers=retry)
        if self.running > _MAX_RUNNING:
            raise HttpError(503, f"the server has {_MAX_RUNNING} requests already", code="overloaded", headers=retry)

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send, record: Record) -> None:
        """Run the application until it has answered, and cancel it when the client goes away."""
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        answer = asyncio.ensure_future(self._app(scope, replay, send))
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            record.is_disconnected = not answer.done()
            answer.cancel()
            await asyncio.wait({answer, gone})
        # starlette raises an error again that the handler has told.
        if not answer.cancelled() and (error := answer.exception()) is not None and not record.error:
            record.error = "internal_error"
            logger.error("a reply was broken off by a bug of the server", exc_info=error)


class _Gone(Exception):
    """The client went away before its request was complete."""


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read(scope: Scope, receive: Receive) -> bytes:
    """Read the body of a request.

    Raises:
        HttpError: it is too long, or too slow.
        _Gone: the client went away.
    """
    too_long = HttpError(
        413,
        f"the body is longer than {MAX_BODY_BYTES // 2**20} MiB, the most that this server reads",
        code="request_too_large",
        headers={"connection": "close"},
    )
    headers = dict(scope["headers"])
    if (encoding := headers.get(b"content-encoding", b"identity").lower()) != b"identity":
        shown = encoding[:50].decode("latin-1")
        raise HttpError(
            415, f"Content-Encoding: {shown} is not supported; send the body as it is", code="unsupported_encoding"
        )
    is_long = int(headers.get(b"content-length", b"0")) > MAX_BODY_BYTES
    if is_long and b"expect" in headers:  # the client waits for leave to send it
        raise too_long
    parts: list[bytes] = []
    length = 0
    try:
        async with asyncio.timeout(_BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Gone
                part = message.get("body", b"")
                length += len(part)
                is_long = is_long or length > MAX_BODY_BYTES
                parts = [] if is_long else [*parts, part]
                is_last = not message.get("more_body", False)
                if is_long and (is_last or length > _MAX_DISCARDED_BYTES):
                    raise too_long
                if is_last:
                    return b"".join(parts)
    except TimeoutError:
        close = {"connection": "close"}
        raise HttpError(408, f"the body did not arrive within {_BODY_S:g} s", code="timeout", headers=close) from None


def _header(scope: Scope, name: str) -> str | None:
    """Return a header that may be there once; several ones cannot be right."""
    found = [value.decode("latin-1") for key, value in scope["headers"] if key == name.encode()]
    return found[0] if len(found) == 1 else None


def _request_id(scope: Scope) -> str:
    """Return the id that the client gave to its request if it is short printable text, or else a new one."""
    given: Any = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode("ascii") if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
