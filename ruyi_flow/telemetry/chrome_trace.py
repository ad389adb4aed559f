"""Chrome traces (Trace Event Format; ui.perfetto.dev and chrome://tracing open them): the simulator's, and those of
requests on running nodes, which need no other library."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import threading
import zlib
from collections import deque
from pathlib import Path
from typing import Any

from ruyi_flow.errors import ConfigError
from ruyi_flow.telemetry.spans import Attribute, PassedSpan, Span, TraceContext, Tracer, now_ns

__all__ = ["ChromeTrace", "ChromeTracer", "RequestRow", "SharedTrace"]

_EVENTS = 40_000
"""Most events of a simulation; later ones are dropped."""

_SLICES = 200_000
"""Most slices that a node writes into a file, some 50 MB; later requests are not recorded."""

_FLUSH_S = 0.2
"""Seconds for which slices gather before they are written together."""

_CLOSE_S = 5.0
"""Seconds that the last write may take."""

logger = logging.getLogger(__name__)


class ChromeTrace:
    """A simulation's trace, written during the run.

    A tier or a link is shown as a process, each of its nodes or directions as a thread, a request as an async event.

    Args:
        path: the file, which is made anew.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._file.write("[\n")
        self._count, self._comma = 0, ""
        self._processes: dict[str, int] = {}
        self._threads: dict[tuple[int, str], dict[int, float]] = {}
        """The second at which each thread is free, by process and name: more than one thread where slices overlap."""
        self._num_threads = 0

    @property
    def full(self) -> bool:
        """Whether it has all the events that it takes."""
        return self._count >= _EVENTS

    def slice(self, process: str, thread: str, name: str, at_s: float, for_s: float, **about: Any) -> None:
        """Add an activity of a node or a link. Activities must be added in the order of their ends.

        Viewers draw overlapping slices of a thread wrongly, so such a slice goes to another thread of the same name.
        """
        if self.full:
            return
        self._count += 1
        pid = self._process(process)
        threads = self._threads.setdefault((pid, thread), {})
        tid = next((tid for tid, free_s in threads.items() if free_s <= at_s + 1e-9), 0)
        if not tid:
            tid = self._num_threads = self._num_threads + 1
            self._line("M", pid, tid, name="thread_name", args={"name": thread})
        threads[tid] = at_s + for_s
        self._line("X", pid, tid, name=name, ts=_us(at_s), dur=_us(for_s), args=about)

    def request(self, number: int, at_s: float, first_token_s: float | None, total_s: float, **about: Any) -> None:
        """Add a request: its arrival, its first token if there was one, and its end, with times from the arrival."""
        if self.full:
            return
        self._count += 3
        pid = self._process("requests")
        row = {"name": f"request {number}", "cat": "request", "id": number}
        self._line("b", pid, 0, ts=_us(at_s), args=about, **row)
        if first_token_s is not None:
            self._line("n", pid, 0, ts=_us(at_s + first_token_s), **{**row, "name": "first token"})
        self._line("e", pid, 0, ts=_us(at_s + total_s), **row)

    def close(self) -> None:
        """Finish the file."""
        self._file.write("\n]\n")
        self._file.close()

    def _process(self, name: str) -> int:
        if name not in self._processes:
            pid = self._processes[name] = len(self._processes) + 1
            self._line("M", pid, 0, name="process_name", args={"name": name})
        return self._processes[name]

    def _line(self, kind: str, pid: int, tid: int, **event: Any) -> None:
        self._file.write(self._comma + _event(kind, pid, tid, **event))
        self._comma = ",\n"


