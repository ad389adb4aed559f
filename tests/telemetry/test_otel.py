"""Traces over real nodes: one trace a request, whoever samples it, and spans that reach a collector."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from ruyi_flow.client import AsyncClient, Client
from ruyi_flow.errors import ConfigError, NodeError, RequestError
from ruyi_flow.reply import Reply
from ruyi_flow.requests import GenerateRequest, SamplingParams
from ruyi_flow.telemetry import otel
from ruyi_flow.telemetry.chrome_trace import ChromeTracer, SharedTrace
from ruyi_flow.telemetry.otel import OtelTracer, endpoint
from ruyi_flow.telemetry.spans import NO_SPAN, PassedSpan, Span, TraceContext, Tracer, current_span
from ruyi_flow.testing import Cluster, cluster, cut_topology
from ruyi_flow.transport import codec
from ruyi_flow.transport.peer import METHODS
from tests.telemetry.test_chrome_trace import names, read_shared

CUTS = [(2,), (4,), (6,)]
NODES = ("n0", "n1", "n2")
PROMPT = [5, 6, 7, 8]
OPTIONS: dict[str, Any] = {"mode": "exact", "draft": 2, "max_new_tokens": 6}


class Recorded:
    """The spans of several nodes that have ended."""

    def __init__(self, share: float = 1.0) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracers = {node: self.tracer(node, share) for node in NODES}

    def tracer(self, node: str, share: float) -> OtelTracer:
        """Return a node's tracer, whose spans come here."""
        return OtelTracer(node, share, SimpleSpanProcessor(self._exporter))

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        """All spans, in the order of their ends."""
        return self._exporter.get_finished_spans()

    def named(self, name: str, node: str | None = None) -> list[ReadableSpan]:
        """Return the spans of a name, on one node or all."""
        return [s for s in self.spans if s.name == name and node in (None, node_of(s))]


def node_of(span: ReadableSpan) -> str:
    return str(span.resource.attributes["ruyi.node"])


def about(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def trace_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.trace_id)


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None and span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else int(span.parent.span_id)


@asynccontextmanager
async def nodes(tiny: Path, tracers: dict[str, Tracer]) -> AsyncIterator[Cluster]:
    async with cluster(cut_topology(tiny, CUTS), tracers=tracers) as running:
        yield running
        await running.settle()


