"""Who runs next: admission by pages, and steps that mix decodes with chunks of prefill. Pure.

Admission is first come, first served. A sequence gets every page that it can ever need when it
is admitted, so nothing admitted can get stuck for memory; what can never fit is refused before any
work. A sequence whose next block is being computed by another one is held back until
that one has passed (or a deadline has): two users with one document compute it once.

A step has a budget of tokens. Decodes go first, one token each, then prefills in order of
admission share the rest in chunks. Time is passed in as milliseconds of a monotonic clock.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from kvstore.core.errors import BadInput, Refused, TooLarge
from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.names import BlockName
from kvworkers.engine.sequence import Sequence, SequenceState
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

    def __post_init__(self) -> None:
        for name in ("max_model_tokens", "step_tokens", "max_running", "max_waiting", "hold_ms"):
            if getattr(self, name) <= 0:
                raise BadInput(f"scheduler {name} must be positive, got {getattr(self, name)}")
        if self.step_tokens < self.max_running:
            raise BadInput(
                f"step_tokens {self.step_tokens} is below max_running {self.max_running}: "
                "a step has to fit one decode of every sequence"
            )


@dataclass(frozen=True, slots=True)
class Work:
    """Part of a step: compute tokens `[start, start + count)` of one sequence."""

    sequence: Sequence
    start: int
    count: int
    samples: bool
    """Whether the last of them is the last known token, so that the next one is chosen."""


def _never(sequence: Sequence) -> bool:
    return False


NAMED_AT_ONCE: Final = 64
"""Blocks that become known by name on a token's way out: a third of a millisecond."""


class Scheduler:
    """Decides; the engine executes and reports back by `advance` and `finish`."""

    def __init__(self, config: SchedulerConfig, pool: PagePool) -> None:
        self.config = config
        self._pool = pool
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._computing: dict[BlockName, Sequence] = {}
        """A name says its root, so it stands for both."""

    @property
    def waiting(self) -> int:
        """Sequences without pages."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences with pages."""
        return len(self._running)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens admitted or waiting and not yet computed."""
        return sum(max(0, s.prompt_tokens - s.computed) for s in self.sequences())

    @property
    def queued_token_depths(self) -> float:
        """Sum over those tokens of how many tokens of their prompts come before each."""
        left = ((s.computed, max(s.computed, s.prompt_tokens)) for s in self.sequences())
        return sum((last - first) * (first + last) / 2 for first, last in left)

    def sequences(self) -> Iterator[Sequence]:
        """Iterate over everything that is not finished."""
        yield from self._running
        yield from self._waiting

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
        self._waiting.append(sequence)

    def admit(self, now_ms: float) -> list[Sequence]:
        """Give pages to those whose turn it is; returns them in state LOADING.

        Its own pages are matched here: `hbm_blocks`, `computed` and `pages` are set. Stops at the
        first one that does not fit (no overtaking for memory); those held back for a
        prefix are overtaken.
        """
        admitted: list[Sequence] = []
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

    def plan(self, follows: Callable[[Sequence], bool] = _never) -> list[Work]:
        """Choose what the next step computes; empty when nothing is ready.

        Steps that were begun (`launch`) and not ended count as computed. `follows` is asked of a
        sequence with a gate: whether a step is to begin behind its load.
        """
        budget = self.config.step_tokens
        ready = [
            (s, max(s.launched, s.computed), s.pending_tokens)
            for s in self._running
            if s.finish is None and (s.state is SequenceState.RUNNING or (s.gate and follows(s)))
        ]
        works = [Work(s, start, 1, True) for s, start, pending in ready if pending == 1]
        budget -= len(works)
        assert budget >= 0
        for sequence, start, pending in ready:
            if pending <= 1:
                continue
            count = min(budget, pending)
            if count == 0:
                break
            works.append(Work(sequence, start, count, count == pending))
            budget -= count
        return works

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
        sequence.computed = (sequence.hbm_blocks + blocks) * BLOCK_TOKENS
        if not sequence.in_step:
            sequence.launched = sequence.computed
        sequence.gate = None
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
        if sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
        self._forget_computing(sequence, 0)
        use = PageUse(sequence.request.kind, sequence.root.hex(), depth_cost)
        self._pool.release(sequence.pages, now_ms=now_ms, use=use)
        sequence.pages = []
        sequence.state = SequenceState.FINISHED

    def _must_hold(self, sequence: Sequence, now_ms: float) -> bool:
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

    def _give_pages(self, sequence: Sequence, now_ms: float) -> bool:
        own: list[int] = []
        if not sequence.request.no_read:
            own = self._pool.match(sequence.root, sequence.names[: sequence.hit_limit])
        fresh = self._pool.allocate(sequence.pages_needed - len(own), now_ms=now_ms)
        if fresh is None:
            self._pool.release(own, now_ms=now_ms)
            return False
        sequence.pages = own + fresh
        sequence.hbm_blocks = sequence.published = len(own)
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
