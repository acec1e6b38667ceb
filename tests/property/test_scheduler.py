"""The scheduler over few pages: nobody is stuck, no page is two things at once, none is lost."""

import random
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kvworkers.engine.preemption import Prices
from kvworkers.engine.sampling import Sampled, SamplingParams
from kvworkers.engine.scheduler import Scheduler, SchedulerConfig
from kvworkers.engine.sequence import Away, FinishReason, Request, Sequence, SequenceState
from kvworkers.engine.siblings import awaits_first
from kvworkers.engine.work import Work
from kvworkers.pages.pool import PagePool

from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.names import Root, pack_tokens
from kvstore.directory.lru import Lru

_ALL: Any = list(HealthCheck)
PAGES = 12
MOST_TURNS = 4_000
"""Far more than the longest of these needs; who is not done by then is stuck."""


class Worker:
    """Does what the engine does: two steps under way at a time, copies that take their time."""

    def __init__(self, draw: random.Random, *, overcommit: bool) -> None:
        self.draw = draw
        self.pool = PagePool(PAGES, block_bytes=4096, policy=Lru())
        config = SchedulerConfig(
            max_model_tokens=4096, step_tokens=24, max_running=6, overcommit=overcommit
        )
        self.scheduler = Scheduler(config, self.pool)
        self.flight: list[Work] = []
        self.loads: list[Sequence] = []
        self.copies: list[Sequence] = []
        self.forks: list[Sequence] = []
        self.forked = 0
        self.jobs: list[list[int]] = []
        """Pages that are being given to the store."""
        self.lengths: dict[Sequence, int] = {}
        """How long each reply becomes."""
        self.now_ms = 0.0

    def ask(self, prompt: list[int], most: int, length: int, **options: Any) -> None:
        request = Request(
            request_id="r",
            tokens=pack_tokens(prompt),
            sampling=SamplingParams(max_tokens=most),
            **options,
        )
        sequence = Sequence(request, Root(b"r" * 32), arrived_ms=self.now_ms)
        self.scheduler.submit(sequence)
        self.lengths[sequence] = min(length, most)

    def turn(self) -> None:
        self.now_ms += 1
        scheduler = self.scheduler
        self.copies += scheduler.make_room(self.now_ms, lambda: Prices(block_ms=1.0))
        self.begin(scheduler.admit(self.now_ms))
        works = scheduler.plan()
        for work in works:
            work.sequence.in_step += 1
        scheduler.launch(works)
        before, self.flight = self.flight, works
        self.collect(before)
        self.move()
        self.check()

    def begin(self, admitted: list[Sequence]) -> None:
        for sequence in admitted:
            # As long as a copy may be writing its pages nobody takes them away.
            sequence.loading = sequence.branch is not None
            (self.forks if sequence.loading else self.loads).append(sequence)

    def cancel(self) -> None:
        alive = [s for s in self.lengths if s.finish is None]
        if alive:
            sequence = self.draw.choice(alive)
            sequence.finish = FinishReason.ABORT
            self.retire(sequence)

    def done(self) -> bool:
        assert self.now_ms < MOST_TURNS, "somebody is stuck"
        return all(s.state is SequenceState.FINISHED for s in self.lengths)

    def collect(self, works: list[Work]) -> None:
        for work in works:
            sequence = work.sequence
            sequence.in_step -= 1
            if sequence.finish is not None:
                self.retire(sequence)
                continue
            self.scheduler.advance(work, now_ms=self.now_ms)
            if work.samples:
                self.take(sequence)

    def take(self, sequence: Sequence) -> None:
        # From the position, so that a reply does not depend on what became of its pages.
        token = len(sequence.tokens) % 100
        if not sequence.generated and awaits_first(sequence) and sequence.family is not None:
            sequence.family.first = Sampled(token)
            self.begin(self.scheduler.fork(sequence, self.now_ms))
        sequence.tokens.append(token)
        sequence.extend_names()
        if sequence.generated >= self.lengths[sequence]:
            sequence.finish = FinishReason.STOP
            self.retire(sequence)

    def retire(self, sequence: Sequence) -> None:
        if sequence.in_step or sequence.loading:
            return
        if sequence in self.loads:
            self.loads.remove(sequence)
        if sequence in self.copies:
            self.copies.remove(sequence)
        if self.draw.random() < 0.3 and sequence.pages:
            pages = sequence.pages[: sequence.full_blocks]
            self.pool.share(pages)
            self.jobs.append(pages)
        self.scheduler.finish(sequence, now_ms=self.now_ms)

    def move(self) -> None:
        """Let some of what is under way come to its end."""
        for sequence in [s for s in self.forks if self.draw.random() < 0.6]:
            self.forks.remove(sequence)
            self.pool.release([source for source, _ in sequence.branch or ()], now_ms=self.now_ms)
            sequence.branch, sequence.loading = None, False
            if sequence.finish is not None:
                self.retire(sequence)
                continue
            self.forked += 1
            self.scheduler.forked(sequence, now_ms=self.now_ms)
            self.take(sequence)
        for sequence in [s for s in self.loads if self.draw.random() < 0.6]:
            self.loads.remove(sequence)
            if not sequence.preemptions:
                self.scheduler.loaded(sequence, 0, now_ms=self.now_ms)
                continue
            away, sequence.away = sequence.away, None
            tokens = sequence.published * BLOCK_TOKENS
            if away is not None and self.draw.random() < 0.8:
                tokens = max(tokens, away.tokens)
            self.scheduler.returned(sequence, tokens, now_ms=self.now_ms)
        for sequence in [s for s in self.copies if not s.in_step and self.draw.random() < 0.6]:
            self.copies.remove(sequence)
            self.scheduler.name_blocks(sequence, now_ms=self.now_ms)
            away = Away(0, sequence.computed, ()) if self.draw.random() < 0.7 else None
            self.scheduler.left(sequence, away, now_ms=self.now_ms)
        for pages in [job for job in self.jobs if self.draw.random() < 0.5]:
            self.jobs.remove(pages)
            self.pool.release(pages, now_ms=self.now_ms)

    def check(self) -> None:
        self.pool.check()
        running = [s for s in self.lengths if s.pages]
        writable = [s.pages[block] for s in running for block in range(s.published, len(s.pages))]
        held: dict[int, int] = {}
        sources = [[source for source, _ in s.branch or ()] for s in self.forks]
        for pages in [*(s.pages for s in running), *self.jobs, *sources]:
            for page in pages:
                held[page] = held.get(page, 0) + 1
        assert len(set(writable)) == len(writable), "two write to one page"
        assert len(held) == self.pool.use().held, "a page leaked or was given away under a holder"
        for page, holds in held.items():
            assert self.pool.count_alone([page]) == (holds == 1), "holds were miscounted"
        self.check_forks()
        assert self.scheduler.spare_places < BLOCK_TOKENS * max(1, len(running))
        for sequence in running:
            assert max(sequence.launched, sequence.computed) <= len(sequence.pages) * BLOCK_TOKENS
        for sequence in self.lengths:
            waits = sequence.state is SequenceState.WAITING
            assert bool(sequence.pages) == (not waits and sequence.state != "finished")

    def check_forks(self) -> None:
        """A fork shares every page that its prompt fills, and copies the one that it does not."""
        for sequence in self.forks:
            full, rest = divmod(sequence.prompt_tokens, BLOCK_TOKENS)
            assert sequence.branch is not None and len(sequence.branch) == (rest > 0)
            assert [target for _, target in sequence.branch] == sequence.pages[full:]
            assert self.pool.count_alone(sequence.pages[full:]) == (rest > 0), "not its own"


