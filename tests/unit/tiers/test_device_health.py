"""What is told of a disk: breakers by operation, errors by kind, blocks by outcome."""

import errno

from prometheus_client import CollectorRegistry

from kvstore.core.outcomes import Outcome
from kvstore.observe.metrics import TierMetrics
from kvstore.tiers.device_health import DeviceHealth


def test_reads_and_writes_have_a_breaker_each_and_errors_a_kind() -> None:
    registry = CollectorRegistry()
    health = DeviceHealth("nvme", TierMetrics(registry), lambda: 5.0)
    for _ in range(3):
        health.failed("write", OSError(errno.ENOSPC, "full"))
    assert not health.would_enter("write") and health.enter("read")
    for _ in range(3):
        health.stalled("read")
    assert not health.enter("read")
    health.measure(4, 2)
    labels = {"tier": "nvme", "operation": "write", "error": "No space left on device"}
    assert registry.get_sample_value("kvstore_tier_device_errors_total", labels) == 3
    labels = {"tier": "nvme", "operation": "write"}
    assert registry.get_sample_value("kvstore_tier_breaker", labels) == 2
    assert registry.get_sample_value("kvstore_tier_in_device", {"tier": "nvme"}) == 4


def test_a_bug_is_counted_like_a_fault_of_the_device() -> None:
    registry = CollectorRegistry()
    DeviceHealth("nvme", TierMetrics(registry), lambda: 0.0).failed("read", ValueError("odd"))
    labels = {"tier": "nvme", "operation": "read", "error": "other"}
    assert registry.get_sample_value("kvstore_tier_device_errors_total", labels) == 1


def test_bytes_count_for_hits_only() -> None:
    registry = CollectorRegistry()
    health = DeviceHealth("nvme", TierMetrics(registry), lambda: 0.0)
    health.count("read", [Outcome.HIT, Outcome.CORRUPT, Outcome.HIT], [10, 100, 1])
    labels = {"tier": "nvme", "operation": "read"}
    assert registry.get_sample_value("kvstore_tier_moved_bytes_total", labels) == 11
    assert (health.reads[Outcome.HIT], health.reads.total()) == (2, 3)
