"""Spans for OpenTelemetry, sent to a collector over OTLP/HTTP. Imported only where tracing to a collector is on; needs
the extra `otel`.

The SDK's environment variables hold: OTEL_EXPORTER_OTLP_HEADERS, OTEL_SERVICE_NAME, OTEL_BSP_MAX_QUEUE_SIZE and others.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace import Span as SdkSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)
from opentelemetry.trace import Span as AnySpan

from ruyi_flow import __version__
from ruyi_flow.errors import ConfigError
from ruyi_flow.telemetry.chrome_trace import RequestRow, SharedTrace
from ruyi_flow.telemetry.spans import ERROR, NODE, Attribute, PassedSpan, Span, TraceContext, Tracer, now_ns

__all__ = ["OtelTracer", "endpoint"]

_KINDS = {"request": SpanKind.SERVER, "session": SpanKind.SERVER, "hop": SpanKind.CLIENT}
"""Kinds of the spans that cross processes; the others are internal."""

_SEND_S = 5.0
"""Seconds that sending a batch may take, with its retries."""

_CLOSE_S = 5.0
"""Seconds that the last batches may take."""

_COMPLAINT_S = 60.0
"""Seconds between two log lines about a collector that cannot be reached."""

logger = logging.getLogger(__name__)


class OtelTracer(Tracer):
    """Records the requests of one node with OpenTelemetry's SDK.

    Args:
        node: the node's name.
        share: share of the requests without a caller's context that are recorded, from 0 to 1.
        processor: takes the spans that have ended.
        trace: a Chrome trace that gets the same spans. Default: none.
    """

    def __init__(self, node: str, share: float, processor: SpanProcessor, trace: SharedTrace | None = None) -> None:
        name = os.environ.get("OTEL_SERVICE_NAME") or "ruyi-flow"
        about = {"service.name": name, "service.instance.id": node, "service.version": __version__, NODE: node}
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(share)), resource=Resource.create(about), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("ruyi_flow", __version__)
        self._trace = trace

    @classmethod
    def sending(cls, url: str, node: str, share: float, trace: SharedTrace | None = None) -> OtelTracer:
        """Return a tracer that sends spans to a collector, in batches and on a thread of its own.

        Args:
            url: the collector's address, for instance http://localhost:4318.
            node, share, trace: see `OtelTracer`.

        Raises:
            ConfigError: the address is no URL.
        """
        return cls(node, share, BatchSpanProcessor(_Sender(endpoint(url))), trace)

    def start(self, name: str, traceparent: str | None = None, /, **attributes: Attribute) -> Span:
        """Start the first span of a request or a session on this node; see `Tracer.start`."""
        parent, around = TraceContext.parse(traceparent), Context()
        if parent is not None:
            flags = TraceFlags(TraceFlags.SAMPLED if parent.is_sampled else TraceFlags.DEFAULT)
            remote = SpanContext(parent.trace_id, parent.span_id, is_remote=True, trace_flags=flags)
            around = set_span_in_context(NonRecordingSpan(remote), around)
        span = self._start(name, around, now_ns(), attributes)
        own = span.get_span_context()
        context = TraceContext(own.trace_id, own.span_id, is_sampled=own.trace_flags.sampled)
        if not isinstance(span, SdkSpan):
            return PassedSpan(str(context))
        return _OtelSpan(self, span, None if self._trace is None else self._trace.row(context))

    def close(self) -> None:
        """Send what is left; see `Tracer.close`."""
        closing = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        closing.start()
        if self._trace is not None:
            self._trace.close()
        closing.join(_CLOSE_S)

    def _start(self, name: str, around: Context, start_ns: int, attributes: dict[str, Attribute]) -> AnySpan:
        kind = _KINDS.get(name, SpanKind.INTERNAL)
        return self._tracer.start_span(name, around, kind=kind, attributes=attributes, start_time=start_ns)


class _OtelSpan(Span):
    """A span of the SDK."""

    __slots__ = ("_row", "_span", "_tracer")

    def __init__(self, tracer: OtelTracer, span: SdkSpan, row: RequestRow | None) -> None:
        self._tracer, self._span, self._row = tracer, span, row

    @property
    def traceparent(self) -> str:
        own = self._span.get_span_context()
        return str(TraceContext(own.trace_id, own.span_id, is_sampled=True))

    def __bool__(self) -> bool:
        return True

    def child(self, name: str, /, *, ago_s: float = 0.0, **attributes: Attribute) -> Span:
        around = set_span_in_context(self._span, Context())
        span = self._tracer._start(name, around, now_ns() - round(ago_s * 1e9), attributes)
        assert isinstance(span, SdkSpan), "a child of a recorded span is recorded"
        return _OtelSpan(self._tracer, span, self._row)

    def set(self, **attributes: Attribute) -> None:
        if self._span.is_recording():
            self._span.set_attributes(attributes)

    def end(self, **attributes: Attribute) -> None:
        span = self._span
        if not span.is_recording():
            return
        self.set(**attributes)
        if ERROR in attributes:
            span.set_status(Status(StatusCode.ERROR))
        start_ns, end_ns = span.start_time or 0, now_ns()
        if self._row is not None:
            self._row.add(span.name, start_ns, end_ns, dict(span.attributes or {}))  # type: ignore[arg-type]
        span.end(end_ns)


class _Sender(SpanExporter):
    """Sends batches to a collector. One that cannot be reached costs a log line a minute, and never a token.

    Args:
        url: where batches are sent.
    """

    def __init__(self, url: str) -> None:
        self._url, self._inner = url, OTLPSpanExporter(url, timeout=_SEND_S)
        self._lost, self._complained_at = 0, -_COMPLAINT_S
        logging.getLogger(OTLPSpanExporter.__module__).setLevel(logging.CRITICAL)  # its lines are one a batch

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._inner.export(spans)
        if result is not SpanExportResult.SUCCESS:
            self._lost += len(spans)
            now = time.monotonic()
            if now - self._complained_at >= _COMPLAINT_S:
                logger.warning("the collector at %s does not take spans; %d are lost so far", self._url, self._lost)
                self._complained_at = now
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()  # type: ignore[no-untyped-call]


def endpoint(url: str) -> str:
    """Return where a collector takes spans: at the path /v1/traces, unless the address names another.

    Raises:
        ConfigError: the address is no URL of http or https.
    """
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_url = False
    if not is_url:
        raise ConfigError(f"--otlp {url}: is no address of a collector; write http://localhost:4318")
    return url.rstrip("/") + "/v1/traces" if parts.path in ("", "/") else url
