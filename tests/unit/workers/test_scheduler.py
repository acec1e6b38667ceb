from typing import Any

import pytest
from kvworkers.engine.sampling import SamplingParams
from kvworkers.engine.scheduler import Scheduler, SchedulerConfig
from kvworkers.engine.sequence import Request, Sequence, SequenceState
from kvworkers.pages.pool import PagePool
from kvworkers.stream.gate import Gate

from kvstore.core.errors import BadInput, Refused, TooLarge
from kvstore.core.names import Root, pack_tokens
from kvstore.core.outcomes import MissReason
from kvstore.directory.events import TierKind
from kvstore.directory.lru import Lru

ROOT = Root(b"r" * 32)


def make(
    *, pages: int = 64, step_tokens: int = 64, max_running: int = 4, max_waiting: int = 8
) -> tuple[Scheduler, PagePool]:
    pool = PagePool(pages, block_bytes=4096, policy=Lru())
    config = SchedulerConfig(
        max_model_tokens=4096,
        step_tokens=step_tokens,
        max_running=max_running,
        max_waiting=max_waiting,
    )
    return Scheduler(config, pool), pool


def sequence(
    tokens: int | list[int],
    *,
    max_tokens: int = 4,
    no_store: bool = False,
    no_read: bool = False,
    salt: bytes = b"",
) -> Sequence:
    ids = list(range(tokens)) if isinstance(tokens, int) else tokens
    request = Request(
        request_id="r",
        tokens=pack_tokens(ids),
        sampling=SamplingParams(max_tokens=max_tokens),
        no_store=no_store,
        no_read=no_read,
        cache_salt=salt,
    )
    return Sequence(request, ROOT, arrived_ms=0.0)


def run_step(scheduler: Scheduler, now_ms: float = 0.0) -> list[tuple[int, int]]:
    """Compute one planned step; sequences that sample get token 7."""
    assert scheduler.make_room(now_ms) == []
    works = scheduler.plan()
    shape = []
    for work in works:
        shape.append((work.start, work.count))
        scheduler.advance(work, now_ms=now_ms)
        if work.samples:
            work.sequence.tokens.append(7)
            work.sequence.extend_names()
    return shape


def start(scheduler: Scheduler, *sequences: Sequence, now_ms: float = 0.0) -> None:
    for one in sequences:
        scheduler.submit(one)
    for one in scheduler.admit(now_ms):
        scheduler.loaded(one, 0, now_ms=now_ms)


def test_decodes_go_first_and_prefills_share_the_rest_in_chunks() -> None:
    scheduler, _ = make(step_tokens=64)
    first = sequence(20)
    start(scheduler, first)
    assert run_step(scheduler) == [(0, 20)]
    second, third = sequence([5] * 100), sequence([6] * 30)
    start(scheduler, second, third)
    assert run_step(scheduler) == [(20, 1), (0, 63)]
    assert run_step(scheduler) == [(21, 1), (63, 37), (0, 26)]
    assert run_step(scheduler) == [(22, 1), (100, 1), (26, 4)]


def test_what_can_never_fit_is_refused_before_any_work() -> None:
    scheduler, pool = make(pages=4)
    with pytest.raises(TooLarge, match="pages hold 64"):
        scheduler.submit(sequence(60, max_tokens=6))
    with pytest.raises(TooLarge, match="context is 4096"):
        scheduler.submit(sequence(4000, max_tokens=97))
    scheduler.submit(sequence(60, max_tokens=5))
    assert pool.use().free == 4


def test_a_full_queue_refuses_with_a_hint() -> None:
    scheduler, _ = make(max_waiting=2)
    scheduler.submit(sequence(3))
    scheduler.submit(sequence(3))
    with pytest.raises(Refused) as refused:
        scheduler.submit(sequence(3), retry_after_ms=120)
    assert refused.value.retry_after_ms == 120


