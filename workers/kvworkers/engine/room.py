"""Pages for sequences: what they need now, while more run than could grow to their ends. Pure."""

from collections.abc import Sequence as Seq
from operator import attrgetter

from kvstore.core.limits import BLOCK_TOKENS
from kvworkers.engine.forecast import Forecast
from kvworkers.engine.preemption import AHEAD_PAGES, Candidate, Prices, choose
from kvworkers.engine.sequence import FinishReason, Sequence, SequenceState
from kvworkers.pages.pool import PagePool


class Room:
    """What is left of a pool, and who has to go when that is nothing."""

    def __init__(self, pool: PagePool, *, overcommit: bool) -> None:
        """`overcommit`: count on what replies are expected to become, not on all they may."""
        self._pool = pool
        self._overcommit = overcommit
        self._forecast = Forecast()

    def ended(self, sequence: Sequence) -> None:
        """Learn from a reply that came to its end, or to its `max_tokens`."""
        self._forecast.ended(sequence.generated, cut=sequence.finish is FinishReason.LENGTH)

    def fresh(
        self, sequence: Sequence, own: int, running: Seq[Sequence], now_ms: float
    ) -> list[int] | None:
        """Return pages for the known tokens behind `own` pages; None when there is no room.

        What `running` ones and this one are expected to become has to fit as well. Who would run
        alone has to fit as far as it is known: it gets the rest as it grows.
        """
        count = sequence.known_pages - own
        if running:
            growth = self._growth(sequence, sequence.known_pages)
            growth += sum(self._growth(one, len(one.pages)) for one in running)
            if count + growth > self._pool.available:
                return None
        return self._pool.allocate(count, now_ms=now_ms)

    def grow(self, running: Seq[Sequence], now_ms: float) -> int:
        """Give a page to each that has no place for its next token; return how many got none.

        Pages that will come of those who make way already are as good as given.
        """
        short = 0
        for sequence in running:
            alive = sequence.state is SequenceState.RUNNING and sequence.finish is None
            if alive and sequence.lacks_page:
                page = self._pool.allocate(1, now_ms=now_ms)
                if page is None:
                    short += 1
                else:
                    sequence.pages += page
        if short:
            leaving = (s for s in running if s.state is SequenceState.LEAVING)
            short -= sum(self._pool.count_alone(s.pages) for s in leaving)
        return max(0, short)

    def victims(self, running: Seq[Sequence], short: int, prices: Prices) -> list[Sequence]:
        """Return who makes way so that `short` pages become free.

        Never who came first, and nobody whose pages are still being filled. Too few where the
        others cannot give so many: those who lack a page wait.
        """
        senior = min(running, key=attrgetter("turn"))
        able = {
            s.turn: s
            for s in running
            if s.state is SequenceState.RUNNING and s.finish is None and s is not senior
        }
        candidates = [
            Candidate(turn, self._pool.count_alone(s.pages), prices.of(s))
            for turn, s in able.items()
        ]
        wanted = short + AHEAD_PAGES * len(running)
        return [able[turn] for turn in choose(candidates, short=short, wanted=wanted)]

    def _growth(self, sequence: Sequence, pages: int) -> int:
        """Return how many pages one is expected to want beyond so many."""
        most = sequence.request.sampling.max_tokens
        tokens = most
        if self._overcommit:
            tokens = self._forecast.tokens(min(sequence.generated, most), most)
        # The last generated token is never fed back, so it needs no place.
        return max(0, -(-(sequence.prompt_tokens + tokens - 1) // BLOCK_TOKENS) - pages)
