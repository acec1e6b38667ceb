"""Least recently used: the plain `Policy` that every other one is judged against.

Recency alone drops suffixes before prefixes, because owners touch (and insert) the blocks of a
request from its end to its start. One `OrderedDict` of 64-bit keys: O(1) a touch.
"""

from collections import OrderedDict
from collections.abc import Callable

from kvstore.directory.policy import Access, BlockKey


class Lru:
    """Orders blocks by their last use. Implements `kvstore.directory.policy.Policy`."""

    name = "lru"

    def __init__(self) -> None:
        self._order: OrderedDict[BlockKey, None] = OrderedDict()

    def admit(self, block: BlockKey, access: Access) -> bool:
        """Admit everything: recency has no evidence about blocks never seen."""
        return True

    def insert(self, block: BlockKey, access: Access) -> None:
        """Hold `block` as the most recently used."""
        assert block not in self._order, f"{block} is held already"
        self._order[block] = None

    def touch(self, block: BlockKey, access: Access) -> None:
        """Make `block` the most recently used; unknown ones are ignored."""
        if block in self._order:
            self._order.move_to_end(block)

    def remove(self, block: BlockKey) -> None:
        """Forget `block`; unknown ones are ignored."""
        self._order.pop(block, None)

    def victims(
        self, count: int, *, now_ms: float, may_evict: Callable[[BlockKey], bool]
    ) -> list[BlockKey]:
        """Return at most `count` blocks, least recently used first, that `may_evict` allows."""
        chosen: list[BlockKey] = []
        if count <= 0:
            return chosen
        for block in self._order:
            if may_evict(block):
                chosen.append(block)
                if len(chosen) == count:
                    break
        return chosen

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, block: object) -> bool:
        return block in self._order
