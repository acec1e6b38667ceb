"""Where requests wait until a worker has room: order and bounds are `admission`'s, time is here.

A request goes on at once while the best worker's queue is short and nobody waits for the same set
of workers. What waits is looked at when a first token came, a request ended, a worker reported or
became alive: one look decides for the first in order only, so a burst of news costs little.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Final

from kvstore.core.errors import Refused
from kvstore.observe.metrics import RouterMetrics
from kvstore.router.admission import Claim, FairClock, Ticket, WaitingRoom
from kvstore.router.placement import Decision, Prompt

RETRY_AFTER_MS: Final = 1_000
"""What a caller is told when no worker is alive: a restart takes at least that."""

MAX_POOLS: Final = 64
"""Sets of workers whose pace of granting is remembered while nobody waits for them."""

MAX_GRANTS: Final = 16
"""Requests let go in one step of the event loop, so that a large room never stops it."""

Pool = frozenset[str] | None


def nobody_alive() -> Refused:
    """Return what a caller is told when there is no worker at all."""
    return Refused("no worker is alive that could take the request", RETRY_AFTER_MS)


@dataclass(frozen=True, slots=True)
class _Waiter:
    prompt: Prompt
    decided: "asyncio.Future[Decision]"
    since_ms: float


Room = WaitingRoom[_Waiter]


class DecisionQueue:
    """Decides at once or in order. Belongs to one event loop."""

    def __init__(
        self,
        *,
        decide: Callable[[Prompt], Decision | None],
        book: Callable[[Decision, Prompt], Decision],
        unbook: Callable[[int], object],
        hold_ms: float,
        max_waiting: int,
        weights: Mapping[str, float],
        metrics: RouterMetrics,
        now_ms: Callable[[], float],
    ) -> None:
        self._decide = decide
        self._book = book
        self._unbook = unbook
        self._hold_ms = hold_ms
        self._max_waiting = max_waiting
        self._metrics = metrics
        self._now_ms = now_ms
        self._clock = FairClock(weights)
        self._rooms: dict[Pool, Room] = {}
        self._closed = False

    def __len__(self) -> int:
        """Return how many requests wait here."""
        return sum(len(room) for room in self._rooms.values())

    async def place(self, prompt: Prompt, *, alive_ms: float, patience_ms: float) -> Decision:
        """Return a booked decision; raises `Refused`.

        Waits `alive_ms` for any worker to be alive and `patience_ms` for one to have room. A
        retry (`exclude`) does not wait for room: it had its turn.
        """
        if self._closed:
            raise nobody_alive()
        started, now_ms = perf_counter(), self._now_ms()
        room = self._rooms.get(_pool(prompt))
        if not room or prompt.exclude:
            decision = self._decide(prompt)
            if decision is not None and (prompt.exclude or not self._held(decision)):
                self._check_slo(prompt, decision, 0.0, room)
                self._clock.charge(prompt.domain, prompt.tokens - decision.hit_tokens)
                decision = self._book(decision, prompt)
                self._metrics.decisions_seconds.observe(perf_counter() - started)
                return decision
            if decision is not None:
                self._check_slo(prompt, decision, 0.0, room)
            if max(alive_ms, patience_ms if decision is not None else 0.0) <= 0:
                raise self._gave_up(prompt, decision, room)
        return await self._wait(prompt, now_ms, alive_ms, patience_ms)

    async def _wait(
        self, prompt: Prompt, now_ms: float, alive_ms: float, patience_ms: float
    ) -> Decision:
        room = self._room(_pool(prompt))
        waiter = _Waiter(prompt, asyncio.get_running_loop().create_future(), now_ms)
        claim = Claim(prompt.domain, prompt.priority, now_ms + max(alive_ms, patience_ms))
        ticket, victim = room.enter(waiter, claim)
        if victim is not None:
            message = f"{len(room)} requests wait already, with claims as strong or stronger"
            self._refuse(victim, "full", Refused(message, room.retry_after_ms()))
        self._count()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(alive_ms / 1_000):
                    return await asyncio.shield(waiter.decided)
            decision = self._decide(prompt)
            if decision is not None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, patience_ms - alive_ms) / 1_000):
                        return await asyncio.shield(waiter.decided)
            if waiter.decided.done():  # granted in the very step in which patience ended
                return waiter.decided.result()
            raise self._gave_up(prompt, self._decide(prompt), room)
        except asyncio.CancelledError:
            if waiter.decided.done() and waiter.decided.exception() is None:
                self._unbook(waiter.decided.result().booking)
            raise
        finally:
            room.leave(ticket)
            waiter.decided.cancel()
            self._count()

    def kick(self) -> None:
        """Let those go that can: something may have changed."""
        for pool in [pool for pool, room in self._rooms.items() if room]:
            self._serve(pool)

    def close(self) -> None:
        """Refuse everyone who waits, now and later."""
        self._closed = True
        for room in self._rooms.values():
            while (ticket := room.first()) is not None:
                room.leave(ticket)
                self._refuse(ticket, "closed", nobody_alive())

    def _serve(self, pool: Pool) -> None:
        room = self._rooms[pool]
        for _ in range(MAX_GRANTS):
            ticket = room.first()
            if ticket is None:
                return
            started = perf_counter()
            prompt, now_ms = ticket.item.prompt, self._now_ms()
            decision = self._decide(prompt)
            if decision is None or (self._held(decision) and not prompt.exclude):
                return
            waited_ms = now_ms - ticket.item.since_ms
            try:
                self._check_slo(prompt, decision, waited_ms, room)
            except Refused as refusal:
                room.leave(ticket)
                ticket.item.decided.set_exception(refusal)
                continue
            room.grant(ticket, prompt.tokens - decision.hit_tokens, now_ms)
            self._metrics.wait_seconds.observe(waited_ms / 1_000)
            ticket.item.decided.set_result(self._book(decision, prompt))
            self._metrics.decisions_seconds.observe(perf_counter() - started)
        asyncio.get_running_loop().call_soon(self._serve_rest, pool)

    def _serve_rest(self, pool: Pool) -> None:
        if pool in self._rooms and not self._closed:
            self._serve(pool)

    def _held(self, decision: Decision) -> bool:
        """Say whether a worker has enough to do. Rates that are only assumed hold nobody."""
        expected = decision.expected
        return expected.pace.measured and expected.queue_s * 1_000 > self._hold_ms

    def _check_slo(
        self,
        prompt: Prompt,
        decision: Decision,
        waited_ms: float,
        room: Room | None,
    ) -> None:
        """Raise `Refused` where the answer would come later than the caller can use it."""
        late_ms = waited_ms + decision.predicted_ttft_ms - prompt.ttft_slo_ms
        if prompt.ttft_slo_ms <= 0 or late_ms <= 0 or not decision.expected.pace.measured:
            return
        self._metrics.refusals.labels(reason="slo").inc()
        queue_ms = room.retry_after_ms() if room else 0
        raise Refused(
            f"the first token is predicted in {decision.predicted_ttft_ms:.0f} ms on"
            f" {decision.worker}; {prompt.ttft_slo_ms:.0f} ms were asked for",
            max(round(late_ms), queue_ms),
        )

    def _gave_up(self, prompt: Prompt, decision: Decision | None, room: Room | None) -> Refused:
        if decision is None:
            self._metrics.refusals.labels(reason="dead").inc()
            return nobody_alive()
        self._metrics.refusals.labels(reason="deadline").inc()
        queue_ms = decision.expected.queue_s * 1_000
        return Refused(
            f"every worker has enough to do, the best one {queue_ms:.0f} ms"
            f" (domain {prompt.domain!r}, priority {prompt.priority})",
            max(round(queue_ms - self._hold_ms), room.retry_after_ms() if room else 0, 1),
        )

    def _refuse(self, ticket: Ticket[_Waiter], reason: str, refusal: Refused) -> None:
        self._metrics.refusals.labels(reason=reason).inc()
        ticket.item.decided.set_exception(refusal)

    def _room(self, pool: Pool) -> Room:
        if pool not in self._rooms:
            if len(self._rooms) >= MAX_POOLS:
                self._rooms = {key: room for key, room in self._rooms.items() if room}
            self._rooms[pool] = WaitingRoom(bound=self._max_waiting, clock=self._clock)
        return self._rooms[pool]

    def _count(self) -> None:
        self._metrics.waiting.set(len(self))


def _pool(prompt: Prompt) -> Pool:
    return None if prompt.among is None else frozenset(prompt.among)
