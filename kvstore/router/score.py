"""Which worker answers soonest: predicted time to first token from hits, queue and rates. Pure.

    ttft = queue + load of what is cached but not in the worker's own pages + prefill of the rest

Seconds come from the rates each worker measures of itself. A worker that has measured nothing yet
is assumed to be as fast as the known ones on average, and where none is known every worker computes
`ASSUMED_PREFILL_TOKENS_PER_S`: then only the order means something, and the order is the one of
uncached tokens plus queue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

ASSUMED_PREFILL_TOKENS_PER_S: Final = 1_000.0
"""Where no worker has measured a rate. Any value gives the same order."""

LOAD_COST: Final = 0.02
"""Cost of a token loaded from the host, as a share of computing it. The service promises that
about 1,500 cached tokens answer 15 times sooner than cold, decode step included; 1/50 leaves room
for that step. Replaced by measured load rates when workers publish them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A worker that may be chosen, with everything the choice depends on."""

    name: str
    own_tokens: int
    """Leading prompt tokens in its own pages, or being computed there now."""
    hit_tokens: int
    """Leading prompt tokens in anything it reaches; at least `own_tokens`."""
    queued_tokens: int = 0
    """Prompt tokens it still has to compute before this prompt."""
    running: int = 0
    kv_used: float = 0.0
    """Share of its page pool in use, 0 to 1; breaks ties towards the emptier pool."""
    prefill_tokens_per_s: float = 0.0
    """0: not measured."""
    prefill_linear_s: float = 0.0
    prefill_quadratic_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Score:
    """What a worker was predicted to need, and from what."""

    name: str
    hit_tokens: int
    queued_tokens: int
    queue_s: float
    load_s: float
    prefill_s: float

    @property
    def ttft_s(self) -> float:
        """Predicted seconds to the first token."""
        return self.queue_s + self.load_s + self.prefill_s

    def explain(self) -> str:
        """Say in one line what the prediction is made of."""
        return (
            f"{self.name}: {self.ttft_s * 1e3:.1f} ms = queue {self.queue_s * 1e3:.1f}"
            f" + load {self.load_s * 1e3:.1f} + prefill {self.prefill_s * 1e3:.1f}"
            f" ({self.hit_tokens} tokens cached, {self.queued_tokens} queued)"
        )


def prefill_seconds(candidate: Candidate, tokens: int, position: int, fallback: float) -> float:
    """Return the seconds to compute `tokens` prompt tokens that start at `position`.

    With measured coefficients: linear * n + quadratic * n * (p + n / 2), the cost of n tokens of
    which the k-th attends to p + k. `fallback` is tokens per second where nothing is measured.
    """
    if candidate.prefill_linear_s > 0:
        depth = position + tokens / 2
        quadratic = max(0.0, candidate.prefill_quadratic_s)
        return tokens * (candidate.prefill_linear_s + quadratic * depth)
    return tokens / (candidate.prefill_tokens_per_s or fallback)


def score(candidate: Candidate, prompt_tokens: int, fallback: float) -> Score:
    """Predict one worker's time to first token; `fallback` as in `prefill_seconds`."""
    own, hit = candidate.own_tokens, candidate.hit_tokens
    assert 0 <= own <= hit <= prompt_tokens, (own, hit, prompt_tokens)
    return Score(
        name=candidate.name,
        hit_tokens=hit,
        queued_tokens=candidate.queued_tokens,
        queue_s=prefill_seconds(candidate, candidate.queued_tokens, 0, fallback),
        load_s=LOAD_COST * prefill_seconds(candidate, hit - own, own, fallback),
        prefill_s=prefill_seconds(candidate, prompt_tokens - hit, hit, fallback),
    )


def rank(candidates: Sequence[Candidate], prompt_tokens: int) -> list[Score]:
    """Return the scores, best first. Ties: emptier pool, fewer running, then the name."""
    measured = [c.prefill_tokens_per_s for c in candidates if c.prefill_tokens_per_s > 0]
    fallback = median(measured) if measured else ASSUMED_PREFILL_TOKENS_PER_S
    scored = [(score(c, prompt_tokens, fallback), c) for c in candidates]
    scored.sort(key=lambda pair: (pair[0].ttft_s, pair[1].kv_used, pair[1].running, pair[1].name))
    return [entry for entry, _ in scored]
