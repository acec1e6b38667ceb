"""Where a prompt would go: scores every worker from view, bookings and member list. Pure."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from kvstore.core.errors import BadInput
from kvstore.core.limits import BLOCK_TOKENS, MAX_PROMPT_TOKENS
from kvstore.core.names import BlockName, Root
from kvstore.directory.events import TierKind, WorkerRole
from kvstore.directory.reach import Held
from kvstore.directory.view import ClusterView, Health
from kvstore.router.booking import Booking, Bookings
from kvstore.router.heat import Heat
from kvstore.router.learning import Actual, Expected, Learned, Promise
from kvstore.router.members import Members
from kvstore.router.ranking import Ranking, rank
from kvstore.router.score import LOAD_COST, Candidate, Score, Source, Work
from kvstore.router.seats import Seat, Seats
from kvstore.router.split import Side, Split, Whole, choose

DISTRUST_MS: Final = 1_000.0
"""How long a worker that failed a request is passed over: by then its stream has spoken."""


_SILENT: Final = "gives first tokens only"

RATE_LEEWAY: Final = 8.0
"""How many times faster or slower than in the answers seen here a worker may say that it loads. It
speaks of all its loads, ours are the single ones; what is further off is a lie or a fault."""

ASSUMED_SHARES: Final = {
    TierKind.DRAM: LOAD_COST,
    TierKind.NVME: 8 * LOAD_COST,
    TierKind.PEER: 12 * LOAD_COST,
    TierKind.FILES: 32 * LOAD_COST,
}
"""Cost of loading a token as a share of computing it, until loads were measured: host memory gives
50 GB/s, a disk about 6, a peer about 4 over one connection, a shared file system about 1.5."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be placed; raises `BadInput` when names and tokens do not fit together."""

    root: Root
    names: Sequence[BlockName]
    tokens: int
    exclude: Collection[str] = ()
    """Workers that just failed."""
    among: Collection[str] | None = None
    """Workers that serve the model at all; None: every one."""
    keeps: bool = True
    """Whether its blocks stay where they are computed, so that others may follow it there."""
    domain: str = ""
    """Who shares fairly with whom."""
    priority: int = 0
    """Higher goes first where requests wait."""
    ttft_slo_ms: float = 0.0
    """Refuse it at once when no worker can answer so soon; 0: none."""
    whole: Whole | None = Whole.CALLER
    """Why it must not be split over two workers; None: it may be."""

    def __post_init__(self) -> None:
        if not 0 < self.tokens <= MAX_PROMPT_TOKENS:
            raise BadInput(f"prompt of {self.tokens} tokens; 1 to {MAX_PROMPT_TOKENS} allowed")
        if len(self.names) > self.tokens // BLOCK_TOKENS:
            raise BadInput(f"{len(self.names)} names for {self.tokens} tokens")


