from prometheus_client import CollectorRegistry

from kvstore.core.outcomes import MissReason
from kvstore.directory.events import TierKind
from kvstore.observe.metrics import NodeMetrics
from kvstore.service.counting import HitCounts


def test_hits_and_misses_add_up_by_tier_reason_and_domain() -> None:
    registry = CollectorRegistry()
    counts = HitCounts(NodeMetrics(registry))
    for _ in range(2):
        counts.hit("acme", {TierKind.DRAM: 3, TierKind.NVME: 1}, 4096)
        counts.miss("acme", MissReason.ABSENT, 5)
    counts.miss("zoo", MissReason.LATE, 1)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"kvstore_node_{name}_total", labels)

    assert value("hit_blocks", tier="dram", domain="acme") == 6
    assert value("hit_bytes", tier="nvme", domain="acme") == 2 * 4096
    assert value("misses", reason="absent", domain="acme") == 2
    assert value("missed_blocks", reason="absent", domain="acme") == 10
    assert value("missed_blocks", reason="late", domain="zoo") == 1


def test_many_domains_share_a_label() -> None:
    registry = CollectorRegistry()
    counts = HitCounts(NodeMetrics(registry))
    for number in range(200):
        counts.hit(f"tenant-{number}", {TierKind.DRAM: 1}, 4096)
    labels = {"tier": "dram", "domain": "other"}
    assert registry.get_sample_value("kvstore_node_hit_blocks_total", labels) == 136
