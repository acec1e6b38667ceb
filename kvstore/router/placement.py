"""Where a prompt would go: scores every worker from view, bookings and member list. Pure."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvstore.core.errors import BadInput
from kvstore.core.limits import BLOCK_TOKENS, MAX_PROMPT_TOKENS
from kvstore.core.names import BlockName, Root
from kvstore.directory.events import TierKind
from kvstore.directory.view import ClusterView, Health
from kvstore.router.booking import Bookings
from kvstore.router.members import Member, Members
from kvstore.router.score import Candidate, Score, rank

DISTRUST_MS: Final = 1_000.0
"""How long a worker that failed a request is passed over: by then its stream has spoken."""


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
    hit_tokens: int
    predicted_ttft_ms: float
    plan: tuple[Step, ...]
    scores: tuple[Score, ...]
    """Every worker considered, best first."""
    excluded: dict[str, str] = field(default_factory=dict)
    """Every other worker, and why it was not."""
    booking: int = 0

    @property
    def explanation(self) -> str:
        """Say for people how the choice came about."""
        lines = [score.explain() for score in self.scores]
        return "\n".join(lines + [f"{name}: {why}" for name, why in self.excluded.items()])


class Placement:
    """Decides from three things that others keep up to date."""

    def __init__(self, view: ClusterView, bookings: Bookings) -> None:
        self._view = view
        self._bookings = bookings
        self.members = Members()
        self._distrusted: dict[str, float] = {}

    def distrust(self, worker: str, now_ms: float) -> None:
        """Pass a worker over for a moment: it failed a request."""
        self._distrusted[worker] = now_ms + DISTRUST_MS

    def trust(self, worker: str) -> None:
        """Forget that a worker failed: it is another one now."""
        self._distrusted.pop(worker, None)

    def decide(self, prompt: Prompt, now_ms: float) -> Decision | None:
        """Score every worker that may be chosen; None when there is none."""
        allowed: list[Member] = []
        excluded: dict[str, str] = {}
        for member in self.members.workers():
            why = self._why_not(member.name, prompt, now_ms)
            if why:
                excluded[member.name] = why
            else:
                allowed.append(member)
        if not allowed:
            return None
        candidates = self._candidates(allowed, prompt, now_ms)
        scores = rank(list(candidates.values()), prompt.tokens)
        best = scores[0]
        return Decision(
            worker=best.name,
            address=self.members.by_name[best.name].address,
            hit_tokens=best.hit_tokens,
            predicted_ttft_ms=best.ttft_s * 1_000,
            plan=self._plan(candidates[best.name]),
            scores=tuple(scores),
            excluded=excluded,
        )

    def _why_not(self, worker: str, prompt: Prompt, now_ms: float) -> str:
        """Return why a worker must not be chosen; empty when it may."""
        if worker in prompt.exclude:
            return "excluded by the caller"
        if prompt.among is not None and worker not in prompt.among:
            return "does not serve this model"
        health = self._view.health(worker, now_ms)
        if health is not Health.LIVE:
            return str(health)
        if self._distrusted.get(worker, 0.0) > now_ms:
            return "failed a request a moment ago"
        known = self._view.publisher(worker)
        return "draining" if known and known.load and known.load.draining else ""

    def _candidates(
        self, workers: Sequence[Member], prompt: Prompt, now_ms: float
    ) -> dict[str, Candidate]:
        """Gather what the view and the bookings know of each worker."""
        nodes: dict[str, list[str]] = {}
        for node in self.members.nodes():
            nodes.setdefault(self._host(node), []).append(node.name)
        reaches = [
            self._view.reach(worker.name, nodes.get(self._host(worker), ()), now_ms)
            for worker in workers
        ]
        # One prompt token at least is computed, for the logits to sample from.
        most = (prompt.tokens - 1) // BLOCK_TOKENS
        found: dict[str, Candidate] = {}
        matches = self._view.match(prompt.root, prompt.names, reaches)
        coming = self._bookings.coming_blocks(prompt.root, prompt.names)
        for worker, held in zip(workers, matches, strict=True):
            own = min(max(held.own_blocks, coming.get(worker.name, 0)), most)
            hit = max(own, min(held.blocks, most))
            found[worker.name] = self._candidate(worker.name, own, hit)
        return found

    def _candidate(self, worker: str, own_blocks: int, hit_blocks: int) -> Candidate:
        known = self._view.publisher(worker)
        load = known.load if known is not None else None
        load_ms = known.load_ms if known is not None else 0.0
        queued = self._bookings.queued(worker, load_ms=load_ms).tokens
        own_tokens, hit_tokens = own_blocks * BLOCK_TOKENS, hit_blocks * BLOCK_TOKENS
        if load is None:
            return Candidate(
                name=worker, own_tokens=own_tokens, hit_tokens=hit_tokens, queued_tokens=queued
            )
        return Candidate(
            name=worker,
            own_tokens=own_tokens,
            hit_tokens=hit_tokens,
            queued_tokens=queued + load.queued_tokens,
            running=load.running + load.waiting,
            kv_used=load.kv_used_bytes / max(1, load.kv_capacity_bytes),
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            prefill_linear_s=load.prefill_linear_s,
            prefill_quadratic_s=load.prefill_quadratic_s,
        )

    def _plan(self, chosen: Candidate) -> tuple[Step, ...]:
        """Say where the chosen worker is expected to take the prefix from."""
        own, hit = chosen.own_tokens // BLOCK_TOKENS, chosen.hit_tokens // BLOCK_TOKENS
        steps = [Step(0, own, TierKind.HBM, chosen.name)] if own else []
        if hit > own:
            host = self._host(self.members.by_name[chosen.name])
            steps.append(Step(own, hit - own, TierKind.DRAM, host))
        return tuple(steps)

    def _host(self, member: Member) -> str:
        known = self._view.publisher(member.name)
        return member.host or (known.host if known is not None else "")
