"""`kvstore.router.queue` with decisions made by the test; over real streams in tests/rpc."""

import asyncio
from dataclasses import dataclass, field, replace

import pytest
from prometheus_client import CollectorRegistry

from kvstore.core.errors import Refused
from kvstore.core.names import Root
from kvstore.observe.metrics import RouterMetrics
from kvstore.router import queue
from kvstore.router.learning import Expected
from kvstore.router.placement import Decision, Prompt
from kvstore.router.queue import DecisionQueue
from kvstore.router.ranking import Ranking
from kvstore.router.score import Pace

PROMPT = Prompt(Root(bytes(32)), [], 100)


@dataclass
class Workers:
    """What a router would decide over: a queue in seconds, None while nobody is alive."""

    queue_s: float | None = 0.0
    measured: bool = True
    booked: list[Prompt] = field(default_factory=list)
    unbooked: list[int] = field(default_factory=list)

    def decide(self, prompt: Prompt) -> Decision | None:
        if self.queue_s is None:
            return None
        pace = Pace(1e-3, measured=self.measured)
        expected = Expected(prompt.tokens, 0, self.queue_s + 0.1, self.queue_s, 0.0, pace)
        return Decision("w", "h:1", prompt.tokens, (), Ranking([]), expected)

    def book(self, decision: Decision, prompt: Prompt) -> Decision:
        self.booked.append(prompt)
        return replace(decision, booking=len(self.booked))

    def queue(self) -> DecisionQueue:
        return DecisionQueue(
            decide=self.decide, book=self.book, unbook=self.unbooked.append, hold_ms=1_000.0,
            max_waiting=100, weights={}, metrics=RouterMetrics(CollectorRegistry()),
            now_ms=lambda: asyncio.get_running_loop().time() * 1_000,
        )  # fmt: skip


def ask(made: DecisionQueue, prompt: Prompt = PROMPT) -> "asyncio.Task[Decision]":
    return asyncio.create_task(made.place(prompt, alive_ms=5_000, patience_ms=5_000))


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_burst_is_let_go_in_bounded_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "MAX_GRANTS", 2)
    workers = Workers(queue_s=9.0)
    made = workers.queue()
    asked = [ask(made) for _ in range(7)]
    await turns()
    assert workers.booked == []
    workers.queue_s = 0.0
    made.kick()
    assert len(workers.booked) == 2
    assert [done.booking for done in await asyncio.gather(*asked)] == [1, 2, 3, 4, 5, 6, 7]


async def test_nobody_overtakes_those_who_wait() -> None:
    workers = Workers(queue_s=9.0)
    made = workers.queue()
    first = ask(made, replace(PROMPT, tokens=1))
    await turns()
    workers.queue_s = 0.0
    second = ask(made, replace(PROMPT, tokens=2))
    await turns()
    assert workers.booked == [], "the room is looked at when something changed"
    made.kick()
    await asyncio.gather(first, second)
    assert [prompt.tokens for prompt in workers.booked] == [1, 2]


async def test_one_set_of_workers_does_not_hold_up_another() -> None:
    workers = Workers(queue_s=9.0)
    made = workers.queue()
    waiting = ask(made, replace(PROMPT, among=frozenset({"full"})))
    await turns()
    workers.queue_s = 0.0
    assert (await ask(made, replace(PROMPT, among=frozenset({"free"})))).booking == 1
    assert not waiting.done()
    made.kick()
    await waiting


async def test_a_caller_that_leaves_as_it_is_served_frees_its_booking() -> None:
    workers = Workers(queue_s=9.0)
    made = workers.queue()
    asked = ask(made)
    await turns()
    workers.queue_s = 0.0
    made.kick()
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert workers.unbooked == [1]


async def test_rates_that_are_only_assumed_hold_nobody_and_promise_nothing() -> None:
    made = Workers(queue_s=9.0, measured=False).queue()
    assert (await ask(made, replace(PROMPT, ttft_slo_ms=1.0))).booking == 1


async def test_patience_for_life_and_for_room_are_two_things() -> None:
    workers = Workers(queue_s=None)
    made = workers.queue()
    with pytest.raises(Refused, match="no worker is alive"):
        await made.place(PROMPT, alive_ms=20, patience_ms=5_000)
    workers.queue_s = 9.0
    asked = asyncio.create_task(made.place(PROMPT, alive_ms=0, patience_ms=5_000))
    await turns(9)
    workers.queue_s = 0.0
    made.kick()
    assert (await asked).booking == 1


async def test_who_waited_too_long_for_its_objective_is_refused_when_its_turn_comes() -> None:
    workers = Workers(queue_s=None)
    made = workers.queue()
    asked = ask(made, replace(PROMPT, ttft_slo_ms=120.0))
    await asyncio.sleep(0.03)
    workers.queue_s = 0.0
    made.kick()
    with pytest.raises(Refused, match="120 ms were asked for"):
        await asked
    assert workers.booked == []


async def test_pools_nobody_waits_for_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "MAX_POOLS", 2)
    made = Workers(queue_s=9.0).queue()
    for number in range(9):
        pool = frozenset({str(number)})
        with pytest.raises(Refused):
            await made.place(replace(PROMPT, among=pool), alive_ms=0, patience_ms=1)
    assert len(made._rooms) <= 2
