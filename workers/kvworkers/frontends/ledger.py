"""What became of requests: counted for Prometheus, and the last ones kept for whoever asks.

Knows sizes, times, places and reasons; never what a prompt or a reply says. Nothing here runs once
for each token.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from kvstore.core.errors import BadInput, KvStoreError
from kvstore.directory.events import TierKind
from kvstore.observe.bounded import BoundedLabels
from kvstore.observe.metrics import RouterMetrics
from kvstore.router.placement import Decision
from kvworkers.frontends.generation import CacheAccount, FieldError

KEPT: Final = 256
"""Requests remembered: what an operator scrolls through, about 1 MB."""


def outcome_of(error: KvStoreError) -> str:
    """Return a failure's name in metrics: the tree's, where a room has one of its own."""
    return BadInput.__name__ if isinstance(error, FieldError) else type(error).__name__


@dataclass(slots=True)
class Entry:
    """One request, from its beginning."""

    request_id: str
    domain: str
    model: str
    prompt_tokens: int
    began_s: float
    """Seconds since the epoch."""
    decision: Decision | None = None
    """The last one: where it went, and why."""
    split: Decision | None = None
    """The last one before it that chose two workers; None: none did."""
    computed_by: str = ""
    """The worker that computed the prompt, once that is known."""
    cache: CacheAccount | None = None
    ttft_ms: float = 0.0
    """0 before the first token."""
    output_tokens: int = 0
    retries: int = 0
    outcome: str = ""
    """Empty while it runs."""

    def note(self, decision: Decision, retries: int) -> None:
        """Take note of where it goes next, after so many failures."""
        if self.decision is not None and self.decision.split is not None:
            self.split = self.decision
        self.decision, self.retries = decision, retries


@dataclass(slots=True)
class Usage:
    """What one share domain has asked for and got since the start."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


@dataclass(slots=True)
class Totals:
    """What everybody has, since the start."""

    ended: int = 0
    prompt_tokens: int = 0
    """Of requests whose first token has come: those whose hits are known."""
    by_tier: dict[TierKind, int] = field(default_factory=lambda: dict.fromkeys(TierKind, 0))
    ttft_ms: float = 0.0
    first_tokens: int = 0


class Ledger:
    """Requests of one frontend. One event loop's."""

    def __init__(
        self, metrics: RouterMetrics, *, kept: int = KEPT, now_s: Callable[[], float] = time.time
    ) -> None:
        self._metrics = metrics
        self._now_s = now_s
        self._domains = BoundedLabels()
        self._entries: deque[Entry] = deque(maxlen=kept)
        self.usage: dict[str, Usage] = {}
        """By domain; the latest of many share the name `other`."""
        self.totals = Totals()
        self.running = 0

    def begin(self, request_id: str, *, domain: str, model: str, prompt_tokens: int) -> Entry:
        """Note a request that runs now; its entry is filled in as it goes."""
        entry = Entry(request_id, domain, model, prompt_tokens, self._now_s())
        self._entries.append(entry)
        self.running += 1
        self._metrics.in_flight.set(self.running)
        label = self._domains.label(domain)
        self._metrics.prompt_tokens.inc(prompt_tokens)
        self._metrics.domain_requests.labels(domain=label).inc()
        self._metrics.domain_tokens.labels(domain=label, kind="prompt").inc(prompt_tokens)
        usage = self.usage.setdefault(label, Usage())
        usage.requests += 1
        usage.prompt_tokens += prompt_tokens
        return entry

    def found(self, entry: Entry, cache: CacheAccount, worker: str) -> None:
        """Note where a prompt came from, and who computed it."""
        entry.cache, entry.computed_by = cache, worker
        for tier, tokens in cache.by_tier.items():
            self._metrics.cached_tokens.labels(tier=tier.name.lower()).inc(tokens)
            self.totals.by_tier[tier] += tokens
        self.totals.prompt_tokens += cache.prompt_tokens
        self._metrics.misses.labels(reason=cache.miss_reason.name.lower()).inc()
        label = self._domains.label(entry.domain)
        self._metrics.domain_tokens.labels(domain=label, kind="cached").inc(cache.cached_tokens)
        self.usage[label].cached_tokens += cache.cached_tokens

    def first_token(self, entry: Entry, ttft_ms: float) -> None:
        """Note the time to the first token."""
        entry.ttft_ms = ttft_ms
        self.totals.ttft_ms += ttft_ms
        self.totals.first_tokens += 1
        cached = entry.cache is not None and entry.cache.cached_tokens > 0
        label = "yes" if cached else "no"
        self._metrics.ttft_seconds.labels(cached=label).observe(ttft_ms / 1_000)

    def end(self, entry: Entry, outcome: str, *, output_tokens: int, lasted_s: float) -> None:
        """Note how a request ended, `lasted_s` after it arrived."""
        entry.outcome = outcome
        entry.output_tokens = output_tokens
        self._metrics.requests.labels(outcome=outcome).inc()
        label = self._domains.label(entry.domain)
        self._metrics.domain_tokens.labels(domain=label, kind="output").inc(output_tokens)
        self.usage[label].output_tokens += output_tokens
        self.totals.ended += 1
        self.running -= 1
        self._metrics.in_flight.set(self.running)
        if output_tokens > 1:
            after_first_s = lasted_s - entry.ttft_ms / 1_000
            self._metrics.tpot_seconds.observe(after_first_s / (output_tokens - 1))

    def refused(self, outcome: str) -> None:
        """Count a request that never ran."""
        self._metrics.requests.labels(outcome=outcome).inc()

    def latest(self) -> Iterable[Entry]:
        """Iterate over what is remembered, the newest request first."""
        return reversed(self._entries)
