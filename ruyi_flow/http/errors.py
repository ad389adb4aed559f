"""Errors as OpenAI's API tells them: an HTTP status, and an object with message, type, param and code.

`openai` retries 408, 409, 429 and every 5xx, unless the reply says `x-should-retry: false`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from ruyi_flow.errors import (
    CacheMiss,
    CapacityError,
    ContextLengthError,
    DeadlineExceeded,
    HandshakeError,
    NodeError,
    NodeFault,
    NodeUnavailable,
    PermissionDenied,
    RequestCancelled,
    RequestError,
    Unauthenticated,
    WireError,
)

__all__ = ["STATUS_OF", "HttpError", "encode", "http_error"]

logger = logging.getLogger(__name__)

STATUS_OF: dict[type[Exception], int] = {
    RequestError: 400,
    ContextLengthError: 400,
    CapacityError: 503,
    CacheMiss: 503,
    NodeUnavailable: 503,
    RequestCancelled: 503,
    DeadlineExceeded: 504,
    Unauthenticated: 502,
    PermissionDenied: 502,
    HandshakeError: 502,
    WireError: 502,
    NodeFault: 502,
    NodeError: 502,
}
"""The HTTP status of each exception of the SDK.

A full node is 503 (overloaded) and not 429: 429 would say that this caller has used up its own share.
"""

_CODES: dict[type[Exception], str] = {
    ContextLengthError: "context_length_exceeded",
    CapacityError: "overloaded",
    NodeUnavailable: "node_unavailable",
    RequestCancelled: "node_unavailable",
    DeadlineExceeded: "timeout",
}

_RETRY_AFTER = {"retry-after": "1", "retry-after-ms": "1000"}
"""Headers of an error that is soon over."""

_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def encode(value: object) -> bytes:
    """Return a value as JSON. Half of a surrogate pair, which a request may contain, becomes a question mark."""
    return _encoder.encode(value).encode(errors="replace")


class HttpError(Exception):
    """An error that a reply tells.

    Args:
        status: the HTTP status.
        message: what is wrong, where, and what to do.
        type: OpenAI's class of errors.
        param: the field of the request that is wrong, if one is.
        code: a word for programs.
        headers: headers of the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = type or ("invalid_request_error" if status < 500 else "server_error")
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The reply's object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def http_error(error: Exception) -> HttpError:
    """Return the error that a reply tells for an exception; an unforeseen one is logged."""
    if isinstance(error, HttpError):
        return error
    for kind in type(error).__mro__:
        if kind in STATUS_OF:
            status = STATUS_OF[kind]
            headers = _RETRY_AFTER if status == 503 else {"x-should-retry": "false"} if status == 504 else None
            return HttpError(status, str(error), code=_CODES.get(kind), headers=headers)
    logger.error("a request failed by a bug of the server", exc_info=error)
    return HttpError(500, "the server failed at this request by a bug; its log has the details", code="internal_error")
