"""Which worker answers soonest, and from where it takes the prefix. Pure.

    ttft = max(queue + recompute(own .. m), load(m .. hit)) + prefill(hit .. end)

A worker loads while it waits and while it computes, so only what outlasts both costs time. `m` is
the split that makes both sides equal: blocks before it are computed although a tier has them,
because loading them would take longer. `hit` is chosen among the ends of the tiers, so a tier that
is slower than computing is left out. What a request costs others is added for the ranking only:

    cost = ttft + rate * work * (queue + work / 2)
                + DECODE * running * computed
                + MOVE * full * (1 - kept) * (computed + loaded - needed)

in seconds. `work` is how long the request keeps the worker busy, and `rate` how many requests come
to a worker in a second of its queue: so many come while queue and work last, and wait for `work`.
Behind a short queue that is nothing; where all are long, work that a cache saves is worth more than
a place further ahead. `needed` is what it would compute with the longest prefix that any worker has
in its own pages. What is more than that is work that a move makes: the copy evicts what somebody
else then computes again, the more so the fuller (`full`, 0 to 1) the worker's pages are, and the
less the more of them a tier below still has (`kept`, 0 to 1: of the longest prefix of this prompt
in any worker's pages, the share that the tiers below hold too).

Seconds come from the rates each worker measures of itself, corrected by what its requests took. A
worker that has measured nothing is assumed to be as fast as the known ones on average, and where
none is known every worker computes `ASSUMED_PREFILL_TOKENS_PER_S`: then only the order means
something, and the order is the one of uncached tokens plus queue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Final, NamedTuple

ASSUMED_PREFILL_TOKENS_PER_S: Final = 1_000.0
"""Where no worker has measured a rate. Any value gives the same order."""

LOAD_COST: Final = 0.02
"""Cost of a token loaded from the host, as a share of computing it, until loads were measured. The
service promises that about 1,500 cached tokens answer 15 times sooner than cold, decode step
included; 1/50 leaves room for that step."""

DECODE: Final = 0.02
"""Weight of a second by which a prefill delays one running answer, against a second of waiting for
a first token: an answer of some fifty such seconds is late by one."""

MOVE: Final = 2.0
"""Weight of a second of work that a move makes. Chosen by simulation on the shared traces: below
it sessions of agents chase each other from worker to worker (docs/router.md has the sweep)."""

COPY: Final = 1.1
"""Worth of a second of work that makes a wanted copy. Above 1: where nobody queues yet, holder and
newcomer would tie."""

BLOCK: Final = 16
"""Tokens by which a split moves."""


class Work(NamedTuple):
    """Prefill to be done, as the two sums that price it: exact for any number of prompts."""

    tokens: float = 0
    token_depths: float = 0.0
    """Sum over the tokens of how many tokens come before each."""

    @classmethod
    def of(cls, tokens: float, position: float, prompts: int = 1) -> "Work":
        """Return the work of `tokens` from `position` on, in prompts of equal length."""
        return cls(tokens, tokens * (position + tokens / (2 * prompts)))


NO_WORK: Final = Work()


class Source(NamedTuple):
    """A tier that a worker reaches, fastest first."""

    tier: str
    until_tokens: int
    """Leading prompt tokens that it and the faster ones hold."""
    s_per_token: float
    """Measured seconds to load one token; 0: not measured, so `share` of computing it."""
    ahead_tokens: int = 0
    """Tokens that others are loading from the same device."""
    share: float = LOAD_COST


class Rates(NamedTuple):
    """How fast a worker computes, as far as anybody knows; zeros until then."""

    tokens_per_s: float = 0.0
    """What it says of itself: prompt tokens a second, and the coefficients of `Pace`."""
    linear_s: float = 0.0
    quadratic_s: float = 0.0
    correction: float = 0.0
    """What its requests took over what was predicted."""


class Pace(NamedTuple):
    """Prefill seconds: linear * n + quadratic * n * (p + n / 2) for n tokens from p on."""

    linear_s: float
    quadratic_s: float = 0.0
    correction: float = 1.0
    """What is in both already."""
    measured: bool = False
    """Whether the worker said so itself."""

    def seconds(self, work: Work) -> float:
        """Return the seconds that some work takes."""
        return self.linear_s * work.tokens + self.quadratic_s * work.token_depths

    def between(self, first: int, last: int) -> float:
        """Return the seconds to compute tokens `[first, last)` of a prompt."""
        return (last - first) * (self.linear_s + self.quadratic_s * (first + last) / 2)


ASSUMED_PACE: Final = Pace(1 / ASSUMED_PREFILL_TOKENS_PER_S)


@dataclass(slots=True)
class Candidate:
    """A worker that may be chosen, with everything the choice depends on."""

    name: str
    own_tokens: int = 0
    """Leading prompt tokens in its own pages, or being computed there now."""
    sources: Sequence[Source] = ()
    pace: Pace = ASSUMED_PACE
    queued: Work = NO_WORK
    """What it still has to compute before this prompt."""
    running: int = 0
    kv_used: float = 0.0
    """Share of its page pool in use, 0 to 1; breaks ties towards the emptier pool."""
    below_tokens: int = 0
    """Leading prompt tokens in the tiers of its host alone."""
    waiting: int = 0
    """Requests that wait there for their first token."""
    overlaps: bool = True
    """Whether it loads while a request waits; else when its turn comes, and nothing meanwhile."""

    @property
    def known_tokens(self) -> int:
        """Leading prompt tokens in anything it reaches."""
        return self.sources[-1].until_tokens if self.sources else self.own_tokens

    @property
    def queue_s(self) -> float:
        """Seconds until it begins with this prompt."""
        queued = self.queued
        return self.pace.seconds(queued) if queued.tokens else 0.0


class Plan(NamedTuple):
    """How a worker would get its prefix, and how long that takes."""

    ttft_s: float
    hit_tokens: int
    """Tokens up to which nothing beyond `own` is computed, but for the split."""
    split_tokens: int
    """Tokens `[own, split)` are computed while the rest is loaded."""
    load_s: float
    """Of which only what outlasts queue and recompute delays the answer."""
    compute_s: float


@dataclass(slots=True)
class Score:
    """What a worker was predicted to need, and from what."""

    name: str
    own_tokens: int
    known_tokens: int
    """Leading tokens in anything it reaches, whether worth loading or not."""
    queued_tokens: int
    queue_s: float
    pace: Pace
    plan: Plan
    others_s: float
    """What the request costs others, weighted; counts for the ranking only."""

    @property
    def ttft_s(self) -> float:
        """Predicted seconds to the first token."""
        return self.plan.ttft_s

    @property
    def cost_s(self) -> float:
        """What the ranking goes by."""
        return self.plan.ttft_s + self.others_s

    @property
    def hit_tokens(self) -> int:
        """Leading tokens that it is expected to find."""
        return self.plan.hit_tokens

    def explain(self) -> str:
        """Say in one line what the prediction is made of."""
        plan = self.plan
        over_s = max(0.0, plan.ttft_s - self.queue_s - plan.compute_s)
        return (
            f"{self.name}: {plan.ttft_s * 1e3:.1f} ms = queue {self.queue_s * 1e3:.1f}"
            f" + load {over_s * 1e3:.1f} of {plan.load_s * 1e3:.1f}"
            f" + prefill {plan.compute_s * 1e3:.1f}; others {self.others_s * 1e3:.1f}"
            f" ({plan.hit_tokens} tokens cached, {self.own_tokens} of them in its pages,"
            f" {self.queued_tokens} queued)"
        )


def paces(rates: Sequence[Rates]) -> list[Pace]:
    """Return how fast each worker computes; the median of the others stands in for the unknown."""
    speeds = [one.tokens_per_s for one in rates if 0 < one.tokens_per_s < inf]
    speed = median(speeds) if speeds else ASSUMED_PREFILL_TOKENS_PER_S
    corrections = [one.correction for one in rates if one.correction > 0]
    correction = median(corrections) if corrections else 1.0
    return [_pace(one, speed, correction) for one in rates]


def _pace(rates: Rates, speed: float, correction: float) -> Pace:
    factor = rates.correction or correction
    # What is no number is not known: one such price would leave all prices without an order.
    if 0 < rates.linear_s < inf:
        quadratic_s = rates.quadratic_s if 0 < rates.quadratic_s < inf else 0.0
        return Pace(rates.linear_s * factor, quadratic_s * factor, factor, True)
    told = 0 < rates.tokens_per_s < inf
    return Pace(factor / (rates.tokens_per_s if told else speed), 0.0, factor, told)


def _load_s(sources: Sequence[Source], first: int, last: int, pace: Pace) -> float:
    """Return the seconds to load tokens `[first, last)`, behind what others load already."""
    total = 0.0
    for source in sources:
        until = min(source.until_tokens, last)
        if until > first:
            each = source.s_per_token or source.share * pace.linear_s
            total += (until - first + source.ahead_tokens) * each
            first = until
    return total


def plan_sources(candidate: Candidate, prompt_tokens: int, queue_s: float) -> Plan:
    """Choose the tiers to load from and the split that answer soonest."""
    own, pace = candidate.own_tokens, candidate.pace
    assert 0 <= own <= prompt_tokens, (candidate, prompt_tokens)
    compute_s = pace.between(own, prompt_tokens)
    best = Plan(queue_s + compute_s, own, own, 0.0, compute_s)
    for source in candidate.sources:
        hit = source.until_tokens
        if hit <= best.hit_tokens:
            continue
        split = _split(candidate, hit, queue_s) if candidate.overlaps else own
        load_s = _load_s(candidate.sources, split, hit, pace)
        before_s, after_s = pace.between(own, split), pace.between(hit, prompt_tokens)
        until_s = queue_s + before_s
        until_s = max(until_s, load_s) if candidate.overlaps else until_s + load_s
        ttft_s = until_s + after_s
        if ttft_s < best.ttft_s:
            best = Plan(ttft_s, hit, split, load_s, before_s + after_s)
    return best


def _split(candidate: Candidate, hit: int, queue_s: float) -> int:
    """Return the split, in whole blocks, with the earliest end of both loading and computing."""
    own, sources, pace = candidate.own_tokens, candidate.sources, candidate.pace
    if _load_s(sources, own, hit, pace) <= queue_s:
        return own
    low, high = 0, (hit - own) // BLOCK  # blocks computed; at `high` nothing is loaded
    while low < high:
        middle = (low + high) // 2
        split = own + middle * BLOCK
        if _load_s(sources, split, hit, pace) <= queue_s + pace.between(own, split):
            high = middle
        else:
            low = middle + 1
    # Before this split loading ends last, from here on computing does: the best is next to it.
    split = own + low * BLOCK
    before = split - BLOCK
    if _load_s(sources, before, hit, pace) < queue_s + pace.between(own, split):
        return before
    return split


def score(
    candidate: Candidate, prompt_tokens: int, most_own_tokens: int = 0, hot_tokens: int = 0,
    rate: float = 0.0,
) -> Score:  # fmt: skip
    """Predict one worker's time to first token, and what that costs others.

    `most_own_tokens` is the longest prefix that any worker has in its own pages. A copy of the
    first `hot_tokens` is wanted: work that makes one is no cost. `rate` is what `arrivals` returns.
    """
    queue_s = candidate.queue_s
    plan, others_s = price(candidate, queue_s, prompt_tokens, most_own_tokens, hot_tokens, rate)
    return scored(candidate, queue_s, plan, others_s)


def price(
    candidate: Candidate, queue_s: float, prompt_tokens: int, most_own_tokens: int,
    hot_tokens: int, rate: float,
) -> tuple[Plan, float]:  # fmt: skip
    """Return the plan, and what others pay; `score` says what the arguments are.

    Every worker of every decision comes here, so what holds for most of them is asked first.
    """
    own, pace = candidate.own_tokens, candidate.pace
    if candidate.sources:
        plan = plan_sources(candidate, prompt_tokens, queue_s)
        work_s = plan.ttft_s - queue_s
        compute_s, load_s = plan.compute_s, plan.load_s
    else:
        compute_s = work_s = pace.between(own, prompt_tokens)
        load_s = 0.0
        plan = Plan(queue_s + compute_s, own, own, 0.0, compute_s)
    others_s = DECODE * candidate.running * compute_s + rate * work_s * (queue_s + work_s / 2)
    moved_s = 0.0
    if most_own_tokens > own or load_s:
        kept = own if own > most_own_tokens else most_own_tokens
        moved_s = compute_s + load_s - pace.between(kept, prompt_tokens)
    if hot_tokens > own:
        wanted_s = min(moved_s, pace.between(own, hot_tokens))
        moved_s -= wanted_s
        others_s -= COPY * wanted_s
    if moved_s > 0:
        # Empty pages evict nothing, and what a tier below still has nobody computes again.
        others_s += MOVE * candidate.kv_used * moved_s * _lost(candidate, most_own_tokens)
    return plan, others_s


def _lost(candidate: Candidate, most_own_tokens: int) -> float:
    """Return the share of what is evicted that no tier below would give back."""
    below = candidate.below_tokens
    return max(0.0, 1.0 - below / most_own_tokens) if below and most_own_tokens else 1.0


def scored(one: Candidate, queue_s: float, plan: Plan, others_s: float) -> Score:
    """Return the score that these make."""
    return Score(
        one.name, one.own_tokens, one.known_tokens, int(one.queued.tokens), queue_s, one.pace,
        plan, others_s,
    )  # fmt: skip
