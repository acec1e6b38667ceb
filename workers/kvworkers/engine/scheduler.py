"""Who runs next: admission by pages, and steps that mix decodes with chunks of prefill. Pure.

Admission is first come, first served, by the pages that are needed: those of the tokens that are
known are given at once, those of the reply while it grows. One is admitted when what replies are
expected to become (`Forecast`) fits beside those that run. When pages run out all the same, some
make way (`make_room`), and come back before anyone new is admitted. Nothing gets stuck: whoever
came first is never asked to, and what can never fit is refused before any work.

A sequence whose next block is being computed by another one is held back until
that one has passed (or a deadline has): two users with one document compute it once.

A step has a budget of tokens. Decodes go first, one token each, then prefills in order of
admission share the rest in chunks. Time is passed in as milliseconds of a monotonic clock.
"""

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from kvstore.core.errors import BadInput, Refused, TooLarge
from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.names import BlockName
from kvworkers.engine.preemption import Prices
from kvworkers.engine.room import Room
from kvworkers.engine.sequence import Away, FinishReason, Sequence, SequenceState
from kvworkers.engine.siblings import Families, full_pages, last_page
from kvworkers.engine.work import Work, never, plan_step
from kvworkers.pages.pool import PageKey, PagePool, PageUse
from kvworkers.stream.gate import Gate


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Bounds of batching."""

    max_model_tokens: int
    """Prompt and output of one sequence together."""
    step_tokens: int = 512
    """Tokens computed in one step: a chunk on CPU takes about a second."""
    max_running: int = 16
    """Sequences that have pages at once."""
    max_waiting: int = 64
    """Sequences without pages; beyond it requests are refused."""
    hold_ms: float = 10_000
    """How long one sequence waits for another that computes the same prefix."""
    overcommit: bool = True
    """Admit by what replies are expected to become; False: by all that they may become."""

    def __post_init__(self) -> None:
        for name in ("max_model_tokens", "step_tokens", "max_running", "max_waiting", "hold_ms"):
            if getattr(self, name) <= 0:
                raise BadInput(f"scheduler {name} must be positive, got {getattr(self, name)}")
        if self.step_tokens < self.max_running:
            raise BadInput(
                f"step_tokens {self.step_tokens} is below max_running {self.max_running}: "
                "a step has to fit one decode of every sequence"
            )


NAMED_AT_ONCE: Final = 64
"""Blocks that become known by name on a token's way out: a third of a millisecond."""


