"""Every metric family in one table, so that names, labels and units agree everywhere.

Rooms get one of these bundles passed in; none of them touches a global registry, so several nodes
can live in one process (tests, simulation). Units are base units: seconds, bytes, tokens.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kvstore.observe.access_metrics import AccessMetrics
from kvstore.observe.buckets import LATENCY_SECONDS
from kvstore.observe.client_metrics import ClientMetrics
from kvstore.observe.peer_metrics import PeerMetrics
from kvstore.observe.redis_metrics import RedisMetrics
from kvstore.observe.tier_metrics import TierMetrics, numa_gauge
from kvstore.observe.worker_metrics import WorkerMetrics

__all__ = [
    "AccessMetrics",
    "ClientMetrics",
    "ClusterMetrics",
    "NodeMetrics",
    "PeerMetrics",
    "RedisMetrics",
    "RouterMetrics",
    "TierMetrics",
    "WorkerMetrics",
    "exposition",
]


class NodeMetrics:
    """What a cache node counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._add_hits(registry)
        self.reserved_blocks = Counter(
            "kvstore_node_reserved_blocks", "Slots handed to writers", registry=registry
        )
        self.settled = Counter(
            "kvstore_node_settled_blocks", "Settled items", ["kind", "outcome"], registry=registry
        )
        self.sealed_bytes = Counter(
            "kvstore_node_sealed_bytes", "Bytes hashed and sealed", registry=registry
        )
        self.scrubbed_bytes = Counter(
            "kvstore_node_scrubbed_bytes", "Bytes reread and found good", registry=registry
        )
        self.evictions = Counter(
            "kvstore_node_evicted_blocks", "Blocks dropped", ["tier", "reason"], registry=registry
        )
        self.corrupt = Counter(
            "kvstore_node_corrupt_blocks",
            "Blocks that failed their sum",
            ["tier"],
            registry=registry,
        )
        self.leases_expired = Counter(
            "kvstore_node_expired_leases", "Leases that ran out unreleased", registry=registry
        )
        self.unrecorded = Counter(
            "kvstore_node_unrecorded_accesses",
            "Accesses that a slow recording missed",
            registry=registry,
        )
        self.unwritten = Counter(
            "kvstore_node_unwritten_blocks",
            "Blocks that were not copied to a tier below",
            ["tier", "reason"],
            registry=registry,
        )
        self._add_calls(registry)
        self._add_movement(registry)
        self._add_gauges(registry)
        self._add_space(registry)
        self.numa_nodes = numa_gauge(registry)
        # Alerts watch these: an increase from nothing at all is none to Prometheus.
        self.corrupt.labels("dram")
        for reason in ("room", "chunk", "corrupt", "cleared", "quota"):
            self.evictions.labels("dram", reason)

    def _add_hits(self, registry: CollectorRegistry) -> None:
        """Add what was found and what was not, by whom it was asked for."""
        self.hit_blocks = Counter(
            "kvstore_node_hit_blocks", "Blocks leased to a caller", ["tier", "domain"],
            registry=registry,
        )  # fmt: skip
        self.hit_bytes = Counter(
            "kvstore_node_hit_bytes", "Bytes leased to a caller", ["tier", "domain"],
            registry=registry,
        )  # fmt: skip
        self.misses = Counter(
            "kvstore_node_misses", "Acquires whose prefix ended early", ["reason", "domain"],
            registry=registry,
        )  # fmt: skip
        self.missed_blocks = Counter(
            "kvstore_node_missed_blocks",
            "Blocks asked for beyond the prefix that was found, by why it ended",
            ["reason", "domain"], registry=registry,
        )  # fmt: skip

    def _add_movement(self, registry: CollectorRegistry) -> None:
        """Add what blocks do between tiers."""
        self.crossing_seconds = Histogram(
            "kvstore_node_crossing_seconds",
            "Time of one batch of blocks from one tier into another, waiting for its turn excluded",
            ["source", "target"], buckets=LATENCY_SECONDS, registry=registry,
        )  # fmt: skip
        self.crossed_bytes = Counter(
            "kvstore_node_crossed_bytes", "Bytes that arrived in a tier from another",
            ["source", "target"], registry=registry,
        )  # fmt: skip
        self.failed_batches = Counter(
            "kvstore_node_failed_batches", "Batches of moves that ended in an unexpected error",
            ["lane"], registry=registry,
        )  # fmt: skip

    def _add_space(self, registry: CollectorRegistry) -> None:
        """Add how the arena's bytes lie."""
        self.pinned_blocks = Gauge(
            "kvstore_node_pinned_blocks", "Blocks that callers have pinned for a time",
            registry=registry,
        )  # fmt: skip
        self.pinned_bytes = Gauge(
            "kvstore_node_pinned_bytes", "Bytes of them, out of a quarter of the arena each domain",
            registry=registry,
        )  # fmt: skip
        self.free_bytes = Gauge(
            "kvstore_node_free_bytes",
            "Free bytes of the arena: in no chunk yet, or in slots of chunks of one size",
            ["where"], registry=registry,
        )  # fmt: skip
        self.fragmentation = Gauge(
            "kvstore_node_fragmentation_ratio",
            "Share of the bytes in no chunk that lies outside the largest free extent",
            registry=registry,
        )  # fmt: skip
        self.info = Gauge(
            "kvstore_node_info", "1; says which node this is", ["node"], registry=registry
        )

    def _add_calls(self, registry: CollectorRegistry) -> None:
        self.rpc_seconds = Histogram(
            "kvstore_node_rpc_seconds",
            "Handler time of a call",
            ["method"],
            buckets=LATENCY_SECONDS,
            registry=registry,
        )
        self.rpc_errors = Counter(
            "kvstore_node_rpc_errors",
            "Calls refused or failed",
            ["method", "error"],
            registry=registry,
        )

    def _add_gauges(self, registry: CollectorRegistry) -> None:
        self.sessions = Gauge("kvstore_node_sessions", "Open sessions", registry=registry)
        self.leases = Gauge("kvstore_node_leases", "Leases held", registry=registry)
        self.slots = Gauge("kvstore_node_slots", "Slots by state", ["state"], registry=registry)
        self.queued = Gauge(
            "kvstore_node_queued",
            "Blocks to seal, blocks to verify, watchers, moves by lane",
            ["queue"],
            registry=registry,
        )
        self.used_bytes = Gauge(
            "kvstore_tier_used_bytes", "Bytes held", ["tier"], registry=registry
        )
        self.capacity_bytes = Gauge(
            "kvstore_tier_capacity_bytes", "Bytes that fit", ["tier"], registry=registry
        )


