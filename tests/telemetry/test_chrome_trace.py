"""The writer of Chrome traces: simulations, and requests of running nodes in a file that several processes share."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruyi_flow.errors import ConfigError
from ruyi_flow.telemetry import chrome_trace
from ruyi_flow.telemetry.chrome_trace import ChromeTrace, ChromeTracer, SharedTrace
from ruyi_flow.telemetry.spans import NO_SPAN, TraceContext

# ---- simulations ----


def read(path: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(path.read_text())
    for event in events:
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert event["ph"] in ("M", "X", "b", "n", "e")
        assert all(math.isfinite(event[key]) and event[key] >= 0 for key in ("ts", "dur") if key in event)
    return events


def names(events: list[dict[str, Any]]) -> dict[tuple[int, int], tuple[str, str]]:
    """Return the names of each process and thread."""
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    return {key: (processes[key[0]], name) for key, name in threads.items()}


def test_a_trace_names_its_processes_and_threads(tmp_path: Path) -> None:
    trace = ChromeTrace(tmp_path / "t.json")
    trace.slice("phone", "phone 0", "exit 2", 0.0, 0.25, rows=3)
    trace.slice("phone", "phone 1", "exit 2", 0.0, 0.5)
    trace.slice("link phone-cloud", "up 0", "message", 0.25, 0.75, bytes=10)
    trace.request(7, 0.0, 0.5, 1.5, tokens=3)
    trace.close()
    found = read(tmp_path / "t.json")
    slices = [e for e in found if e["ph"] == "X"]
    called = names(found)
    assert [called[e["pid"], e["tid"]] for e in slices] == [
        ("phone", "phone 0"),
        ("phone", "phone 1"),
        ("link phone-cloud", "up 0"),
    ]
    assert [(e["name"], e["ts"], e["dur"], e["args"]) for e in slices][0] == ("exit 2", 0.0, 250_000.0, {"rows": 3})
    request = [e for e in found if e.get("cat") == "request"]
    assert [(e["ph"], e["ts"]) for e in request] == [("b", 0.0), ("n", 500_000.0), ("e", 1_500_000.0)]
    assert {e["id"] for e in request} == {7} and request[0]["args"]["tokens"] == 3


def test_a_request_without_a_token_has_no_first_one(tmp_path: Path) -> None:
    trace = ChromeTrace(tmp_path / "t.json")
    trace.request(0, 0.0, None, 1.5, error="NodeUnavailable")
    trace.close()
    request = [e for e in read(tmp_path / "t.json") if e.get("cat") == "request"]
    assert [e["ph"] for e in request] == ["b", "e"] and request[0]["args"]["error"] == "NodeUnavailable"


def test_an_empty_trace_is_json(tmp_path: Path) -> None:
    ChromeTrace(tmp_path / "t.json").close()
    assert read(tmp_path / "t.json") == []


@given(spans=st.lists(st.tuples(st.floats(0, 10), st.floats(0, 3)), max_size=40))
def test_slices_of_one_thread_never_overlap(
    tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[float, float]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "slices.json"
    trace = ChromeTrace(path)
    for at, lasts in sorted(spans, key=lambda span: span[0] + span[1]):
        trace.slice("link", "up 0", "message", at, lasts)
    trace.close()
    slices = [e for e in read(path) if e["ph"] == "X"]
    assert len(slices) == len(spans)
    ends: dict[int, float] = {}
    for e in slices:
        assert e["ts"] >= ends.get(e["tid"], 0.0) - 0.01, "times are to the nanosecond"
        ends[e["tid"]] = e["ts"] + e["dur"]


def test_slices_that_overlap_are_on_threads_of_one_name(tmp_path: Path) -> None:
    trace = ChromeTrace(tmp_path / "t.json")
    for at, lasts in ((0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.5, 1.0)):
        trace.slice("link", "up 0", "message", at, lasts)
    trace.close()
    found = read(tmp_path / "t.json")
    assert [e["tid"] for e in found if e["ph"] == "X"] == [1, 2, 1, 2]
    assert set(names(found).values()) == {("link", "up 0")}


def test_a_full_trace_takes_no_more_and_is_whole(tmp_path: Path) -> None:
    trace = ChromeTrace(tmp_path / "t.json")
    number = 0
    while not trace.full:
        trace.slice("phone", "phone 0", "exit 2", number, 1.0)
        trace.request(number, number, 0.5, 1.5)
        number += 1
    for _ in range(5):
        trace.slice("phone", "phone 9", "exit 2", number, 1.0)
        trace.request(number, number, 0.5, 1.5)
    trace.close()
    found = read(tmp_path / "t.json")
    assert 40_000 <= sum(e["ph"] != "M" for e in found) < 40_004
    kinds = [e["ph"] for e in found]
    assert kinds.count("b") == kinds.count("n") == kinds.count("e") == kinds.count("X") == number


# ---- requests of running nodes ----

CONTEXT = TraceContext(0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7, is_sampled=True)


def read_shared(path: Path) -> list[dict[str, Any]]:
    """Return the events of a file whose closing bracket nobody writes, as viewers read it."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("[\n") and text.endswith("},\n")
    events: list[dict[str, Any]] = json.loads(text.removesuffix(",\n") + "]")
    return events


