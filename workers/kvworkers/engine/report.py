"""What the engine tells the outside: metrics of requests, events and load for routers."""

from collections.abc import Sequence
from dataclasses import replace

from kvstore.core.limits import BLOCK_TOKENS
from kvstore.directory.events import Loaded, TierKind, WorkerRole
from kvstore.directory.publisher import Publisher
from kvstore.observe.metrics import WorkerMetrics
from kvworkers.engine.output import FirstTokens
from kvworkers.engine.rates import LoadFit, RateFit, Rates
from kvworkers.engine.scheduler import Scheduler
from kvworkers.engine.sequence import Sequence as Run
from kvworkers.engine.work import Work
from kvworkers.pages.pool import PageChange, PagePool


class Reporter:
    """Turns what happened into metrics and events. Lives on the engine's event loop."""

    def __init__(
        self, publisher: Publisher, metrics: WorkerMetrics, role: WorkerRole = WorkerRole.BOTH
    ) -> None:
        self._publisher = publisher
        self._role = role
        self._metrics = metrics
        self._loads = LoadFit()
        self._evictions = 0

    def publish(self, pool: PagePool, load: Loaded) -> None:
        """Send on what the pool named and unnamed since the last call, and the load.

        With the load go the rates of loading, as `first_token` has heard of it, and the role.
        """
        for run in _runs(pool.drain_changes()):
            root, names = run[0].key.root, [change.key.name for change in run]
            if run[0].deleted:
                self._publisher.delete(root, TierKind.HBM, names)
            else:
                self._publisher.set(root, TierKind.HBM, names, block_bytes=pool.block_bytes)
        self._publisher.load = replace(load, load_rates=self._loads.rates(), role=self._role)
        metrics = self._metrics
        metrics.evictions.inc(pool.evictions - self._evictions)
        self._evictions = pool.evictions
        metrics.running.set(load.running)
        metrics.waiting.set(load.waiting)
        metrics.kv_used_bytes.set(load.kv_used_bytes)
        metrics.kv_capacity_bytes.set(load.kv_capacity_bytes)

    def occupancy(self, pool: PagePool, scheduler: Scheduler) -> None:
        """Say how much of the pages those that run hold, how much of it for nothing, who waits."""
        held = pool.use().held
        self._metrics.kv_held_bytes.set(held * pool.block_bytes)
        places = held * BLOCK_TOKENS
        self._metrics.kv_waste.set(scheduler.spare_places / places if places else 0.0)
        self._metrics.preempted.set(scheduler.preempted)

    def forked(self, *, shared: int, copied: int) -> None:
        """Count the pages that replies to one prompt share, and those copied for them."""
        self._metrics.fork_pages.labels("shared").inc(shared)
        self._metrics.fork_pages.labels("copied").inc(copied)

    def preempted(self, *, swapped: bool) -> None:
        """Count one request that made way."""
        self._metrics.preemptions.labels("swap" if swapped else "recompute").inc()

    def first_token(self, first: FirstTokens) -> None:
        """Count where a prompt's tokens came from and how long its first token took."""
        metrics, use = self._metrics, first.cache
        self._loads.load(use.loaded_tokens, first.load_ms / 1000)
        metrics.prompt_tokens.labels("hbm").inc(use.hbm_tokens)
        for tier, tokens in use.loaded_tokens.items():
            metrics.prompt_tokens.labels(tier.name.lower()).inc(tokens)
        metrics.prompt_tokens.labels("computed").inc(use.computed_tokens)
        metrics.misses.labels(use.miss_reason.name.lower()).inc()
        metrics.ttft_seconds.observe(first.ttft_ms / 1000)
        metrics.queue_seconds.observe(first.queue_ms / 1000)

    def finished(self, run: Run, *, failed: bool, now_ms: float) -> None:
        """Count how a request ended and how fast its tokens came."""
        outcome = "failed" if failed or run.finish is None else run.finish.value
        self._metrics.requests.labels(outcome).inc()
        if run.first_token_ms is not None and run.generated > 1:
            seconds = (now_ms - run.first_token_ms) / 1000
            self._metrics.tpot_seconds.observe(seconds / (run.generated - 1))

    def refused(self) -> None:
        """Count a request that was turned away before any work."""
        self._metrics.requests.labels("refused").inc()

    def step(self, seconds: float) -> None:
        """Count one step."""
        self._metrics.step_seconds.observe(seconds)

    def decode(self, batch: int, seconds: float) -> None:
        """Count one step in which every one of `batch` requests got a token."""
        self._metrics.decode_seconds.labels(batch_label(batch)).observe(seconds)

    def token(self) -> None:
        """Count one generated token."""
        self._metrics.output_tokens.inc()


def load_of(pool: PagePool, scheduler: Scheduler, rates: Rates, *, draining: bool) -> Loaded:
    """Return load and measured rates, as routers want them."""
    use, block = pool.use(), pool.block_bytes
    return Loaded(
        running=scheduler.running,
        waiting=scheduler.waiting,
        queued_tokens=scheduler.queued_tokens,
        queued_token_depths=scheduler.queued_token_depths,
        kv_used_bytes=(use.held + use.cached) * block,
        kv_capacity_bytes=use.total * block,
        prefill_tokens_per_s=rates.prefill_tokens_per_s,
        decode_tokens_per_s=rates.decode_tokens_per_s,
        prefill_linear_s=rates.prefill_linear_s,
        prefill_quadratic_s=rates.prefill_quadratic_s,
        draining=draining,
    )


def measure(reporter: Reporter, rates: RateFit, works: Sequence[Work], seconds: float) -> None:
    """Take note of how long a step took; `rates` learn from steps of one kind."""
    reporter.step(seconds)
    if all(work.count == 1 for work in works):
        rates.decode(len(works), seconds)
        reporter.decode(len(works), seconds)
    elif len(works) == 1:
        rates.prefill(works[0].count, works[0].start, seconds)


def batch_label(batch: int) -> str:
    """Return the label of a batch size: the power of two that it does not exceed."""
    return str(1 << max(0, batch - 1).bit_length())


def _runs(changes: list[PageChange]) -> list[list[PageChange]]:
    """Split into neighbours alike in root and kind: one event each."""
    runs: list[list[PageChange]] = []
    for change in changes:
        last = runs[-1][-1] if runs else None
        if last and last.deleted == change.deleted and last.key.root == change.key.root:
            runs[-1].append(change)
        else:
            runs.append([change])
    return runs
