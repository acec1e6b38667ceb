"""How one run uses the store: fetch before its prefill, give after it. Glue of pool and link."""

import logging
import time
from collections.abc import Callable, Sequence

from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.outcomes import MissReason
from kvstore.observe.tracing import under
from kvworkers.engine.cache import StoreJob, StoreLink
from kvworkers.engine.loader import Ask, LoadResult
from kvworkers.engine.rates import Rates
from kvworkers.engine.sequence import Sequence as Run
from kvworkers.pages.pool import PagePool
from kvworkers.stream.gate import Follower

_log = logging.getLogger(__name__)


class PrefixStore:
    """Loads and stores blocks of runs. `changed` is called when pages became free."""

    def __init__(
        self,
        pool: PagePool,
        link: Callable[[], StoreLink | None],
        *,
        changed: Callable[[], None],
        rates: Callable[[], Rates],
    ) -> None:
        """`link` is asked each time: a cache node may come and go; None: no store.

        `rates` predict what a prefix that is not loaded costs.
        """
        self._pool = pool
        self._link = link
        self._changed = changed
        self._rates = rates
        self._results: dict[Run, LoadResult] = {}

    def wanted(self, run: Run) -> StoreLink | None:
        """Return the link to fetch through, or None when there is nothing to ask or nobody.

        Notes the reason in the run.
        """
        run.stored = run.hbm_blocks
        link = self._link()
        if run.request.no_read or link is None:
            run.store_reason = MissReason.DISABLED
            return None
        if run.hbm_blocks >= run.hit_limit:
            return None
        if not link.usable:
            run.store_reason = MissReason.UNREACHABLE
            return None
        return link

    async def fetch(self, run: Run, link: StoreLink, follower: Follower | None = None) -> int:
        """Copy what the store has into the run's pages; return how many blocks that was.

        `follower` as `Loader.load` takes it.
        """
        started, own = time.monotonic(), run.hbm_blocks
        names = run.names[own : run.prompt_blocks]
        usable = run.hit_limit - own
        rates = self._rates()
        recompute_ms = rates.prefill_ms(usable * BLOCK_TOKENS, own * BLOCK_TOKENS)
        try:
            with under(run.request.traceparent):
                ask = Ask(
                    names=names,
                    pages=run.pages[own : run.prompt_blocks],
                    usable=usable,
                    first_block=own,
                    reserve=len(names) if run.keeps else 0,
                    recompute_ms=recompute_ms,
                    kind=run.request.kind,
                    depth_cost=rates.depth_cost,
                )
                result = await link.load(ask, follower)
        except Exception:  # task boundary: without the cache the prompt is computed
            _log.exception("loading failed")
            link.count_unexpected("load")
            result = LoadResult(reason=MissReason.UNREACHABLE)
        run.load_ms = (time.monotonic() - started) * 1000
        run.loaded, run.store_reason = dict(result.tiers), result.reason
        run.stored = own + result.found
        while run.stored in result.reserved:
            run.stored += 1
        self._results[run] = result
        return result.blocks

    def settle_prompt(self, run: Run) -> None:
        """Hand the prompt's new blocks and its lease to the background, once."""
        link, result = self._link(), self._results.pop(run, None)
        if link is None or result is None:
            return
        done = run.full_blocks
        writes = [
            (run.pages[block], slot) for block, slot in result.reserved.items() if block < done
        ]
        aborts = [slot for block, slot in result.reserved.items() if block >= done]
        if not (writes or aborts or result.leases):
            return
        link.submit(
            StoreJob(
                done=self._holding([page for page, _ in writes]),
                writes=writes,
                aborts=aborts,
                leases=result.leases,
                kept=result.kept if self._listed(run, result) else (),
            )
        )

    def _listed(self, run: Run, result: LoadResult) -> bool:
        """Say whether the blocks that were loaded are known by name in our own pages now."""
        return run.keeps and run.published >= run.hbm_blocks + result.blocks

    def store_rest(self, run: Run) -> None:
        """Give the store full blocks that it was not given yet: the reply's, mostly."""
        link = self._link()
        if link is None or not run.keeps or run.full_blocks <= run.stored or not link.usable:
            return
        blocks = slice(run.stored, run.full_blocks)
        pages = run.pages[blocks]
        link.submit(
            StoreJob(
                done=self._holding(pages),
                names=run.names[blocks],
                pages=pages,
                first_block=run.stored,
            )
        )

    def _holding(self, pages: Sequence[int]) -> Callable[[], None]:
        """Hold `pages` until the returned function is called."""
        self._pool.share(pages)

        def done() -> None:
            self._pool.release(pages, now_ms=time.monotonic() * 1000)
            self._changed()

        return done