class SharedTrace:
    """The requests of one node, in a file that several processes of this machine write.

    Each process appends whole lines, and nobody writes the closing bracket, which the format allows. A node is shown as
    a process, each request as a thread. A thread of this process writes, so that a full disk stops no request.

    Args:
        path: the file; it is made if it is missing.
        node: the name under which the node's requests are shown.

    Raises:
        ConfigError: the file cannot be written, or is something else than such a trace.
    """

    def __init__(self, path: Path, node: str) -> None:
        self.path, self.node = path, node
        self._file = _open_shared(path)
        self._pid = _number(node)
        self._threads = itertools.count()
        self._count = 0
        self._events: deque[tuple[str, int, dict[str, Any]]] = deque()
        self._wake, self._ending = threading.Event(), threading.Event()
        self._add("M", 0, name="process_name", args={"name": node})
        self._writer = threading.Thread(target=self._write, name="trace", daemon=True)
        self._writer.start()

    @classmethod
    def create(cls, path: Path) -> None:
        """Make the file anew, so that it has nothing of earlier runs.

        Raises:
            ConfigError: the file cannot be written, or is something else than such a trace.
        """
        os.close(_open_shared(path))
        path.write_bytes(_HEAD)

    @property
    def full(self) -> bool:
        """Whether it takes no more slices."""
        return self._count >= _SLICES

    def row(self, context: TraceContext) -> RequestRow:
        """Return the place of a request's slices."""
        return RequestRow(self, f"request {context.trace_id:032x}"[:16])

    def close(self) -> None:
        """Write what has gathered, and close the file; blocks for a few seconds at most."""
        self._ending.set()
        self._wake.set()
        self._writer.join(_CLOSE_S)

    def _thread(self, name: str) -> int:
        """Return the number of a new thread; no two of a file are the same."""
        tid = _number(f"{self.node}/{os.getpid()}/{id(self)}/{next(self._threads)}")
        self._add("M", tid, name="thread_name", args={"name": name})
        return tid

    def _slice(self, tid: int, name: str, start_ns: int, end_ns: int, about: dict[str, Attribute]) -> None:
        self._count += 1
        if self._count == _SLICES:
            logger.warning("%s has %d slices of %s, which is all that it takes", self.path, _SLICES, self.node)
        self._add("X", tid, name=name, ts=start_ns / 1000, dur=max(0, end_ns - start_ns) / 1000, args=about)

    def _add(self, kind: str, tid: int, **event: Any) -> None:
        self._events.append((kind, tid, event))
        self._wake.set()

    def _write(self) -> None:
        try:
            while not self._ending.is_set() or self._events:
                self._wake.wait()
                self._ending.wait(_FLUSH_S)
                self._wake.clear()
                lines = [self._events.popleft() for _ in range(len(self._events))]
                text = "".join(f"{_event(kind, self._pid, tid, **event)},\n" for kind, tid, event in lines)
                os.write(self._file, text.encode())
        except OSError as error:
            self._count = max(self._count, _SLICES)  # it takes no more
            logger.warning("%s cannot be written, so no more requests are traced: %s", self.path, error.strerror)
        finally:
            os.close(self._file)


class RequestRow:
    """The slices of one request on one node. They are nested by time; one that overlaps another goes to a new thread.

    Args:
        trace: the file.
        name: what the threads are called.
    """

    def __init__(self, trace: SharedTrace, name: str) -> None:
        self._trace, self._name = trace, name
        self._threads: list[tuple[int, list[tuple[int, int]]]] = []
        """The threads, each with the slices that no other one contains, as (start, end)."""

    def add(self, name: str, start_ns: int, end_ns: int, about: dict[str, Attribute]) -> None:
        """Add a slice. They are added in the order of their ends."""
        if self._trace.full:
            return
        tid, outer = self._place(start_ns)
        outer.append((start_ns, end_ns))
        self._trace._slice(tid, name, start_ns, end_ns, about)

    def _place(self, start_ns: int) -> tuple[int, list[tuple[int, int]]]:
        """Return a thread on which the next slice overlaps no other one."""
        for thread in self._threads:
            outer = thread[1]
            kept = len(outer)
            while kept and outer[kept - 1][0] >= start_ns:  # the new slice contains it
                kept -= 1
            if not kept or outer[kept - 1][1] <= start_ns:
                del outer[kept:]
                return thread
        self._threads.append((self._trace._thread(self._name), []))
        return self._threads[-1]


