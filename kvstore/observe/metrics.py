"""Every metric family in one table, so that names, labels and units agree everywhere.

Rooms get one of these bundles passed in; none of them touches a global registry, so several nodes
can live in one process (tests, simulation). Units are base units: seconds, bytes, tokens.
"""

from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_LATENCY_SECONDS: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0,
)  # fmt: skip


class NodeMetrics:
    """What a cache node counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.hit_blocks = Counter(
            "kvstore_node_hit_blocks", "Blocks leased to a caller", ["tier"], registry=registry
        )
        self.hit_bytes = Counter(
            "kvstore_node_hit_bytes", "Bytes leased to a caller", ["tier"], registry=registry
        )
        self.misses = Counter(
            "kvstore_node_misses",
            "Acquires whose prefix ended early",
            ["reason"],
            registry=registry,
        )
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
        self._add_gauges(registry)

    def _add_calls(self, registry: CollectorRegistry) -> None:
        self.rpc_seconds = Histogram(
            "kvstore_node_rpc_seconds",
            "Handler time of a call",
            ["method"],
            buckets=_LATENCY_SECONDS,
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
            buckets=_LATENCY_SECONDS, registry=registry,
        )  # fmt: skip
        self.tpot_seconds = Histogram(
            "kvstore_tpot_seconds", "Time per output token after the first",
            buckets=_LATENCY_SECONDS, registry=registry,
        )  # fmt: skip
        self.decisions_seconds = Histogram(
            "kvstore_route_seconds", "Time of one routing decision", buckets=_LATENCY_SECONDS,
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
        self._add_predictions(registry)

    def _add_predictions(self, registry: CollectorRegistry) -> None:
        """Add what predictions are held against."""
        self.waiting = Gauge(
            "kvstore_router_waiting", "Requests that wait for a worker to have room or to be alive",
            registry=registry,
        )  # fmt: skip
        self.wait_seconds = Histogram(
            "kvstore_router_wait_seconds", "How long those waited that went on to a worker",
            buckets=_LATENCY_SECONDS, registry=registry,
        )  # fmt: skip
        self.refusals = Counter(
            "kvstore_router_refusals", "Requests turned away: the queue is full, the answer would"
            " come later than asked, the deadline passed waiting, or no worker is alive",
            ["reason"], registry=registry,
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
            buckets=_LATENCY_SECONDS, registry=registry,
        )  # fmt: skip
        self.predicted_ttft_error_seconds = Histogram(
            "kvstore_predicted_ttft_error_seconds",
            "Predicted minus actual time to first token, absolute", buckets=_LATENCY_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.lowest_trust = Gauge(
            "kvstore_lowest_trust", "Share believed of the publisher that is believed least",
            registry=registry,
        )  # fmt: skip


class WorkerMetrics:
    """What a GPU worker counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "kvstore_worker_requests", "Requests by how they ended", ["outcome"], registry=registry
        )
        self.prompt_tokens = Counter(
            "kvstore_worker_prompt_tokens", "Prompt tokens by source", ["source"], registry=registry
        )
        self.output_tokens = Counter(
            "kvstore_worker_output_tokens", "Tokens generated", registry=registry
        )
        self.misses = Counter(
            "kvstore_worker_misses", "Why cached prefixes ended", ["reason"], registry=registry
        )
        self.ttft_seconds = Histogram(
            "kvstore_worker_ttft_seconds", "Arrival to first token", buckets=_LATENCY_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.tpot_seconds = Histogram(
            "kvstore_worker_tpot_seconds", "Time per output token after the first",
            buckets=_LATENCY_SECONDS, registry=registry,
        )  # fmt: skip
        self.queue_seconds = Histogram(
            "kvstore_worker_queue_seconds", "Arrival to first step", buckets=_LATENCY_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.step_seconds = Histogram(
            "kvstore_worker_step_seconds", "Time of one engine step", buckets=_LATENCY_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.moved_bytes = Counter(
            "kvstore_worker_moved_bytes", "Bytes between arena and pages", ["direction"],
            registry=registry,
        )  # fmt: skip
        self.store_failures = Counter(
            "kvstore_worker_store_failures", "Cache calls that failed; requests went on without",
            ["call", "error"], registry=registry,
        )  # fmt: skip
        self.evictions = Counter(
            "kvstore_worker_evicted_pages", "Pages dropped from HBM", registry=registry
        )
        self.running = Gauge("kvstore_worker_running", "Requests in the batch", registry=registry)
        self.waiting = Gauge("kvstore_worker_waiting", "Requests queued", registry=registry)
        self.kv_used_bytes = Gauge(
            "kvstore_worker_kv_used_bytes", "Bytes of pages in use or cached", registry=registry
        )
        self.kv_capacity_bytes = Gauge(
            "kvstore_worker_kv_capacity_bytes", "Bytes of the page pool", registry=registry
        )


class ClientMetrics:
    """What a client of a cache node counts; its host passes its own registry in."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.failures = Counter(
            "kvstore_client_failures", "Calls to the cache node that failed", ["call", "error"],
            registry=registry,
        )  # fmt: skip
        self.sessions = Counter(
            "kvstore_client_sessions", "Sessions opened", ["reason"], registry=registry
        )
        self.strays = Counter(
            "kvstore_client_stray_blocks", "Slots given back whose reservation's answer was lost",
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


class AccessMetrics:
    """What the door of a server counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.denied = Counter(
            "kvstore_access_denied", "Calls turned away before they were looked at", ["reason"],
            registry=registry,
        )  # fmt: skip
        self.admin_calls = Counter(
            "kvstore_access_admin_calls", "Calls that need the admin role", ["outcome"],
            registry=registry,
        )  # fmt: skip


def exposition(registry: CollectorRegistry) -> Callable[[], bytes]:
    """Return a function that renders the registry in Prometheus' text format."""
    return lambda: generate_latest(registry)


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
        self.queued = Gauge(
            "kvstore_tier_queued", "Operations that wait", ["tier"], registry=registry
        )


class PeerMetrics:
    """What a cache node gives to and takes from those who do not map its arena."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.connections = Counter(
            "kvstore_bulk_connections",
            "Connections of the bulk port, by how they ended",
            ["how"],
            registry=registry,
        )
        self.bytes = Counter(
            "kvstore_bulk_bytes",
            "Bytes on tickets that the bulk port has redeemed",
            ["direction"],
            registry=registry,
        )
        self.tickets = Gauge("kvstore_bulk_tickets", "Tickets not used yet", registry=registry)
        self.remote_sessions = Gauge(
            "kvstore_remote_sessions", "Open sessions of remote clients", registry=registry
        )
        self.peers = Gauge(
            "kvstore_peers", "Neighbours by how they fare", ["state"], registry=registry
        )
        self.known_blocks = Gauge(
            "kvstore_peer_known_blocks", "Blocks known to lie at neighbours", registry=registry
        )
        self.resyncs = Counter(
            "kvstore_peer_resyncs",
            "Streams of neighbours followed anew",
            ["reason"],
            registry=registry,
        )
        self.list_errors = Counter(
            "kvstore_peer_list_errors",
            "Times that the list of peers could not be read",
            registry=registry,
        )
