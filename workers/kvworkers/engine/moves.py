"""Brings a run's blocks into its pages before it computes: what the store has of its prompt."""

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial

from kvworkers.engine.active import Active, Actives
from kvworkers.engine.cache import StoreLink
from kvworkers.engine.prefix import PrefixStore
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
        self._wake = wake
        self._retire = retire
        self._broken = broken
        self._loop = asyncio.get_running_loop()

    def begin(self, active: Active) -> None:
        """Fetch what the store has for an admitted run, or let it compute at once."""
        link = self._prefix.wanted(active.run)
        if link is None:
            self._scheduler.loaded(active.run, 0, now_ms=_now_ms())
            return
        active.run.loading = True
        active.load_task = self._loop.create_task(self._load(active, link))

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
        try:
            if run.finish is None:
                self._scheduler.loaded(run, blocks, now_ms=_now_ms())
            else:
                self._retire(active)
        except Exception as error:  # task boundary: the engine's loop would go on without it
            _log.exception("taking in a load failed")
            self._broken(error)
        self._wake()


def _now_ms() -> float:
    return time.monotonic() * 1000
