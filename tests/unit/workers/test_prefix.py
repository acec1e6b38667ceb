"""How a run meets the store: when it asks, what it hands over, what it holds meanwhile."""

from typing import Any

import pytest
from kvworkers.engine.cache import StoreJob
from kvworkers.engine.handover import HandOver
from kvworkers.engine.loader import Ask, LoadResult
from kvworkers.engine.prefix import PrefixStore
from kvworkers.engine.rates import Rates
from kvworkers.engine.sampling import SamplingParams
from kvworkers.engine.sequence import Request, Sequence
from kvworkers.pages.pool import PagePool
from kvworkers.stream.gate import Follower

from kvstore.client import SlotRef
from kvstore.core.names import Root, pack_tokens
from kvstore.core.outcomes import MissReason
from kvstore.directory.events import TierKind
from kvstore.directory.lru import Lru


def slot(number: int) -> SlotRef:
    return SlotRef(number, 1, number * 4096, TierKind.DRAM, 1)


class ScriptedLink:
    def __init__(self) -> None:
        self.usable = True
        self.sees_all = True
        self.result = LoadResult()
        self.raises: Exception | None = None
        self.asked: Ask | None = None
        self.follower: Follower | None = None
        self.jobs: list[StoreJob] = []
        self.unexpected = 0

    async def load(self, ask: Ask, follower: Follower | None) -> LoadResult:
        self.asked, self.follower = ask, follower
        if self.raises is not None:
            raise self.raises
        return self.result

    def submit(self, job: StoreJob) -> None:
        self.jobs.append(job)

    def count_unexpected(self, call: str) -> None:
        self.unexpected += 1


class Rig:
    def __init__(self, tokens: int = 70, **options: Any) -> None:
        self.pool = PagePool(8, block_bytes=4096, policy=Lru())
        self.link = ScriptedLink()
        self.changes = 0
        self.rates = Rates()
        self.store = PrefixStore(
            self.pool, self._link, changed=self._changed, rates=lambda: self.rates
        )
        request = Request(
            request_id="r",
            tokens=pack_tokens(list(range(tokens))),
            sampling=SamplingParams(max_tokens=20),
            **options,
        )
        self.run = Sequence(request, Root(b"r" * 32), arrived_ms=0.0)
        pages = self.pool.allocate(self.run.pages_needed, now_ms=0.0)
        assert pages is not None
        self.run.pages = pages

    def _link(self) -> Any:
        return self.link

    def _changed(self) -> None:
        self.changes += 1


def test_the_store_is_asked_only_when_it_can_help() -> None:
    it = Rig()
    assert it.store.wanted(it.run) is not None
    it.link.usable = False
    assert it.store.wanted(it.run) is None
    assert it.run.store_reason is MissReason.UNREACHABLE
    unread = Rig(no_read=True)
    assert unread.store.wanted(unread.run) is None
    assert unread.run.store_reason is MissReason.DISABLED
    full = Rig()
    full.run.hbm_blocks = full.run.hit_limit
    assert full.store.wanted(full.run) is None
    short = Rig(tokens=16)
    assert short.store.wanted(short.run) is None


async def test_a_fetch_asks_for_what_own_pages_lack() -> None:
    it = Rig()
    it.run.hbm_blocks = 1
    it.link.result = LoadResult(tiers={TierKind.DRAM: 1}, found=1, reserved={2: slot(2)})
    assert await it.store.fetch(it.run, it.link) == 1  # type: ignore[arg-type]
    assert it.link.asked == Ask(
        names=it.run.names[1:4], pages=it.run.pages[1:4], usable=3, first_block=1, reserve=3
    )
    assert it.link.follower is None
    assert it.run.stored == 3, "one found, one reserved, then a gap"


async def test_a_fetch_says_what_computing_would_take() -> None:
    it = Rig()
    it.run.hbm_blocks = 1
    it.rates = Rates(prefill_linear_s=0.001, prefill_quadratic_s=1e-5)
    await it.store.fetch(it.run, it.link)  # type: ignore[arg-type]
    # 48 tokens from position 16 on: 48 x (1 ms + 0.01 ms x (16 + 24)).
    assert it.link.asked is not None
    assert abs(it.link.asked.recompute_ms - 48 * 1.4) < 1e-6


async def test_a_bug_in_loading_is_counted_and_the_prompt_computed() -> None:
    it = Rig()
    it.link.raises = RuntimeError("bug")
    assert await it.store.fetch(it.run, it.link) == 0  # type: ignore[arg-type]
    assert it.link.unexpected == 1 and it.run.store_reason is MissReason.UNREACHABLE


async def test_settling_commits_what_was_computed_and_aborts_the_rest() -> None:
    it = Rig()
    it.link.result = LoadResult(
        tiers={TierKind.DRAM: 1}, found=1, leases=[9], kept=[slot(0)],
        reserved={1: slot(1), 2: slot(2), 3: slot(3)},
    )  # fmt: skip
    await it.store.fetch(it.run, it.link)  # type: ignore[arg-type]
    it.run.published = 3
    it.run.computed = 50  # blocks 0 to 2 are full; a caller left before the rest
    it.store.settle_prompt(it.run)
    it.store.settle_prompt(it.run)
    (job,) = it.link.jobs
    assert job.writes == [(it.run.pages[1], slot(1)), (it.run.pages[2], slot(2))]
    assert job.aborts == [slot(3)] and job.leases == [9] and job.kept == [slot(0)]
    # The run ends first: its pages must not be given away while the copy reads them.
    it.pool.release(it.run.pages, now_ms=1.0)
    assert it.pool.use().held == 2
    job.done()
    assert it.pool.use().held == 0 and it.changes == 1


