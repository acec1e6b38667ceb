"""What a worker counts: one family of `kvstore.observe.metrics`."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvstore.observe.buckets import LATENCY_SECONDS


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
            "kvstore_worker_ttft_seconds", "Arrival to first token", buckets=LATENCY_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.tpot_seconds = Histogram(
            "kvstore_worker_tpot_seconds", "Time per output token after the first",
            buckets=LATENCY_SECONDS, registry=registry,
        )  # fmt: skip
        self.queue_seconds = Histogram(
            "kvstore_worker_queue_seconds", "Arrival to first step", buckets=LATENCY_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.step_seconds = Histogram(
            "kvstore_worker_step_seconds", "Time of one engine step", buckets=LATENCY_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._add_moves(registry)
        self.store_failures = Counter(
            "kvstore_worker_store_failures", "Cache calls that failed; requests went on without",
            ["call", "error"], registry=registry,
        )  # fmt: skip
        for call in (
            "connect",
            "acquire",
            "load",
            "settle",
            "swap",
        ):  # from the start: alerts watch it
            self.store_failures.labels(call, "Unreachable")
        self.evictions = Counter(
            "kvstore_worker_evicted_pages", "Pages dropped from HBM", registry=registry
        )
        self.running = Gauge("kvstore_worker_running", "Requests in the batch", registry=registry)
        self.waiting = Gauge("kvstore_worker_waiting", "Requests queued", registry=registry)
        self._add_room(registry)

    def _add_room(self, registry: CollectorRegistry) -> None:
        """Add how full the pages are and who made way for others."""
        self.kv_used_bytes = Gauge(
            "kvstore_worker_kv_used_bytes", "Bytes of pages in use or cached", registry=registry
        )
        self.kv_capacity_bytes = Gauge(
            "kvstore_worker_kv_capacity_bytes", "Bytes of the page pool", registry=registry
        )
        self.kv_held_bytes = Gauge(
            "kvstore_worker_kv_held_bytes", "Bytes of pages that requests hold", registry=registry
        )
        self.kv_waste = Gauge(
            "kvstore_worker_kv_waste_ratio",
            "Share of those bytes that no known token fills: the ends of last pages",
            registry=registry,
        )
        self.preempted = Gauge(
            "kvstore_worker_preempted", "Requests that made way and are not back", registry=registry
        )
        self.preemptions = Counter(
            "kvstore_worker_preemptions",
            "Requests that made way by what became of their pages: swap to the arena, or recompute",
            ["kind"], registry=registry,
        )  # fmt: skip
        for kind in ("swap", "recompute"):
            self.preemptions.labels(kind)
        self.fork_pages = Counter(
            "kvstore_worker_fork_pages",
            "Pages of a prompt that several replies to it have: shared by count, or copied",
            ["kind"], registry=registry,
        )  # fmt: skip
        for kind in ("shared", "copied"):
            self.fork_pages.labels(kind)

    def _add_moves(self, registry: CollectorRegistry) -> None:
        """Add what copies between arena and pages take, steps by batch, and lost ranks."""
        self.rank_failures = Counter(
            "kvstore_worker_rank_failures",
            "Times that a process of a tensor-parallel worker was lost; the worker ends with it",
            registry=registry,
        )
        self.reachable_arena_bytes = Gauge(
            "kvstore_worker_reachable_arena_bytes", "Bytes of the arena that copies can use",
            registry=registry,
        )  # fmt: skip
        self.moved_bytes = Counter(
            "kvstore_worker_moved_bytes", "Bytes between arena and pages", ["direction"],
            registry=registry,
        )  # fmt: skip
        self.move_seconds = Histogram(
            "kvstore_worker_move_seconds",
            "Time of one copy between arena and pages: a prompt's blocks, or those of a store job",
            ["direction"], buckets=LATENCY_SECONDS, registry=registry,
        )  # fmt: skip
        self.decode_seconds = Histogram(
            "kvstore_worker_decode_seconds",
            "Time per output token by requests in the batch: steps in which all of them decode",
            ["batch"], buckets=LATENCY_SECONDS, registry=registry,
        )  # fmt: skip
        self.void_blocks = Counter(
            "kvstore_worker_void_blocks",
            "Blocks copied and thrown away because their slot was given to another meanwhile",
            registry=registry,
        )  # fmt: skip
