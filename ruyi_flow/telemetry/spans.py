"""Spans: what a request spends its time on, node by node. Pure; `otel` and `chrome_trace` record them.

A `Tracer` belongs to one node, and decides which requests are recorded. A caller's decision counts more than its own,
so that a trace is recorded on all nodes or on none. Most requests have a span that records nothing and is falsy: code
on the path of a token asks `if span:` and does nothing else.
"""

from __future__ import annotations

import re
import time
from contextvars import ContextVar
from types import TracebackType
from typing import Self, TypeAlias

__all__ = [
    "MAX_TRACEPARENT",
    "NO_SPAN",
    "NO_TRACER",
    "TRACEPARENT",
    "Attribute",
    "PassedSpan",
    "Span",
    "TraceContext",
    "Tracer",
    "current_span",
    "now_ns",
]

Attribute: TypeAlias = str | int | float | bool | tuple[str, ...] | tuple[int, ...]
"""The value of an attribute."""

TRACEPARENT = "traceparent"
"""Name of the header and of the gRPC metadata that carry the context of a trace (W3C Trace Context)."""

MAX_TRACEPARENT = 256
"""Longest context that is read; version 00 has 55 characters."""

# Attribute names of OpenTelemetry's conventions for generative AI, and the general ones.
OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
RESPONSE_MODEL = "gen_ai.response.model"
TEMPERATURE = "gen_ai.request.temperature"
TOP_P = "gen_ai.request.top_p"
TOP_K = "gen_ai.request.top_k"
SEED = "gen_ai.request.seed"
MAX_TOKENS = "gen_ai.request.max_tokens"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
FINISH_REASONS = "gen_ai.response.finish_reasons"
FIRST_TOKEN_S = "gen_ai.response.time_to_first_chunk"
METHOD = "http.request.method"
ROUTE = "http.route"
STATUS = "http.response.status_code"
ERROR = "error.type"

# Attribute names of this package: no convention has exits, drafts and hops.
NODE = "ruyi.node"
EXITS = "ruyi.exits"
"""Exits that decided tokens, in the order of the tokens."""
TOKENS = "ruyi.tokens"
"""Number of tokens that were decided."""
DRAFTED = "ruyi.drafted"
ACCEPTED = "ruyi.accepted"
ROWS = "ruyi.rows"
"""Number of positions that ran through the layers, drafts included."""
QUEUE_S = "ruyi.queue_s"
COMPUTE_S = "ruyi.compute_s"
POSITIONS = "ruyi.positions"
"""Number of positions in the messages to the next node."""
ASKED = "ruyi.asked"
"""Number of positions that the next node is asked about."""
BYTES_UP = "ruyi.bytes_up"
BYTES_DOWN = "ruyi.bytes_down"
WIRE_S = "ruyi.wire_s"
ESCALATIONS = "ruyi.escalations"


def now_ns() -> int:
    """Return the wall clock's time in nanoseconds, by which the spans of several processes line up."""
    return time.time_ns()


class Span:
    """An activity with a start and an end. This class itself records nothing; see `NO_SPAN`.

    As a context manager it ends with the block, and names the exception that left it.
    """

    __slots__ = ()

    @property
    def traceparent(self) -> str:
        """The context to send to whoever continues the trace; empty if they decide by themselves."""
        return ""

    @property
    def trace_id(self) -> str:
        """The trace's number in hexadecimal; empty if there is none."""
        return self.traceparent[3:35]

    def __bool__(self) -> bool:
        """Whether it records."""
        return False

    def child(self, name: str, /, *, ago_s: float = 0.0, **attributes: Attribute) -> Span:
        """Start a part of this activity.

        Args:
            name: its name.
            ago_s: seconds since it started, for one that is recorded when it has ended.
            attributes: what is known about it.
        """
        return self

    def set(self, **attributes: Attribute) -> None:
        """Add attributes."""

    def end(self, **attributes: Attribute) -> None:
        """Add attributes and end; only the first call counts."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.end(**{} if kind is None else {ERROR: kind.__name__})


NO_SPAN = Span()
"""The span of a request that nobody traces."""

current_span: ContextVar[Span] = ContextVar("current_span", default=NO_SPAN)
"""The span of the request that the current task works for."""


class PassedSpan(Span):
    """A span that records nothing and passes a context on.

    Args:
        traceparent: the context, for instance that of a request that is not recorded.
    """

    __slots__ = ("_traceparent",)

    def __init__(self, traceparent: str) -> None:
        self._traceparent = traceparent

    @property
    def traceparent(self) -> str:
        """The context to send on."""
        return self._traceparent


_FORMAT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII | re.DOTALL)


class TraceContext:
    """A span of another process, as `traceparent` names it.

    Args:
        trace_id: number of the trace, 128 bits.
        span_id: number of the span, 64 bits.
        is_sampled: whether the trace is recorded.
    """

    __slots__ = ("is_sampled", "span_id", "trace_id")

    def __init__(self, trace_id: int, span_id: int, *, is_sampled: bool) -> None:
        self.trace_id, self.span_id, self.is_sampled = trace_id, span_id, is_sampled

    @classmethod
    def parse(cls, text: str | None) -> TraceContext | None:
        """Return the context in a `traceparent` from outside; None if there is none, or none that is valid."""
        if not text or len(text) > MAX_TRACEPARENT or (found := _FORMAT.fullmatch(text)) is None:
            return None
        version, trace_id, span_id, flags, rest = found.groups()
        if version == "ff" or (version == "00" and rest is not None) or not int(trace_id, 16) or not int(span_id, 16):
            return None
        return cls(int(trace_id, 16), int(span_id, 16), is_sampled=bool(int(flags, 16) & 1))

    def __str__(self) -> str:
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{int(self.is_sampled):02x}"


class Tracer:
    """Starts the spans of one node. This class itself records none, and passes contexts on; see `NO_TRACER`."""

    def start(self, name: str, traceparent: str | None = None, /, **attributes: Attribute) -> Span:
        """Start the first span of a request or a session on this node.

        Args:
            name: its name.
            traceparent: the caller's context, which is not checked yet. Without one, the node decides what it records.
            attributes: what is known about it.
        """
        context = TraceContext.parse(traceparent)
        return NO_SPAN if context is None else PassedSpan(str(context))

    def close(self) -> None:
        """Write or send what is left, within a bounded time; blocks."""


NO_TRACER = Tracer()
"""The tracer of a node that traces nothing."""
