"""The request log: what a line says, that no text of a user forges one, and that no prompt is in it."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import CapacityError, RequestError
from ruyi_flow.telemetry.request_log import JsonLines, RequestEntry
from ruyi_flow.telemetry.spans import PassedSpan, current_span
from ruyi_flow.testing import cluster, cut_topology

LOGGER = "ruyi_flow.telemetry.request_log"


def entries(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(record)["request"] for record in caplog.records if record.name == LOGGER]


async def test_each_request_to_the_entry_node_is_one_line(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with cluster(cut_topology(tiny, [(2,), (4,), (6,)])) as running, AsyncClient(running.topology) as client:
        caplog.set_level(logging.INFO, LOGGER)
        reply = await client.generate([5, 6, 7], mode="token", threshold=0.3, max_new_tokens=20, eos_token_ids=())
    (entry,) = entries(caplog)
    nodes = {node: sum(t.node == node for t in reply.tokens) for node in {t.node for t in reply.tokens}}
    assert len(nodes) > 1 and entry["nodes"] == nodes
    assert entry["status"] == "ok" and entry["finish_reason"] == "length" and entry["model"] == tiny.name
    assert (entry["prompt_tokens"], entry["new_tokens"]) == (3, 20)
    assert entry["bytes_up"] == sum(hop.bytes_up for hop in reply.stats.hops) > 0
    assert 0 < entry["first_token_ms"] < entry["total_ms"] and entry["queue_ms"] >= 0
    (line,) = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    assert line.startswith(f"request {entry['id']}: ok (length), model {tiny.name}, 3 prompt tokens, 20 new (")
    assert all(f"{node} {count}" in line for node, count in nodes.items())


async def test_a_request_that_fails_or_is_left_has_its_line(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with cluster(cut_topology(tiny, [(2, 4, 6)])) as running, AsyncClient(running.topology) as client:
        caplog.set_level(logging.INFO, LOGGER)
        with pytest.raises(RequestError):
            await client.generate([5] * 600)
        async for _ in client.events([5, 6], max_new_tokens=400, eos_token_ids=()):
            break
    refused, left = entries(caplog)
    assert refused["status"] == "ContextLengthError" and refused["nodes"] == {} and not refused["finish_reason"]
    assert left["status"] == "cancelled" and left["new_tokens"] >= 1 and left["id"] != refused["id"]


async def test_a_request_has_the_id_of_its_trace(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    async with cluster(cut_topology(tiny, [(2, 4, 6)])) as running, AsyncClient(running.topology) as client:
        token = current_span.set(PassedSpan(f"00-{trace_id}-00f067aa0ba902b7-00"))
        caplog.set_level(logging.INFO, LOGGER)
        await client.generate([5, 6], max_new_tokens=2)
        current_span.reset(token)
    assert [entry["id"] for entry in entries(caplog)] == [trace_id]


async def test_no_text_of_a_prompt_or_an_answer_is_logged(spoken: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with cluster(cut_topology(spoken, [(2, 4, 6)])) as running, AsyncClient(running.topology) as client:
        caplog.set_level(logging.DEBUG)
        reply = await client.generate("Zanzibar", raw=True, max_new_tokens=12, eos_token_ids=())
        with pytest.raises(RequestError):
            await client.generate("Zanzibar" * 500, raw=True)
    formatter = JsonLines()
    lines = [formatter.format(record) + record.getMessage() for record in caplog.records]
    assert len(entries(caplog)) == 2 and len(reply.text) > 3
    assert not any("Zanzibar" in line or reply.text in line for line in lines)


def test_a_name_that_a_user_chose_forges_no_line() -> None:
    entry = RequestEntry("smollm2, user root", user='eve\nrequest 1: ok\u2028\u202e\x1b[2J"', id="a" * 500)
    line = str(entry)
    assert line.isprintable() and len(line) < 500
    assert 'user "eve\\u{a}request 1: ok\\u{2028}\\u{202e}\\u{1b}[2J\\"", model "smollm2, user root", 0' in line
    assert f'request "{"a" * 64}…": cancelled' in line
    assert len(json.dumps(entry.fields)) < 600


@given(st.text(max_size=100))
def test_every_name_stays_one_printable_part(name: str) -> None:
    entry = RequestEntry("smollm2", user=name or "x", id="1")
    line = str(entry)
    assert line.isprintable()
    shown = line.removeprefix("request 1: cancelled, user ").split(", model smollm2, 0 prompt tokens")[0]
    plain = all(c.isascii() and (c.isalnum() or c in "-_.:@/+") for c in shown)
    assert plain or (shown[0] == shown[-1] == '"' and '"' not in shown[1:-1].replace("\\\\", "").replace('\\"', ""))


def test_lines_in_json_are_objects() -> None:
    formatter = JsonLines(node="n0")

    def parsed(message: str, **given: Any) -> dict[str, Any]:
        exc_info = given.pop("exc_info", None)
        record = logging.LogRecord("ruyi_flow.x", logging.WARNING, "x.py", 1, message, ("a\nb",), exc_info)
        vars(record).update(given)
        text = formatter.format(record)
        assert "\n" not in text
        found: dict[str, Any] = json.loads(text)
        return found

    line = parsed("lost %s")
    assert line["message"] == "lost a\nb" and line["level"] == "warning" and line["node"] == "n0"
    assert line["logger"] == "ruyi_flow.x" and line["time"].endswith("+00:00")
    line = parsed("%s", request={"id": "1"})
    assert line["request"] == {"id": "1"} and "message" not in line
    try:
        raise CapacityError("full")
    except CapacityError:
        assert "CapacityError: full" in parsed("failed: %s", exc_info=sys.exc_info())["error"]
