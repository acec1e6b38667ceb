"""Admission by what is expected, and who makes way when it turns out otherwise."""

from collections.abc import Callable

from kvworkers.engine.preemption import Prices
from kvworkers.engine.scheduler import Scheduler, SchedulerConfig
from kvworkers.engine.sequence import Away, FinishReason, Sequence, SequenceState
from kvworkers.pages.pool import PagePool

from kvstore.directory.lru import Lru
from tests.unit.workers.test_scheduler import run_step, sequence, start


def make(pages: int, *, overcommit: bool = True) -> tuple[Scheduler, PagePool]:
    pool = PagePool(pages, block_bytes=4096, policy=Lru())
    config = SchedulerConfig(max_model_tokens=4096, max_running=8, overcommit=overcommit)
    return Scheduler(config, pool), pool


def learn(scheduler: Scheduler, tokens: int) -> None:
    """Let one reply of so many tokens come to its end."""
    one = sequence([7] * 3, max_tokens=tokens)
    start(scheduler, one)
    for _ in range(tokens):
        run_step(scheduler)
    one.finish = FinishReason.LENGTH
    scheduler.finish(one, now_ms=0.0)


def filled(scheduler: Scheduler, count: int, *, most: int = 200) -> list[Sequence]:
    made = [sequence([20 + n] * 32, max_tokens=most, no_store=True) for n in range(count)]
    start(scheduler, *made)
    return made


def test_more_are_admitted_than_could_all_use_up_their_tokens() -> None:
    scheduler, _ = make(16)
    assert [s.state for s in filled(scheduler, 2)].count(SequenceState.RUNNING) == 1
    scheduler, _ = make(16)
    learn(scheduler, 8)
    assert [s.state for s in filled(scheduler, 6)].count(SequenceState.RUNNING) == 5
    cautious, _ = make(16, overcommit=False)
    learn(cautious, 8)
    assert [s.state for s in filled(cautious, 6)].count(SequenceState.RUNNING) == 1


def test_pages_come_as_tokens_do() -> None:
    scheduler, pool = make(16)
    one = sequence([5] * 30, max_tokens=40)
    start(scheduler, one)
    assert len(one.pages) == 2
    spare = []
    for _ in range(30):
        run_step(scheduler)
        spare.append(scheduler.spare_places)
    assert len(one.pages) == 4 and max(spare) <= 15
    pool.check()


def test_who_has_ended_gets_no_page_and_drives_nobody_out() -> None:
    scheduler, pool = make(16)
    one = sequence([5] * 30, max_tokens=40)
    start(scheduler, one)
    while not one.lacks_page:
        run_step(scheduler)
    one.finish = FinishReason.ABORT
    others = pool.allocate(pool.available, now_ms=0.0)
    assert others is not None
    assert scheduler.make_room(0.0) == [] and len(one.pages) == 2
    pool.release(others[:1], now_ms=0.0)
    assert scheduler.make_room(0.0) == [] and len(one.pages) == 2


def until_short(scheduler: Scheduler, prices: Callable[[], Prices] = Prices) -> list[Sequence]:
    """Compute until somebody has to make way."""
    for _ in range(200):
        if victims := scheduler.make_room(0.0, prices):
            return victims
        run_step(scheduler)
    raise AssertionError("there was room for everybody")


def leave(scheduler: Scheduler, victim: Sequence, *, kept: bool) -> None:
    away = Away(0, victim.computed, ()) if kept else None
    scheduler.left(victim, away, now_ms=0.0)


def test_who_lacks_a_page_gets_it_from_one_that_came_later() -> None:
    scheduler, pool = make(6)
    learn(scheduler, 2)
    first, second = filled(scheduler, 2, most=60)
    (victim,) = until_short(scheduler)
    assert victim is second and victim.state is SequenceState.LEAVING
    assert pool.use().free == 0 and len(first.tokens) == len(second.tokens) == 49
    assert scheduler.make_room(0.0) == [], "its pages are as good as there"
    assert scheduler.plan() == [], "the first waits for them"
    leave(scheduler, second, kept=True)
    assert (second.pages, second.state) == ([], SequenceState.WAITING)
    assert scheduler.preempted == scheduler.waiting == 1
    assert scheduler.make_room(0.0) == [] and len(first.pages) == 4
    assert run_step(scheduler) == [(48, 1)]
    pool.check()


def test_who_made_way_comes_back_before_anyone_new() -> None:
    scheduler, pool = make(6)
    learn(scheduler, 2)
    first, second = filled(scheduler, 2, most=60)
    until_short(scheduler)
    new = sequence([9] * 3)
    scheduler.submit(new)
    assert second.state is SequenceState.LEAVING
    computed = second.computed
    leave(scheduler, second, kept=True)
    scheduler.make_room(0.0)
    assert scheduler.admit(0.0) == [], "nobody overtakes it, however small"
    assert scheduler.queued_tokens == 3, "its own are computed already"
    first.finish = FinishReason.STOP
    scheduler.finish(first, now_ms=0.0)
    assert scheduler.admit(0.0) == [second], "it has outlived all replies: it may want every page"
    second.away = None
    scheduler.returned(second, computed, now_ms=0.0)
    assert run_step(scheduler) == [(computed, 1)]
    scheduler.finish(second, now_ms=0.0)
    assert scheduler.admit(0.0) == [new]
    pool.check()


def test_without_a_copy_it_is_computed_anew_behind_what_is_found() -> None:
    scheduler, pool = make(6)
    learn(scheduler, 2)
    first, second = sequence([21] * 32, max_tokens=60), sequence([22] * 32, max_tokens=60)
    start(scheduler, first, second)
    until_short(scheduler)
    known = len(second.tokens)
    leave(scheduler, second, kept=False)
    scheduler.make_room(0.0)
    first.finish = FinishReason.STOP
    scheduler.finish(first, now_ms=0.0)
    assert scheduler.admit(0.0) == [second]
    found = second.published
    assert found == 2, "the third of its blocks was given to the first"
    assert second.hbm_blocks == 0, "the account is that of its prompt"
    scheduler.returned(second, found * 16, now_ms=0.0)
    assert run_step(scheduler) == [(32, known - 32)]
    scheduler.finish(second, now_ms=0.0)
    pool.check()


def test_prices_decide_and_are_asked_only_then() -> None:
    scheduler, _ = make(10)
    learn(scheduler, 2)
    asked: list[int] = []

    def prices() -> Prices:
        asked.append(1)
        return Prices(block_ms=1.0)

    start(scheduler, *(one := [sequence([20 + n] * 32, max_tokens=100) for n in range(3)]))
    one[0].stored, one[1].stored = 9, 2
    assert not asked
    victims = until_short(scheduler, prices)
    assert victims == [one[1]] and asked == [1], (
        "half of it lies in the store; the first never makes way"
    )
    scheduler.finish(one[1], now_ms=0.0)
    assert scheduler.preempted == 0
