"""Everything a node holds, arena and tiers below, as one table for `Watch`. Pure."""

from collections.abc import Sequence
from typing import Final, Protocol

from kvstore.core.names import BlockName, Root
from kvstore.directory.events import Changed, TierKind
from kvstore.directory.publisher import Publisher
from kvstore.service.slots import SlotTable
from kvstore.tiers.base import Held
from kvstore.tiers.block_rows import HEADER_BYTES

_BELOW: Final = 1 << 40
"""Cursors from here on are in the tier below; no arena has that many slots."""


class Scannable(Protocol):
    """A tier that can be listed in slices: see `NvmeTier.scan`."""

    def scan(self, cursor: int, limit: int) -> tuple[list[Held], int | None]: ...


class NodeHoldings:
    """The arena's slots first, then what the tier below holds."""

    def __init__(self, table: SlotTable, below: Scannable) -> None:
        self._table = table
        self._below = below

    def scan(self, cursor: int, limit: int) -> tuple[list[Changed], int | None]:
        """Return a slice of a snapshot: see `kvstore.directory.publisher.Holdings`."""
        if cursor < _BELOW:
            changes, following = self._table.scan(cursor, limit)
            return changes, _BELOW if following is None else following
        held, following = self._below.scan(cursor - _BELOW, limit)
        changes = [
            Changed(root=root, tier=TierKind.NVME, names=names, block_bytes=block_bytes)
            for (root, block_bytes), names in by_root(held).items()
        ]
        return changes, None if following is None else _BELOW + following


def by_root(held: Sequence[Held]) -> dict[tuple[Root, int], list[BlockName]]:
    """Return the names of blocks under each (root, bytes of a block)."""
    names: dict[tuple[Root, int], list[BlockName]] = {}
    for one in held:
        names.setdefault((one.root, one.slot_bytes - HEADER_BYTES), []).append(one.name)
    return names


def publish(publisher: Publisher, held: Sequence[Held], *, deleted: bool) -> None:
    """Tell watchers what the tier below holds now, or does not any more."""
    for (root, block_bytes), names in by_root(held).items():
        if deleted:
            publisher.delete(root, TierKind.NVME, names)
        else:
            publisher.set(root, TierKind.NVME, names, block_bytes=block_bytes)