@dataclass(frozen=True, slots=True)
class Step:
    """Blocks `[first, first + count)` are expected from one place."""

    first: int
    count: int
    tier: TierKind
    place: str


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a prompt goes, and why. `booking` is 0 in an explanation that booked nothing."""

    worker: str
    address: str
    prompt_tokens: int
    plan: tuple[Step, ...]
    scores: Ranking
    """Every worker considered, best first."""
    expected: Expected
    """What to hold the answer against."""
    loading: Mapping[str, int] = field(default_factory=dict)
    """Tokens to be loaded, by device."""
    excluded: dict[str, str] = field(default_factory=dict)
    """Every other worker, and why it was not."""
    doubts: dict[str, float] = field(default_factory=dict)
    """Publishers that are believed in part only, and how far."""
    hot_tokens: int = 0
    """Leading tokens that deserve another copy."""
    booking: int = 0
    split: Split | None = None
    """Set where `worker` gives the first token only, and another one goes on."""
    whole: Whole | None = None
    """Why it is not split; None where no worker has a role, too."""

    @property
    def hit_tokens(self) -> int:
        """Prompt tokens that the worker is expected to find."""
        return self.expected.hit_tokens

    @property
    def predicted_ttft_ms(self) -> float:
        """Predicted time to the first token."""
        return self.expected.ttft_s * 1_000

    @property
    def missed(self) -> str:
        """Say why the rest of the prompt has to be computed."""
        chosen, most = self.scores[0], (self.prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        reasons = []
        if chosen.known_tokens > chosen.hit_tokens:
            slower = chosen.known_tokens - chosen.hit_tokens
            reasons.append(f"{slower} tokens would load slower than they compute")
        if chosen.plan.split_tokens > chosen.own_tokens:
            split = chosen.plan.split_tokens - chosen.own_tokens
            reasons.append(f"{split} tokens are computed while the rest loads")
        best = self.scores.longest()
        if best.known_tokens > chosen.known_tokens:
            more, later = best.known_tokens - chosen.known_tokens, best.cost_s - chosen.cost_s
            reasons.append(f"{best.name} has {more} more and costs {later * 1e3:.1f} ms more")
        unknown = most - best.known_tokens
        if unknown > 0:
            reasons.append(f"{unknown} tokens are cached nowhere in sight")
        if self.hot_tokens > chosen.own_tokens:
            reasons.append(f"the first {self.hot_tokens} are hot and get another copy")
        for publisher, trust in self.doubts.items():
            reasons.append(f"{publisher} is believed {trust:.0%}")
        reasons.append(f"the last {self.prompt_tokens - most} are always computed")
        return "; ".join(reasons)

    @property
    def explanation(self) -> str:
        """Say for people how the choice came about."""
        lines = [score.explain() for score in self.scores]
        lines += [f"{name}: {why}" for name, why in self.excluded.items()]
        if self.split is not None:
            lines += [self.split.alone.explain(), self.split.explain()]
        elif self.whole is not None:
            lines.append(f"not split: {self.whole}")
        return "\n".join([*lines, f"not cached: {self.missed}"])


class Placement:
    """Decides from three things that others keep up to date."""

    def __init__(self, view: ClusterView, bookings: Bookings) -> None:
        self._view = view
        self._bookings = bookings
        self.learned = Learned()
        self.heat = Heat()
        self.members = Members()
        self._distrusted: dict[str, float] = {}
        self._seats = Seats(view, self.learned)

    def distrust(self, worker: str, now_ms: float) -> None:
        """Pass a worker over for a moment: it failed a request."""
        self._distrusted[worker] = now_ms + DISTRUST_MS

    def trust(self, worker: str) -> None:
        """Forget that a worker failed: it is another one now."""
        self._distrusted.pop(worker, None)

    def decide(self, prompt: Prompt, now_ms: float) -> Decision | None:
        """Score every worker that may be chosen; None when there is none."""
        allowed, excluded = self._sift(self._seats.update(self.members), prompt, now_ms)
        if not allowed:
            return None
        held = self._held(allowed, prompt, now_ms)
        coming = self._bookings.coming_blocks(prompt.root, prompt.names)
        trusts = {name: self.learned.trust(name, now_ms) for name in self.learned.doubted() if name}
        # One prompt token at least is computed, for the logits to sample from.
        most = (prompt.tokens - 1) // BLOCK_TOKENS
        candidates = [
            self._candidate(seat, found, coming.get(seat.name, 0) if coming else 0, most, trusts)
            for seat, found in zip(allowed, held, strict=True)
        ]
        sides: Sequence[int] = range(len(allowed))
        able = candidates
        if roles := self._seats.roles and any(seat.role is not WorkerRole.BOTH for seat in allowed):
            sides = [at for at in sides if _answers(allowed[at], prompt)]
            if not sides:
                return None
            able = [candidates[at] for at in sides]
        own_blocks = [one.own_tokens // BLOCK_TOKENS for one in able]
        hot_blocks = self.heat.hot_blocks(prompt.names, own_blocks, now_ms)
        hot_tokens = min(hot_blocks, most) * BLOCK_TOKENS

        def decision(at: int, scores: Ranking) -> Decision:
            return self._decision(
                prompt, scores, allowed[at], held[at], candidates[at], excluded, trusts, hot_blocks
            )

        scores = rank(able, prompt.tokens, hot_tokens)
        alone = decision(sides[scores.best_index], scores)
        if not roles:
            return alone
        split = self._split(prompt, scores[0], allowed, candidates, hot_tokens, now_ms)
        if isinstance(split, Whole):
            silent = {seat.name: _SILENT for seat in allowed if not _answers(seat, prompt)}
            return replace(alone, whole=split, excluded=excluded | silent)
        return replace(decision(split.prefill, split.scores), split=split)

    def _split(
        self, prompt: Prompt, alone: Score, seats: Sequence[Seat], candidates: Sequence[Candidate],
        hot_tokens: int, now_ms: float,
    ) -> Split | Whole:  # fmt: skip
        """Say whether two workers are better than the best one, and which."""
        if not prompt.keeps or prompt.whole is not None:
            return prompt.whole or Whole.NO_STORE
        blocks = prompt.tokens // BLOCK_TOKENS
        arenas = {
            host: any(self._view.health(node, now_ms) is Health.LIVE for node in nodes)
            for host, nodes in self._seats.nodes.items()
        }
        sides = [
            Side(
                candidate, seat.role, seat.host,
                self._source(seat, TierKind.DRAM, blocks) if arenas.get(seat.host) else None,
            )
            for seat, candidate in zip(seats, candidates, strict=True)
        ]  # fmt: skip
        return choose(sides, prompt.tokens, alone, hot_tokens)

    def warm(self, decision: Decision, prompt: Prompt, now_ms: float) -> None:
        """Note that a decision is carried out: its prefixes are asked for."""
        if prompt.keeps and prompt.names:
            plan = decision.scores[0].plan
            self.heat.add(prompt.names, plan.compute_s + plan.load_s, now_ms)

    def learn(self, made: Booking, expected: Expected, actual: Actual, now_ms: float) -> None:
        """Correct what comes next by what became of a booking."""
        if self._stepped_over_a_hole(made, expected, actual):
            expected = expected._replace(promises=())  # no publisher promised that
        self.learned.observe(made.worker, expected, actual, now_ms)

    def _stepped_over_a_hole(self, made: Booking, expected: Expected, actual: Actual) -> bool:
        """Tell the view where a prefix ended early; True when it knew that all of it did."""
        seat = next((seat for seat in self._seats.all if seat.name == made.worker), None)
        if seat is None:
            return False
        reach, names, found = seat.reach, made.names, (actual.by_tier or {}).get(TierKind.HBM)
        if found is not None and expected.promises and found < expected.promises[0].until_tokens:
            self._view.ended(reach.own, made.root, names, found // BLOCK_TOKENS)
        if actual.hit_tokens >= expected.hit_tokens:
            return False
        places = reach.own | reach.below
        return self._view.ended(places, made.root, names, actual.hit_tokens // BLOCK_TOKENS)

    def _sift(
        self, seats: Sequence[Seat], prompt: Prompt, now_ms: float
    ) -> tuple[list[Seat], dict[str, str]]:
        """Return who may be chosen, and why each other one must not."""
        allowed: list[Seat] = []
        excluded: dict[str, str] = {}
        picky = bool(prompt.exclude or prompt.among is not None or self._distrusted)
        health_of, live = self._view.health_of, Health.LIVE
        for seat in seats:
            if not picky and not seat.load.draining and health_of(seat.known, now_ms) is live:
                allowed.append(seat)  # as nearly always
            elif why := self._why_not(seat, prompt, now_ms):
                excluded[seat.name] = why
            else:
                allowed.append(seat)
        return allowed, excluded

    def _why_not(self, seat: Seat, prompt: Prompt, now_ms: float) -> str:
        """Return why a worker must not be chosen; empty when it may."""
        if prompt.exclude and seat.name in prompt.exclude:
            return "excluded by the caller"
        if prompt.among is not None and seat.name not in prompt.among:
            return "does not serve this model"
        health = self._view.health_of(seat.known, now_ms)
        if health is not Health.LIVE:
            return str(health)
        if self._distrusted and self._distrusted.get(seat.name, 0.0) > now_ms:
            return "failed a request a moment ago"
        return "draining" if seat.load.draining else ""

    def _held(self, seats: Sequence[Seat], prompt: Prompt, now_ms: float) -> list[Held]:
        """Return what each worker reaches of the prompt, as far as the view knows."""
        tiers: dict[str, list[tuple[TierKind, int]]] = {}
        for host in {seat.host for seat in seats}:
            tiers[host] = self._view.host_tiers(self._seats.nodes.get(host, ()), now_ms)
        reaches = [seat.reach_with(tiers[seat.host]) for seat in seats]
        return self._view.match(prompt.root, prompt.names, reaches)

    def _candidate(
        self, seat: Seat, held: Held, coming: int, most: int, trusts: Mapping[str, float]
    ) -> Candidate:
        own, levels, below = held.own_blocks, held.levels, held.below_blocks
        if trusts:
            own = int(own * trusts.get(seat.name, 1.0))
            trust = trusts.get(seat.publisher, 1.0)
            levels = tuple((tier, int(blocks * trust)) for tier, blocks in levels)
            below = int(below * trust)
        # Plain comparisons: this runs for every worker of every decision.
        own = coming if coming > own else own
        own = most if own > most else own
        sources: Sequence[Source] = ()
        if levels:
            sources = [
                self._source(seat, tier, min(blocks, most))
                for tier, blocks in levels
                if min(blocks, most) > own
            ]
        load_ms = seat.known.load_ms if seat.known is not None else 0.0
        queued, waiting = self._bookings.queued(seat.name, load_ms=load_ms)
        waiting += seat.load.waiting
        if reported := seat.reported.tokens:
            depths = queued.token_depths + seat.reported.token_depths
            queued = Work(queued.tokens + reported, depths)
        return Candidate(
            seat.name, own * BLOCK_TOKENS, sources, seat.pace, queued, seat.running, seat.kv_used,
            below * BLOCK_TOKENS, waiting,
            not sources or self.learned.overlaps(seat.name),
        )  # fmt: skip

    def _source(self, seat: Seat, tier: TierKind, blocks: int) -> Source:
        return Source(
            tier.name.lower(),
            blocks * BLOCK_TOKENS,
            self._load_s_per_token(seat, tier),
            self._bookings.loading(seat.device(tier)),
            ASSUMED_SHARES[tier],
        )

    def _load_s_per_token(self, seat: Seat, tier: TierKind) -> float:
        """Return what the worker says of all its loads, within what its answers here allow."""
        told = seat.load_rates.get(tier, 0.0)
        seen = self.learned.load_s_per_token(seat.name, tier)
        if not told or not seen:
            return told or seen
        return min(max(told, seen / RATE_LEEWAY), seen * RATE_LEEWAY)

    def _decision(
        self, prompt: Prompt, scores: Ranking, seat: Seat, held: Held, chosen: Candidate,
        excluded: dict[str, str], trusts: Mapping[str, float], hot_blocks: int,
    ) -> Decision:  # fmt: skip
        """Say where the chosen worker is expected to take the prefix from."""
        best = scores[0]
        first, promised = chosen.own_tokens // BLOCK_TOKENS, held.own_blocks * BLOCK_TOKENS
        worker, publisher = seat.name, seat.publisher
        steps = [Step(0, first, TierKind.HBM, worker)] if first else []
        # What is only coming was promised by nobody.
        promises = [Promise(worker if promised >= chosen.own_tokens else "", chosen.own_tokens)]
        loading: dict[str, int] = {}
        first = best.plan.split_tokens // BLOCK_TOKENS
        for source in chosen.sources:
            last, tier = (
                min(source.until_tokens, best.hit_tokens) // BLOCK_TOKENS,
                TierKind[source.tier.upper()],
            )
            if last > first:
                steps.append(Step(first, last - first, tier, seat.host))
                loading[seat.device(tier)] = (last - first) * BLOCK_TOKENS
                first = last
        if best.hit_tokens > chosen.own_tokens:
            promises.append(Promise(publisher, best.hit_tokens))
        visible_s = max(0.0, best.ttft_s - best.queue_s - best.plan.compute_s)
        return Decision(
            worker=worker,
            address=seat.member.address,
            prompt_tokens=prompt.tokens,
            plan=tuple(steps),
            scores=scores,
            expected=Expected(
                prompt.tokens, best.hit_tokens, best.ttft_s, best.queue_s, visible_s, best.pace,
                tuple(promises),
            ),
            loading=loading,
            excluded=excluded,
            hot_tokens=hot_blocks * BLOCK_TOKENS,
            doubts={name: trusts[name] for name in (worker, publisher) if name in trusts},
        )  # fmt: skip


def _answers(seat: Seat, prompt: Prompt) -> bool:
    """Say whether a worker may take a prompt alone."""
    return seat.role is not WorkerRole.PREFILL or prompt.whole is Whole.FIRST_TOKEN
