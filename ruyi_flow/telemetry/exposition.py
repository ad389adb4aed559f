"""Metrics as Prometheus reads them: the counters become samples when they are asked for, and a node has a page."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ruyi_flow.errors import ConfigError
from ruyi_flow.telemetry import names
from ruyi_flow.telemetry.counters import Counter, Histogram, NodeCounters, ServerCounters
from ruyi_flow.telemetry.names import Kind, Metric
from ruyi_flow.types import NodeStatus

__all__ = ["make_registry", "node_metrics", "page", "serve_page", "server_metrics"]

Gauges = Callable[[], Mapping[Metric, tuple[tuple[str, ...], float]]]
"""Returns the gauges of this moment: the values of each one's own labels, and its value."""

_CALL_S = 10.0
"""Seconds that a reader of a node's page may take for everything; Prometheus itself gives up after as many."""

_MAX_CALLS = 16
"""Largest number of readers of a node's page at a time; further ones are turned away."""


class _Counters(Collector):
    """Turns counters and histograms into samples.

    Args:
        counters: what is counted; several of one metric are added up.
        gauges: returns the gauges.
        common: the node's name and tier; empty for a server.
    """

    def __init__(self, counters: Sequence[Counter | Histogram], gauges: Gauges, common: tuple[str, ...] = ()) -> None:
        self._counters, self._gauges, self._common = counters, gauges, common

    def collect(self) -> Iterable[Any]:
        """Return the metrics of this moment."""
        for metric, (labels, value) in self._gauges().items():
            gauge = GaugeMetricFamily(metric.name, metric.help, labels=metric.all_labels)
            gauge.add_metric(self._labels(metric, labels), value)
            yield gauge
        by_metric: dict[str, list[Counter | Histogram]] = {}
        for one in self._counters:
            by_metric.setdefault(one.metric.name, []).append(one)
        for same in by_metric.values():
            yield self._histogram(same) if same[0].metric.kind is Kind.HISTOGRAM else self._counter(same)

    def _labels(self, metric: Metric, labels: Sequence[str | int]) -> tuple[str, ...]:
        common = self._common if len(metric.all_labels) > len(labels) else ()
        return (*common, *map(str, labels))

    def _counter(self, same: Sequence[Any]) -> CounterMetricFamily:
        metric: Metric = same[0].metric
        sums: dict[tuple[str, ...], float] = {} if metric.labels else {self._labels(metric, ()): 0.0}
        for one in same:
            for labels, value in list(one.values.items()):
                key = self._labels(metric, labels)
                sums[key] = sums.get(key, 0) + value
        family = CounterMetricFamily(metric.name, metric.help, labels=metric.all_labels)
        for key, value in sums.items():
            family.add_metric(key, value)
        return family

    def _histogram(self, same: Sequence[Any]) -> HistogramMetricFamily:
        metric: Metric = same[0].metric
        none = [0] * (len(metric.buckets) + 1)
        sums: dict[tuple[str, ...], tuple[list[int], float]] = {}
        if not metric.labels:
            sums[self._labels(metric, ())] = none, 0.0
        for one in same:
            for labels, row in list(one.rows.items()):
                key = self._labels(metric, labels)
                counts, total = sums.get(key, (none, 0.0))
                sums[key] = ([a + b for a, b in zip(counts, row.counts, strict=True)], total + row.sum)
        family = HistogramMetricFamily(metric.name, metric.help, labels=metric.all_labels)
        bounds = [*(f"{bound:g}" for bound in metric.buckets), "+Inf"]
        for key, (counts, total) in sums.items():
            family.add_metric(key, list(zip(bounds, accumulate(counts), strict=True)), total)
        return family


def make_registry(*collectors: Collector) -> CollectorRegistry:
    """Return a registry of these metrics, and of what the process itself uses."""
    registry = CollectorRegistry()
    for one in collectors:
        registry.register(one)
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    return registry


def node_metrics(counters: NodeCounters, status: Callable[[], NodeStatus]) -> Collector:
    """Return the metrics of a node.

    Args:
        counters: what it counts.
        status: returns its status; called at each reading.
    """
    now = status()
    return _Counters(counters.all, lambda: _gauges(status()), (now.node, now.tier))


def server_metrics(counters: ServerCounters, running: Callable[[], int]) -> Collector:
    """Return the metrics of an HTTP server.

    Args:
        counters: what it counts.
        running: returns the number of requests that have not ended; called at each reading.
    """
    return _Counters(counters.all, lambda: {names.HTTP_RUNNING: ((), running())})


def _gauges(status: NodeStatus) -> dict[Metric, tuple[tuple[str, ...], float]]:
    return {
        names.RUNNING: ((), status.sessions),
        names.WAITING: ((), status.waiting),
        names.KV_CACHE: ((), status.used_positions / max(1, status.max_positions)),
        names.WEIGHT_BYTES: ((), status.tensor_bytes),
        names.INFO: ((status.version, status.family), 1),
        names.DRAINING: ((), status.state == "draining"),
    }


def page(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """Return the metrics as text and its content type, in the format that a reader accepts.

    Args:
        registry: the metrics.
        accept: the reader's header Accept; empty for none.
    """
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


@contextmanager
def serve_page(
    address: str, registry: CollectorRegistry, where: str, context: ssl.SSLContext | None = None
) -> Iterator[int]:
    """Serve GET /metrics and GET /health on threads of their own while the block lasts; yield the port.

    Args:
        address: host:port to listen on.
        registry: the metrics.
        where: what gave the address, for an error message.
        context: TLS of the page. Default: it is plain HTTP.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    host, _, port = address.rpartition(":")

    def answer(environ: dict[str, Any], start: Any) -> list[bytes]:
        path, method = environ.get("PATH_INFO", ""), environ.get("REQUEST_METHOD", "")
        status, content_type, body = "404 Not Found", "text/plain; charset=utf-8", b"there are /metrics and /health\n"
        if method not in ("GET", "HEAD"):
            status, body = "405 Method Not Allowed", b"only GET is allowed\n"
        elif path == "/health":
            status, content_type, body = "200 OK", "application/json", b'{"status":"ok"}'
        elif path == "/metrics":
            body, content_type = page(registry, environ.get("HTTP_ACCEPT", ""))
            status = "200 OK"
        start(status, [("Content-Type", content_type), ("Content-Length", str(len(body)))])
        return [b"" if method == "HEAD" else body]

    try:
        kind = _Threads6 if ":" in host else _Threads
        server = make_server(host.strip("[]"), int(port), answer, kind, _Quiet)
    except OSError as error:
        raise ConfigError(f"{where}: cannot listen on {address}: {error.strerror}; correct it") from None
    if context is not None:  # each reader's own thread makes the handshake, when it first reads
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


class _Threads(ThreadingMixIn, WSGIServer):
    """Answers each reader on a thread, so that a slow one stops no other."""

    daemon_threads = True
    block_on_close = False

    def server_bind(self) -> None:
        """Listen, without asking a name server for this machine's name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def __init__(self, *args: Any, **options: Any) -> None:
        self._places = threading.BoundedSemaphore(_MAX_CALLS)
        super().__init__(*args, **options)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a reader on a thread, if there is a place for it."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread can be started
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a reader, and cut it off when it takes too long: it may send a byte now and then for ever."""
        timer = threading.Timer(_CALL_S, _cut, (request,))
        timer.daemon = True
        timer.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            timer.cancel()
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore what a reader broke off."""


def _cut(request: socket.socket) -> None:
    with suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Write no line for each reading."""


class _Threads6(_Threads):
    address_family = socket.AF_INET6
