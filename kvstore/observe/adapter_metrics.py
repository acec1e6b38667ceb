"""Metric families of adapters whose engines hand over their own bytes."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from kvstore.observe.buckets import LATENCY_SECONDS


class AdapterMetrics:
    """What an adapter counts in its engine's process; the engine's registry is passed in."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.blocks = Counter(
            "kvstore_adapter_blocks", "Blocks that an engine asked for, by call (lookup, load,"
            " store) and outcome: hit or miss, and for stores held or refused",
            ["engine", "call", "outcome"], registry=registry,
        )  # fmt: skip
        self.bytes = Counter(
            "kvstore_adapter_bytes", "Bytes of whole blocks that were loaded, or are held now that"
            " they were given", ["engine", "call"], registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "kvstore_adapter_seconds", "Time of one call, the node's answers and copies included",
            ["engine", "call"], buckets=LATENCY_SECONDS, registry=registry,
        )  # fmt: skip
        self.refused = Counter(
            "kvstore_adapter_refused_tasks", "Tasks that failed at once because too many wait;"
            " and chunks whose storing or removal an engine is not told because there are too many",
            ["engine"], registry=registry,
        )  # fmt: skip
        self.failures = Counter(
            "kvstore_adapter_failures", "Calls that failed for a reason nobody foresaw; the log has"
            " it", ["engine", "call"], registry=registry,
        )  # fmt: skip