async def test_a_request_is_one_trace_over_all_nodes(tiny: Path) -> None:
    recorded = Recorded()
    async with nodes(tiny, {**recorded.tracers}) as running, AsyncClient(running.topology) as client:
        reply = await client.generate(PROMPT, temperature=0.5, seed=3, **OPTIONS)
    assert len({trace_of(s) for s in recorded.spans}) == 1
    (request,) = recorded.named("request")
    assert request.parent is None and node_of(request) == "n0" and request.kind is SpanKind.SERVER
    assert request.resource.attributes["service.name"] == "ruyi-flow"
    assert request.resource.attributes["service.instance.id"] == "n0"
    told = about(request)
    assert told["gen_ai.operation.name"] == "text_completion" and told["gen_ai.provider.name"] == "ruyi-flow"
    assert told["gen_ai.usage.input_tokens"] == 4 and told["gen_ai.usage.output_tokens"] == 6
    assert told["gen_ai.response.finish_reasons"] == ("length",) and told["gen_ai.request.seed"] == 3
    assert told["gen_ai.request.temperature"] == 0.5 and told["gen_ai.request.max_tokens"] == 6
    assert told["gen_ai.request.model"] == told["gen_ai.response.model"] == tiny.name
    assert told["ruyi.bytes_up"] == sum(hop.bytes_up for hop in reply.stats.hops)
    sessions = {node_of(s): s for s in recorded.named("session")}
    assert list(sessions) in (["n1", "n2"], ["n2", "n1"])
    assert parent_of(sessions["n1"]) == id_of(request) and parent_of(sessions["n2"]) == id_of(sessions["n1"])
    assert all(s.status.status_code is StatusCode.UNSET for s in recorded.spans)
    for name in ("queue", "tokenize", "prefill"):
        (span,) = recorded.named(name, "n0")
        assert parent_of(span) == id_of(request), name
    assert [node_of(s) for s in recorded.named("queue")] == ["n0", "n1", "n2"]
    (prefill,) = recorded.named("prefill")
    rounds = [prefill, *recorded.named("round")]
    assert len(rounds) > 1 and {parent_of(s) for s in rounds} == {id_of(request)}
    assert sum(about(s)["ruyi.tokens"] for s in rounds) >= 6
    assert all(about(s)["ruyi.exits"] == (6,) * about(s)["ruyi.tokens"] for s in rounds)
    assert sum(about(s)["ruyi.drafted"] for s in rounds) == reply.stats.drafted
    assert sum(about(s)["ruyi.accepted"] for s in rounds) == reply.stats.accepted
    hops = recorded.named("hop", "n0")
    assert {parent_of(s) for s in hops} == {id_of(s) for s in rounds} and len(hops) == len(rounds)
    spent = {hop.node: hop for hop in reply.stats.hops}
    assert sum(about(s)["ruyi.bytes_up"] for s in hops) == spent["n1"].bytes_up
    assert sum(about(s)["ruyi.positions"] for s in hops) == spent["n1"].positions
    assert {parent_of(s) for s in recorded.named("hop", "n1")} == {id_of(sessions["n1"])}
    assert all(s.kind is SpanKind.CLIENT and about(s)["ruyi.asked"] >= 1 for s in recorded.named("hop"))
    for node in NODES:
        steps = recorded.named("step", node)
        parents = {id_of(s) for s in rounds} if node == "n0" else {id_of(sessions[node])}
        assert {parent_of(s) for s in steps} <= parents and len(steps) >= len(rounds)
        assert sum(about(s)["ruyi.compute_s"] for s in steps) == pytest.approx(spent[node].compute_s)
        for step in steps:
            lasted_s = about(step)["ruyi.compute_s"] + about(step)["ruyi.queue_s"]
            assert seconds(step) >= lasted_s - 1e-6
    for span in recorded.spans:
        assert span.start_time is not None and span.end_time is not None and span.start_time <= span.end_time
        within = [s for s in recorded.spans if id_of(s) == parent_of(span) and node_of(s) == node_of(span)]
        assert all(s.start_time <= span.start_time for s in within)  # type: ignore[operator]


async def test_sessions_that_share_batches_keep_their_own_traces(tiny: Path) -> None:
    recorded = Recorded()
    async with nodes(tiny, {**recorded.tracers}) as running, AsyncClient(running.topology) as client:
        batches = running.engines["n0"]
        many = [client.generate([5, 6, 7 + i], **OPTIONS | {"max_new_tokens": 24}) for i in range(8)]
        replies = await asyncio.gather(*many)
        assert batches._replicas is not None
        assert batches._replicas.pick().batches._running is not None, "messages went in batches"
    requests = {trace_of(s): s for s in recorded.named("request")}
    assert len(requests) == 8
    for trace, request in requests.items():
        mine = [s for s in recorded.spans if trace_of(s) == trace]
        known = {id_of(s) for s in mine}
        assert all(s is request or parent_of(s) in known for s in mine)
        sessions = {node_of(s): s for s in mine if s.name == "session"}
        assert set(sessions) == {"n1", "n2"}
        for node, session in sessions.items():
            steps = [s for s in mine if s.name == "step" and node_of(s) == node]
            assert steps and {parent_of(s) for s in steps} == {id_of(session)}
    found = sum(about(s)["ruyi.positions"] for s in recorded.named("hop", "n0"))
    assert found == sum(hop.positions for reply in replies for hop in reply.stats.hops if hop.node == "n1")


