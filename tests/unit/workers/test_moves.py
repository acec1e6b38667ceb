"""Runs that make way: when their pages go, what their callers do meanwhile, and bugs."""

import asyncio
from typing import Any

import pytest
from kvworkers.engine.active import Active, Actives
from kvworkers.engine.moves import Moves
from kvworkers.engine.output import OutputStream
from kvworkers.engine.sampling import Sampler
from kvworkers.engine.scheduler import Scheduler, SchedulerConfig
from kvworkers.engine.sequence import Away, FinishReason, SequenceState
from kvworkers.pages.pool import PagePool

from kvstore.directory.lru import Lru
from tests.unit.workers.test_scheduler import run_step, sequence, start


class Prefix:
    """Copies when it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.error: Exception | None = None
        self.restored = 0

    async def put_away(self, run: Any) -> Away | None:
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return Away(0, run.computed, ())

    async def bring_back(self, run: Any) -> int:
        tokens, run.away = run.away.tokens, None
        self.restored += tokens
        return int(tokens)


class Rig:
    def __init__(self) -> None:
        self.pool = PagePool(8, block_bytes=4096, policy=Lru())
        self.scheduler = Scheduler(SchedulerConfig(max_model_tokens=4096), self.pool)
        self.prefix = Prefix()
        self.run = sequence(40, max_tokens=8)
        self.active = Active(self.run, Sampler(self.run.request.sampling), OutputStream())
        self.kinds: list[bool] = []
        self.wakes = 0
        self.retired: list[Active] = []
        self.bugs: list[Exception] = []
        self.moves = Moves(
            self.scheduler,
            self.prefix,  # type: ignore[arg-type]
            Actives({self.run: self.active}),
            self,  # type: ignore[arg-type]
            wake=self._wake,
            retire=self.retired.append,
            broken=self.bugs.append,
        )
        start(self.scheduler, self.run)
        run_step(self.scheduler)
        self.run.state = SequenceState.LEAVING

    def preempted(self, *, swapped: bool) -> None:
        self.kinds.append(swapped)

    def _wake(self) -> None:
        self.wakes += 1

    async def moved(self) -> None:
        assert self.active.load_task is not None
        await self.active.load_task


async def test_pages_go_when_no_step_has_them_and_they_are_copied() -> None:
    it = Rig()
    it.run.in_step = 1
    it.moves.leave(it.active)
    assert it.active.load_task is None, "a step is writing them"
    it.run.in_step = 0
    it.moves.leave(it.active)
    await asyncio.sleep(0)
    assert it.run.loading and it.pool.use().held == 3
    it.prefix.go.set()
    await it.moved()
    assert it.pool.use().held == 0 and it.run.state is SequenceState.WAITING
    assert it.kinds == [True] and it.wakes == 1
    (back,) = it.scheduler.admit(0.0)
    assert back is it.run
    it.moves.begin(it.active)
    await it.moved()
    assert it.run.computed == it.prefix.restored == 40
    assert it.run.state.value == "running" and not it.bugs


async def test_who_ends_meanwhile_is_retired_with_its_copy() -> None:
    it = Rig()
    it.moves.leave(it.active)
    it.run.finish = FinishReason.ABORT
    it.prefix.go.set()
    await it.moved()
    assert it.retired == [it.active] and it.run.away is not None and not it.kinds
    it.moves.leave(it.active)
    assert it.retired == [it.active], "it is over"


@pytest.mark.parametrize("error", [RuntimeError("bug"), AssertionError("bug")])
async def test_a_bug_is_told_and_nobody_waits(error: Exception) -> None:
    it = Rig()
    it.prefix.error = error
    it.moves.leave(it.active)
    it.prefix.go.set()
    await it.moved()
    assert it.bugs == [error] and it.wakes == 1