def test_every_page_is_reserved_up_front_and_nobody_overtakes_for_memory() -> None:
    scheduler, pool = make(pages=8)
    big, wide, small = sequence(60), sequence([9] * 80), sequence([8] * 4)
    start(scheduler, big, wide, small)
    assert [s.state for s in (big, wide, small)] == [
        SequenceState.RUNNING,
        SequenceState.WAITING,
        SequenceState.WAITING,
    ]
    assert len(big.pages) == 4
    scheduler.finish(big, now_ms=1.0)
    assert scheduler.admit(1.0) == [wide, small]
    pool.check()


def test_own_pages_are_used_and_one_token_is_always_computed() -> None:
    scheduler, pool = make()
    first = sequence(48)
    start(scheduler, first)
    run_step(scheduler)
    scheduler.finish(first, now_ms=1.0)
    second = sequence(48)
    start(scheduler, second, now_ms=2.0)
    assert second.hbm_blocks == 2 and second.computed == 32
    use = second.cache_use()
    assert (use.hbm_tokens, use.computed_tokens) == (32, 16)
    assert use.miss_reason is MissReason.LAST_TOKENS
    assert run_step(scheduler) == [(32, 16)]
    scheduler.finish(second, now_ms=3.0)
    longer = sequence(50)
    start(scheduler, longer, now_ms=4.0)
    assert longer.hbm_blocks == 3
    assert longer.cache_use().miss_reason is MissReason.NONE
    pool.check()


def test_two_with_one_prefix_compute_it_once() -> None:
    scheduler, _ = make(step_tokens=32)
    shared = list(range(64))
    first, second, other = sequence([*shared, 1]), sequence([*shared, 2]), sequence([5] * 8)
    start(scheduler, first, second, other)
    assert second.state is SequenceState.WAITING, "the prefix is being computed"
    assert other.state is SequenceState.RUNNING, "one held back is overtaken"
    hold_ms = scheduler.config.hold_ms
    assert scheduler.next_hold_end_ms(1.0) == hold_ms
    assert scheduler.next_hold_end_ms(hold_ms) is None, "it waits for pages then, not for a time"
    run_step(scheduler)
    assert scheduler.admit(1.0) == []
    run_step(scheduler)
    (admitted,) = scheduler.admit(2.0)
    assert admitted is second and second.hbm_blocks == 4


def test_holding_back_ends_with_the_deadline_or_the_other_one() -> None:
    scheduler, _ = make(step_tokens=16)
    tokens = list(range(40))
    first, second, third = sequence([*tokens, 1]), sequence([*tokens, 2]), sequence([*tokens, 3])
    start(scheduler, first, second)
    assert scheduler.admit(scheduler.config.hold_ms - 1) == []
    assert scheduler.admit(scheduler.config.hold_ms) == [second]
    scheduler.loaded(second, 0, now_ms=0.0)
    scheduler.submit(third)
    assert scheduler.admit(0.0) == []
    scheduler.finish(first, now_ms=1.0)
    assert scheduler.admit(1.0) == [third], "who was computing is gone"


def test_no_store_keeps_nothing_and_no_read_ignores_own_pages() -> None:
    scheduler, pool = make()
    secret = sequence(48, no_store=True)
    start(scheduler, secret)
    run_step(scheduler)
    scheduler.finish(secret, now_ms=1.0)
    assert pool.use().cached == 0
    kept = sequence(48)
    start(scheduler, kept)
    run_step(scheduler)
    fresh = sequence(48, no_read=True)
    start(scheduler, fresh)
    assert fresh.hbm_blocks == 0
    assert fresh.cache_use().miss_reason is MissReason.DISABLED
    run_step(scheduler)
    scheduler.finish(fresh, now_ms=2.0)
    scheduler.finish(kept, now_ms=2.0)
    assert pool.use().cached == 3
    pool.check()


def test_nobody_waits_for_a_prefix_that_will_not_be_kept() -> None:
    scheduler, _ = make(step_tokens=16)
    start(scheduler, sequence(64, no_store=True), sequence(64))
    assert scheduler.running == 2 and scheduler.waiting == 0


def test_a_salt_gives_other_names() -> None:
    plain, salted, again = sequence(48), sequence(48, salt=b"x"), sequence(48, salt=b"x")
    assert salted.names == again.names
    assert not set(plain.names) & set(salted.names)