async def test_nothing_is_recorded_at_a_share_of_zero_and_deeper_nodes_obey(tiny: Path) -> None:
    recorded = Recorded()
    recorded.tracers["n0"] = recorded.tracer("n0", 0.0)
    async with nodes(tiny, {**recorded.tracers}) as running, AsyncClient(running.topology) as client:
        await client.generate(PROMPT, **OPTIONS)
    assert recorded.spans == ()


async def test_a_node_that_traces_nothing_passes_the_context_on(tiny: Path) -> None:
    recorded = Recorded(share=0.0)
    context = TraceContext(0x1234 << 64, 0x5678, is_sampled=True)
    only_last: dict[str, Tracer] = {"n2": recorded.tracers["n2"]}
    async with nodes(tiny, only_last) as running, AsyncClient(running.topology) as client:
        token = current_span.set(PassedSpan(str(context)))
        await client.generate(PROMPT, **OPTIONS)
        current_span.reset(token)
        await client.generate(PROMPT, **OPTIONS)
    (session,) = recorded.named("session")
    assert trace_of(session) == context.trace_id and parent_of(session) == context.span_id
    assert session.parent is not None and session.parent.is_remote
    assert {s.name for s in recorded.spans} == {"session", "queue", "step"}


def test_the_callers_decision_counts_for_both_clients(tiny: Path) -> None:
    recorded = Recorded(share=0.5)

    async def ask(context: TraceContext) -> int:
        async with nodes(tiny, {**recorded.tracers}) as running:

            def synchronous() -> None:
                with Client(running.topology) as client:
                    list(client.stream(PROMPT, **OPTIONS))

            token = current_span.set(PassedSpan(str(context)))
            async with AsyncClient(running.topology) as client:
                await client.generate(PROMPT, **OPTIONS)
            await asyncio.to_thread(synchronous)
            current_span.reset(token)
        return len(recorded.named("request"))

    assert asyncio.run(ask(TraceContext(1 << 100, 7, is_sampled=False))) == 0
    assert asyncio.run(ask(TraceContext(1 << 100, 7, is_sampled=True))) == 2
    assert {parent_of(s) for s in recorded.named("request")} == {7}


@pytest.mark.parametrize(
    "sent",
    [
        [],
        ["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7"],
        ["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00-more"],
        ["00-00000000000000000000000000000000-00f067aa0ba902b7-01"],
        ["00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-00"],
        ["ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"],
        ["x" * 4000],
    ],
)
async def test_a_context_that_is_malformed_is_as_good_as_none(tiny: Path, sent: list[str]) -> None:
    recorded = Recorded()
    async with cluster(cut_topology(tiny, [(2, 4, 6)]), tracers={**recorded.tracers}) as running:
        async with grpc.aio.insecure_channel(str(running.topology.entry.address)) as channel:
            call = channel.unary_stream(METHODS["Generate"])
            request = codec.generate_to_pb(
                GenerateRequest(tuple(PROMPT), sampling=SamplingParams(max_new_tokens=2))
            ).SerializeToString()
            async for _ in call(request, metadata=[("traceparent", text) for text in sent]):
                pass
    (root,) = recorded.named("request")
    assert root.parent is None and trace_of(root) != 0x4BF92F3577B34DA6A3CE929D0E0E4736


async def test_spans_end_when_a_request_fails_or_its_client_goes(tiny: Path) -> None:
    recorded = Recorded()
    async with nodes(tiny, {**recorded.tracers}) as running, AsyncClient(running.topology, max_retries=0) as client:
        with pytest.raises(RequestError):
            await client.generate([5] * 600)
        for number in range(6):  # in different moments, most of them with a question under way
            events = client.events(PROMPT, **OPTIONS | {"max_new_tokens": 300})
            for _ in range(number + 1):
                await anext(events)
            await events.aclose()
            await running.settle()
        for _ in range(200):
            if len(recorded.named("session")) == 12:
                break
            await asyncio.sleep(0.01)
    refused, *left = recorded.named("request")
    assert about(refused)["error.type"] == "ContextLengthError" and refused.status.status_code is StatusCode.ERROR
    assert [about(s)["error.type"] for s in left] == ["CancelledError"] * 6
    sessions = recorded.named("session")
    assert len(sessions) == 12 and not any("error.type" in about(s) for s in sessions)