def test_slices_of_a_request_nest_by_time(tmp_path: Path) -> None:
    trace = SharedTrace(tmp_path / "t.json", "phone")
    row = trace.row(CONTEXT)
    row.add("step", 2_000, 3_000, {"ruyi.rows": 3})
    row.add("hop", 3_000, 6_000, {})
    row.add("step", 4_000, 7_000, {})  # drafted while the answer was awaited
    row.add("round", 1_000, 8_000, {})
    row.add("round", 8_000, 9_000, {})
    row.add("request", 0, 10_000, {})
    trace.close()
    found = read_shared(tmp_path / "t.json")
    slices = [e for e in found if e["ph"] == "X"]
    tids = [e["tid"] for e in slices]
    assert [tid == tids[0] for tid in tids] == [True, True, False, True, True, True]
    assert [(e["name"], e["ts"], e["dur"]) for e in slices][:2] == [("step", 2.0, 1.0), ("hop", 3.0, 3.0)]
    assert slices[0]["args"] == {"ruyi.rows": 3}
    assert set(names(found).values()) == {("phone", "request 4bf92f35")}


@given(spans=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=30))
def test_slices_of_one_thread_nest_or_are_apart(
    tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "nested.json"
    path.unlink(missing_ok=True)
    trace = SharedTrace(path, "phone")
    row = trace.row(CONTEXT)
    for start, lasts in sorted(spans, key=lambda span: span[0] + span[1]):
        row.add("step", 1000 * start, 1000 * (start + lasts), {})
    trace.close()
    slices = [e for e in read_shared(path) if e["ph"] == "X"]
    assert len(slices) == len(spans)
    for i, a in enumerate(slices):
        for b in slices[i + 1 :]:  # b ends later
            if a["tid"] == b["tid"]:
                assert b["ts"] <= a["ts"] or b["ts"] >= a["ts"] + a["dur"]


WRITER = """
import sys
from pathlib import Path
from ruyi_flow.telemetry.chrome_trace import SharedTrace
from ruyi_flow.telemetry.spans import TraceContext
trace = SharedTrace(Path(sys.argv[1]), sys.argv[2])
for number in range(20):
    row = trace.row(TraceContext(number + 1 << 96, 1, is_sampled=True))
    for i in range(50):
        row.add("step", 1000 * i, 1000 * i + 500, {"about": "x" * 200})
trace.close()
"""


def test_several_processes_append_whole_lines_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    SharedTrace.create(path)
    arguments = [[sys.executable, "-c", WRITER, str(path), f"n{i}"] for i in range(3)]
    writers = [subprocess.Popen(command) for command in arguments]
    assert [writer.wait(50) for writer in writers] == [0, 0, 0]
    found = read_shared(path)
    slices = [e for e in found if e["ph"] == "X"]
    assert len(slices) == 3 * 20 * 50
    called = names(found)
    assert {called[e["pid"], e["tid"]][0] for e in slices} == {"n0", "n1", "n2"}
    tids = [e["tid"] for e in found if e["name"] == "thread_name"]
    assert len(set(tids)) == len(tids) == 60


def test_a_node_that_starts_again_continues_the_file(tmp_path: Path) -> None:
    for _ in range(2):
        trace = SharedTrace(tmp_path / "t.json", "phone")
        trace.row(CONTEXT).add("request", 0, 1000, {})
        trace.close()
    slices = [e for e in read_shared(tmp_path / "t.json") if e["ph"] == "X"]
    assert len(slices) == 2 and slices[0]["pid"] == slices[1]["pid"]
    SharedTrace.create(tmp_path / "t.json")
    assert (tmp_path / "t.json").read_text() == "[\n"


@pytest.mark.parametrize("content", ["my notes\n", "[\n]\n", '[\n{"ph": "M"}\n]\n'])
def test_a_file_that_is_no_such_trace_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    for call in (SharedTrace.create, lambda path: SharedTrace(path, "phone")):
        with pytest.raises(ConfigError, match="name a file that does not exist yet"):
            call(path)
    assert path.read_text() == content
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        SharedTrace(tmp_path / "nowhere" / "t.json", "phone")


def test_a_full_file_takes_no_more_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(chrome_trace, "_SLICES", 3)
    tracer = ChromeTracer(SharedTrace(tmp_path / "t.json", "phone"), 1.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            tracer.start("request").end()
    assert not tracer.start("request")
    tracer.close()
    assert sum(e["ph"] == "X" for e in read_shared(tmp_path / "t.json")) == 3
    assert len(caplog.messages) == 1 and "3 slices of phone" in caplog.messages[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_a_full_disk_ends_the_trace_and_no_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(chrome_trace, "_open_shared", lambda path: os.open(path, os.O_WRONLY))
    tracer = ChromeTracer(SharedTrace(Path("/dev/full"), "phone"), 1.0)
    tracer.start("request").end()
    tracer.close()
    assert "No space left on device" in caplog.text
    assert not tracer.start("request")


def test_a_span_becomes_a_slice_with_its_attributes_when_it_ends(tmp_path: Path) -> None:
    tracer = ChromeTracer(SharedTrace(tmp_path / "t.json", "phone"), 1.0)
    span = tracer.start("request", str(CONTEXT), **{"ruyi.node": "phone"})
    with pytest.raises(ValueError), span.child("round"):
        span.child("step", ago_s=0.0, **{"ruyi.rows": 2}).end()
        raise ValueError
    span.set(**{"ruyi.tokens": 5})
    span.end()
    span.end(**{"ruyi.tokens": 6})
    tracer.close()
    slices = [e for e in read_shared(tmp_path / "t.json") if e["ph"] == "X"]
    assert [(e["name"], e["args"]) for e in slices] == [
        ("step", {"ruyi.rows": 2}),
        ("round", {"error.type": "ValueError"}),
        ("request", {"ruyi.node": "phone", "ruyi.tokens": 5}),
    ]


def test_a_tracer_samples_requests_and_obeys_callers(tmp_path: Path) -> None:
    trace = SharedTrace(tmp_path / "t.json", "phone")
    some = ChromeTracer(trace, 0.25)
    some.random.seed(1)
    recorded = [bool(some.start("request")) for _ in range(4000)]
    assert 850 < sum(recorded) < 1150
    for share, begins in ((0.0, "00-"), (1.0, "00-")):
        span = ChromeTracer(trace, share).start("request")
        assert bool(span) == bool(share)
        assert span.traceparent.startswith(begins) and span.traceparent.endswith("-01" if share else "-00")
        assert TraceContext.parse(span.traceparent) is not None
    never, always = ChromeTracer(trace, 0.0), ChromeTracer(trace, 1.0)
    yes, no = str(CONTEXT), str(CONTEXT)[:-1] + "0"
    assert never.start("session", yes) and not always.start("session", no)
    assert always.start("session", no).traceparent == no
    assert never.start("session", yes).traceparent[:36] == yes[:36]
    child = always.start("session", yes).child("step")
    assert child.traceparent[:36] == yes[:36] and child is not NO_SPAN
    trace.close()