def test_generated_tokens_are_named_like_a_prompt_of_the_same_tokens() -> None:
    scheduler, _ = make()
    one = sequence(10, max_tokens=40, salt=b"s")
    start(scheduler, one)
    for _ in range(30):
        run_step(scheduler)
    assert one.computed == 39 and one.generated == 30
    assert one.names == sequence(list(one.tokens), salt=b"s").names
    assert one.published == 2


def test_loaded_blocks_count_by_tier() -> None:
    scheduler, _ = make()
    one = sequence(70)
    scheduler.submit(one)
    scheduler.admit(0.0)
    one.loaded = {TierKind.DRAM: 3}
    one.store_reason = MissReason.ABSENT
    scheduler.loaded(one, 3, now_ms=0.0)
    use = one.cache_use()
    assert use.cached_tokens == 48 and use.computed_tokens == 22
    assert use.miss_reason is MissReason.ABSENT
    assert run_step(scheduler) == [(48, 16 + 6)]


@pytest.mark.parametrize(
    "change",
    [{"step_tokens": 0}, {"max_running": 0}, {"hold_ms": 0}, {"step_tokens": 4, "max_running": 8}],
)
def test_bad_bounds_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(change))):
        SchedulerConfig(max_model_tokens=100, **change)


def test_a_prompt_shorter_than_a_block_has_no_name() -> None:
    one = sequence(15)
    assert one.names == [] and one.hit_limit == 0
    assert one.cache_use().miss_reason is MissReason.PARTIAL_BLOCK


def test_empty_and_ragged_prompts_are_refused() -> None:
    sampling = SamplingParams(max_tokens=1)
    with pytest.raises(BadInput, match="empty"):
        Request(request_id="", tokens=b"", sampling=sampling)
    with pytest.raises(BadInput, match="multiple of 4"):
        Request(request_id="", tokens=b"abc", sampling=sampling)


def test_many_blocks_become_known_a_part_at_a_time() -> None:
    scheduler, pool = make(pages=256, step_tokens=4096)
    long = sequence(150 * 16 + 3)
    scheduler.submit(long)
    scheduler.admit(0.0)
    scheduler.loaded(long, 150, now_ms=0.0)
    assert (long.published, long.unnamed_blocks) == (64, 86)
    assert pool.count_prefix(ROOT, long.names) == 64
    scheduler.name_blocks(long, now_ms=1.0, limit=80)
    assert (long.published, long.unnamed_blocks) == (144, 6)
    scheduler.name_blocks(long, now_ms=2.0)
    assert pool.count_prefix(ROOT, long.names) == 150 and long.unnamed_blocks == 0


def test_who_waits_for_a_prefix_waits_until_all_of_it_is_known() -> None:
    scheduler, _ = make(pages=512, step_tokens=4096)
    first, second = sequence(100 * 16 + 3), sequence(100 * 16 + 3)
    scheduler.submit(first)
    scheduler.admit(0.0)
    scheduler.submit(second)
    scheduler.loaded(first, 0, now_ms=0.0)
    assert scheduler.admit(0.0) == [], "the first is computing it"
    run_step(scheduler)
    assert scheduler.admit(0.0) == [], "and not all of its blocks have their names"
    scheduler.name_blocks(first, now_ms=0.0)
    assert scheduler.admit(0.0) == [second] and second.hbm_blocks == 100


def test_a_load_that_is_followed_is_planned_when_asked_for() -> None:
    scheduler, _ = make()
    one = sequence(70)
    scheduler.submit(one)
    scheduler.admit(0.0)
    gate = Gate(4, changed=lambda: None)
    scheduler.loading(one, 4, gate)
    assert scheduler.plan() == [] and scheduler.plan(lambda _: False) == []
    (work,) = scheduler.plan(lambda sequence: sequence.gate is gate)
    assert (work.start, work.count, work.samples) == (64, 6, True)
    scheduler.launch([work])
    one.in_step = 1
    scheduler.loaded(one, 3, now_ms=0.0)
    one.in_step = 0
    scheduler.void(one)
    assert run_step(scheduler) == [(48, 22)], "what the step took for given did not come"
