"""Everything a node holds, arena and tiers below, as one table for `Watch`. Pure."""

from collections.abc import Mapping, Sequence
from typing import Final

from kvstore.core.names import BlockName, Root
from kvstore.directory.events import Changed, TierKind
from kvstore.directory.publisher import Publisher
from kvstore.service.slots import SlotTable
from kvstore.tiers.base import Held, StoredTier
from kvstore.tiers.block_rows import HEADER_BYTES

Stored = dict[TierKind, StoredTier]
"""Tiers with a medium of their own, fastest first."""
_TIER_SHIFT: Final = 56
"""A cursor's upper bits say which table it is in: 0 the arena, then the tiers in order."""


class NodeHoldings:
    """The arena's slots first, then what the tiers below hold."""

    def __init__(self, table: SlotTable, below: Mapping[TierKind, StoredTier]) -> None:
        self._table = table
        self._below = list(below.items())

    def scan(self, cursor: int, limit: int) -> tuple[list[Changed], int | None]:
        """Return a slice of a snapshot: see `kvstore.directory.publisher.Holdings`."""
        number, inner = cursor >> _TIER_SHIFT, cursor & ((1 << _TIER_SHIFT) - 1)
        if not number:
            changes, following = self._table.scan(inner, limit)
        else:
            kind, tier = self._below[number - 1]
            held, following = tier.scan(inner, limit)
            changes = [
                Changed(root=root, tier=kind, names=names, block_bytes=block_bytes)
                for (root, block_bytes), names in by_root(held).items()
            ]
        if following is not None:
            return changes, number << _TIER_SHIFT | following
        return changes, (number + 1) << _TIER_SHIFT if number < len(self._below) else None


def by_root(held: Sequence[Held]) -> dict[tuple[Root, int], list[BlockName]]:
    """Return the names of blocks under each (root, bytes of a block)."""
    names: dict[tuple[Root, int], list[BlockName]] = {}
    for one in held:
        names.setdefault((one.root, one.slot_bytes - HEADER_BYTES), []).append(one.name)
    return names


def publish(publisher: Publisher, kind: TierKind, held: Sequence[Held], *, deleted: bool) -> None:
    """Tell watchers what a tier below holds now, or does not any more."""
    for (root, block_bytes), names in by_root(held).items():
        if deleted:
            publisher.delete(root, kind, names)
        else:
            publisher.set(root, kind, names, block_bytes=block_bytes)
