"""The page of a node's metrics: series are there before their first event, and slow callers are bounded."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest

from ruyi_flow.loop.front_door import _REFUSALS
from ruyi_flow.serving.totals import _CAUSES, _cause
from ruyi_flow.telemetry import exposition, names
from ruyi_flow.telemetry.counters import Counter
from ruyi_flow.telemetry.exposition import make_registry, serve_page
from ruyi_flow.types import FinishReason


def test_every_cause_and_reason_is_there_before_its_first_event() -> None:
    assert set(names.SUCCESSES.known) == set(FinishReason)
    assert set(names.FAILURES.known) == {*_CAUSES.values(), _cause(None), _cause(ValueError())}
    assert set(names.REFUSALS.known) == set(_REFUSALS.values())
    counter = Counter(names.REFUSALS)
    counter.add("full")
    assert counter.values == {("full",): 1, ("draining",): 0, ("too_large",): 0}
    assert all(len(metric.labels) == 1 for metric in names.ALL if metric.known)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a page whose readers may take half a second."""
    monkeypatch.setattr(exposition, "_CALL_S", 0.5)
    with serve_page("127.0.0.1:0", make_registry(), "here") as port:
        yield port


def health(port: int) -> int:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        connection.request("GET", "/health")
        return connection.getresponse().status


def until_healthy(port: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        with suppress(OSError, http.client.HTTPException):  # all places are taken
            assert health(port) == 200
            return
        assert time.monotonic() < deadline, "the page answers nobody any more"
        time.sleep(0.05)


def test_callers_beyond_the_most_are_turned_away_and_the_others_keep_their_places(
    monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    monkeypatch.setattr(exposition, "_CALL_S", 60.0)
    silent = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(exposition._MAX_CALLS)]
    try:
        with pytest.raises((OSError, http.client.HTTPException)):
            health(port)
    finally:
        for connection in silent:
            connection.close()
    until_healthy(port)


def test_a_caller_that_sends_a_byte_now_and_then_is_cut_off(port: int) -> None:
    with closing(socket.create_connection(("127.0.0.1", port), timeout=10)) as drip:
        deadline = time.monotonic() + 20
        with pytest.raises(OSError):  # the connection was ended from the other side
            while time.monotonic() < deadline:
                drip.sendall(b"x")
                time.sleep(0.05)
    assert health(port) == 200