async def test_a_lost_node_is_the_error_of_its_hop(tiny: Path) -> None:
    recorded = Recorded()
    topology = cut_topology(tiny, [(2,), (4, 6)])
    async with cluster(topology, tracers={**recorded.tracers}) as running:
        nowhere = running.topology.nodes[1].model_copy(update={"address": "127.0.0.1:1"})
        engine = running.engines["n0"]
        engine._next = nowhere, running.topology.links[0]
        engine._replicas = engine._make_replicas(*engine._next)
        async with AsyncClient(running.topology) as client:
            with pytest.raises(NodeError):
                await client.generate(PROMPT, **OPTIONS)
    failed = {s.name: about(s).get("error.type") for s in recorded.spans if s.status.status_code is StatusCode.ERROR}
    assert failed == {"hop": "NodeUnavailable", "prefill": "NodeUnavailable", "request": "NodeUnavailable"}


async def test_answers_are_the_same_with_and_without_traces(tiny: Path) -> None:
    replies: list[Reply] = []
    for tracers in ({}, Recorded().tracers):
        async with nodes(tiny, {**tracers}) as running, AsyncClient(running.topology) as client:
            replies.append(await client.generate(PROMPT, mode="token", threshold=0.3, draft=3, max_new_tokens=40))
    assert [(t.id, t.exit) for t in replies[0].tokens] == [(t.id, t.exit) for t in replies[1].tokens]


