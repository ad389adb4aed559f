"""The context of a trace, which comes from outside, and spans that record nothing."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruyi_flow.telemetry import spans
from ruyi_flow.telemetry.spans import (
    MAX_TRACEPARENT,
    NO_SPAN,
    NO_TRACER,
    PassedSpan,
    Span,
    TraceContext,
    Tracer,
    current_span,
)

VALID = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Noted(Span):
    """A span that notes its end."""

    def __init__(self) -> None:
        self.ended: list[dict[str, spans.Attribute]] = []

    def __bool__(self) -> bool:
        return True

    def end(self, **attributes: spans.Attribute) -> None:
        self.ended.append(attributes)


def test_a_context_is_read_and_written() -> None:
    context = TraceContext.parse(VALID)
    assert context is not None and str(context) == VALID
    assert (context.trace_id, context.span_id) == (0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7)
    assert context.is_sampled
    other = TraceContext.parse(VALID[:-2] + "02")
    assert other is not None and not other.is_sampled, "only the lowest bit says whether it is sampled"


@pytest.mark.parametrize("text", [f"cc{VALID[2:]}", f"cc{VALID[2:]}-what comes later"])
def test_a_later_version_is_read_as_far_as_it_is_known(text: str) -> None:
    context = TraceContext.parse(text)
    assert context is not None and str(context) == VALID


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "00",
        VALID[:-1],
        VALID + "0",
        VALID + "-",
        VALID.upper(),
        " " + VALID,
        VALID + "\n",
        "ff" + VALID[2:],
        "00-" + "0" * 32 + VALID[35:],
        VALID[:36] + "0" * 16 + VALID[52:],
        VALID.replace("4", "\u0664"),  # a digit of another script
        "cc" + VALID[2:] + "-" + "x" * MAX_TRACEPARENT,
    ],
)
def test_a_malformed_context_is_none(text: str | None) -> None:
    assert TraceContext.parse(text) is None
    assert NO_TRACER.start("request", text) is NO_SPAN


@given(st.text(alphabet="0123456789abcdef-fg\n", max_size=80))
def test_no_text_breaks_the_reading(text: str) -> None:
    context = TraceContext.parse(text)
    assert context is None or TraceContext.parse(str(context)) is not None


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans())
def test_every_context_survives_its_text(trace_id: int, span_id: int, is_sampled: bool) -> None:
    read = TraceContext.parse(str(TraceContext(trace_id, span_id, is_sampled=is_sampled)))
    assert read is not None and (read.trace_id, read.span_id, read.is_sampled) == (trace_id, span_id, is_sampled)


def test_a_node_that_traces_nothing_passes_a_context_on() -> None:
    span = Tracer().start("request", VALID)
    assert not span and span.traceparent == VALID
    assert span.child("round").traceparent == VALID
    assert isinstance(span, PassedSpan) and NO_TRACER.start("request") is NO_SPAN
    NO_TRACER.close()


def test_a_block_ends_its_span_and_names_the_exception_that_left_it() -> None:
    fine, failed = Noted(), Noted()
    with fine as inside:
        assert inside is fine and not fine.ended
    with pytest.raises(KeyError), failed:
        raise KeyError
    assert fine.ended == [{}] and failed.ended == [{"error.type": "KeyError"}]


async def test_the_current_span_is_that_of_the_task() -> None:
    async def work(span: Span) -> Span:
        current_span.set(span)
        await asyncio.sleep(0)
        return await asyncio.to_thread(current_span.get)

    one, two = Noted(), Noted()
    found = await asyncio.gather(work(one), work(two))
    assert found[0] is one and found[1] is two
    assert current_span.get() is NO_SPAN


def test_the_conventions_names_are_those_of_opentelemetry() -> None:
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
    from opentelemetry.semconv.attributes import error_attributes, http_attributes

    known = {
        value
        for module in (gen_ai_attributes, http_attributes, error_attributes)
        for value in vars(module).values()
        if isinstance(value, str)
    }
    ours = {v for k, v in vars(spans).items() if k.isupper() and isinstance(v, str) and "." in v}
    assert {name for name in ours if not name.startswith("ruyi.")} <= known
    assert "gen_ai.usage.input_tokens" in ours and "ruyi.drafted" in ours