class Scheduler:
    """Decides; the engine executes and reports back by `advance`, `left` and `finish`."""

    def __init__(self, config: SchedulerConfig, pool: PagePool) -> None:
        self.config = config
        self._pool = pool
        self._room = Room(pool, overcommit=config.overcommit)
        self._families = Families()
        self._turns = 0
        self._waiting: deque[Sequence] = deque()
        self._out: list[Sequence] = []
        """Those that made way, by their turns."""
        self._running: list[Sequence] = []
        self._computing: dict[BlockName, Sequence] = {}
        """A name says its root, so it stands for both."""

    @property
    def waiting(self) -> int:
        """Sequences without pages."""
        return len(self._waiting) + len(self._out)

    @property
    def preempted(self) -> int:
        """Those among them that made way."""
        return len(self._out)

    @property
    def running(self) -> int:
        """Sequences with pages."""
        return len(self._running)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens admitted or waiting and not yet computed."""
        return sum(max(0, s.prompt_tokens - _done(s)) for s in self.sequences())

    @property
    def queued_token_depths(self) -> float:
        """Sum over those tokens of how many tokens of their prompts come before each."""
        left = ((_done(s), max(_done(s), s.prompt_tokens)) for s in self.sequences())
        return sum((last - first) * (first + last) / 2 for first, last in left)

    def sequences(self) -> Iterator[Sequence]:
        """Iterate over everything that is not finished."""
        yield from self._running
        yield from self._out
        yield from self._waiting

    @property
    def spare_places(self) -> int:
        """Places for tokens in pages of running sequences that no known token will fill."""
        return sum(max(0, len(s.pages) * BLOCK_TOKENS - len(s.tokens)) for s in self._running)

    def submit(self, sequence: Sequence, *, retry_after_ms: int = 0) -> None:
        """Queue a sequence. Raises `TooLarge` when it can never run, `Refused` when full."""
        wanted = sequence.prompt_tokens + sequence.request.sampling.max_tokens
        if wanted > self.config.max_model_tokens:
            raise TooLarge(
                f"prompt of {sequence.prompt_tokens} tokens and max_tokens "
                f"{sequence.request.sampling.max_tokens} make {wanted}; the model's context is "
                f"{self.config.max_model_tokens}"
            )
        if sequence.pages_needed > self._pool.pages:
            raise TooLarge(
                f"{wanted} tokens of prompt and output; this worker's pages hold "
                f"{self._pool.pages * BLOCK_TOKENS}"
            )
        if len(self._waiting) >= self.config.max_waiting:
            raise Refused(f"{len(self._waiting)} requests are waiting already", retry_after_ms)
        self._turns += 1
        sequence.turn = self._turns
        self._waiting.append(sequence)
        self._families.join(sequence)

    def make_room(self, now_ms: float, prices: Callable[[], Prices] = Prices) -> list[Sequence]:
        """Give running sequences a page for their next token; return who has to make way for it.

        Those are LEAVING from now on: no step is planned for them. When no step has them any more,
        the caller copies what is to be kept and says `left`. `prices` are asked when needed.
        """
        short = self._room.grow(self._running, now_ms)
        if not short:
            return []
        victims = self._room.victims(self._running, short, prices())
        for victim in victims:
            victim.state = SequenceState.LEAVING
        return victims

    def left(self, sequence: Sequence, away: Away | None, *, now_ms: float) -> None:
        """Take the pages of one that makes way; `away` is its copy, None: it is computed anew."""
        assert sequence.state is SequenceState.LEAVING
        assert not sequence.in_step and not sequence.loading and not sequence.coming
        self._running.remove(sequence)
        self._forget_computing(sequence, 0)
        self._pool.release(sequence.give_up_pages(), now_ms=now_ms)
        sequence.away = away
        sequence.preemptions += 1
        sequence.state = SequenceState.WAITING
        insort(self._out, sequence, key=attrgetter("turn"))

    def admit(self, now_ms: float) -> list[Sequence]:
        """Give pages to those whose turn it is; returns them in state LOADING.

        Its own pages are matched here: `hbm_blocks`, `computed` and `pages` are set; `branch` of
        one that forks. Stops at the first one that does not fit (no overtaking for memory); those
        held back for a prefix are overtaken. Those that made way come first, and nobody before
        them.
        """
        admitted: list[Sequence] = []
        while self._out and len(self._running) < self.config.max_running:
            if not self._give_pages(self._out[0], now_ms):
                return admitted
            admitted.append(self._out.pop(0))
        held: list[Sequence] = []
        while self._waiting and len(self._running) < self.config.max_running:
            sequence = self._waiting.popleft()
            if self._must_hold(sequence, now_ms):
                held.append(sequence)
            elif self._give_pages(sequence, now_ms):
                admitted.append(sequence)
            else:
                self._waiting.appendleft(sequence)
                break
        self._waiting.extendleft(reversed(held))
        return admitted

    def fork(self, source: Sequence, now_ms: float) -> list[Sequence]:
        """Give pages to those who wait for the prompt of `source`, whose first token is there.

        Returned as `admit` returns them. They overtake: there are few, and each takes a page.
        """
        forks: list[Sequence] = []
        family = source.family
        for one in [] if family is None or self._out else list(family.members):
            waits = one.state is SequenceState.WAITING and one.finish is None
            if waits and len(self._running) < self.config.max_running:
                if not self._give_pages(one, now_ms):
                    break
                self._waiting.remove(one)
                forks.append(one)
        return forks

    def forked(self, sequence: Sequence, *, now_ms: float) -> None:
        """Take note that K and V of the prompt stand in the pages of one that forks."""
        assert sequence.state is SequenceState.LOADING and not sequence.in_step
        sequence.forked = True
        self._runs(sequence, sequence.prompt_tokens, now_ms)

    def next_hold_end_ms(self, now_ms: float) -> float | None:
        """Return when the next sequence held back for a prefix will have waited enough.

        One that has waited enough already is left out: it waits for pages, not for a time.
        """
        ends = [
            s.held_since_ms + self.config.hold_ms
            for s in self._waiting
            if s.held_since_ms is not None
        ]
        return min((end for end in ends if end > now_ms), default=None)

    def plan(self, follows: Callable[[Sequence], bool] = never) -> list[Work]:
        """Choose what the next step computes; empty when nothing is ready.

        Steps that were begun (`launch`) and not ended count as computed. `follows` is asked of a
        sequence with a gate: whether a step is to begin behind its load.
        """
        return plan_step(self._running, self.config.step_tokens, follows)

    def launch(self, works: Iterable[Work]) -> None:
        """Take note that `works` were begun: the next plan goes on behind them."""
        for work in works:
            work.sequence.launched = work.start + work.count
            work.sequence.coming = int(work.samples)

    def loading(self, sequence: Sequence, blocks: int, gate: Gate) -> None:
        """Take note that `blocks` more leading blocks are on their way, and a step may follow."""
        assert sequence.state is SequenceState.LOADING and not sequence.in_step
        assert sequence.hbm_blocks + blocks <= sequence.hit_limit
        sequence.gate = gate
        sequence.launched = (sequence.hbm_blocks + blocks) * BLOCK_TOKENS

    def loaded(self, sequence: Sequence, blocks: int, *, now_ms: float) -> None:
        """Take note that `blocks` more leading blocks were copied into its pages.

        Where a step has followed the load and there are fewer than it took for given, `void` it.
        """
        assert sequence.state is SequenceState.LOADING
        assert sequence.hbm_blocks + blocks <= sequence.hit_limit
        sequence.gate = None
        self._runs(sequence, (sequence.hbm_blocks + blocks) * BLOCK_TOKENS, now_ms)

    def returned(self, sequence: Sequence, tokens: int, *, now_ms: float) -> None:
        """Take note that K and V of `tokens` stand in the pages of one that had made way."""
        assert sequence.state is SequenceState.LOADING and sequence.away is None
        assert sequence.published * BLOCK_TOKENS <= tokens < len(sequence.tokens)
        self._runs(sequence, tokens, now_ms)

    def _runs(self, sequence: Sequence, tokens: int, now_ms: float) -> None:
        sequence.computed = tokens
        if not sequence.in_step:
            sequence.launched = sequence.computed
        sequence.state = SequenceState.RUNNING
        self.name_blocks(sequence, now_ms=now_ms)

    def advance(self, work: Work, *, now_ms: float) -> None:
        """Take note that `work` was computed; full blocks become known by name.

        Only so many at once: `name_blocks` does the rest when tokens are on their way.
        """
        sequence = work.sequence
        assert sequence.computed == work.start
        sequence.computed += work.count
        if work.samples and sequence.launched <= sequence.computed:
            sequence.coming = 0
        assert sequence.computed <= len(sequence.pages) * BLOCK_TOKENS
        self.name_blocks(sequence, now_ms=now_ms)

    def void(self, sequence: Sequence) -> None:
        """Take note that a step went on from blocks that never came: it is computed anew."""
        assert not sequence.in_step
        sequence.launched, sequence.coming = sequence.computed, 0

    def disown(self, sequence: Sequence) -> None:
        """Take away the names of everything that is in its pages: their bytes are not to be used.

        Whoever matched them before goes on with them; nobody finds them from now on.
        """
        self._pool.unname(sequence.pages[: sequence.published])
        sequence.computed = sequence.launched = sequence.published = 0

    def finish(self, sequence: Sequence, *, now_ms: float, depth_cost: float = 0.0) -> None:
        """Give everything back. The caller knows that nobody writes its pages any more.

        `depth_cost` as measured (`Rates`): evidence for the policy of the pages, with the request's
        own. The root stands for the share domain: it is one domain's, and workers know no other.
        """
        assert not sequence.in_step and not sequence.loading
        if sequence.state is SequenceState.FINISHED:
            return
        if sequence.state is not SequenceState.WAITING:
            self._running.remove(sequence)
        elif sequence.preemptions:
            self._out.remove(sequence)
        else:
            self._waiting.remove(sequence)
        if sequence.finish in (FinishReason.STOP, FinishReason.LENGTH):
            self._room.ended(sequence)
        self._families.leave(sequence)
        self._forget_computing(sequence, 0)
        use = PageUse(sequence.request.kind, sequence.root.hex(), depth_cost)
        self._pool.release(sequence.pages, now_ms=now_ms, use=use)
        sequence.pages = []
        sequence.state = SequenceState.FINISHED

    def _must_hold(self, sequence: Sequence, now_ms: float) -> bool:
        if sequence.family is not None and sequence.family.computes():
            return True  # Without an end of its own: who computes it goes on, fails or makes way.
        if sequence.request.no_read:
            return False
        known = self._pool.count_prefix(sequence.root, sequence.names[: sequence.hit_limit])
        if known == sequence.hit_limit:
            return False
        if sequence.names[known] not in self._computing:
            return False
        if sequence.held_since_ms is None:
            sequence.held_since_ms = now_ms
        return now_ms - sequence.held_since_ms < self.config.hold_ms

    def _matched(self, sequence: Sequence) -> tuple[list[int], list[int] | None]:
        """Return held pages with its beginning; for one that forks, the page to copy as well."""
        family = sequence.family
        source = None if family is None or sequence.preemptions else family.source()
        if source is not None:
            pages, last = full_pages(source), last_page(source)
            self._pool.share(pages + last)
            return pages, last
        if sequence.request.no_read:
            return [], None
        return self._pool.match(sequence.root, sequence.names[: sequence.reuse_limit]), None

    def _give_pages(self, sequence: Sequence, now_ms: float) -> bool:
        own, shared = self._matched(sequence)
        fresh = self._room.fresh(sequence, len(own), self._running, now_ms)
        if fresh is None:
            self._pool.release(own + (shared or []), now_ms=now_ms)
            return False
        if shared is not None:
            sequence.branch = list(zip(shared, fresh, strict=True))
        sequence.pages = own + fresh
        sequence.published = len(own)
        if not sequence.preemptions:
            sequence.hbm_blocks = len(own)
        sequence.computed = len(own) * BLOCK_TOKENS
        sequence.state = SequenceState.LOADING
        sequence.held_since_ms = None
        self._running.append(sequence)
        if sequence.keeps:
            for name in sequence.names[len(own) :]:
                self._computing.setdefault(name, sequence)
        return True

    def name_blocks(self, sequence: Sequence, *, now_ms: float, limit: int = NAMED_AT_ONCE) -> None:
        """Make up to `limit` more full blocks known by name."""
        if not sequence.keeps:
            return
        first = sequence.published
        last = min(sequence.full_blocks, first + limit)
        if last > first:
            root, names = sequence.root, sequence.names
            self._pool.publish_run(
                sequence.pages[first:last],
                [PageKey(root, name) for name in names[first:last]],
                position=first,
                now_ms=now_ms,
                parent=PageKey(root, names[first - 1]) if first else None,
            )
        self._forget_computing(sequence, first, last)
        sequence.published = max(first, last)

    def _forget_computing(self, sequence: Sequence, first: int, last: int | None = None) -> None:
        for name in sequence.names[first:last]:
            if self._computing.get(name) is sequence:
                del self._computing[name]


def _done(sequence: Sequence) -> int:
    """Return how many tokens of a sequence need not be computed any more."""
    return sequence.computed if sequence.away is None else sequence.away.tokens
