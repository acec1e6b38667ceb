"""Metric families of the tiers below DRAM."""

from prometheus_client import CollectorRegistry, Counter, Gauge


class TierMetrics:
    """What a tier below DRAM counts; one bundle for all tiers of a node, told apart by label."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.operations = Counter(
            "kvstore_tier_operations",
            "Blocks read or written, by how it ended",
            ["tier", "operation", "outcome"],
            registry=registry,
        )
        self.moved_bytes = Counter(
            "kvstore_tier_moved_bytes",
            "Bytes read from or written to a tier",
            ["tier", "operation"],
            registry=registry,
        )
        self.device_errors = Counter(
            "kvstore_tier_device_errors",
            "Operations that the device failed",
            ["tier", "operation", "error"],
            registry=registry,
        )
        self.dropped = Counter(
            "kvstore_tier_dropped_blocks",
            "Blocks that a tier forgot",
            ["tier", "reason"],
            registry=registry,
        )
        self.breaker = Gauge(
            "kvstore_tier_breaker",
            "0 closed, 1 half open, 2 open",
            ["tier", "operation"],
            registry=registry,
        )
        self.in_device = Gauge(
            "kvstore_tier_in_device", "Operations inside the device", ["tier"], registry=registry
        )
        self.disk_free_bytes = Gauge(
            "kvstore_tier_disk_free_bytes",
            "Bytes that the file system of a tier has left for anybody",
            ["tier"],
            registry=registry,
        )
        self.disk_bytes = Gauge(
            "kvstore_tier_disk_bytes", "Bytes of that file system", ["tier"], registry=registry
        )
        self.queued = Gauge(
            "kvstore_tier_queued", "Operations that wait", ["tier"], registry=registry
        )
        self._add_quotas(registry)

    def _add_quotas(self, registry: CollectorRegistry) -> None:
        """Add who holds how much, and who may not hold more."""
        self.quota_refusals = Counter(
            "kvstore_tier_quota_refusals",
            "Blocks not taken because their root or share domain is at its quota",
            ["tier"],
            registry=registry,
        )
        for tier in ("dram", "nvme", "files"):  # from the start: alerts watch it
            self.quota_refusals.labels(tier)
        self.domain_bytes = Gauge(
            "kvstore_tier_domain_bytes",
            "Bytes held by a share domain; unknown: of roots that no session has opened yet",
            ["tier", "domain"],
            registry=registry,
        )


def numa_gauge(registry: CollectorRegistry) -> Gauge:
    """Return the gauge of where a node's arena lies."""
    return Gauge(
        "kvstore_node_numa_nodes",
        "NUMA nodes that the arena was put on; 0: wherever its pages fell",
        registry=registry,
    )
