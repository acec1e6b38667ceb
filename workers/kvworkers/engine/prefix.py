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

    def begin_hand_over(self, run: Run) -> None:
        """Give the store what our own pages have of a prompt that goes on elsewhere.

        It had these blocks once; whether it has them still, nobody here knows.
        """
        link = self._link()
        if run.request.hand_over is not None and link is not None and run.hbm_blocks:
            self._store_named(run, link, range(run.hbm_blocks))

    def settle_chunk(self, run: Run) -> None:
        """Give the store the blocks that are computed so far of such a prompt.

        Its end was not seen yet: what is no number is given to nobody (`StoreJob.checked`). Where
        that cannot be seen, all of it waits for the end.
        """
        link, result = self._link(), self._results.get(run)
        if run.request.hand_over is None or link is None or result is None or not link.sees_all:
            return
        done = [block for block in result.reserved if block < run.full_blocks]
        writes = [(run.pages[block], result.reserved.pop(block)) for block in done]
        if writes:
            held = self._holding(run, [page for page, _ in writes])
            link.submit(StoreJob(done=held, writes=writes, checked=True))

    def leave(self, run: Run) -> None:
        """Take note that nothing more comes of a run."""
        if run.request.hand_over is not None:
            run.request.hand_over.ended()

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
                done=self._holding(run, [page for page, _ in writes]),
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
        if link is not None and run.keeps and run.full_blocks > run.stored:
            self._store_named(run, link, range(run.stored, run.full_blocks))

    def _store_named(self, run: Run, link: StoreLink, blocks: range) -> None:
        """Have the background ask for slots for these blocks, and fill those that it gets."""
        if not link.usable:
            return
        pages = run.pages[blocks.start : blocks.stop]
        link.submit(
            StoreJob(
                done=self._holding(run, pages),
                names=run.names[blocks.start : blocks.stop],
                pages=pages,
                first_block=blocks.start,
            )
        )

    def _holding(self, run: Run, pages: Sequence[int]) -> Callable[[], None]:
        """Hold `pages` until the returned function is called; a hand-over waits for it."""
        self._pool.share(pages)
        waiting = run.request.hand_over
        if waiting is not None:
            waiting.began()

        def done() -> None:
            self._pool.release(pages, now_ms=time.monotonic() * 1000)
            self._changed()
            if waiting is not None:
                waiting.ended()

        return done
