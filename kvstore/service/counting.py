"""Counts what Acquires found, by tier, reason and share domain: once for each call, so quickly."""

from collections.abc import Mapping
from functools import cache
from typing import Final

from prometheus_client import Counter

from kvstore.core.outcomes import MissReason
from kvstore.directory.events import TierKind
from kvstore.observe.bounded import BoundedLabels
from kvstore.observe.metrics import NodeMetrics, TierMetrics
from kvstore.tiers.quotas import EACH, Quotas

UNKNOWN: Final = "unknown"
"""Label of what stands under roots that no session of this incarnation has opened."""


class HitCounts:
    """Counters of one node. Finding one by its labels costs more than counting: they are kept."""

    def __init__(self, metrics: NodeMetrics) -> None:
        domains = BoundedLabels()

        # Bounded: tiers and reasons are few, and domains have few labels.
        @cache
        def hits(tier: TierKind, label: str) -> tuple[Counter, Counter]:
            name = tier.name.lower()
            return metrics.hit_blocks.labels(name, label), metrics.hit_bytes.labels(name, label)

        @cache
        def misses(reason: MissReason, label: str) -> tuple[Counter, Counter]:
            name = reason.name.lower()
            return metrics.misses.labels(name, label), metrics.missed_blocks.labels(name, label)

        self._label = domains.label
        self._hits = hits
        self._misses = misses

    def hit(self, domain: str, by_tier: Mapping[TierKind, int], block_bytes: int) -> None:
        """Count leased blocks by the tier that they come from."""
        label = self._label(domain)
        for tier, count in by_tier.items():
            blocks, size = self._hits(tier, label)
            blocks.inc(count)
            size.inc(count * block_bytes)

    def miss(self, domain: str, reason: MissReason, missed_blocks: int) -> None:
        """Count a prefix that ended before all that was asked for."""
        calls, blocks = self._misses(reason, self._label(domain))
        calls.inc()
        blocks.inc(missed_blocks)


class DomainBytes:
    """Sets the gauge of what each share domain holds in each tier, for few enough of them."""

    def __init__(self, quotas: Quotas, metrics: TierMetrics) -> None:
        """Domains that a rule names have a label of their own before all others."""
        self._quotas = quotas
        self._metrics = metrics
        domains = BoundedLabels()
        self._label = domains.label
        self._shown: set[tuple[str, str]] = set()
        for rule in quotas.rules:
            if rule.kind == "domain" and rule.name != EACH:
                domains.label(rule.name)

    def measure(self) -> None:
        """Set the gauges; a domain that holds nothing any more is 0."""
        totals = dict.fromkeys(self._shown, 0)
        for book in self._quotas.books:
            self._metrics.quota_refusals.labels(book.tier).inc(book.refusals)
            book.refusals = 0
            for domain, size in book.by_domain.items():
                key = book.tier, self._label(domain) if domain else UNKNOWN
                totals[key] = totals.get(key, 0) + size
        for (tier, label), size in totals.items():
            self._metrics.domain_bytes.labels(tier, label).set(size)
        self._shown = set(totals)
