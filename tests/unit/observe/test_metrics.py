"""Metric families: as documented, in base units, in whatever registry is passed in."""

import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families

from kvstore.observe.access_metrics import AccessMetrics
from kvstore.observe.adapter_metrics import AdapterMetrics
from kvstore.observe.buckets import LATENCY_SECONDS
from kvstore.observe.client_metrics import ClientMetrics
from kvstore.observe.metrics import (
    ClusterMetrics,
    NodeMetrics,
    RouterMetrics,
    exposition,
)
from kvstore.observe.peer_metrics import PeerMetrics
from kvstore.observe.pick_metrics import PickMetrics
from kvstore.observe.redis_metrics import RedisMetrics
from kvstore.observe.tier_metrics import TierMetrics
from kvstore.observe.worker_metrics import WorkerMetrics

PAGE = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"
BUNDLES = {
    "node": NodeMetrics,
    "peer": PeerMetrics,
    "tier": TierMetrics,
    "router": RouterMetrics,
    "picker": PickMetrics,
    "worker": WorkerMetrics,
    "redis": RedisMetrics,
    "client": ClientMetrics,
    "adapter": AdapterMetrics,
    "cluster": ClusterMetrics,
    "access": AccessMetrics,
}


def _families(bundle: Any) -> dict[str, Metric]:
    registry = CollectorRegistry()
    bundle(registry)
    return {family.name: family for family in registry.collect()}


def _labels(bundle: Any) -> dict[str, tuple[str, ...]]:
    return {
        metric._name: tuple(metric._labelnames)
        for metric in vars(bundle(CollectorRegistry())).values()
    }


def _documented() -> dict[str, dict[str, tuple[str, str, str]]]:
    """Return {room: {family: (type, labels, help)}} as the page has it."""
    rooms: dict[str, dict[str, tuple[str, str, str]]] = {}
    room = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## (\w+)", line):
            room = heading.group(1).lower()
        elif row := re.match(r"\| `(\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", line):
            rooms.setdefault(room, {})[row.group(1)] = (row.group(2), row.group(3), row.group(4))
    return rooms


def test_every_room_has_a_bundle() -> None:
    assert set(BUNDLES) == set(_documented()) >= {"client", "node", "router", "worker"}


@pytest.mark.parametrize("room", BUNDLES)
def test_the_page_lists_every_family(room: str) -> None:
    families, labels = _families(BUNDLES[room]), _labels(BUNDLES[room])
    real = {
        name + ("_total" if family.type == "counter" else ""): (
            family.type,
            ", ".join(f"`{label}`" for label in labels[name]),
            family.documentation,
        )
        for name, family in families.items()
    }
    assert _documented()[room] == real


@pytest.mark.parametrize("room", BUNDLES)
def test_names_carry_prefix_and_base_unit(room: str) -> None:
    for name, family in _families(BUNDLES[room]).items():
        assert name.startswith("kvstore_")
        assert not re.search(r"_(ms|us|kb|mb|kib|mib|percent)$", name)
        if family.type == "histogram":
            assert name.endswith(("_seconds", "_tokens"))


def test_families_do_not_collide_in_one_registry() -> None:
    registry = CollectorRegistry()
    for bundle in BUNDLES.values():
        bundle(registry)
    names = [family.name for family in registry.collect()]
    assert len(names) == len(set(names))


def test_latencies_share_their_buckets() -> None:
    """Predicted and actual times, and those of neighbouring tiers, are laid over each other."""
    assert list(LATENCY_SECONDS) == sorted(set(LATENCY_SECONDS))
    for bundle in BUNDLES.values():
        for metric in vars(bundle(CollectorRegistry())).values():
            if metric._type == "histogram" and metric._name.endswith("_seconds"):
                assert metric._kwargs["buckets"] == LATENCY_SECONDS, metric._name


def test_nothing_touches_the_global_registry() -> None:
    before = {family.name for family in REGISTRY.collect()}
    first, second = NodeMetrics(CollectorRegistry()), NodeMetrics(CollectorRegistry())
    first.sessions.inc()
    assert second.sessions._value.get() == 0
    assert {family.name for family in REGISTRY.collect()} == before


def test_exposition_is_what_prometheus_reads() -> None:
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry)
    metrics.cached_tokens.labels(tier="dram").inc(1024)
    metrics.ttft_seconds.labels(cached="hit").observe(0.02)
    text = exposition(registry)().decode()
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["kvstore_cached_tokens_total", (("tier", "dram"),)] == 1024
    assert samples["kvstore_ttft_seconds_count", (("cached", "hit"),)] == 1


def test_every_family_is_set_somewhere() -> None:
    """A family that nobody sets shows an operator a healthy zero for ever."""
    root = PAGE.parents[1]
    rooms = (root / "kvstore", root / "workers" / "kvworkers")
    source = "".join(path.read_text("utf-8") for room in rooms for path in room.rglob("*.py"))
    for bundle in BUNDLES.values():
        for name in vars(bundle(CollectorRegistry())):
            assert re.search(rf"metrics\.{name}\b", source), f"{bundle.__name__}.{name}"
