"""Replays a trace through a cluster and a router: hits, balance and time to first token."""

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from kvstore.core.errors import BadInput
from kvstore.directory.policies import DEFAULT_POLICY, make_policy
from kvstore.router.members import MAX_MEMBERS
from kvstore.simulate.prices import Prices
from kvstore.simulate.route_cluster import Cluster, Job, Rates
from kvstore.simulate.trace import Trace, TraceRequest

MAX_WORKERS: Final = MAX_MEMBERS - 1
"""What the production router follows, less the pool."""


class RouteChooser(Protocol):
    """A router under test. Hears of its jobs in order of time, as `Observer`."""

    def choose(self, request: TraceRequest) -> int:
        """Return the worker for a request that arrives now."""
        ...

    def sent(self, job: Job) -> None: ...
    def first_token(self, job: Job) -> None: ...
    def ended(self, job: Job) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A cluster and what routers may know of it."""

    workers: int = 8
    capacity: float = 0.2
    """All workers' caches together, as a share of the trace's unique blocks."""
    pool: float = 0.0
    """The shared pool, likewise; 0: none."""
    policy: str = DEFAULT_POLICY
    prices: Prices = field(default_factory=lambda: Prices(pool_gb_per_s=40.0))
    factor: float = 1.0
    """How many times slower than `prices` the workers are."""
    overlapped: bool = True
    """Whether a prompt is loaded while it waits, as our workers do; else when its turn comes."""
    decode_s: float = 0.025
    """Per token of output."""
    report_ms: float = 250.0
    """Between two load reports of a worker."""
    delay_ms: float = 2.0
    """Until an event or a report is seen by the router."""

    def __post_init__(self) -> None:
        if not 1 <= self.workers <= MAX_WORKERS:
            raise BadInput(f"{self.workers} workers; 1 to {MAX_WORKERS} allowed")
        if not 0 < self.capacity < math.inf or not 0 <= self.pool <= 1:
            raise BadInput(f"capacity {self.capacity} or pool {self.pool} is not a share")
        for name in ("factor", "report_ms"):
            if not getattr(self, name) > 0:
                raise BadInput(f"{name} is {getattr(self, name)}, not above 0")
        for name in ("decode_s", "delay_ms"):
            if not getattr(self, name) >= 0:
                raise BadInput(f"{name} is {getattr(self, name)}, below 0")

    def cluster(self, trace: Trace) -> Cluster:
        """Return the cluster, empty, before the first request of `trace`."""
        size = trace.block_tokens
        return Cluster(
            workers=self.workers,
            worker_blocks=max(1, round(self.capacity * trace.unique_blocks) // self.workers),
            pool_blocks=trace.capacity(self.pool) if self.pool else 0,
            block_tokens=size,
            block_bytes=size * self.prices.bytes_per_token,
            overlapped=self.overlapped,
            rates=Rates.of(self.prices, factor=self.factor, decode_s=self.decode_s),
            make=lambda: make_policy(self.policy),
        )


MakeRouter = Callable[[Cluster, Setup, Trace], RouteChooser]
"""Makes a router for an empty cluster."""


@dataclass(frozen=True, slots=True)
class RouteResult:
    """What a router made of a trace."""

    token_hit: float
    """Share of prompt tokens found in the chosen worker's own cache, 0 to 1."""
    pool_hit: float
    """Share of prompt tokens loaded from the pool."""
    imbalance: float
    """Seconds of computing and loading of the busiest worker over the mean of all."""
    utilisation: float
    """Mean busy seconds of a worker over the span of arrivals."""
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float


class _Meter:
    """Counts what became of the jobs, and passes on what the router hears."""

    def __init__(self, router: RouteChooser) -> None:
        self._router = router
        self.ttft_s = array("d")
        self.own_tokens = self.loaded_tokens = 0

    def first_token(self, job: Job) -> None:
        """Count a prompt that is computed."""
        self.ttft_s.append(job.ttft_s)
        self.own_tokens += job.service.own_tokens
        self.loaded_tokens += job.service.loaded_tokens
        self._router.first_token(job)

    def ended(self, job: Job) -> None:
        """Pass it on."""
        self._router.ended(job)


def replay_route(
    trace: Trace,
    setup: Setup,
    make: MakeRouter,
    *,
    on_request: Callable[[], None] | None = None,
) -> RouteResult:
    """Send every request of `trace` where the router says, and wait until all have ended."""
    cluster = setup.cluster(trace)
    router = make(cluster, setup, trace)
    meter = _Meter(router)
    for request in trace.requests:
        cluster.advance(request.timestamp_ms, meter)
        router.sent(cluster.send(request, router.choose(request)))
        if on_request is not None:
            on_request()
    cluster.advance(math.inf, meter)
    busy = [worker.busy_s for worker in cluster.workers]
    mean = sum(busy) / len(busy)
    times = sorted(meter.ttft_s)
    return RouteResult(
        token_hit=meter.own_tokens / max(1, trace.input_tokens),
        pool_hit=meter.loaded_tokens / max(1, trace.input_tokens),
        imbalance=max(busy) / mean if mean else 1.0,
        utilisation=mean / span_s(trace),
        ttft_mean_s=sum(times) / len(times),
        ttft_p50_s=times[(len(times) - 1) // 2],
        ttft_p99_s=times[math.ceil(0.99 * len(times)) - 1],
    )


def span_s(trace: Trace) -> float:
    """Return the seconds from the first arrival to the last; at least a millisecond."""
    first, last = trace.requests[0].timestamp_ms, trace.requests[-1].timestamp_ms
    return max(1.0, last - first) / 1_000