@pytest.mark.timeout(120)
@settings(max_examples=60, deadline=None, suppress_health_check=_ALL)
@given(seed=st.integers(0, 2**32 - 1))
def test_forks_end_cancel_and_make_way_with_every_hold_counted(seed: int) -> None:
    draw = random.Random(seed)
    worker = Worker(draw, overcommit=True)
    for family in range(4):
        prompt = [draw.randrange(100, 200)] * draw.choice([1, 16, 20, 32, 45])
        options = {"no_store": draw.random() < 0.5, "no_read": draw.random() < 0.3}
        most = PAGES * BLOCK_TOKENS - len(prompt)
        for _ in range(draw.randrange(2, 6)):
            length = draw.randrange(1, 60)
            worker.ask(prompt, most, length, siblings=str(family), **options)
            for _ in range(draw.choice([0, 0, 0, 1, 9])):
                worker.turn()
                if draw.random() < 0.1:
                    worker.cancel()
    while not worker.done():
        worker.turn()
        if draw.random() < 0.05:
            worker.cancel()
    for sequence, length in worker.lengths.items():
        first = sequence.prompt_tokens
        if sequence.finish is FinishReason.STOP:
            expected = [at % 100 for at in range(first, first + length)]
            assert list(sequence.tokens)[first:] == expected
    for pages in worker.jobs:
        worker.pool.release(pages, now_ms=worker.now_ms)
    assert worker.pool.use().held == 0
    assert all(sequence.family is None for sequence in worker.lengths)


def test_those_families_do_fork_and_make_way() -> None:
    forked, left = 0, 0
    for seed in range(10):
        worker = Worker(random.Random(seed), overcommit=True)
        worker.ask([7], 2, 1)
        for _ in range(6):
            worker.ask([20] * 20, 150, 80, siblings="one", no_store=True)
        while not worker.done():
            worker.turn()
        forked += worker.forked
        left += sum(sequence.preemptions for sequence in worker.lengths)
    assert forked >= 40 and left > 10


@pytest.mark.parametrize("overcommit", [True, False])
@settings(max_examples=40, deadline=None, suppress_health_check=_ALL)
@given(seed=st.integers(0, 2**32 - 1), gap=st.integers(1, 30))
def test_everybody_ends_and_nothing_is_left(seed: int, gap: int, overcommit: bool) -> None:
    draw = random.Random(seed)
    worker = Worker(draw, overcommit=overcommit)
    shared = list(range(40))
    left = 14
    for turn in count():
        if left and turn % gap == 0:
            left -= 1
            own = [draw.randrange(100, 200)] * draw.randrange(1, 60)
            prompt = shared + own if draw.random() < 0.4 else own
            most = draw.randrange(1, PAGES * BLOCK_TOKENS - len(prompt))
            worker.ask(
                prompt,
                most,
                draw.randrange(1, 90),
                no_store=draw.random() < 0.3,
                no_read=draw.random() < 0.2,
            )
        worker.turn()
        if not left and worker.done():
            break
    for sequence, length in worker.lengths.items():
        first = sequence.prompt_tokens
        assert list(sequence.tokens)[first:] == [at % 100 for at in range(first, first + length)]
        assert overcommit or not sequence.preemptions, "all were to fit"
    for pages in worker.jobs:
        worker.pool.release(pages, now_ms=worker.now_ms)
    assert worker.pool.use().held == 0


def test_few_pages_do_make_some_leave() -> None:
    left = 0
    for seed in range(10):
        draw = random.Random(seed)
        worker = Worker(draw, overcommit=True)
        worker.ask([7], 2, 1)
        for n in range(6):
            worker.ask([20 + n] * 20, 150, 80)
        while not worker.done():
            worker.turn()
        left += sum(sequence.preemptions for sequence in worker.lengths)
    assert left > 20
