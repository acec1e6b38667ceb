"""What answers teach: how far predictions were off, how fast tiers load, whom to believe. Pure.

Everything fades: newer answers count more, and a publisher that was caught promising too much is
believed again little by little, because nothing is sent its way that could prove it better.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from kvstore.directory.events import TierKind
from kvstore.router.score import Pace

NEWEST: Final = 0.2
"""Weight of the newest answer in every moving average: about the last ten count."""

MAX_CORRECTION: Final = 64.0
"""A worker is at most so much slower or faster than it says: an outlier must not end its use."""

TRUST_HALF_LIFE_MS: Final = 30_000.0
"""Half of a publisher's distrust is gone after so long: a cache refills in that order of time."""

MIN_LEARNT_S: Final = 1e-4
"""Predictions below this say nothing about rates: calls and steps take as long."""


class Promise(NamedTuple):
    """Prompt tokens up to `until_tokens` were expected from one publisher; "" is nobody."""

    publisher: str
    until_tokens: int


class Expected(NamedTuple):
    """What the router believed when it sent a request to a worker."""

    prompt_tokens: int
    hit_tokens: int
    ttft_s: float
    queue_s: float
    load_s: float
    pace: Pace
    promises: tuple[Promise, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Actual:
    """What became of it, as far as the caller knows."""

    hit_tokens: int
    ttft_ms: float = 0.0
    """From the sending to the first token; 0: not known."""
    queue_ms: float | None = None
    load_ms: float | None = None
    """Measured by the worker; None: not known, as predicted."""
    by_tier: Mapping[TierKind, int] | None = None
    """Tokens found, by the tier they came from."""


class _Overlap(NamedTuple):
    """Fading sums over answers that waited and loaded; as if one had told that both overlap."""

    hidden: float = 1.0
    """Shares of the shorter of both that passed during the longer, weighted."""
    weight: float = 1.0


@dataclass(slots=True)
class _Trust:
    value: float
    at_ms: float


class Learned:
    """Moving averages per worker and per publisher."""

    def __init__(self) -> None:
        self._corrections: dict[tuple[str, bool], float] = {}
        self._loads: dict[tuple[str, TierKind], float] = {}
        self._overlaps: dict[str, _Overlap] = {}
        self._trust: dict[str, _Trust] = {}
        self.version = 0
        """Changes with every correction."""

    def correction(self, worker: str, *, measured: bool) -> float:
        """Return what a worker's prefill took over what it should; 0 when nothing is known.

        Rates that it `measured` itself and assumed ones are off by different factors.
        """
        logarithm = self._corrections.get((worker, measured))
        return math.exp(logarithm) if logarithm is not None else 0.0

    def load_s_per_token(self, worker: str, tier: TierKind) -> float:
        """Return the seconds to load a token into a worker; 0 when nothing is known."""
        return self._loads.get((worker, tier), 0.0)

    def overlaps(self, worker: str) -> bool:
        """Say whether a worker loads while a request waits; so ours do, so it is assumed."""
        known = self._overlaps.get(worker)
        return known is None or known.hidden >= known.weight / 2

    def trust(self, publisher: str, now_ms: float) -> float:
        """Return the share of a publisher's claims that are believed, 0 to 1."""
        known = self._trust.get(publisher)
        if known is None:
            return 1.0
        halvings = (now_ms - known.at_ms) / TRUST_HALF_LIFE_MS
        doubt = (1.0 - known.value) * math.exp2(-halvings)
        if doubt < 1e-3:
            del self._trust[publisher]
            return 1.0
        return 1.0 - doubt

    def doubted(self) -> list[str]:
        """Return the publishers that are not wholly believed; seldom any."""
        return list(self._trust)

    def lowest_trust(self, now_ms: float) -> float:
        """Return the trust of the publisher that is believed least."""
        return min((self.trust(name, now_ms) for name in self.doubted()), default=1.0)

    def forget(self, name: str) -> None:
        """Forget a member: it is gone, or another one now."""
        for measured in (False, True):
            self._corrections.pop((name, measured), None)
        self._trust.pop(name, None)
        self._overlaps.pop(name, None)
        self.version += 1
        for key in [key for key in self._loads if key[0] == name]:
            del self._loads[key]

    def observe(self, worker: str, expected: Expected, actual: Actual, now_ms: float) -> None:
        """Learn from one answer."""
        self._observe_hits(expected, actual, now_ms)
        self._observe_load(worker, actual)
        self._observe_overlap(worker, expected, actual)
        self._observe_prefill(worker, expected, actual)

    def _observe_hits(self, expected: Expected, actual: Actual, now_ms: float) -> None:
        first = 0
        for publisher, until in expected.promises:
            claimed, found = until - first, min(actual.hit_tokens, until) - first
            first = until
            if not publisher or claimed <= 0:
                continue
            share = max(0, found) / claimed
            trust = self.trust(publisher, now_ms)
            if share < 1.0 or trust < 1.0:
                self._trust[publisher] = _Trust(trust + NEWEST * (share - trust), now_ms)

    def _observe_load(self, worker: str, actual: Actual) -> None:
        """Learn a tier's rate from answers that loaded from it alone."""
        if not actual.load_ms or actual.by_tier is None:
            return
        loaded = [
            (tier, tokens)
            for tier, tokens in actual.by_tier.items()
            if tokens > 0 and tier is not TierKind.HBM
        ]
        if len(loaded) != 1:
            return
        ((tier, tokens),) = loaded
        each, old = actual.load_ms / 1_000 / tokens, self._loads.get((worker, tier))
        self._loads[worker, tier] = each if old is None else old + NEWEST * (each - old)

    def _observe_overlap(self, worker: str, expected: Expected, actual: Actual) -> None:
        """Learn whether loads hide behind the queue, from an answer that had both.

        The worker counts as queue what is left of the time before its turn without the load. So
        both add up to the longer of the expected queue and the load, or to their sum.
        """
        if not actual.load_ms or actual.queue_ms is None:
            return
        queue_s, load_s = expected.queue_s, actual.load_ms / 1_000
        both_s = min(queue_s, load_s)
        if both_s < MIN_LEARNT_S:
            return
        # A queue is foreseen within a share of itself, so a short load behind a long one tells
        # little. Errors are cut alike on both sides of what decides.
        share = min(2.0, max(-1.0, (queue_s - actual.queue_ms / 1_000) / both_s))
        weight, kept = (both_s / max(queue_s, load_s)) ** 2, 1.0 - NEWEST
        old = self._overlaps.get(worker, _Overlap())
        self._overlaps[worker] = _Overlap(
            old.hidden * kept + share * weight, old.weight * kept + weight
        )

    def _observe_prefill(self, worker: str, expected: Expected, actual: Actual) -> None:
        """Learn from the part of the time that was neither queue nor load."""
        if actual.ttft_ms <= 0:
            return
        hit = min(actual.hit_tokens, expected.prompt_tokens)
        should_s = expected.pace.between(hit, expected.prompt_tokens)
        queue_s = expected.queue_s if actual.queue_ms is None else actual.queue_ms / 1_000
        load_s = expected.load_s if actual.load_ms is None else actual.load_ms / 1_000
        took_s = actual.ttft_ms / 1_000 - queue_s - load_s
        if should_s < MIN_LEARNT_S or took_s <= 0:
            return
        # `pace` holds the correction of its time already: what is learnt is on top of that.
        self.version += 1
        limit = math.log(MAX_CORRECTION)
        old = self._corrections.get((worker, expected.pace.measured))
        told = math.log(took_s / should_s) + math.log(expected.pace.correction)
        new = told if old is None else old + NEWEST * (told - old)
        self._corrections[worker, expected.pace.measured] = min(limit, max(-limit, new))