async def test_a_chrome_trace_has_slices_of_all_nodes(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    tracers: dict[str, Tracer] = {node: ChromeTracer(SharedTrace(path, node), 1.0) for node in NODES}
    async with nodes(tiny, tracers) as running, AsyncClient(running.topology) as client:
        await client.generate(PROMPT, **OPTIONS)
        await asyncio.gather(*(client.generate(PROMPT, **OPTIONS) for _ in range(3)))
    for tracer in tracers.values():
        await asyncio.to_thread(tracer.close)
    found = read_shared(path)
    called = names(found)
    slices = [(called[e["pid"], e["tid"]], e) for e in found if e["ph"] == "X"]
    assert len({thread for (_, thread), _ in slices}) == 4, "requests have the same name on all nodes"
    for thread in {thread for (_, thread), _ in slices}:
        kinds = {(process, e["name"]) for (process, name), e in slices if name == thread}
        assert {("n0", "request"), ("n0", "prefill"), ("n0", "hop"), ("n1", "session"), ("n2", "session")} <= kinds
        assert {(node, "step") for node in NODES} <= kinds
    times = [e["ts"] / 1e6 for _, e in slices]
    assert time.time() - 60 < min(times) <= max(times) < time.time(), "wall-clock times, so that processes line up"


def test_the_same_spans_go_to_a_collector_and_into_a_file(tmp_path: Path) -> None:
    exporter = InMemorySpanExporter()
    trace = SharedTrace(tmp_path / "t.json", "n0")
    tracer = OtelTracer("n0", 1.0, SimpleSpanProcessor(exporter), trace)
    with tracer.start("request") as span, span.child("round", **{"ruyi.tokens": 2}):
        pass
    tracer.close()
    slices = [e for e in read_shared(tmp_path / "t.json") if e["ph"] == "X"]
    assert [(e["name"], e["args"]) for e in slices] == [("round", {"ruyi.tokens": 2}), ("request", {})]
    spans = exporter.get_finished_spans()
    assert [s.name for s in spans] == ["round", "request"]
    for span_, slice_ in zip(spans, slices, strict=True):
        assert span_.start_time is not None and slice_["ts"] == pytest.approx(span_.start_time / 1000)


def test_a_recorded_span_that_has_ended_takes_no_more() -> None:
    exporter = InMemorySpanExporter()
    span = OtelTracer("n0", 1.0, SimpleSpanProcessor(exporter)).start("request")
    span.end(**{"ruyi.tokens": 1})
    span.set(**{"ruyi.tokens": 2})
    span.end(**{"error.type": "Late"})
    (ended,) = exporter.get_finished_spans()
    assert about(ended) == {"ruyi.tokens": 1}


# ---- a collector ----


class Collector(ThreadingHTTPServer):
    """A collector that keeps what it is sent.

    Args:
        status: the status of its replies.
    """

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = status
        self.requests: list[tuple[str, str, ExportTraceServiceRequest]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        message = ExportTraceServiceRequest.FromString(body)
        self.server.requests.append((self.path, self.headers["content-type"], message))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def collector(status: int = 200) -> Iterator[Collector]:
    with Collector(status) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


async def test_a_collector_receives_the_spans_of_all_nodes(tiny: Path) -> None:
    with collector() as server:
        tracers: dict[str, Tracer] = {node: OtelTracer.sending(server.url, node, 1.0) for node in NODES}
        async with nodes(tiny, tracers) as running, AsyncClient(running.topology) as client:
            await client.generate(PROMPT, **OPTIONS)
        for tracer in tracers.values():
            await asyncio.to_thread(tracer.close)
    assert {path for path, _, _ in server.requests} == {"/v1/traces"}
    assert {kind for _, kind, _ in server.requests} == {"application/x-protobuf"}
    found: dict[str, set[str]] = {}
    traces = set()
    for resource in (r for _, _, message in server.requests for r in message.resource_spans):
        named = {a.key: a.value.string_value for a in resource.resource.attributes}
        assert named["service.name"] == "ruyi-flow"
        for span in (s for scope in resource.scope_spans for s in scope.spans):
            found.setdefault(named["service.instance.id"], set()).add(span.name)
            traces.add(span.trace_id)
    assert found == {
        "n0": {"request", "tokenize", "queue", "prefill", "round", "hop", "step"},
        "n1": {"session", "queue", "hop", "step"},
        "n2": {"session", "queue", "step"},
    }
    assert len(traces) == 1


@pytest.mark.parametrize("status", [None, 400])
def test_a_collector_that_takes_nothing_costs_one_log_line(
    status: int | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otel, "_SEND_S", 0.2)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with collector(status or 200) as server, caplog.at_level(logging.INFO):
        url = server.url if status else "http://127.0.0.1:1"
        tracer = OtelTracer.sending(url, "n0", 1.0)
        for _ in range(5):
            tracer.start("request").end()
            time.sleep(0.05)
        tracer.close()
    (line,) = caplog.messages
    assert line.startswith(f"the collector at {url}/v1/traces does not take spans; ")


def test_a_collector_that_hangs_delays_the_end_by_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otel, "_CLOSE_S", 0.3)
    monkeypatch.setattr(otel, "_SEND_S", 30.0)
    with collector() as server:
        release = Thread(target=time.sleep, args=(3,))
        server.status = 503  # it is asked again and again
        tracer = OtelTracer.sending(server.url, "n0", 1.0)
        tracer.start("request").end()
        release.start()
        tracer.close()
        assert release.is_alive(), "the end waited for the collector"
        release.join()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://localhost:4318", "http://localhost:4318/v1/traces"),
        ("https://collector/", "https://collector/v1/traces"),
        ("http://[::1]:4318/otlp/v1/traces", "http://[::1]:4318/otlp/v1/traces"),
    ],
)
def test_the_address_of_a_collector_needs_no_path(given: str, expected: str) -> None:
    assert endpoint(given) == expected


@pytest.mark.parametrize("given", ["localhost:4318", "ftp://collector", "http://", "http://[", "http://a:99999", ""])
def test_an_address_that_is_no_url_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a collector; write http://localhost:4318"):
        endpoint(given)


def test_the_span_of_nobody_does_nothing() -> None:
    span: Span = NO_SPAN
    with span.child("round", ago_s=1.0, **{"ruyi.tokens": 2}) as inner:
        assert inner is NO_SPAN and not inner and inner.traceparent == ""
