"""What a worker reaches, as sets of places, and how much of a prompt it holds there. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.directory.events import TierKind


@dataclass(frozen=True, slots=True)
class Reach:
    """Where a worker can take blocks from, as place bits of one view at one moment."""

    own: int
    """Its own HBM pages."""
    levels: tuple[tuple[TierKind, int], ...] = ()
    """Tiers of its host's nodes, fastest first: each with all places down to it."""
    below: int = 0
    """All places of those tiers, without its own pages."""


@dataclass(slots=True)
class Held:
    """Prefix lengths in blocks, as far as the view knows. Several reaches share one: read-only."""

    own_blocks: int
    """In the worker's own pages."""
    blocks: int
    """In anything it reaches; at least `own_blocks`."""
    levels: tuple[tuple[TierKind, int], ...] = field(default=(), compare=False)
    """The same down to each tier of its host that adds something, fastest first."""
    below_blocks: int = field(default=0, compare=False)
    """In the tiers of its host alone."""


class Spot(NamedTuple):
    """Where the places of a reach stand among all that a match asks for."""

    own: int
    below: int
    levels: tuple[tuple[TierKind, int], ...]


def spots_of(reaches: Sequence[Reach]) -> tuple[list[int], list[Spot]]:
    """Return every set of places in some reach, once, and where those of each reach stand."""
    masks: list[int] = []
    known: dict[str, int] = {}  # by text: all integers of one bit share 61 hashes

    def spot(places: int) -> int:
        at = known.setdefault(hex(places), len(masks))
        if at == len(masks):
            masks.append(places)
        return at

    return masks, [
        Spot(
            spot(reach.own),
            spot(reach.below),
            tuple((tier, spot(places)) for tier, places in reach.levels),
        )
        for reach in reaches
    ]


def held_by(spots: Sequence[Spot], found: Sequence[int]) -> list[Held]:
    """Return what each reach holds, given what each set of places does."""
    held: list[Held] = []
    plain: dict[tuple[int, int], Held] = {}
    for spot in spots:
        own_at, below_at, levels = spot
        own, below = found[own_at], found[below_at]
        if levels and found[levels[-1][1]] > own:
            held.append(_with_levels(spot, found))
            continue
        # As most do: their host adds nothing. And most of those hold the same.
        same = plain.get((own, below))
        if same is None:
            same = plain[own, below] = Held(own, own, (), below)
        held.append(same)
    return held


def _with_levels(spot: Spot, found: Sequence[int]) -> Held:
    most = own = found[spot.own]
    levels: list[tuple[TierKind, int]] = []
    for tier, at in spot.levels:
        if found[at] > most:
            most = found[at]
            levels.append((tier, most))
    return Held(own, most, tuple(levels), found[spot.below])
