"""The one place where a request is counted and logged, when it has ended."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from ruyi_flow.http.access import Caller
from ruyi_flow.telemetry import spans
from ruyi_flow.telemetry.counters import ServerCounters
from ruyi_flow.telemetry.request_log import RequestEntry
from ruyi_flow.telemetry.spans import NO_SPAN, NO_TRACER, Attribute, Span, Tracer, current_span
from ruyi_flow.types import Event, Final, Stats, Token

__all__ = ["Record", "Usage"]

_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
"""The methods that counters tell apart."""


@dataclass(slots=True)
class Record:
    """What is known of one request; the parts of the server fill it in as they learn it."""

    request_id: str
    """The request's id, which the reply's header x-request-id has too."""
    method: str
    """HTTP method."""
    caller: Caller = Caller("")
    """Who asks."""
    endpoint: str = "other"
    """The path of the route, such as /v1/chat/completions; "other" for a path that is none."""
    model: str = ""
    """The model's name, one of the server's; empty if the request named none of them."""
    user: str = ""
    """The end user that the request names, if it does: text from outside, of any length."""
    is_streamed: bool = False
    """Whether the answer is streamed."""
    status: int = 0
    """HTTP status of the reply; 0 if none was sent."""
    error: str = ""
    """Type or code of the error, also of one in the middle of a stream; empty if there was none."""
    is_disconnected: bool = False
    """Whether the client went away before the reply was complete."""
    new_tokens: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Number of new tokens by the node and the exit that decided them."""
    stats: list[Stats] = field(default_factory=list)
    """Statistics of each complete answer; `n` or several prompts make several answers."""
    finish_reasons: list[str] = field(default_factory=list)
    """Why each complete answer ended."""
    began: float = field(default_factory=time.perf_counter)
    """Time of the request's arrival, by `time.perf_counter`."""
    first_token_s: float | None = None
    """Seconds from the request's arrival at this server to the first token; None if there was none."""
    total_s: float = 0.0
    """Seconds from the request's arrival at this server to the end of the reply."""
    span: Span = NO_SPAN
    """What is traced of it."""

    def saw(self, event: Event) -> None:
        """Note an event of an answer."""
        if isinstance(event, Token):
            if self.first_token_s is None:
                self.first_token_s = time.perf_counter() - self.began
            self.new_tokens[event.node, event.exit] += 1
        elif isinstance(event, Final):
            self.stats.append(event.stats)
            self.finish_reasons.append(event.finish_reason.value)

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompts of complete answers."""
        return sum(stats.prompt_tokens for stats in self.stats)

    @property
    def completion_tokens(self) -> int:
        """Number of new tokens, those of answers that were broken off included."""
        return self.new_tokens.total()

    @property
    def queue_s(self) -> float:
        """Seconds that the answers waited for the compute threads of the nodes."""
        return sum(hop.queue_s for stats in self.stats for hop in stats.hops)


class Usage:
    """Counts, traces and logs requests.

    Args:
        tracer: records what asks for answers.
    """

    def __init__(self, tracer: Tracer = NO_TRACER) -> None:
        self.counters = ServerCounters()
        """What `/metrics` tells."""
        self.running = 0
        """Number of requests that have begun and not ended."""
        self._tracer = tracer

    def begun(self, record: Record, traceparent: str | None = None) -> None:
        """Note that a request has arrived, with the context of a trace if its client sent one; not checked yet."""
        self.running += 1
        if record.method == "POST":  # not those who ask every few seconds how the server is
            record.span = self._tracer.start("request", traceparent, **{spans.METHOD: record.method})
        current_span.set(record.span)  # each request has a task of its own

    def ended(self, record: Record) -> None:
        """Note that a request has ended, however it did; it is called once for each."""
        self.running -= 1
        record.total_s = time.perf_counter() - record.began
        counters, route = self.counters, record.endpoint
        counters.requests.add(route, record.method if record.method in _METHODS else "other", record.status)
        counters.request_s.observe(record.total_s, route)
        counters.disconnects.add(route, amount=record.is_disconnected)
        if record.first_token_s is not None:
            counters.first_token_s.observe(record.first_token_s, record.model)
            counters.prompt_tokens.add(record.model, amount=record.prompt_tokens)
            counters.tokens.add(record.model, amount=record.completion_tokens)
        if record.method == "POST":
            _entry(record).write()
            record.span.end(**_attributes(record))


def _entry(record: Record) -> RequestEntry:
    """Return what the request log says about a request."""
    entry = RequestEntry(record.model, user=_user(record), id=record.request_id, trace=record.span.trace_id)
    entry.status = record.error or ("cancelled" if record.is_disconnected else "ok")
    entry.finish_reason = "+".join(dict.fromkeys(record.finish_reasons))
    entry.prompt_tokens, entry.new_tokens = record.prompt_tokens, record.completion_tokens
    for (node, _), count in record.new_tokens.items():
        entry.nodes[node] = entry.nodes.get(node, 0) + count
    entry.queue_s, entry.first_token_s, entry.total_s = record.queue_s, record.first_token_s or 0.0, record.total_s
    entry.bytes_up = sum(hop.bytes_up for stats in record.stats for hop in stats.hops)
    return entry


def _user(record: Record) -> str:
    """Return the caller's name, and the end user whom the request names."""
    return f"{record.caller.name}/{record.user}" if record.user else record.caller.name


def _attributes(record: Record) -> dict[str, Attribute]:
    """Return what the span of a request says about its reply; those of the answer are set where it is made."""
    found: dict[str, Attribute] = {spans.ROUTE: record.endpoint, spans.STATUS: record.status}
    error = record.error or ("cancelled" if record.is_disconnected else "")
    return found | {spans.ERROR: error} if error else found
