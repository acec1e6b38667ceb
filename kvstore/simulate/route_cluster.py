"""A cluster of workers in virtual time: queues, caches, a shared pool, and who holds what.

Every worker computes prompts one after another in order of arrival, and has a cache of its own
that a production `Policy` orders. So what a worker's cache holds when a prompt's turn comes depends
only on the prompts sent to it before, and is known the moment the prompt is sent. What the pool
holds is looked up when its turn comes; until then the queue counts with what it held at arrival.

    sent ── waits ──▶ start ── loads, computes ──▶ first token ── decodes ──▶ end

With the first token a prompt's blocks are written to the pool and its worker tells what it holds.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple, Protocol

from kvstore.directory.policy import BlockKey, Policy
from kvstore.router.score import Pace
from kvstore.simulate.prices import Prices
from kvstore.simulate.replay import PolicyTier
from kvstore.simulate.trace import TraceRequest


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds of one worker, alike for all: linear and quadratic in the position."""

    linear_s: float
    """Per token, at position 0."""
    quadratic_s: float
    """Per token and token of position."""
    load_s: float
    """Per token brought from the pool."""
    decode_s: float
    """Per token of output."""

    @classmethod
    def of(cls, prices: Prices, *, factor: float, decode_s: float) -> "Rates":
        """Return rates of a worker that is `factor` times slower than `prices` says."""
        linear = factor / prices.prefill_tokens_per_s
        rate = 1e9 * min(prices.pool_gb_per_s, prices.dram_gb_per_s)
        return cls(
            linear_s=linear,
            quadratic_s=linear / prices.doubling_tokens,
            load_s=factor * prices.bytes_per_token / rate,
            decode_s=decode_s,
        )

    def compute_s(self, start: int, stop: int) -> float:
        """Return the seconds to compute the tokens at positions `[start, stop)`.

        Asks the router's own model, so that simulation and routing price alike.
        """
        return Pace(self.linear_s, self.quadratic_s).between(start, stop)


class Service(NamedTuple):
    """What a worker would do for a prompt."""

    own_tokens: int
    loaded_tokens: int
    computed_tokens: int
    load_s: float
    compute_s: float


@dataclass(slots=True, eq=False)
class Job:
    """A prompt that was sent to a worker. Times are ms of the trace's clock."""

    number: int
    request: TraceRequest
    worker: int
    depth: int
    """Leading blocks in the worker's own cache when its turn comes."""
    service: Service
    """What the worker does for it; as foreseen until it starts."""
    busy_s: float
    """How long that keeps the worker; likewise."""
    sent_ms: float
    start_ms: float = math.inf
    first_ms: float = math.inf
    """The first token is there; known from the start on."""
    end_ms: float = math.inf
    stored: list[BlockKey] = field(default_factory=list)
    """Blocks that the worker's cache took in, root first."""
    dropped: list[BlockKey] = field(default_factory=list)
    pool_stored: list[BlockKey] = field(default_factory=list)
    pool_dropped: list[BlockKey] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        """Seconds from arrival to first token."""
        return (self.first_ms - self.sent_ms) / 1_000


@dataclass(slots=True, eq=False)
class Worker:
    """One worker's queue and cache."""

    index: int
    tier: PolicyTier
    current: Job | None = None
    """What is being computed."""
    queue: deque[Job] = field(default_factory=deque)
    queued_s: float = 0.0
    """Seconds that the queue is foreseen to take."""
    in_flight: int = 0
    """Requests sent that have not ended."""
    uncached_tokens: int = 0
    """What those without a first token compute; the current one counts in full."""
    kv_tokens: int = 0
    """Prompt tokens of everything in flight."""
    busy_s: float = 0.0

    @property
    def waiting(self) -> int:
        """Requests without a first token."""
        return len(self.queue) + (self.current is not None)

    def wait_s(self, now_ms: float) -> float:
        """Return the seconds until a prompt sent now would begin."""
        left = (self.current.first_ms - now_ms) / 1_000 if self.current is not None else 0.0
        return left + self.queued_s


class Observer(Protocol):
    """Hears of jobs, in order of time."""

    def first_token(self, job: Job) -> None: ...
    def ended(self, job: Job) -> None: ...


_FIRST: Final = 0
_END: Final = 1


