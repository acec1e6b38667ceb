"""A registry's families given on to another set of metrics: Ray Serve serves its own, not ours.

Counters go on by what they grew, gauges as they are. A histogram becomes counters: its buckets by
`le`, its sum and its count; so quantiles and rates are computed as of any histogram.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple, Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

MAX_SERIES: Final = 4_096
"""Series given on; later ones are left out and counted. Ours are bounded far below."""

_LOG: Final = logging.getLogger(__name__)
_Key = tuple[str, tuple[tuple[str, str], ...]]
"""A series: its family's name and its labels."""


class Sink(Protocol):
    """Metrics by name, made at their first value: `ray.util.metrics` is behind one."""

    def add(self, family: "Family", value: float, labels: Mapping[str, str]) -> None:
        """Let a counter grow by `value` > 0."""

    def set(self, family: "Family", value: float, labels: Mapping[str, str]) -> None:
        """Give a gauge its value."""


class Family(NamedTuple):
    """What series of one name have in common."""

    name: str
    text: str
    labels: tuple[str, ...]
    counts: bool


_LEFT_OUT: Final = Family(
    "kvstore_serve_series_left_out",
    f"Series of the router that are not given on, beyond {MAX_SERIES}",
    (),
    counts=False,
)


class Exporter:
    """Of one registry and one sink; `export` is called now and then, by one thread."""

    def __init__(self, registry: CollectorRegistry, sink: Sink) -> None:
        self._registry = registry
        self._sink = sink
        self._last: dict[_Key, float] = {}
        self._left_out: set[_Key] = set()  # no more than the registry has
        self._told_left_out = -1

    @property
    def left_out(self) -> int:
        """How many series are not given on because there are too many."""
        return len(self._left_out)

    def export(self) -> None:
        """Give on what changed since the last time."""
        for metric in self._registry.collect():
            for family, labels, value in _series(metric):
                self._give(family, labels, value)
        if self.left_out != self._told_left_out:
            if self._told_left_out <= 0 < self.left_out:
                _LOG.warning("more than %d series: the others are left out", MAX_SERIES)
            self._told_left_out = self.left_out
            self._sink.set(_LEFT_OUT, float(self.left_out), {})

    def _give(self, family: Family, labels: Mapping[str, str], value: float) -> None:
        key = family.name, tuple(sorted(labels.items()))
        last = self._last.get(key)
        if last is None and len(self._last) >= MAX_SERIES:
            self._left_out.add(key)
            return
        if value == last or (last is None and family.counts and not value):
            return
        self._last[key] = value
        if not family.counts:
            self._sink.set(family, value, labels)
            return
        # One that shrank was begun anew.
        grown = value - last if last is not None and value > last else value
        if grown > 0:
            self._sink.add(family, grown, labels)


def _series(metric: Metric) -> Iterator[tuple[Family, Mapping[str, str], float]]:
    counts = metric.type in ("counter", "histogram")
    if not counts and metric.type != "gauge":
        return
    for sample in metric.samples:
        if sample.name.endswith("_created"):
            continue
        # Whoever serves a counter says that it is a total.
        name = sample.name.removesuffix("_total") if metric.type == "counter" else sample.name
        family = Family(name, metric.documentation, tuple(sorted(sample.labels)), counts)
        yield family, sample.labels, sample.value


class Grows(Protocol):
    """`ray.util.metrics.Counter`, as far as it is used."""

    def inc(self, value: float, tags: dict[str, str]) -> None:
        """Add."""


class Stands(Protocol):
    """`ray.util.metrics.Gauge`, as far as it is used."""

    def set(self, value: float, tags: dict[str, str]) -> None:
        """Replace."""


def sink_of(
    counter: Callable[[str, str, tuple[str, ...]], Grows],
    gauge: Callable[[str, str, tuple[str, ...]], Stands],
    tags: Mapping[str, str],
) -> Sink:
    """Return a sink over factories of metrics, each series with `tags` besides its labels."""
    return _Made(counter, gauge, dict(tags))


class _Made:
    """Metrics made at their first value."""

    def __init__(
        self,
        counter: Callable[[str, str, tuple[str, ...]], Grows],
        gauge: Callable[[str, str, tuple[str, ...]], Stands],
        tags: dict[str, str],
    ) -> None:
        self._counter, self._gauge, self._tags = counter, gauge, tags
        self._counters: dict[str, Grows] = {}
        self._gauges: dict[str, Stands] = {}

    def add(self, family: Family, value: float, labels: Mapping[str, str]) -> None:
        if family.name not in self._counters:
            keys = (*self._tags, *family.labels)
            self._counters[family.name] = self._counter(family.name, family.text, keys)
        self._counters[family.name].inc(value, tags={**self._tags, **labels})

    def set(self, family: Family, value: float, labels: Mapping[str, str]) -> None:
        if family.name not in self._gauges:
            keys = (*self._tags, *family.labels)
            self._gauges[family.name] = self._gauge(family.name, family.text, keys)
        self._gauges[family.name].set(value, tags={**self._tags, **labels})
