"""Moves runs' blocks: into pages what the store has of a prompt; out of them, and back, for others.

admitted ─▶ begin ─▶ load from the store ─▶ computes
asked to make way ─▶ leave ─▶ copy out ─▶ waits ─▶ admitted ─▶ begin ─▶ copy back ─▶ computes
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from kvworkers.engine.active import Active, Actives
from kvworkers.engine.cache import StoreLink
from kvworkers.engine.prefix import PrefixStore
from kvworkers.engine.report import Reporter
from kvworkers.engine.scheduler import Scheduler
from kvworkers.engine.sequence import Sequence as Run
from kvworkers.stream.gate import Follower

_log = logging.getLogger(__name__)


class Moves:
    """Moves blocks of runs in tasks of their own. Lives on the engine's event loop."""

    def __init__(
        self,
        scheduler: Scheduler,
        prefix: PrefixStore,
        actives: Actives,
        reporter: Reporter,
        *,
        wake: Callable[[], None],
        retire: Callable[[Active], None],
        broken: Callable[[Exception], None],
    ) -> None:
        """`wake` lets the engine look again; `retire` is for a run that ended meanwhile.

        `broken` is told of a bug: nobody may wait for a run whose move has failed.
        """
        self._scheduler = scheduler
        self._prefix = prefix
        self._actives = actives
        self._reporter = reporter
        self._wake = wake
        self._retire = retire
        self._broken = broken
        self._loop = asyncio.get_running_loop()

    def begin(self, active: Active) -> None:
        """Fetch what there is for an admitted run, or let it compute at once."""
        if active.run.preemptions:
            self._move(active, self._return(active))
            return
        self._prefix.begin_hand_over(active.run)
        link = self._prefix.wanted(active.run)
        if link is None:
            self._scheduler.loaded(active.run, 0, now_ms=_now_ms())
            return
        self._move(active, self._load(active, link))

    def leave(self, active: Active) -> None:
        """Let a run make way once no step has it: copy what is to be kept, and free its pages."""
        run = active.run
        if run.in_step or run.loading or active.over:
            return
        self._scheduler.name_blocks(run, now_ms=_now_ms(), limit=run.full_blocks)
        self._move(active, self._leave(active))

    def _move(self, active: Active, work: Coroutine[Any, Any, None]) -> None:
        active.run.loading = True
        active.load_task = self._loop.create_task(self._guarded(active, work))

    async def _guarded(self, active: Active, work: Coroutine[Any, Any, None]) -> None:
        """Do `work`, and what was held up by it."""
        try:
            await work
            if active.over:
                self._retire(active)
        except Exception as error:  # task boundary: the engine's loop would go on without it
            _log.exception("moving blocks failed")
            self._broken(error)
        self._wake()

    def follows(self, run: Run) -> bool:
        """Say whether a step of `run` is to begin behind its load now."""
        return run.gate is not None and run.gate.lets_begin(alone=self._actives.alone)

    async def _load(self, active: Active, link: StoreLink) -> None:
        run = active.run
        follower = None
        if self._actives.alone:
            # Beside others a load takes its time and leaves them the device.
            follower = Follower(partial(self._scheduler.loading, run), self._wake)
        blocks = await self._prefix.fetch(run, link, follower)
        run.loading = False
        if run.finish is None:
            self._scheduler.loaded(run, blocks, now_ms=_now_ms())

    async def _leave(self, active: Active) -> None:
        run = active.run
        away = await self._prefix.put_away(run)
        run.loading = False
        if run.finish is None:
            self._scheduler.left(run, away, now_ms=_now_ms())
            self._reporter.preempted(swapped=away is not None)
        else:
            run.away = away  # Its caller left meanwhile: given up with the rest.

    async def _return(self, active: Active) -> None:
        run = active.run
        tokens = await self._prefix.bring_back(run)
        run.loading = False
        if run.finish is None:
            self._scheduler.returned(run, tokens, now_ms=_now_ms())


def _now_ms() -> float:
    return time.monotonic() * 1000
