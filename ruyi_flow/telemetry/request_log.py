"""The request log: one line a request when it ends, never with its text. Pure.

The entry node writes it about the requests that reach it, and the HTTP server about its own.
"""

from __future__ import annotations

import json
import logging
import time
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from ruyi_flow.types import Event, Final, Token

__all__ = ["JsonLines", "RequestEntry"]

_MAX_CHARS = 64
"""Most characters of a text that a user chose, for instance a name or a model."""

logger = logging.getLogger(__name__)


class RequestEntry:
    """What the log says about one request.

    Args:
        model: the model that was asked for.
        user: the user's name. Default: unknown.
        id: the request's id. Default: a new one.
        trace: the id of its trace. Default: it has none.
    """

    def __init__(self, model: str, *, user: str = "", id: str = "", trace: str = "") -> None:
        self.id, self.user, self.model, self.trace = id or uuid4().hex, user, model, trace
        self.status = "cancelled"
        """ok, cancelled (the client went away), or what ended the request otherwise."""
        self.finish_reason = ""
        """Why the answer ended; empty if it is not complete."""
        self.prompt_tokens = self.new_tokens = self.bytes_up = 0
        self.nodes: dict[str, int] = {}
        """Number of tokens that each node decided."""
        self.queue_s = 0.0
        """Seconds of waiting for the compute threads of all nodes."""
        self.first_token_s = self.total_s = 0.0
        """Seconds from the request's arrival to its first token and to its end."""
        self._began = time.perf_counter()

    def saw(self, event: Event) -> None:
        """Take note of an event of the answer."""
        if isinstance(event, Token):
            if not self.new_tokens:
                self.first_token_s = time.perf_counter() - self._began
            self.new_tokens += 1
            self.nodes[event.node] = self.nodes.get(event.node, 0) + 1
        elif isinstance(event, Final):
            stats = event.stats
            self.status, self.finish_reason = "ok", str(event.finish_reason)
            self.prompt_tokens, self.new_tokens = stats.prompt_tokens, stats.new_tokens
            self.queue_s = sum(hop.queue_s for hop in stats.hops)
            self.bytes_up = sum(hop.bytes_up for hop in stats.hops)

    def failed(self, error: BaseException) -> None:
        """Take note of the error that ended the request."""
        self.status = type(error).__name__

    def write(self) -> None:
        """Write the line of a request that has ended."""
        self.total_s = self.total_s or time.perf_counter() - self._began
        logger.info("%s", self, extra={"request": self.fields})

    @property
    def fields(self) -> dict[str, Any]:
        """The line as JSON has it; times are in milliseconds."""
        return {
            "id": _cut(self.id),
            "trace": self.trace,
            "user": _cut(self.user),
            "model": _cut(self.model),
            "status": self.status,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "nodes": self.nodes,
            "queue_ms": round(1000 * self.queue_s, 3),
            "first_token_ms": round(1000 * self.first_token_s, 3),
            "total_ms": round(1000 * self.total_s, 3),
            "bytes_up": self.bytes_up,
        }

    def __str__(self) -> str:
        shares = ", ".join(f"{_shown(node)} {count}" for node, count in self.nodes.items())
        return (
            f"request {_shown(self.id)}: {self.status}{f' ({self.finish_reason})' if self.finish_reason else ''}, "
            + (f"user {_shown(self.user)}, " if self.user else "")
            + f"model {_shown(self.model)}, {self.prompt_tokens} prompt tokens, {self.new_tokens} new"
            + (f" ({shares})" if shares else "")
            + f", queue {1000 * self.queue_s:.1f} ms, first token {1000 * self.first_token_s:.1f} ms, "
            f"total {1000 * self.total_s:.1f} ms, {self.bytes_up} bytes up"
        )


class JsonLines(logging.Formatter):
    """Writes every log line as one JSON object; a request's line has its fields.

    Args:
        about: fields of every line, for instance the node.
    """

    def __init__(self, **about: str) -> None:
        super().__init__()
        self._about = about

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": when, "level": record.levelname.lower(), "logger": record.name, **self._about}
        request = getattr(record, "request", None)
        line |= {"message": record.getMessage()} if request is None else {"request": request}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + "…"


def _shown(text: str) -> str:
    """Return a text that a user may have chosen, so that it cannot look like another part of the line or a new line."""
    text = _cut(text)
    if text.isascii() and text and all(c.isalnum() or c in "-_.:@/+" for c in text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\u{{{ord(c):x}}}" for c in escaped) + '"'