class RouterMetrics:
    """What a router and its frontends count."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "kvstore_requests", "Requests by how they ended", ["outcome"], registry=registry
        )
        self.prompt_tokens = Counter(
            "kvstore_prompt_tokens", "Prompt tokens received", registry=registry
        )
        self.cached_tokens = Counter(
            "kvstore_cached_tokens", "Prompt tokens that came from a cache", ["tier"],
            registry=registry,
        )  # fmt: skip
        self.misses = Counter(
            "kvstore_request_misses", "Why cached prefixes ended", ["reason"], registry=registry
        )
        self.ttft_seconds = Histogram(
            "kvstore_ttft_seconds", "Time to first token at the frontend", ["cached"],
            buckets=LATENCY_SECONDS, registry=registry,
        )  # fmt: skip
        self.tpot_seconds = Histogram(
            "kvstore_tpot_seconds", "Time per output token after the first",
            buckets=LATENCY_SECONDS, registry=registry,
        )  # fmt: skip
        self.decisions_seconds = Histogram(
            "kvstore_route_seconds", "Time of one routing decision", buckets=LATENCY_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.retries = Counter(
            "kvstore_request_retries", "Requests moved to another worker", ["reason"],
            registry=registry,
        )  # fmt: skip
        self.in_flight = Gauge("kvstore_requests_in_flight", "Requests running", registry=registry)
        self.workers = Gauge(
            "kvstore_workers", "Workers by state as the router sees them", ["state"],
            registry=registry,
        )  # fmt: skip
        self.view_blocks = Gauge("kvstore_view_blocks", "Blocks in the view", registry=registry)
        self.view_resyncs = Counter(
            "kvstore_view_resyncs", "Snapshots fetched again", ["reason"], registry=registry
        )
        self.source_faults = Counter(
            "kvstore_event_source_faults", "Times that following a publisher failed: by source"
            " (redis, vllm) and error", ["source", "error"], registry=registry,
        )  # fmt: skip
        self.watched_instead = Gauge(
            "kvstore_event_source_watched_instead", "Publishers followed by Watch while Redis is"
            " away or does not know them", registry=registry,
        )  # fmt: skip
        self._add_predictions(registry)
        self._add_errors(registry)
        self._add_domains(registry)

    def _add_domains(self, registry: CollectorRegistry) -> None:
        """Add who uses what."""
        self.domain_requests = Counter(
            "kvstore_domain_requests", "Requests that began, by share domain", ["domain"],
            registry=registry,
        )  # fmt: skip
        self.domain_tokens = Counter(
            "kvstore_domain_tokens",
            "Tokens by share domain and kind: prompt, cached (part of prompt) and output",
            ["domain", "kind"], registry=registry,
        )  # fmt: skip

    def _add_errors(self, registry: CollectorRegistry) -> None:
        """Add predictions, and what they are held against."""
        self.predicted_hit_error_tokens = Histogram(
            "kvstore_predicted_hit_error_tokens", "Predicted minus actual cached tokens, absolute",
            buckets=(0, 16, 64, 256, 1024, 4096, 16384, 65536), registry=registry,
        )  # fmt: skip
        self.routed_hit_tokens = Counter(
            "kvstore_routed_hit_tokens", "Cached prompt tokens of answered requests by kind:"
            " predicted when they were sent, actual as the worker said", ["kind"],
            registry=registry,
        )  # fmt: skip
        self.predicted_ttft_seconds = Histogram(
            "kvstore_predicted_ttft_seconds", "Predicted time to first token of answered requests",
            buckets=LATENCY_SECONDS, registry=registry,
        )  # fmt: skip
        self.predicted_ttft_error_seconds = Histogram(
            "kvstore_predicted_ttft_error_seconds",
            "Predicted minus actual time to first token, absolute", buckets=LATENCY_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.actual_ttft_seconds = Histogram(
            "kvstore_actual_ttft_seconds",
            "Time from the decision to the first token, of the requests that were predicted",
            buckets=LATENCY_SECONDS, registry=registry,
        )  # fmt: skip
        self.false_hit_tokens = Counter(
            "kvstore_false_hit_tokens", "Prompt tokens predicted to be cached that were not found",
            registry=registry,
        )  # fmt: skip

    def _add_predictions(self, registry: CollectorRegistry) -> None:
        """Add what decides where requests go, and when."""
        self.waiting = Gauge(
            "kvstore_router_waiting", "Requests that wait for a worker to have room or to be alive",
            registry=registry,
        )  # fmt: skip
        self.wait_seconds = Histogram(
            "kvstore_router_wait_seconds", "How long those waited that went on to a worker",
            buckets=LATENCY_SECONDS, registry=registry,
        )  # fmt: skip
        self.refusals = Counter(
            "kvstore_router_refusals", "Requests turned away: the queue is full, the answer would"
            " come later than asked, the deadline passed waiting, or no worker is alive",
            ["reason"], registry=registry,
        )  # fmt: skip
        self.splits = Counter(
            "kvstore_router_splits", "Requests of clusters whose workers have roles: split over two"
            " workers, or why not", ["outcome"], registry=registry,
        )  # fmt: skip
        self.hand_over_seconds = Histogram(
            "kvstore_hand_over_seconds",
            "Time from a split request's first token until another worker has given the next",
            buckets=LATENCY_SECONDS, registry=registry,
        )  # fmt: skip
        self.replications = Counter(
            "kvstore_hot_prefix_copies", "Requests that made another copy of a hot prefix",
            registry=registry,
        )  # fmt: skip
        self.named_tokens = Gauge(
            "kvstore_named_tokens", "Prompt tokens named by hashing, since the start",
            registry=registry,
        )  # fmt: skip
        self.known_name_tokens = Gauge(
            "kvstore_known_name_tokens", "Prompt tokens whose names were remembered instead",
            registry=registry,
        )  # fmt: skip
        self.lowest_trust = Gauge(
            "kvstore_lowest_trust", "Share believed of the publisher that is believed least",
            registry=registry,
        )  # fmt: skip


class ClusterMetrics:
    """What the controller of a cluster counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.parts = Gauge(
            "kvstore_cluster_parts", "Parts by where they stand", ["role", "phase"],
            registry=registry,
        )  # fmt: skip
        self.restarts = Counter(
            "kvstore_cluster_restarts", "Parts that came back empty", ["part"], registry=registry
        )
        self.failures = Counter(
            "kvstore_cluster_failures", "Calls to parts that failed, by what was asked", ["call"],
            registry=registry,
        )  # fmt: skip
        self.members_version = Gauge(
            "kvstore_cluster_members_version", "Changes of the member list", registry=registry
        )


def exposition(registry: CollectorRegistry) -> Callable[[], bytes]:
    """Return a function that renders the registry in Prometheus' text format."""
    return lambda: generate_latest(registry)