class Cluster:
    """All workers and the pool at one moment of virtual time."""

    def __init__(
        self,
        *,
        workers: int,
        worker_blocks: int,
        pool_blocks: int,
        block_tokens: int,
        rates: Rates,
        block_bytes: int,
        overlapped: bool,
        make: Callable[[], Policy],
    ) -> None:
        """`pool_blocks` 0: no pool. `overlapped`: a prompt loads while it waits."""
        self.rates = rates
        self.overlapped = overlapped
        self.block_tokens = block_tokens
        self.worker_blocks = worker_blocks
        self.now_ms = 0.0
        self.workers = [
            Worker(at, PolicyTier(make(), worker_blocks, block_bytes=block_bytes))
            for at in range(workers)
        ]
        self.pool = (
            PolicyTier(make(), pool_blocks, block_bytes=block_bytes) if pool_blocks else None
        )
        self._all = (1 << workers) - 1
        self._holders: dict[BlockKey, int] = {}
        """Block → bit set of the workers whose cache has it, queued prompts included."""
        self._events: list[tuple[float, int, int, Job]] = []
        self._sent = 0

    # -- what may be asked -----------------------------------------------------------------

    def depths(self, blocks: Sequence[BlockKey]) -> list[int]:
        """Return for each worker how many leading blocks its cache has."""
        found = [0] * len(self.workers)
        alive, holders = self._all, self._holders
        depth = 0
        for depth, block in enumerate(blocks):
            now = alive & holders.get(block, 0)
            if now != alive and depth:
                _note(found, alive ^ now, depth)
            alive = now
            if not alive:
                return found
        _note(found, alive, depth + 1 if blocks else 0)
        return found

    def pool_run(self, blocks: Sequence[BlockKey], depth: int) -> int:
        """Return where the run of blocks in the pool that begins at `depth` ends."""
        if self.pool is not None:
            held = self.pool.held
            while depth < len(blocks) and blocks[depth] in held:
                depth += 1
        return depth

    def services(self, request: TraceRequest, depths: Sequence[int]) -> list[Service]:
        """Return what each worker would do, given `depths` of the request's blocks."""
        by_depth = {depth: self._service(request, depth) for depth in set(depths)}
        return [by_depth[depth] for depth in depths]

    def _service(self, request: TraceRequest, depth: int) -> Service:
        size, rates = self.block_tokens, self.rates
        # One prompt token at least is computed, for the logits to sample from.
        last = max(1, request.input_tokens) - 1
        own = min(depth * size, last)
        pooled = max(own, min(self.pool_run(request.blocks, depth) * size, last))
        # Loading beats computing from this position on, as in `simulate tiers`.
        begin = own
        if rates.load_s > rates.linear_s:
            begin = int(min(pooled, max(own, (rates.load_s - rates.linear_s) / rates.quadratic_s)))
        loaded = pooled - begin
        compute_s = rates.compute_s(own, begin) + rates.compute_s(pooled, last + 1)
        return Service(own, loaded, last + 1 - own - loaded, rates.load_s * loaded, compute_s)

    def busy_s(self, service: Service, waited_s: float) -> float:
        """Return the seconds a worker is busy with a prompt that has waited in its queue."""
        hidden_s = min(service.load_s, waited_s) if self.overlapped else 0.0
        return service.load_s - hidden_s + service.compute_s

    def ttft_s(self, at: int, service: Service) -> float:
        """Return the seconds to the first token if worker `at` were chosen now."""
        wait_s = self.workers[at].wait_s(self.now_ms)
        return wait_s + self.busy_s(service, wait_s)

    # -- what happens ----------------------------------------------------------------------

    def advance(self, now_ms: float, observer: Observer) -> None:
        """Let time pass up to `now_ms`."""
        while self._events and self._events[0][0] <= now_ms:
            at_ms, _, kind, job = heapq.heappop(self._events)
            self.now_ms = at_ms
            worker = self.workers[job.worker]
            if kind == _FIRST:
                self._first_token(job, worker)
                observer.first_token(job)
                heapq.heappush(self._events, (job.end_ms, job.number, _END, job))
            else:
                worker.in_flight -= 1
                worker.kv_tokens -= job.request.input_tokens
                observer.ended(job)
        self.now_ms = now_ms

    def send(self, request: TraceRequest, at: int) -> Job:
        """Queue a prompt that arrives now at worker `at`."""
        worker, blocks = self.workers[at], request.blocks
        depth = worker.tier.prefix(blocks)
        service = self._service(request, depth)
        busy_s = self.busy_s(service, worker.wait_s(self.now_ms))
        job = Job(self._sent, request, at, depth, service, busy_s, self.now_ms)
        self._sent += 1
        held = worker.tier.held
        missing = [place for place in range(depth, len(blocks)) if blocks[place] not in held]
        moved = worker.tier.serve(request, missing, partial=request.is_partial(self.block_tokens))
        job.stored = [blocks[place] for place in moved.admitted]
        job.dropped = moved.victims
        self._hold(worker, job)
        worker.in_flight += 1
        worker.kv_tokens += request.input_tokens
        worker.uncached_tokens += service.computed_tokens
        worker.queue.append(job)
        worker.queued_s += busy_s
        if worker.current is None:
            self._start(worker)
        return job

    def _start(self, worker: Worker) -> None:
        """Begin with the next prompt in the queue, which is not empty."""
        job = worker.queue.popleft()
        worker.queued_s = worker.queued_s - job.busy_s if worker.queue else 0.0
        worker.uncached_tokens -= job.service.computed_tokens
        job.service = service = self._service(job.request, job.depth)
        worker.uncached_tokens += service.computed_tokens
        job.start_ms = self.now_ms
        job.busy_s = self.busy_s(service, (job.start_ms - job.sent_ms) / 1_000)
        worker.busy_s += job.busy_s
        job.first_ms = job.start_ms + job.busy_s * 1_000
        job.end_ms = job.first_ms + job.request.output_tokens * self.rates.decode_s * 1_000
        worker.current = job
        heapq.heappush(self._events, (job.first_ms, job.number, _FIRST, job))

    def _hold(self, worker: Worker, job: Job) -> None:
        holders, bit = self._holders, 1 << worker.index
        for block in job.dropped:
            left = holders[block] & ~bit
            if left:
                holders[block] = left
            else:
                del holders[block]
        for block in job.stored:
            holders[block] = holders.get(block, 0) | bit

    def _first_token(self, job: Job, worker: Worker) -> None:
        worker.uncached_tokens -= job.service.computed_tokens
        worker.current = None
        if self.pool is not None:
            request = replace(job.request, timestamp_ms=self.now_ms)
            blocks, held = request.blocks, self.pool.held
            missing = [place for place, block in enumerate(blocks) if block not in held]
            partial = request.is_partial(self.block_tokens)
            moved = self.pool.serve(request, missing, partial=partial)
            job.pool_stored = [blocks[place] for place in moved.admitted]
            job.pool_dropped = moved.victims
        if worker.queue:
            self._start(worker)


def _note(found: list[int], workers: int, depth: int) -> None:
    """Write `depth` for every worker of a bit set."""
    while workers:
        lowest = workers & -workers
        found[lowest.bit_length() - 1] = depth
        workers ^= lowest
