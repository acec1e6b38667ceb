"""Counts what Acquires found, by tier, reason and share domain: once for each call, so quickly."""

from collections.abc import Mapping
from functools import cache

from prometheus_client import Counter

from kvstore.core.outcomes import MissReason
from kvstore.directory.events import TierKind
from kvstore.observe.bounded import BoundedLabels
from kvstore.observe.metrics import NodeMetrics


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
