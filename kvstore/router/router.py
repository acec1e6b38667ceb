"""The router: follows every publisher, decides where prompts go, remembers what it sent.

Lives on one event loop and is never blocked by a publisher: streams are read by one task each,
decisions are pure functions of the view, and nothing leaves the process on the way of a request.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Final

from kvstore.core.errors import BadInput
from kvstore.core.limits import SUSPECT_AFTER_MS
from kvstore.core.names import BlockName, Root
from kvstore.directory.events import Changed, Lost, pieces
from kvstore.directory.view import DEFAULT_MAX_BLOCKS, ClusterView, Health, Resync
from kvstore.observe.metrics import RouterMetrics
from kvstore.router.booking import Booking, Bookings
from kvstore.router.heat import HotPrefix
from kvstore.router.learning import Actual
from kvstore.router.members import Member, Members, VllmEvents
from kvstore.router.naming import NameCache
from kvstore.router.placement import Decision, Placement, Prompt
from kvstore.router.queue import DecisionQueue, nobody_alive
from kvstore.router.source import EventSource
from kvstore.router.sources import source_maker
from kvstore.router.survey import MemberState, survey
from kvstore.rpc.credentials import NO_CREDENTIALS, Credentials
from kvstore.rpc.event_writers import check_redis

_PIECE_NAMES: Final = 128
"""Names applied in one turn of the loop: about 0.1 ms in a view of millions, where most miss the
CPU's caches."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Bounds and patience of a router."""

    suspect_after_ms: float = SUSPECT_AFTER_MS
    wait_ms: float = 5_000
    """How long a request waits for a worker to be alive before it is refused."""
    booking_lifetime_ms: float = 120_000
    max_blocks: int = DEFAULT_MAX_BLOCKS
    hold_ms: float = 5_000
    """Requests wait here while the best worker's queue is longer: there, nobody can overtake."""
    queue_wait_ms: float = 60_000
    """How long a request without a deadline of its own waits for that."""
    max_waiting: int = 1_024
    """Requests that may wait for one set of workers; beyond it the weakest claim is refused."""
    domain_weights: Mapping[str, float] = field(default_factory=dict)
    """Shares of domains where requests wait; 1 where none is given."""
    tick_ms: float = 250
    sweep_blocks: int = 4_000
    """Entries cleaned per step after a snapshot: about 0.5 ms of the loop."""
    events_redis: str = ""
    """Follow publishers through the Redis at this URL, by `Watch` while it is away; "": `Watch`."""
    events_vllm: Mapping[str, VllmEvents] = field(default_factory=dict)
    """Workers that are vLLM engines, by name: followed by their own events."""
    resync_pause_ms: float = 250
    """Between noticing a hole and following anew, so that a liar cannot keep the router busy."""

    def __post_init__(self) -> None:
        for name in ("suspect_after_ms", "booking_lifetime_ms", "max_blocks", "tick_ms",
                     "sweep_blocks", "resync_pause_ms", "hold_ms", "max_waiting",
                     "queue_wait_ms"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise BadInput(f"router {name} must be positive, got {getattr(self, name)}")
        if self.wait_ms < 0:
            raise BadInput(f"router wait_ms must not be negative, got {self.wait_ms}")
        for domain, weight in self.domain_weights.items():
            if not 0 < weight < math.inf:
                raise BadInput(f"the weight of domain {domain} is {weight}, not above 0")
        check_redis("events_redis", self.events_redis)


class Router:
    """Chooses workers. Use as an async context manager, or call `close`."""

    def __init__(
        self,
        *,
        metrics: RouterMetrics,
        config: RouterConfig | None = None,
        source: Callable[[Member], EventSource] | None = None,
        credentials: Credentials = NO_CREDENTIALS,
        now_ms: Callable[[], float] = lambda: time.monotonic() * 1_000,
    ) -> None:
        self._config = config or RouterConfig()
        self._metrics = metrics
        self._source = source or source_maker(
            metrics,
            redis=self._config.events_redis,
            vllm=self._config.events_vllm,
            credentials=credentials,
        )
        self._now_ms = now_ms
        self._view = ClusterView(
            suspect_after_ms=self._config.suspect_after_ms, max_blocks=self._config.max_blocks
        )
        self._bookings = Bookings(lifetime_ms=self._config.booking_lifetime_ms)
        self._placement = Placement(self._view, self._bookings)
        self._naming = NameCache()
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._queue = DecisionQueue(
            decide=lambda prompt: self._placement.decide(prompt, self._now_ms()),
            book=self._book,
            unbook=self._bookings.complete,
            hold_ms=self._config.hold_ms,
            max_waiting=self._config.max_waiting,
            weights=self._config.domain_weights,
            metrics=metrics,
            now_ms=now_ms,
        )
        self._turn = asyncio.Lock()
        self._ticker: asyncio.Task[None] | None = None
        self._closed = False

    async def __aenter__(self) -> "Router":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def members(self) -> Members:
        """The list set last."""
        return self._placement.members

    def names(self, root: Root, tokens: bytes) -> list[BlockName]:
        """Name a prompt of packed u32 tokens; a beginning that was named before is not again."""
        return self._naming.names(root, tokens)

    def set_members(self, members: Members) -> None:
        """Follow these publishers and no others. Those that did not change are left alone."""
        assert not self._closed, "the router is closed"
        change = self.members.change_to(members)
        for member in change.gone:
            self._followers.pop(member.name).cancel()
            # A restarted node adopts its sealed blocks again; a worker's pages are gone with it.
            if member.kind == "worker" or member.name not in members.by_name:
                self._view.forget(member.name)
            self._placement.trust(member.name)
            self._placement.learned.forget(member.name)
        self._placement.members = members
        for member in change.new:
            self._view.follow(member.name, host=member.host, now_ms=self._now_ms())
            self._followers[member.name] = asyncio.create_task(
                self._follow(member), name=f"follow {member.name}"
            )
        if self._ticker is None:
            self._ticker = asyncio.create_task(self._tick(), name="router tick")

    async def close(self) -> None:
        """Stop following. Waiting `route` calls end with `Refused`."""
        self._closed = True
        self._queue.close()
        tasks = [*self._followers.values(), *([self._ticker] if self._ticker else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._followers.clear()

    def health(self, worker: str) -> Health:
        """Say how a member fares at this moment."""
        return self._view.health(worker, self._now_ms())

    @property
    def view_blocks(self) -> int:
        """How many blocks it knows somewhere."""
        return len(self._view)

    def silence_ms(self, worker: str) -> float:
        """Return for how long nothing was heard of a member; 0 for one that is not followed."""
        if worker not in self.members.by_name:
            return 0.0
        return self._view.silence_ms(worker, self._now_ms())

    @property
    def waiting(self) -> int:
        """Return how many requests wait here for a worker."""
        return len(self._queue)

    def survey(self) -> list[MemberState]:
        """Return every member as it is seen at this moment."""
        return list(survey(self.members, self._view, self._now_ms()))

    def hottest(self, most: int) -> list[HotPrefix]:
        """Return the prefixes whose requests ask for most work, hottest first."""
        return self._placement.heat.hottest(most, self._now_ms())

    async def route(
        self, prompt: Prompt, *, wait_ms: float | None = None, deadline_ms: float | None = None
    ) -> Decision:
        """Choose a worker and book the load there until `complete`.

        Waits at most `wait_ms` for a live one, and `deadline_ms` for one with a queue that is
        short enough; both end in `Refused` with the time after which to try again.
        """
        return await self._queue.place(
            prompt,
            alive_ms=self._config.wait_ms if wait_ms is None else wait_ms,
            patience_ms=self._config.queue_wait_ms if deadline_ms is None else deadline_ms,
        )

    def explain(self, prompt: Prompt) -> Decision:
        """Say what `route` would answer, without booking. Raises `Refused` like it, at once."""
        decision = self._placement.decide(prompt, self._now_ms())
        if decision is None:
            raise nobody_alive()
        return decision

    def first_token(self, booking: int, actual: Actual | None) -> bool:
        """Take a booking's prefill off the queue and learn from it; False when it is unknown.

        Its names stay: other prompts go on to follow it until the worker's events tell of them.
        None as `actual`: what was found is told with `complete`, if at all.
        """
        made = self._bookings.get(booking)
        if made is None:
            return False
        self._bookings.prefilled(made)
        if actual is not None:
            self._learn(made, actual)
        self._queue.kick()
        return True

    def complete(self, booking: int, *, actual: Actual | None = None, failed: bool = False) -> bool:
        """Free a booking and learn from it; False when it is unknown or expired.

        `actual` is for callers that did not tell of the first token. `failed` passes the worker
        over for a moment.
        """
        made = self._bookings.complete(booking)
        if made is None:
            return False
        if failed:
            self._placement.distrust(made.worker, self._now_ms())
        elif actual is not None:
            self._learn(made, actual)
        self._queue.kick()
        return True

    def _learn(self, made: Booking, actual: Actual) -> None:
        """Count how far a prediction was off, and correct the next ones. Once for each booking."""
        expected, made.expected = made.expected, None
        if expected is None:
            return
        metrics = self._metrics
        metrics.predicted_hit_error_tokens.observe(abs(expected.hit_tokens - actual.hit_tokens))
        metrics.routed_hit_tokens.labels(kind="predicted").inc(expected.hit_tokens)
        metrics.routed_hit_tokens.labels(kind="actual").inc(actual.hit_tokens)
        metrics.false_hit_tokens.inc(max(0, expected.hit_tokens - actual.hit_tokens))
        if actual.ttft_ms > 0:
            error_s = abs(expected.ttft_s - actual.ttft_ms / 1_000)
            metrics.predicted_ttft_seconds.observe(expected.ttft_s)
            metrics.predicted_ttft_error_seconds.observe(error_s)
            metrics.actual_ttft_seconds.observe(actual.ttft_ms / 1_000)
        self._placement.learn(made, expected, actual, self._now_ms())

    def _book(self, decision: Decision, prompt: Prompt) -> Decision:
        self._placement.warm(decision, prompt, self._now_ms())
        if decision.hot_tokens > decision.scores[0].own_tokens:
            self._metrics.replications.inc()
        if decision.split is not None or decision.whole is not None:
            self._metrics.splits.labels(outcome=str(decision.whole or "split")).inc()
        booking = self._bookings.book(
            decision.worker,
            prompt.root,
            prompt.names if prompt.keeps else (),
            hit_tokens=decision.hit_tokens,
            uncached_tokens=prompt.tokens - decision.hit_tokens,
            now_ms=self._now_ms(),
            loading=decision.loading,
            expected=decision.expected,
        )
        return replace(decision, booking=booking.number)

    async def _follow(self, member: Member) -> None:
        """Apply one publisher's events until cancelled, anew after each hole."""
        while True:
            try:
                reason = await self._follow_until_hole(member)
            except Exception as error:  # task boundary: one publisher must not end the router
                _log.exception("following %s failed", member.name)
                reason = "failure"
                self._view.apply(member.name, Lost(repr(error)), self._now_ms())
            self._metrics.view_resyncs.labels(reason=reason).inc()
            await asyncio.sleep(self._config.resync_pause_ms / 1_000)

    async def _follow_until_hole(self, member: Member) -> str:
        async with aclosing(self._source(member).events()) as events:
            async for event in events:
                if isinstance(event, Changed):
                    reason = await self._change(member.name, event)
                else:
                    reason = self._view.apply(member.name, event, self._now_ms())
                    self._queue.kick()  # blocks free nobody
                if reason is not None:
                    return str(reason)
        return "ended"

    async def _change(self, publisher: str, change: Changed) -> Resync | None:
        """Apply a change; large ones of all publishers take turns, a piece each turn of the loop.

        A decision waits for one piece at most, however many snapshots come in at once.
        """
        if len(change.names) <= _PIECE_NAMES:
            return self._view.apply(publisher, change, self._now_ms())
        reason: Resync | None = None
        async with self._turn:
            for piece in pieces(change, _PIECE_NAMES):
                reason = self._view.apply(publisher, piece, self._now_ms()) or reason
                await asyncio.sleep(0)
        return reason

    async def _tick(self) -> None:
        """Expire, sweep and count, a bounded piece at a time."""
        while True:
            now_ms = self._now_ms()
            self._bookings.expire(now_ms)
            self._queue.kick()
            states = dict.fromkeys(Health, 0)
            for worker in self.members.workers():
                states[self._view.health(worker.name, now_ms)] += 1
            for state, count in states.items():
                self._metrics.workers.labels(state=state.value).set(count)
            self._metrics.view_blocks.set(len(self._view))
            self._metrics.named_tokens.set(self._naming.named_tokens)
            self._metrics.known_name_tokens.set(self._naming.known_tokens)
            doubt = self._placement.learned.lowest_trust(now_ms)
            self._metrics.lowest_trust.set(doubt)
            swept = self._view.sweep(self._config.sweep_blocks)
            await asyncio.sleep(0.01 if swept else self._config.tick_ms / 1_000)
