"""Carries forks out: one copy of last pages for all of them, then each one's own first token.

source's pages:   [ full ][ full ][ full ][ par│… ]
                     │ another hold each      │ copied once for each fork
fork's pages:     [ full ][ full ][ full ][ par│  ]
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from kvworkers.engine.active import Active
from kvworkers.engine.prefix import PrefixStore
from kvworkers.engine.report import Reporter
from kvworkers.engine.sampling import Sampled
from kvworkers.engine.scheduler import Scheduler
from kvworkers.engine.steps import StepRunner
from kvworkers.pages.pool import PagePool

_log = logging.getLogger(__name__)


class Forks:
    """Forks runs that the scheduler gave pages for it. Lives on the engine's event loop."""

    def __init__(
        self,
        scheduler: Scheduler,
        pool: PagePool,
        prefix: PrefixStore,
        runner: StepRunner,
        reporter: Reporter,
        *,
        take: Callable[[Active, Sampled, float], None],
        retire: Callable[[Active], None],
        broken: Callable[[Exception], None],
        wake: Callable[[], None],
    ) -> None:
        """`take` gives a run its first token; the others as `Moves` has them."""
        self._scheduler = scheduler
        self._pool = pool
        self._prefix = prefix
        self._runner = runner
        self._reporter = reporter
        self._take = take
        self._retire = retire
        self._broken = broken
        self._wake = wake
        self._loop = asyncio.get_running_loop()

    def begin(self, admitted: Sequence[Active]) -> list[Active]:
        """Fork those that are to, in a task of their own; return the others."""
        actives = [active for active in admitted if active.run.branch is not None]
        if actives:
            task = self._loop.create_task(self._guarded(actives))
            for active in actives:
                active.run.loading, active.load_task = True, task
                active.run.first_step_ms = _now_ms()
                self._prefix.begin_fork(active.run)
        return [active for active in admitted if active.run.branch is None]

    async def _guarded(self, actives: Sequence[Active]) -> None:
        try:
            await self._fork(actives)
        except Exception as error:  # task boundary: the engine's loop would go on without it
            _log.exception("forking failed")
            self._broken(error)
        self._wake()

    async def _fork(self, actives: Sequence[Active]) -> None:
        # Now: when the copy is done, who they fork from may have left the family.
        firsts = [(a.sampler, _given(a), a.run.prompt_tokens) for a in actives]
        copies = [pair for a in actives for pair in a.run.branch or ()]
        try:
            await self._runner.copy(copies)
            chosen = await self._runner.choose(firsts)
        finally:
            # Only now: a page of the source that is free may be written by a load at once.
            self._pool.release([source for source, _ in copies], now_ms=_now_ms())
            for active in actives:
                active.run.branch, active.run.loading = None, False
        shared = sum(active.run.prompt_blocks for active in actives)
        self._reporter.forked(shared=shared, copied=len(copies))
        for active, sampled in zip(actives, chosen, strict=True):
            if active.over:
                self._retire(active)
                continue
            now_ms = _now_ms()
            self._scheduler.forked(active.run, now_ms=now_ms)
            self._take(active, sampled, now_ms)


def _given(active: Active) -> Sampled:
    family = active.run.family
    assert family is not None and family.first is not None
    return family.first


def _now_ms() -> float:
    return time.monotonic() * 1000