class ChromeTracer(Tracer):
    """Records the requests of one node in a Chrome trace.

    Args:
        trace: the file.
        share: share of the requests without a caller's context that are recorded, from 0 to 1.
    """

    def __init__(self, trace: SharedTrace, share: float) -> None:
        self._trace, self._bound = trace, round(share * 2**64)
        self.random = random.Random()
        """Draws the numbers of traces and spans."""

    def start(self, name: str, traceparent: str | None = None, /, **attributes: Attribute) -> Span:
        """Start the first span of a request or a session on this node; see `Tracer.start`."""
        context = TraceContext.parse(traceparent)
        if context is None:
            trace_id = self.random.getrandbits(128) or 1
            is_sampled = trace_id % 2**64 < self._bound  # by the same rule as OpenTelemetry's TraceIdRatioBased
            context = TraceContext(trace_id, self.random.getrandbits(64) or 1, is_sampled=is_sampled)
        if not context.is_sampled or self._trace.full:
            return PassedSpan(str(context))
        return _ChromeSpan(self, self._trace.row(context), context.trace_id, name, now_ns(), attributes)

    def close(self) -> None:
        """Write what is left; see `Tracer.close`."""
        self._trace.close()


class _ChromeSpan(Span):
    """A span that becomes a slice when it ends."""

    __slots__ = ("_about", "_context", "_ended", "_name", "_row", "_start_ns", "_tracer")

    def __init__(
        self,
        tracer: ChromeTracer,
        row: RequestRow,
        trace_id: int,
        name: str,
        start_ns: int,
        about: dict[str, Attribute],
    ) -> None:
        self._tracer, self._row, self._name, self._start_ns, self._about = tracer, row, name, start_ns, about
        self._context = TraceContext(trace_id, tracer.random.getrandbits(64) or 1, is_sampled=True)
        self._ended = False

    @property
    def traceparent(self) -> str:
        return str(self._context)

    def __bool__(self) -> bool:
        return True

    def child(self, name: str, /, *, ago_s: float = 0.0, **attributes: Attribute) -> Span:
        start_ns = now_ns() - round(ago_s * 1e9)
        return _ChromeSpan(self._tracer, self._row, self._context.trace_id, name, start_ns, attributes)

    def set(self, **attributes: Attribute) -> None:
        self._about |= attributes

    def end(self, **attributes: Attribute) -> None:
        if self._ended:
            return
        self._ended = True
        self._row.add(self._name, self._start_ns, now_ns(), self._about | attributes)


_HEAD = b"[\n"

_APPEND = os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0)
"""Flags of a file to which whole lines are appended; on Windows, without a carriage return at each end."""


def _open_shared(path: Path) -> int:
    """Open a trace for appending whole lines; a missing one is made."""
    try:
        try:
            file = os.open(path, _APPEND | os.O_CREAT | os.O_EXCL, 0o666)
            os.write(file, _HEAD)
        except FileExistsError:
            with path.open("rb") as there:
                head = there.read(len(_HEAD))
                there.seek(-min(2, os.fstat(there.fileno()).st_size), os.SEEK_END)
                end = there.read()
            if head and (head != _HEAD or end not in (_HEAD, b",\n")):
                raise ConfigError(
                    f"{path}: is not a trace that nodes may continue; name a file that does not exist yet"
                ) from None
            file = os.open(path, _APPEND)
            if not head:
                os.write(file, _HEAD)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    return file


def _event(kind: str, pid: int, tid: int, **event: Any) -> str:
    """Return an event as JSON."""
    return json.dumps({"ph": kind, "pid": pid, "tid": tid, **event})


def _number(name: str) -> int:
    """Return a number for a process or a thread, above 0."""
    return zlib.crc32(name.encode()) % 2**31 or 1


def _us(seconds: float) -> float:
    """Return microseconds, rounded to the nanosecond."""
    return round(1e6 * seconds, 3)
