"""The view of a cluster: what every publisher holds and how it fares, built from events.

A view is a memory of event streams, never the truth (DESIGN D7): it may promise too much or too
little, and losing it loses nothing. Applying an event answers whether the stream has a hole and
has to be followed anew; the executor that owns the connection does that.

A snapshot is fuzzy: its slices go to fresh places while the old ones still answer; at `Ended` the
old ones are void. Every later event is absolute, so applying it twice is harmless.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from kvstore.core.limits import SUSPECT_AFTER_MS
from kvstore.core.names import BlockName, Root
from kvstore.directory.events import (
    Began,
    Changed,
    Ended,
    Event,
    Loaded,
    Lost,
    Marked,
    TierKind,
)
from kvstore.directory.places import BlockIndex, Place

DEFAULT_MAX_BLOCKS: Final = 16_000_000
"""Blocks in one view: about 2 GB. Beyond it new blocks are left out and matches promise less."""

HOST_TIERS: Final = frozenset({TierKind.DRAM, TierKind.NVME, TierKind.PEER, TierKind.FILES})
"""Tiers of a node that every worker of its host reaches."""


class Health(StrEnum):
    """How a publisher fares as far as its stream tells."""

    JOINING = "joining"
    """Followed, and its first snapshot is not whole yet."""
    LIVE = "live"
    SUSPECT = "suspect"
    """Silent for too long: nothing may be routed to it."""
    LOST = "lost"
    """Its stream said so, or broke."""


class Resync(StrEnum):
    """Why a publisher has to be followed anew."""

    GAP = "gap"
    """Events are missing between two that arrived."""
    DIGEST = "digest"
    """At an equal sequence the publisher holds something else than the view believes."""
    ORDER = "order"
    """Events came before any snapshot."""


@dataclass(slots=True)
class PublisherView:
    """What is known of one publisher. Read-only for everyone but the view."""

    name: str
    host: str = ""
    incarnation: int = 0
    sequence: int = 0
    """Number of the last event applied."""
    heard_ms: float = 0.0
    load: Loaded | None = None
    load_ms: float = 0.0
    lost: str = ""
    """Why it is lost; empty while it is not."""
    began: bool = False
    joined: bool = False
    """Whether any snapshot has come in whole."""
    fuzzy_until: int = 0
    """Below this sequence the snapshot may be ahead of the events, so digests say nothing."""
    resyncing: bool = False
    behind_at: int = -1
    """Sequence at which the last mark found the view behind; -1 when it did not."""
    places: dict[TierKind, Place] = field(default_factory=dict)
    fresh: dict[TierKind, Place] | None = None
    """Places of the snapshot that is coming in."""

    def bits(self, tiers: Iterable[TierKind]) -> int:
        """Return the places of these tiers, a running snapshot included."""
        bits = 0
        for tier in tiers:
            for places in (self.places, self.fresh or {}):
                if tier in places:
                    bits |= places[tier].bit
        return bits


@dataclass(frozen=True, slots=True)
class Reach:
    """Where a worker can take blocks from, as place bits of one view at one moment."""

    own: int
    """Its own HBM pages."""
    union: int
    """Those and the tiers of its host's nodes."""


@dataclass(frozen=True, slots=True)
class Held:
    """Prefix lengths in blocks, as far as the view knows."""

    own_blocks: int
    """In the worker's own pages."""
    blocks: int
    """In anything it reaches; at least `own_blocks`."""


