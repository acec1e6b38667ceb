"""The production router in simulation: its view, bookings and placement, told no more than there.

It learns of blocks by events and of queues by periodic reports, both late; of its own requests at
once. It never sees the simulated cluster.

Production cuts prompts in blocks of `BLOCK_TOKENS`; a trace in blocks of B tokens. To decide with
one name per trace block, lengths are told to the router in units of B / BLOCK_TOKENS tokens, and
rates per such unit: every prediction in seconds stays what it was.
"""

import math
from collections import deque
from typing import Final

from kvstore.core.limits import BLOCK_TOKENS, NAME_BYTES, SUSPECT_AFTER_MS
from kvstore.core.names import BlockName, Root
from kvstore.directory.events import Began, Changed, Ended, Event, Loaded, Marked, TierKind
from kvstore.directory.policy import BlockKey
from kvstore.directory.view import ClusterView
from kvstore.router.booking import Booking, Bookings
from kvstore.router.learning import Actual
from kvstore.router.members import Member, Members
from kvstore.router.placement import Decision, Placement, Prompt
from kvstore.router.router import RouterConfig
from kvstore.router.score import Work
from kvstore.simulate.route import Setup
from kvstore.simulate.route_cluster import Cluster, Job
from kvstore.simulate.trace import Trace, TraceRequest

_ROOT: Final = Root(bytes(NAME_BYTES))
_POOL: Final = "pool"


class Publisher:
    """What one worker, or the pool, tells: blocks by number of event, and load."""

    def __init__(self, name: str, tier: TierKind) -> None:
        self.name = name
        self.tier = tier
        self.sequence = 0
        """Number of the last event made."""
        self.blocks = 0
        """What it has said it holds."""
        self.jobs: list[Job] = []
        """Sent here and not over at the last report."""
        self.heard_ms = -math.inf
        self.idle = False
        """Whether the last report said that there is nothing to do."""

    def changed(self, names: list[BlockName], *, deleted: bool) -> Changed:
        """Return the event that these blocks are, or are not, here."""
        first = self.sequence + 1
        self.sequence += len(names)
        self.blocks += -len(names) if deleted else len(names)
        return Changed(_ROOT, self.tier, names, deleted, first)


