"""How one run uses the store: fetch before its prefill, give after it. Glue of pool and link."""

import logging
import time
from collections.abc import Callable, Sequence

from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.outcomes import MissReason
from kvstore.observe.tracing import under
from kvworkers.engine.cache import StoreJob, StoreLink
from kvworkers.engine.loader import Ask, LoadResult
from kvworkers.engine.preemption import Prices, settled_blocks
from kvworkers.engine.rates import Rates
from kvworkers.engine.sequence import Away
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

    def begin_fork(self, run: Run) -> None:
        """Take note that whoever a run forks from gives its prompt to the store, if to anybody."""
        link = self._link()
        run.stored = run.hbm_blocks if run.keeps else 0
        if run.request.no_read or link is None:
            run.store_reason = MissReason.DISABLED
        self.begin_hand_over(run)

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
        # Nothing was chosen from them before the first token: what is not seen is not given away.
        done = run.full_blocks if self._seen(run, link) else 0
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
                checked=run.first_token_ms is None,
            )
        )

    def prices(self) -> Prices:
        """Return what bringing back those who make way costs now."""
        link = self._link()
        if link is None or not link.usable or not link.swap.has_room(1):
            return Prices(self._rates())
        return Prices(self._rates(), link.swap.block_ms, exact=link.exact)

    async def put_away(self, run: Run) -> Away | None:
        """Copy what a run needs of its pages to come back; None where it is to be computed anew.

        The prompt is settled first: what the store has then is not copied.
        """
        self.settle_prompt(run)
        link = self._link()
        held = run.full_blocks
        if link is None or not self._seen(run, link):
            held = run.hbm_blocks + sum(run.loaded.values())
        run.stored = min(run.stored, held)
        if link is None or not link.usable:
            return None
        first = settled_blocks(run, exact=link.exact)
        last = -(-run.computed // BLOCK_TOKENS)
        if first >= last:
            # All that it has lies in the store: nothing to copy, and nothing to compute either.
            return Away(first, run.computed, ())
        try:
            slots = await link.swap.out(run.pages[first:last])
        except Exception:  # task boundary: it is computed anew
            _log.exception("copying pages out failed")
            link.count_unexpected("swap")
            return None
        return None if slots is None else Away(first, run.computed, slots)

    def forget(self, run: Run) -> None:
        """Give up the copy of one that made way, if there is one."""
        away, run.away = run.away, None
        link = self._link()
        if away is not None and away.slots and link is not None:
            link.swap.drop(away.slots)

    async def bring_back(self, run: Run) -> int:
        """Fill the pages of one that had made way; return how many of its tokens stand there now.

        What its own pages' cache no longer has is loaded from the store, what lies in private
        slots copied back. Blocks behind one that did not come are computed.
        """
        away, link = run.away, self._link()
        got = run.published
        try:
            if link is not None:
                upto = run.reuse_limit if away is None else away.first_block
                got += await self._from_store(run, link, got, upto)
                if away is not None and got >= away.first_block:
                    return await self._from_slots(run, link, got, away)
        except Exception:  # task boundary: what did not come is computed
            _log.exception("copying pages back failed")
            if link is not None:
                link.count_unexpected("swap")
        finally:
            self.forget(run)
        return got * BLOCK_TOKENS

    async def _from_store(self, run: Run, link: StoreLink, first: int, upto: int) -> int:
        if first >= upto or run.request.no_read or not (link.exact and link.usable):
            return 0
        rates = self._rates()
        tokens = (upto - first) * BLOCK_TOKENS
        ask = Ask(
            names=run.names[first:upto],
            pages=run.pages[first:upto],
            usable=upto - first,
            first_block=first,
            reserve=0,
            recompute_ms=rates.prefill_ms(tokens, first * BLOCK_TOKENS),
            kind=run.request.kind,
            depth_cost=rates.depth_cost,
        )
        result = await link.load(ask)
        link.release(result.leases)
        return result.blocks

    async def _from_slots(self, run: Run, link: StoreLink, got: int, away: Away) -> int:
        last = away.first_block + len(away.slots)
        if got < last and not await link.swap.back(
            away.slots[got - away.first_block :], run.pages[got:last]
        ):
            return got * BLOCK_TOKENS
        return max(got * BLOCK_TOKENS, away.tokens)

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
        if not (link.usable and self._seen(run, link)):
            return
        pages = run.pages[blocks.start : blocks.stop]
        link.submit(
            StoreJob(
                done=self._holding(run, pages),
                names=run.names[blocks.start : blocks.stop],
                pages=pages,
                first_block=blocks.start,
                checked=run.first_token_ms is None,
            )
        )

    def _seen(self, run: Run, link: StoreLink) -> bool:
        """Say whether what is no number in its pages has been noticed, or will be by a check."""
        return run.first_token_ms is not None or link.sees_all

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
