"""Spans: recorded and exported where tracing is on, free and harmless where it is off.

Reaches `kvstore.observe.otel`.
"""

import asyncio
import sys

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvstore.core.errors import BadInput, Refused
from kvstore.observe.otel import OtelTracing
from kvstore.observe.tracing import (
    CURRENT,
    HEADER,
    OFF,
    checked,
    from_metadata,
    start_tracing,
    to_metadata,
    under,
)

GIVEN = f"00-{'ab' * 16}-{'cd' * 8}-01"


def test_off_hands_on_what_it_was_given_and_records_nothing() -> None:
    assert start_tracing("", service="s", name="n") is OFF and not OFF.on
    with OFF.begin("work", GIVEN, age_s=1.0, tokens=3) as span:
        span.set(more=1)
        assert span.traceparent == GIVEN
    assert OFF.begin("work").traceparent == ""
    OFF.close()


def test_spans_are_children_of_what_came_and_carry_their_facts() -> None:
    exporter = InMemorySpanExporter()
    tracing = OtelTracing(exporter, service="kvstore-node", name="node-a")
    with tracing.begin("outer", GIVEN, age_s=2.0, tokens=3) as outer:
        assert outer.traceparent.startswith(f"00-{'ab' * 16}-") and outer.traceparent != GIVEN
        with tracing.begin("inner", outer.traceparent) as inner:
            inner.set(worker="w", hit=True)
    tracing.close()
    second, first = exporter.get_finished_spans()
    assert first.name == "outer" and first.parent is not None and second.parent is not None
    assert first.context is not None and first.parent.span_id == int("cd" * 8, 16)
    assert second.parent.span_id == first.context.span_id
    assert first.attributes == {"kvstore.tokens": 3}
    assert second.attributes == {"kvstore.worker": "w", "kvstore.hit": True}
    assert first.resource.attributes["service.instance.id"] == "node-a"
    assert first.end_time is not None and first.start_time is not None
    assert first.end_time - first.start_time >= 2_000_000_000


def test_errors_are_named_and_a_caller_that_leaves_is_none() -> None:
    exporter = InMemorySpanExporter()
    tracing = OtelTracing(exporter, service="s", name="n")
    with pytest.raises(Refused), tracing.begin("failing"):
        raise Refused("no")
    with pytest.raises(GeneratorExit), tracing.begin("left"):
        raise GeneratorExit
    span = tracing.begin("twice")
    span.end("first")
    span.end()
    tracing.close()
    failing, left, twice = exporter.get_finished_spans()
    assert failing.status.description == "Refused" and twice.status.description == "first"
    assert left.status.is_unset


@pytest.mark.parametrize(
    "wrong",
    [None, "", "x", GIVEN + "0", GIVEN.upper(), GIVEN.replace("-", "_"), b"\xff" * 55,
     "00-" + "-" * 48 + "-01-"],
)  # fmt: skip
def test_what_is_no_traceparent_is_nothing(wrong: str | bytes | None) -> None:
    assert checked(wrong) == ""


def test_metadata_carries_a_traceparent() -> None:
    assert from_metadata(dict(to_metadata(GIVEN))) == GIVEN == checked(GIVEN.encode())
    assert to_metadata("") == () and from_metadata({HEADER: "junk"}) == ""


async def test_calls_of_other_tasks_are_not_under_a_span() -> None:
    async def other() -> str:
        return CURRENT.get()

    before = asyncio.create_task(other())
    with under(GIVEN):
        assert await before == "" or CURRENT.get() == GIVEN
        assert await asyncio.create_task(other()) == GIVEN
    assert CURRENT.get() == ""


def test_addresses_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="--trace 'localhost:4318'"):
        start_tracing("localhost:4318", service="s", name="n")
    monkeypatch.delitem(sys.modules, "kvstore.observe.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(BadInput, match="extra `otel`"):
        start_tracing("http://127.0.0.1:1", service="s", name="n")
