"""Where a prompt would go: scores every worker from view, bookings and member list. Pure."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from kvstore.core.errors import BadInput
from kvstore.core.limits import BLOCK_TOKENS, MAX_PROMPT_TOKENS
from kvstore.core.names import BlockName, Root
from kvstore.directory.events import TierKind
from kvstore.directory.view import ClusterView, Health, Held, PublisherView
from kvstore.router.booking import Bookings
from kvstore.router.learning import Expected, Learned, Promise
from kvstore.router.members import Member, Members
from kvstore.router.score import LOAD_COST, Candidate, Score, Source, Work, rank

DISTRUST_MS: Final = 1_000.0
"""How long a worker that failed a request is passed over: by then its stream has spoken."""


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
    scores: tuple[Score, ...]
    """Every worker considered, best first."""
    expected: Expected
    """What to hold the answer against."""
    loading: Mapping[str, int] = field(default_factory=dict)
    """Tokens to be loaded, by device."""
    excluded: dict[str, str] = field(default_factory=dict)
    """Every other worker, and why it was not."""
    doubts: dict[str, float] = field(default_factory=dict)
    """Publishers that are believed in part only, and how far."""
    booking: int = 0

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
        best = max(self.scores[1:], key=lambda score: score.known_tokens, default=chosen)
        if best.known_tokens > chosen.known_tokens:
            more, later = best.known_tokens - chosen.known_tokens, best.cost_s - chosen.cost_s
            reasons.append(f"{best.name} has {more} more and costs {later * 1e3:.1f} ms more")
        unknown = most - max(score.known_tokens for score in self.scores)
        if unknown > 0:
            reasons.append(f"{unknown} tokens are cached nowhere in sight")
        for publisher, trust in self.doubts.items():
            reasons.append(f"{publisher} is believed {trust:.0%}")
        reasons.append(f"the last {self.prompt_tokens - most} are always computed")
        return "; ".join(reasons)

    @property
    def explanation(self) -> str:
        """Say for people how the choice came about."""
        lines = [score.explain() for score in self.scores]
        lines += [f"{name}: {why}" for name, why in self.excluded.items()]
        return "\n".join([*lines, f"not cached: {self.missed}"])


class _Seat(NamedTuple):
    """A worker of the member list with what the view knows of it."""

    member: Member
    known: PublisherView | None
    host: str


class Placement:
    """Decides from three things that others keep up to date."""

    def __init__(self, view: ClusterView, bookings: Bookings) -> None:
        self._view = view
        self._bookings = bookings
        self.learned = Learned()
        self.members = Members()
        self._distrusted: dict[str, float] = {}
        self._seated: tuple[Members, int] | None = None
        self._seats: list[_Seat] = []
        self._nodes: dict[str, list[str]] = {}

    def distrust(self, worker: str, now_ms: float) -> None:
        """Pass a worker over for a moment: it failed a request."""
        self._distrusted[worker] = now_ms + DISTRUST_MS

    def trust(self, worker: str) -> None:
        """Forget that a worker failed: it is another one now."""
        self._distrusted.pop(worker, None)

    def decide(self, prompt: Prompt, now_ms: float) -> Decision | None:
        """Score every worker that may be chosen; None when there is none."""
        self._seat()
        allowed: list[_Seat] = []
        excluded: dict[str, str] = {}
        for seat in self._seats:
            why = self._why_not(seat, prompt, now_ms)
            if why:
                excluded[seat.member.name] = why
            else:
                allowed.append(seat)
        if not allowed:
            return None
        held = self._held(allowed, prompt, now_ms)
        coming = self._bookings.coming_blocks(prompt.root, prompt.names)
        trusts = {name: self.learned.trust(name, now_ms) for name in self.learned.doubted() if name}
        # One prompt token at least is computed, for the logits to sample from.
        most = (prompt.tokens - 1) // BLOCK_TOKENS
        candidates = [
            self._candidate(seat, found, coming.get(seat.member.name, 0), most, trusts)
            for seat, found in zip(allowed, held, strict=True)
        ]
        scores = rank(candidates, prompt.tokens)
        at = next(i for i, one in enumerate(candidates) if one.name == scores[0].name)
        return self._decision(
            prompt, scores, allowed[at], held[at], candidates[at], excluded, trusts
        )

    def _seat(self) -> None:
        """Bring the list of workers and of nodes by host up to date."""
        state = (self.members, self._view.version)
        if self._seated is not None and self._seated[0] is state[0] and self._seated[1] == state[1]:
            return
        self._seated = state
        self._nodes = {}
        for node in self.members.nodes():
            known = self._view.publisher(node.name)
            self._nodes.setdefault(_host(node, known), []).append(node.name)
        self._seats = []
        for worker in self.members.workers():
            known = self._view.publisher(worker.name)
            self._seats.append(_Seat(worker, known, _host(worker, known)))

    def _why_not(self, seat: _Seat, prompt: Prompt, now_ms: float) -> str:
        """Return why a worker must not be chosen; empty when it may."""
        worker, known = seat.member.name, seat.known
        if worker in prompt.exclude:
            return "excluded by the caller"
        if prompt.among is not None and worker not in prompt.among:
            return "does not serve this model"
        health = self._view.health(worker, now_ms)
        if health is not Health.LIVE:
            return str(health)
        if self._distrusted and self._distrusted.get(worker, 0.0) > now_ms:
            return "failed a request a moment ago"
        return "draining" if known and known.load and known.load.draining else ""

    def _held(self, seats: Sequence[_Seat], prompt: Prompt, now_ms: float) -> list[Held]:
        """Return what each worker reaches of the prompt, as far as the view knows."""
        view = self._view
        tiers: dict[str, list[tuple[TierKind, int]]] = {}
        for seat in seats:
            if seat.host not in tiers:
                tiers[seat.host] = view.host_tiers(self._nodes.get(seat.host, ()), now_ms)
        reaches = [view.reach_over(seat.member.name, tiers[seat.host]) for seat in seats]
        return view.match(prompt.root, prompt.names, reaches)

    def _candidate(
        self, seat: _Seat, held: Held, coming: int, most: int, trusts: Mapping[str, float]
    ) -> Candidate:
        worker, known = seat.member.name, seat.known
        own, levels = held.own_blocks, held.levels
        if trusts:
            own = int(own * trusts.get(worker, 1.0))
            trust = trusts.get(self._publisher(seat.host), 1.0)
            levels = tuple((tier, int(blocks * trust)) for tier, blocks in levels)
        own = min(max(own, coming), most)
        sources = [
            self._source(seat, tier, min(blocks, most))
            for tier, blocks in levels
            if min(blocks, most) > own
        ]
        load = known.load if known is not None else None
        queued = self._bookings.queued(worker, load_ms=known.load_ms if known is not None else 0.0)
        if load is None:
            correction = self.learned.correction(worker, measured=False)
            return Candidate(worker, own * BLOCK_TOKENS, sources, queued, correction=correction)
        if load.queued_tokens:
            reported = Work.of(load.queued_tokens, 0, max(1, load.waiting))
            queued = Work(queued.tokens + reported.tokens, queued.token_depths + reported[1])
        measured = load.prefill_linear_s > 0 or load.prefill_tokens_per_s > 0
        return Candidate(
            worker,
            own * BLOCK_TOKENS,
            sources,
            queued,
            load.running + load.waiting,
            load.kv_used_bytes / max(1, load.kv_capacity_bytes),
            load.prefill_tokens_per_s,
            load.prefill_linear_s,
            load.prefill_quadratic_s,
            self.learned.correction(worker, measured=measured),
        )

    def _source(self, seat: _Seat, tier: TierKind, blocks: int) -> Source:
        worker = seat.member.name
        return Source(
            tier.name.lower(),
            blocks * BLOCK_TOKENS,
            self.learned.load_s_per_token(worker, tier),
            self._bookings.loading(_device(seat, tier)),
            ASSUMED_SHARES[tier],
        )

    def _decision(
        self, prompt: Prompt, scores: list[Score], seat: _Seat, held: Held, chosen: Candidate,
        excluded: dict[str, str], trusts: Mapping[str, float],
    ) -> Decision:  # fmt: skip
        """Say where the chosen worker is expected to take the prefix from."""
        best = scores[0]
        first, promised = chosen.own_tokens // BLOCK_TOKENS, held.own_blocks * BLOCK_TOKENS
        worker, publisher = seat.member.name, self._publisher(seat.host)
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
                loading[_device(seat, tier)] = (last - first) * BLOCK_TOKENS
                first = last
        if best.hit_tokens > chosen.own_tokens:
            promises.append(Promise(publisher, best.hit_tokens))
        visible_s = max(0.0, best.ttft_s - best.queue_s - best.plan.compute_s)
        return Decision(
            worker=worker,
            address=seat.member.address,
            prompt_tokens=prompt.tokens,
            plan=tuple(steps),
            scores=tuple(scores),
            expected=Expected(
                prompt.tokens, best.hit_tokens, best.ttft_s, best.queue_s, visible_s, best.pace,
                tuple(promises),
            ),
            loading=loading,
            excluded=excluded,
            doubts={name: trusts[name] for name in (worker, publisher) if name in trusts},
        )  # fmt: skip

    def _publisher(self, host: str) -> str:
        """Return who answers for the tiers of a host: its node; where it has several, the host."""
        nodes = self._nodes.get(host, ())
        return nodes[0] if len(nodes) == 1 else host


def _host(member: Member, known: PublisherView | None) -> str:
    return member.host or (known.host if known is not None else "")


def _device(seat: _Seat, tier: TierKind) -> str:
    """Return what a load occupies: a worker's own wire, or what the workers of a host share."""
    return f"{seat.member.name if tier is TierKind.DRAM else seat.host}/{tier.name.lower()}"