class Ours:
    """Routes with the production code. Implements `RouteChooser`."""

    def __init__(self, cluster: Cluster, setup: Setup, trace: Trace) -> None:
        config = RouterConfig()
        self._unit = trace.block_tokens / BLOCK_TOKENS
        """Tokens of the trace that are one to the router."""
        self._block_tokens = trace.block_tokens
        self._rates = cluster.rates
        self._capacity = cluster.worker_blocks
        self._report_ms, self._delay_ms = setup.report_ms, setup.delay_ms
        self._view = ClusterView(max_blocks=config.max_blocks)
        self._bookings = Bookings(lifetime_ms=config.booking_lifetime_ms)
        self._placement = Placement(self._view, self._bookings)
        self._names: dict[BlockKey, BlockName] = {}
        self._booked: dict[int, int] = {}
        """Job → booking, until it ends."""
        self._next_booking = 0
        self._events: deque[tuple[float, Publisher, Changed]] = deque()
        self._workers = [Publisher(f"{at:04d}", TierKind.HBM) for at in range(setup.workers)]
        self._pool = Publisher(_POOL, TierKind.DRAM) if cluster.pool is not None else None
        self._reported_ms = -math.inf
        # A pool is to the workers what the arena of a host is to its: one store, a wire for each.
        members = [
            Member("worker", worker.name, "simulated:1", host=_POOL if self._pool else worker.name)
            for worker in self._workers
        ]
        if self._pool is not None:
            members.append(Member("node", _POOL, "simulated:1", host=_POOL))
        self._placement.members = Members.of(members)
        for member in members:
            self._view.follow(member.name, host=member.host, now_ms=0.0)
        for publisher in self._publishers():
            self._apply(publisher, Began(publisher.name, 1, 0, (publisher.tier,)), 0.0)
            self._apply(publisher, Ended(0), 0.0)

    # -- deciding --------------------------------------------------------------------------

    def choose(self, request: TraceRequest) -> int:
        """Return the worker that production would choose now, and book it there."""
        decision, now_ms = self.decide(request), request.timestamp_ms
        prompt = self._prompt(request)
        self._placement.warm(decision, prompt, now_ms)
        booking = self._bookings.book(
            decision.worker,
            prompt.root,
            prompt.names,
            hit_tokens=decision.hit_tokens,
            uncached_tokens=prompt.tokens - decision.hit_tokens,
            now_ms=now_ms,
            loading=decision.loading,
            expected=decision.expected,
        )
        self._next_booking = booking.number
        return int(decision.worker)

    def decide(self, request: TraceRequest) -> Decision:
        """Return what production would decide now."""
        self._hear(request.timestamp_ms)
        decision = self._placement.decide(self._prompt(request), request.timestamp_ms)
        assert decision is not None, "every worker reports in time"
        return decision

    def sent(self, job: Job) -> None:
        """Remember the booking of a job."""
        self._booked[job.number] = self._next_booking
        self._workers[job.worker].jobs.append(job)

    def first_token(self, job: Job) -> None:
        """Learn from a computed prompt; its events come to the router a little later."""
        booking = self._bookings.get(self._booked[job.number])
        if booking is not None:
            self._learn(booking, job)
        due_ms = job.first_ms + self._delay_ms
        self._tell(due_ms, self._workers[job.worker], job.stored, job.dropped)
        if self._pool is not None:
            self._tell(due_ms, self._pool, job.pool_stored, job.pool_dropped)

    def ended(self, job: Job) -> None:
        """Free the booking: the router's own frontend saw the last token."""
        self._bookings.complete(self._booked.pop(job.number))

    def _learn(self, booking: Booking, job: Job) -> None:
        """Do what `Router.first_token` does, with what a worker says of its answer."""
        self._bookings.prefilled(booking)
        expected, booking.expected = booking.expected, None
        if expected is None:
            return
        own, loaded = job.service.own_tokens, job.service.loaded_tokens
        tiers = {TierKind.HBM: self._floor(own)}
        if loaded:
            tiers[TierKind.DRAM] = self._floor(own + loaded) - tiers[TierKind.HBM]
        ttft_ms = job.first_ms - job.sent_ms
        actual = Actual(
            hit_tokens=self._floor(own + loaded),
            # Below a block the units are too coarse to tell a rate.
            ttft_ms=ttft_ms if job.service.computed_tokens >= self._block_tokens else 0.0,
            queue_ms=max(0.0, ttft_ms - (job.service.load_s + job.service.compute_s) * 1_000),
            load_ms=job.service.load_s * 1_000,
            by_tier=tiers,
        )
        self._placement.learn(booking, expected, actual, job.first_ms)

    # -- hearing ---------------------------------------------------------------------------

    def _publishers(self) -> list[Publisher]:
        return [*self._workers, *([self._pool] if self._pool is not None else [])]

    def _tell(
        self, due_ms: float, publisher: Publisher, stored: list[BlockKey], dropped: list[BlockKey]
    ) -> None:
        for keys, deleted in ((dropped, True), (stored, False)):
            if keys:
                event = publisher.changed(self._named(keys), deleted=deleted)
                self._events.append((due_ms, publisher, event))

    def _hear(self, now_ms: float) -> None:
        """Apply what has come in by now."""
        while self._events and self._events[0][0] <= now_ms:
            due_ms, publisher, event = self._events.popleft()
            self._apply(publisher, event, due_ms)
        at_ms = math.floor((now_ms - self._delay_ms) / self._report_ms) * self._report_ms
        if at_ms <= self._reported_ms:
            return
        self._reported_ms = at_ms
        for worker in self._workers:
            self._report(worker, at_ms)
        if self._pool is not None:
            # A mark of what was heard already: a heartbeat, and nothing else.
            known = self._view.publisher(_POOL)
            assert known is not None
            self._apply(self._pool, Marked(known.sequence), at_ms + self._delay_ms)

    def _report(self, worker: Publisher, at_ms: float) -> None:
        """Apply the load that a worker reported at `at_ms`, unless it is no news."""
        worker.jobs = [job for job in worker.jobs if job.end_ms > at_ms]
        came_ms = at_ms + self._delay_ms
        if worker.idle and not worker.jobs and came_ms - worker.heard_ms < SUSPECT_AFTER_MS / 2:
            return
        worker.idle, worker.heard_ms = not worker.jobs, came_ms
        jobs = [job for job in worker.jobs if job.sent_ms <= at_ms]
        self._apply(worker, self.load(jobs, at_ms, worker.blocks), came_ms)

    def load(self, jobs: list[Job], at_ms: float, blocks: int = 0) -> Loaded:
        """Return what a worker with these jobs and cached blocks measures at `at_ms`."""
        rates, unit = self._rates, self._unit
        left = [self._left(job, at_ms) for job in jobs]
        return Loaded(
            running=sum(job.start_ms <= at_ms for job in jobs),
            waiting=sum(job.start_ms > at_ms for job in jobs),
            queued_tokens=math.ceil(sum(work.tokens for work in left) / unit),
            queued_token_depths=sum(work.token_depths for work in left) / unit**2,
            kv_used_bytes=blocks,
            kv_capacity_bytes=self._capacity,
            prefill_tokens_per_s=1 / (rates.linear_s * unit),
            decode_tokens_per_s=1 / (rates.decode_s * unit) if rates.decode_s else 0.0,
            prefill_linear_s=rates.linear_s * unit,
            prefill_quadratic_s=rates.quadratic_s * unit**2,
        )

    def _left(self, job: Job, at_ms: float) -> Work:
        """Return what is left to compute of a prompt: its last tokens, as the time tells."""
        service, rates = job.service, self._rates
        end = service.own_tokens + service.loaded_tokens + service.computed_tokens
        seconds = service.compute_s * _share_left(job, at_ms)
        slope = rates.linear_s + rates.quadratic_s * end
        # seconds = slope * tokens - quadratic * tokens**2 / 2
        root = math.sqrt(max(0.0, slope**2 - 2 * rates.quadratic_s * seconds))
        tokens = min(float(service.computed_tokens), 2 * seconds / (slope + root))
        return Work.of(tokens, end - tokens)

    def _apply(self, publisher: Publisher, event: Event, now_ms: float) -> None:
        resync = self._view.apply(publisher.name, event, now_ms)
        assert resync is None, (publisher.name, resync)

    def _prompt(self, request: TraceRequest) -> Prompt:
        full = request.input_tokens // self._block_tokens
        names = self._named(request.blocks[:full])
        return Prompt(root=_ROOT, names=names, tokens=self._units(request.input_tokens))

    def _units(self, tokens: int) -> int:
        return max(1, math.ceil(tokens / self._unit))

    def _floor(self, tokens: int) -> int:
        return int(tokens / self._unit)

    def _named(self, keys: list[BlockKey]) -> list[BlockName]:
        """Return names whose first bytes are the keys: as good as hashes, one object each."""
        known, names = self._names, []
        for key in keys:
            name = known.get(key)
            if name is None:
                name = known[key] = BlockName(key.to_bytes(8, "little").ljust(NAME_BYTES, b"\0"))
            names.append(name)
        return names


def _share_left(job: Job, at_ms: float) -> float:
    """Return which share of a prompt's computing is left."""
    if job.start_ms >= at_ms:
        return 1.0
    if job.first_ms <= at_ms:
        return 0.0
    return (job.first_ms - at_ms) / (job.first_ms - job.start_ms)