def test_the_replys_blocks_are_stored_at_the_end() -> None:
    it = Rig()
    it.run.stored, it.run.computed = 2, 70
    it.store.store_rest(it.run)
    (job,) = it.link.jobs
    assert list(job.names) == it.run.names[2:4] and job.first_block == 2
    assert list(job.pages) == it.run.pages[2:4]
    kept = Rig(no_store=True)
    kept.run.computed = 70
    kept.store.store_rest(kept.run)
    assert kept.link.jobs == []


async def test_a_run_without_names_in_its_pages_keeps_no_loaded_block() -> None:
    it = Rig()
    it.link.result = LoadResult(
        tiers={TierKind.DRAM: 1}, found=1, leases=[9], kept=[slot(0)], reserved={1: slot(1)}
    )
    await it.store.fetch(it.run, it.link)  # type: ignore[arg-type]
    it.store.settle_prompt(it.run)  # its caller left, or its pages were disowned
    (job,) = it.link.jobs
    assert (list(job.kept), list(job.writes), list(job.aborts)) == ([], [], [slot(1)])


async def handed(**result: Any) -> Rig:
    """Return a run that another worker goes on with, after its fetch."""
    it = Rig(hand_over=HandOver())
    it.link.result = LoadResult(**result)
    it.store.begin_hand_over(it.run)
    await it.store.fetch(it.run, it.link)  # type: ignore[arg-type]
    return it


async def test_a_prompt_that_goes_on_elsewhere_is_stored_chunk_by_chunk() -> None:
    it = await handed(reserved={0: slot(0), 1: slot(1), 2: slot(2)}, leases=[9])
    waiting = it.run.request.hand_over
    assert waiting is not None
    for computed, blocks in ((10, 0), (40, 2), (45, 2)):
        it.run.computed = computed
        it.store.settle_chunk(it.run)
        assert sum(len(job.writes) for job in it.link.jobs) == blocks
    (chunk,) = it.link.jobs
    assert list(chunk.writes) == [(it.run.pages[0], slot(0)), (it.run.pages[1], slot(1))]
    assert chunk.checked, "no token was chosen from it yet"
    assert not chunk.leases
    it.run.computed = 70
    it.run.first_token_ms = 1.0
    it.store.settle_prompt(it.run)
    it.store.store_rest(it.run)
    it.store.leave(it.run)
    _, last, rest = it.link.jobs
    assert list(last.writes) == [(it.run.pages[2], slot(2))]
    assert (last.leases, last.checked, rest.first_block) == ([9], False, 3)
    for job in it.link.jobs:
        assert not await waiting.settled(deadline_ms=1)
        job.done()
    assert await waiting.settled(deadline_ms=1)


async def test_what_cannot_be_looked_through_waits_for_the_end_of_its_prompt() -> None:
    it = await handed(reserved={0: slot(0), 1: slot(1)})
    it.link.sees_all = False
    it.run.computed = 40
    it.store.settle_chunk(it.run)
    assert it.link.jobs == []
    it.run.computed, it.run.first_token_ms = 70, 1.0
    it.store.settle_prompt(it.run)
    (job,) = it.link.jobs
    assert [to for _, to in job.writes] == [slot(0), slot(1)]


@pytest.mark.parametrize("sees_all", [True, False])
async def test_what_no_token_was_chosen_from_is_looked_through_or_kept(sees_all: bool) -> None:
    """Its caller left, or it makes way; or its pages are another run's, which may have left."""
    it = await handed(reserved={0: slot(0), 1: slot(1)})
    it.link.sees_all = sees_all
    it.run.computed, it.run.stored = 70, 1
    it.store.settle_prompt(it.run)
    it.store.store_rest(it.run)
    first, *rest = it.link.jobs
    assert len(first.writes) == (2 if sees_all else 0)
    assert len(first.aborts) == (0 if sees_all else 2)
    assert [job.checked for job in rest] == ([True] if sees_all else [])


async def test_other_prompts_are_stored_in_one_piece() -> None:
    it = Rig()
    it.link.result = LoadResult(reserved={0: slot(0)})
    await it.store.fetch(it.run, it.link)  # type: ignore[arg-type]
    it.run.computed = 40
    it.run.hbm_blocks = 1
    it.store.begin_hand_over(it.run)
    it.store.settle_chunk(it.run)
    assert it.link.jobs == []


async def test_what_own_pages_have_is_offered_to_the_store_again() -> None:
    it = Rig(hand_over=HandOver())
    it.run.hbm_blocks = 3
    it.store.begin_hand_over(it.run)
    (job,) = it.link.jobs
    assert (list(job.names), list(job.pages)) == (it.run.names[:3], it.run.pages[:3])
    assert job.first_block == 0
    it.link.usable = False
    it.store.begin_hand_over(it.run)
    assert len(it.link.jobs) == 1


async def test_a_run_that_ends_early_keeps_nobody_waiting() -> None:
    it = await handed(reserved={0: slot(0)})
    it.store.settle_prompt(it.run)
    it.store.leave(it.run)
    (job,) = it.link.jobs
    assert list(job.aborts) == [slot(0)]
    job.done()
    assert it.run.request.hand_over is not None
    assert await it.run.request.hand_over.settled(deadline_ms=1)