class ClusterView:
    """Applies events of many publishers and answers who holds which prefix. Pure."""

    def __init__(
        self,
        *,
        suspect_after_ms: float = SUSPECT_AFTER_MS,
        max_blocks: int = DEFAULT_MAX_BLOCKS,
    ) -> None:
        self._suspect_after_ms = suspect_after_ms
        self._index = BlockIndex(max_blocks=max_blocks)
        self._publishers: dict[str, PublisherView] = {}

    def __len__(self) -> int:
        """Return the number of blocks known somewhere."""
        return len(self._index)

    def publisher(self, name: str) -> PublisherView | None:
        """Return what is known of a publisher, or None when it is not followed."""
        return self._publishers.get(name)

    def follow(self, name: str, *, host: str, now_ms: float) -> None:
        """Start to know a publisher; one known already keeps what is known."""
        if name not in self._publishers:
            self._publishers[name] = PublisherView(name, host=host, heard_ms=now_ms)

    def forget(self, name: str) -> None:
        """Void everything about a publisher. Unknown ones are ignored."""
        known = self._publishers.pop(name, None)
        if known is not None:
            self._retire(known.places)
            self._retire(known.fresh or {})

    def health(self, name: str, now_ms: float) -> Health:
        """Say how a publisher fares; one that is not followed is lost."""
        known = self._publishers.get(name)
        if known is None or known.lost:
            return Health.LOST
        if not known.joined:
            return Health.JOINING
        if now_ms - known.heard_ms > self._suspect_after_ms:
            return Health.SUSPECT
        return Health.LIVE

    def silence_ms(self, name: str, now_ms: float) -> float:
        """Return for how long nothing was heard of a publisher."""
        known = self._publishers.get(name)
        return now_ms - known.heard_ms if known is not None else float("inf")

    def reach(self, worker: str, nodes: Iterable[str], now_ms: float) -> Reach:
        """Return the places a worker reaches: its own, and those of its host's live nodes."""
        known = self._publishers.get(worker)
        own = known.bits((TierKind.HBM,)) if known is not None else 0
        union = own
        for node in nodes:
            if self.health(node, now_ms) is Health.LIVE:
                union |= self._publishers[node].bits(HOST_TIERS)
        return Reach(own, union)

    def match(self, root: Root, names: Sequence[BlockName], reaches: Sequence[Reach]) -> list[Held]:
        """Return the prefix that each reach holds, in blocks of `names`; a hint."""
        flat = [bits for reach in reaches for bits in (reach.own, reach.union)]
        found = self._index.match(root, names, flat)
        return [
            Held(own, max(own, union)) for own, union in zip(found[::2], found[1::2], strict=True)
        ]

    def sweep(self, limit: int) -> int:
        """Do a bounded part of the cleaning after snapshots; 0 when nothing is left."""
        return self._index.sweep(limit)

    def apply(self, name: str, event: Event, now_ms: float) -> Resync | None:
        """Apply one event of a followed publisher; a reason means: follow it anew.

        After such an answer the rest of the stream is still applied, and no second reason is
        given, until the next `Began`.
        """
        known = self._publishers.get(name)
        if known is None:
            return None
        if isinstance(event, Lost):
            known.lost = event.reason or "lost"
            return None
        known.heard_ms = now_ms
        known.lost = ""
        reason = self._apply_heard(known, event, now_ms)
        if reason is None or known.resyncing:
            return None
        known.resyncing = True
        return reason

    def _apply_heard(self, known: PublisherView, event: Event, now_ms: float) -> Resync | None:
        """Apply an event that proves its publisher alive."""
        if isinstance(event, Began):
            self._begin(known, event)
        elif isinstance(event, Loaded):
            known.load, known.load_ms = event, now_ms
        elif not known.began:
            return Resync.ORDER
        elif isinstance(event, Changed):
            return self._change(known, event)
        elif isinstance(event, Ended):
            self._end(known, event)
        else:
            assert isinstance(event, Marked), "a loss is no sign of life"
            return _compare(known, event)
        return None

    def _begin(self, known: PublisherView, event: Began) -> None:
        """Open fresh places; the old ones go on answering until the snapshot is whole."""
        if known.began and event.incarnation != known.incarnation:
            known.load = None
        known.began, known.resyncing, known.behind_at = True, False, -1
        known.incarnation = event.incarnation
        known.host = event.host or known.host
        known.sequence = known.fuzzy_until = event.sequence
        self._retire(known.fresh or {})
        known.fresh = {tier: self._index.new_place() for tier in event.tiers}

    def _end(self, known: PublisherView, event: Ended) -> None:
        """Make the snapshot the truth about the tiers it spoke for."""
        if known.fresh is None:
            return
        self._retire({tier: known.places[tier] for tier in known.fresh if tier in known.places})
        known.places.update(known.fresh)
        known.fresh = None
        known.joined = True
        known.fuzzy_until = max(known.fuzzy_until, event.sequence)

    def _change(self, known: PublisherView, event: Changed) -> Resync | None:
        """Apply sets or deletes; parts that were applied before are left out."""
        names = event.names
        reason: Resync | None = None
        if event.first_sequence:
            behind = known.sequence + 1 - event.first_sequence
            if behind < 0:
                reason = Resync.GAP
            elif behind:
                names = names[behind:]
            last = event.first_sequence + len(event.names) - 1
            known.sequence = max(known.sequence, last)
        place = (known.fresh or {}).get(event.tier) or known.places.get(event.tier)
        if place is None or not names:
            return reason
        if event.deleted:
            self._index.discard(place, event.root, names)
        else:
            self._index.add(place, event.root, names)
        return reason

    def _retire(self, places: dict[TierKind, Place]) -> None:
        for place in places.values():
            self._index.retire(place)


def _compare(known: PublisherView, mark: Marked) -> Resync | None:
    """Hold a mark against what was applied.

    A mark can overtake events that are still on their way. Only a second one that finds the view
    behind at the same place proves a gap.
    """
    if mark.sequence > known.sequence:
        stuck = known.behind_at == known.sequence
        known.behind_at = known.sequence
        return Resync.GAP if stuck and known.fresh is None else None
    known.behind_at = -1
    if mark.sequence < max(known.sequence, known.fuzzy_until) or known.fresh is not None:
        return None
    for digest in mark.digests:
        place = known.places.get(digest.tier)
        if place is None or place.partial:
            continue
        if (place.count, place.xor_keys) != (digest.count, digest.xor_prefixes):
            return Resync.DIGEST
    return None
