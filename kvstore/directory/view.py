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
from kvstore.directory.holes import Holes
from kvstore.directory.place import Place
from kvstore.directory.places import BlockIndex
from kvstore.directory.reach import Held, Reach, Spot, held_by, spots_of

DEFAULT_MAX_BLOCKS: Final = 16_000_000
"""Blocks in one view: about 2 GB. Beyond it new blocks are left out and matches promise less."""

HOST_TIERS: Final = (TierKind.DRAM, TierKind.NVME, TierKind.PEER, TierKind.FILES)
"""Tiers of a node that every worker of its host reaches, fastest first."""


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

    tier_bits: dict[TierKind, int] = field(default_factory=dict)
    """Places by tier, a running snapshot included."""

    def gather_bits(self) -> None:
        """Bring `tier_bits` up to date with the places."""
        bits = {tier: place.bit for tier, place in self.places.items()}
        for tier, place in (self.fresh or {}).items():
            bits[tier] = bits.get(tier, 0) | place.bit
        self.tier_bits = bits


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
        self._holes = Holes()
        self._publishers: dict[str, PublisherView] = {}
        self._asked: list[Reach] = []
        self._masks: list[int] = []
        """Sets of places of the reaches asked for last, each once."""
        self._spots: list[Spot] = []
        """Where those of each reach stand among them."""
        self.version = 0
        """Changes whenever a publisher comes, goes or begins anew."""

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
            self.version += 1

    def forget(self, name: str) -> None:
        """Void everything about a publisher. Unknown ones are ignored."""
        known = self._publishers.pop(name, None)
        if known is not None:
            self.version += 1
            self._retire(known.places)
            self._retire(known.fresh or {})

    def health(self, name: str, now_ms: float) -> Health:
        """Say how a publisher fares; one that is not followed is lost."""
        return self.health_of(self._publishers.get(name), now_ms)

    def health_of(self, known: PublisherView | None, now_ms: float) -> Health:
        """Say the same of what `publisher` returned."""
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
        return reach_over(known, self.host_tiers(nodes, now_ms))

    def host_tiers(self, nodes: Iterable[str], now_ms: float) -> list[tuple[TierKind, int]]:
        """Return the places of a host's live nodes by tier, fastest first; empty tiers left out."""
        bits: dict[TierKind, int] = {}
        for node in nodes:
            if self.health(node, now_ms) is Health.LIVE:
                for tier, places in self._publishers[node].tier_bits.items():
                    bits[tier] = bits.get(tier, 0) | places
        return [(tier, bits[tier]) for tier in HOST_TIERS if tier in bits]

    def match(self, root: Root, names: Sequence[BlockName], reaches: Sequence[Reach]) -> list[Held]:
        """Return the prefix that each reach holds, in blocks of `names`; a hint.

        Of what the view knows it promises too much where blocks are missing in the middle, never
        too little, and no longer too much once `ended` told where the prefix ends.
        """
        if reaches != self._asked:  # mostly the very same objects as the last time
            self._asked = list(reaches)
            self._masks, self._spots = spots_of(reaches)
        found = self._index.match(root, names, self._masks)
        for position in self._holes.within(root, names) if self._holes else ():
            held = self._index.places_of(root, names[position])
            for at, places in enumerate(self._masks):
                if found[at] > position and not held & places:
                    found[at] = position
        return held_by(self._spots, found)

    def ended(self, places: int, root: Root, names: Sequence[BlockName], blocks: int) -> bool:
        """Note that a prefix in `places` had so many blocks only, where a match promised more.

        Returns whether the view knew better: it does not believe that the next block is there.
        """
        if blocks >= len(names) or self._index.places_of(root, names[blocks]) & places:
            return False
        self._holes.note(root, names, blocks)
        return True

    def places_of(self, root: Root, name: BlockName) -> int:
        """Return the bits of the places that hold one block, as in `PublisherView.tier_bits`."""
        return self._index.places_of(root, name)

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
        if isinstance(event, Changed) and known.began:  # first: a hundred for each of the others
            known.heard_ms, known.lost = now_ms, ""
            reason = self._change(known, event)
        elif isinstance(event, Lost):
            known.lost = event.reason or "lost"
            return None
        else:
            known.heard_ms, known.lost = now_ms, ""
            reason = self._apply_heard(known, event, now_ms)
        if reason is None or known.resyncing:
            return None
        known.resyncing = True
        return reason

    def _apply_heard(self, known: PublisherView, event: Event, now_ms: float) -> Resync | None:
        """Apply an event that proves its publisher alive and changes no blocks."""
        if isinstance(event, Began):
            self._begin(known, event)
        elif isinstance(event, Loaded):
            known.load, known.load_ms = event, now_ms
        elif not known.began:
            return Resync.ORDER
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
        self.version += 1
        known.sequence = known.fuzzy_until = event.sequence
        self._retire(known.fresh or {})
        known.fresh = {tier: self._index.new_place() for tier in event.tiers}
        known.gather_bits()

    def _end(self, known: PublisherView, event: Ended) -> None:
        """Make the snapshot the truth about the tiers it spoke for."""
        if known.fresh is None:
            return
        self._retire({tier: known.places[tier] for tier in known.fresh if tier in known.places})
        known.places.update(known.fresh)
        known.fresh = None
        known.gather_bits()
        known.joined = True
        known.fuzzy_until = max(known.fuzzy_until, event.sequence)

    def _change(self, known: PublisherView, event: Changed) -> Resync | None:
        """Apply sets or deletes; parts that were applied before are left out."""
        names, first = event.names, event.first_sequence
        reason: Resync | None = None
        if first:
            last, behind = first + len(names) - 1, known.sequence + 1 - first
            if behind < 0:
                reason = Resync.GAP
            elif behind:
                names = names[behind:]
            known.sequence = max(known.sequence, last)
        place = known.fresh.get(event.tier) if known.fresh else None
        if place is None:
            place = known.places.get(event.tier)
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


def reach_over(known: PublisherView | None, tiers: Sequence[tuple[TierKind, int]]) -> Reach:
    """Return what a worker reaches whose host has these places (`ClusterView.host_tiers`)."""
    own = known.tier_bits.get(TierKind.HBM, 0) if known is not None else 0
    below = 0
    levels: list[tuple[TierKind, int]] = []
    for tier, places in tiers:
        below |= places
        levels.append((tier, own | below))
    return Reach(own, tuple(levels), below)


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
