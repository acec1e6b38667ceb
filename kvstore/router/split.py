"""Whether one worker computes a prompt and another one answers from its blocks. Pure.

    alone:   cost(w)                              the least, of those that answer
    split:   cost(p) + CALLS + cost(d takes over)  the least, of one host's p and d

in seconds, and `cost` is what `kvstore.router.score` says: time to the first token plus what the
request costs others. `d` takes over when the first token is out: it loads every full block of the
prompt from the arena of its host and computes the rest, 16 tokens at most. So a split pays where a
prompt computed at `d` would delay the answers that run there by more than the blocks' way costs.

Blocks move through the arena that both map, and no other way: between hosts they would come over
TCP, which for models of 8 B parameters takes longer than computing them. So that is never chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, NamedTuple

from kvstore.directory.events import WorkerRole
from kvstore.router.ranking import Ranking, arrivals, rank
from kvstore.router.score import BLOCK, Candidate, Score, Source, score

CALLS_S: Final = 0.010
"""What a hand-over costs besides loading and computing: the last blocks are settled, one more call
begins, and the node is asked. *Measured* from 6 ms on, on two busy cores (docs/worker.md)."""


class Whole(StrEnum):
    """Why a prompt is not split."""

    CALLER = "caller"
    """Whoever asks calls one worker only."""
    FIRST_TOKEN = "first_token"
    """No more than one token is wanted."""
    NO_STORE = "no_store"
    """Its blocks must not be kept, so nobody else can have them."""
    NO_READ = "no_read"
    """It reads no cache."""
    HAND_OVER = "hand_over"
    """It was split: what is asked for is who takes over."""
    SHORT = "short"
    """It has no full block."""
    NO_PREFILL = "no_prefill"
    """No worker of that role may be chosen now."""
    OTHER_HOST = "other_host"
    """No such worker has an arena in common with one that answers."""
    DEARER = "dearer"
    """One worker alone is predicted to cost less."""


class Side(NamedTuple):
    """A worker that may be chosen."""

    candidate: Candidate
    role: WorkerRole
    host: str
    """Who shares an arena; empty: nobody."""
    arena: Source | None
    """That arena, as a source of tokens; None where no live cache node has one."""


@dataclass(frozen=True, slots=True)
class Split:
    """Two workers for one prompt."""

    prefill: int
    """Index of the one that computes it."""
    scores: Ranking
    """The workers of its host that could, itself the first."""
    takers: tuple[str, ...]
    """Who may take over on that host, best first."""
    hand_over_s: float
    """Predicted seconds from the first token until the best of them has taken over."""
    total_s: float
    alone: Score
    """The best that one worker does."""

    def explain(self) -> str:
        """Say in one line why it was split."""
        return (
            f"split: {self.scores[0].name} computes the prompt, then {self.takers[0]} takes over in"
            f" {self.hand_over_s * 1e3:.1f} ms; {self.total_s * 1e3:.1f} ms in all, and alone"
            f" {self.alone.cost_s * 1e3:.1f} on {self.alone.name}"
        )


def choose(
    sides: Sequence[Side], prompt_tokens: int, alone: Score, hot_tokens: int = 0
) -> Split | Whole:
    """Return the cheapest split, or why there is none that costs less than `alone`."""
    if prompt_tokens < BLOCK:
        return Whole.SHORT
    firsts = [at for at, side in enumerate(sides) if side.role is WorkerRole.PREFILL]
    if not firsts:
        return Whole.NO_PREFILL
    takers = [side for side in sides if side.role is not WorkerRole.PREFILL]
    rate = arrivals([side.candidate for side in takers])
    best: Split | None = None
    for host in sorted({sides[at].host for at in firsts}):
        there = [at for at in firsts if sides[at].host == host]
        taking = sorted(
            (after.cost_s, after.name, after.ttft_s)
            for side in takers
            if (after := _taking_over(side, host, prompt_tokens, rate)) is not None
        )
        if not taking:
            continue
        scores = rank([sides[at].candidate for at in there], prompt_tokens, hot_tokens)
        cost_s, _, seconds = taking[0]
        total_s = scores[0].cost_s + CALLS_S + cost_s
        if best is None or total_s < best.total_s:
            names = tuple(name for _, name, _ in taking)
            at = there[scores.best_index]
            best = Split(at, scores, names, CALLS_S + seconds, total_s, alone)
    if best is None:
        return Whole.OTHER_HOST
    return best if best.total_s < alone.cost_s else Whole.DEARER


def _taking_over(side: Side, host: str, prompt_tokens: int, rate: float) -> Score | None:
    """Return what it costs a worker to go on behind the first token; None where it cannot."""
    if side.arena is None or not host or side.host != host:
        return None
    full = prompt_tokens // BLOCK * BLOCK
    own = min(side.candidate.own_tokens, full)
    arena = [side.arena._replace(until_tokens=full)] if own < full else []
    after = replace(side.candidate, own_tokens=own, sources=arena, below_tokens=full)
    return score(after, prompt_tokens + 1, rate=rate)
