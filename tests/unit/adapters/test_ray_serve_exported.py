"""Our registry's families as another set of metrics has them, without Ray."""

from collections.abc import Mapping

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from kvstore.adapters.ray_serve import exported
from kvstore.adapters.ray_serve.exported import Exporter, Family, sink_of
from kvstore.observe.metrics import RouterMetrics

TAGS = {"application": "llm", "deployment": "d"}


class Noted:
    """One metric that notes what it is told."""

    def __init__(self, name: str, text: str, keys: tuple[str, ...]) -> None:
        self.name, self.text, self.keys = name, text, keys
        self.told: list[tuple[float, Mapping[str, str]]] = []

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0 and set(tags) == set(self.keys)
        self.told.append((value, tags))

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.keys)
        self.told.append((value, tags))


class Room:
    """Everything that was made."""

    def __init__(self) -> None:
        self.counters: dict[str, Noted] = {}
        self.gauges: dict[str, Noted] = {}
        self.sink = sink_of(self._into(self.counters), self._into(self.gauges), TAGS)

    @staticmethod
    def _into(kept: dict[str, Noted]):  # type: ignore[no-untyped-def]
        def make(name: str, text: str, keys: tuple[str, ...]) -> Noted:
            assert name not in kept, "made once"
            kept[name] = Noted(name, text, keys)
            return kept[name]

        return make


def test_counters_go_on_by_what_they_grew_and_gauges_as_they_are() -> None:
    registry, room = CollectorRegistry(), Room()
    asked = Counter("asked", "How often", ["why"], registry=registry)
    size = Gauge("size", "How large", registry=registry)
    exporter = Exporter(registry, room.sink)
    asked.labels("a").inc(3)
    size.set(7)
    exporter.export()
    exporter.export()
    asked.labels("a").inc(2)
    asked.labels("b").inc()
    size.set(0)
    exporter.export()
    assert room.counters["asked"].told == [
        (3.0, {**TAGS, "why": "a"}), (2.0, {**TAGS, "why": "a"}), (1.0, {**TAGS, "why": "b"}),
    ]  # fmt: skip
    assert [value for value, _ in room.gauges["size"].told] == [7.0, 0.0]
    assert room.counters["asked"].text == "How often"


def test_a_histogram_is_counters_of_its_buckets_sum_and_count() -> None:
    registry, room = CollectorRegistry(), Room()
    took = Histogram("took_seconds", "How long", buckets=[0.1, 1.0], registry=registry)
    exporter = Exporter(registry, room.sink)
    took.observe(0.5)
    took.observe(0.5)
    exporter.export()
    took.observe(0.05)
    exporter.export()
    buckets: dict[str, float] = {}
    for value, tags in room.counters["took_seconds_bucket"].told:
        buckets[tags["le"]] = buckets.get(tags["le"], 0) + value
    assert buckets == {"0.1": 1.0, "1.0": 3.0, "+Inf": 3.0}
    assert sum(value for value, _ in room.counters["took_seconds_count"].told) == 3
    assert sum(value for value, _ in room.counters["took_seconds_sum"].told) == pytest.approx(1.05)


def test_what_is_neither_is_left_out_and_series_are_bounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(exported, "MAX_SERIES", 2)
    registry, room = CollectorRegistry(), Room()
    Info("build", "Which", registry=registry).info({"version": "1"})
    asked = Counter("asked", "How often", ["why"], registry=registry)
    for number in range(4):
        asked.labels(str(number)).inc()
    exporter = Exporter(registry, room.sink)
    exporter.export()
    exporter.export()
    assert list(room.counters) == ["asked"] and len(room.counters["asked"].told) == 2
    assert exporter.left_out == 2, "a series is left out once"
    asked.labels("4").inc()
    exporter.export()
    exporter.export()
    told = room.gauges["kvstore_serve_series_left_out"].told
    assert told == [(2.0, TAGS), (3.0, TAGS)]
    assert caplog.text.count("more than 2 series") == 1


def test_a_counter_that_was_begun_anew_goes_on_by_its_new_value() -> None:
    registry, room = CollectorRegistry(), Room()
    asked = Counter("asked", "How often", ["why"], registry=registry)
    exporter = Exporter(registry, room.sink)
    for values in ((3, 5), (2, 0), (4, 1)):
        asked.clear()
        for why, value in zip("ab", values, strict=True):
            asked.labels(why).inc(value)
        exporter.export()
    given = [(value, tags["why"]) for value, tags in room.counters["asked"].told]
    assert given == [(3.0, "a"), (5.0, "b"), (2.0, "a"), (2.0, "a"), (1.0, "b")]


def test_every_family_of_the_router_goes_on() -> None:
    registry, room = CollectorRegistry(), Room()
    metrics = RouterMetrics(registry)
    metrics.decisions_seconds.observe(0.001)
    metrics.workers.labels("live").set(3)
    metrics.misses.labels("absent").inc()
    Exporter(registry, room.sink).export()
    assert room.counters["kvstore_route_seconds_count"].told == [(1.0, TAGS)]
    assert room.gauges["kvstore_workers"].told == [(3.0, {**TAGS, "state": "live"})]
    assert room.counters["kvstore_request_misses"].told == [(1.0, {**TAGS, "reason": "absent"})]
    assert Family("a", "b", (), True).counts
