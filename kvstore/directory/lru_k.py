"""LRU-2 (O'Neil et al., SIGMOD 1993): orders blocks by their last use but one.

A block used once has no such time and goes first, oldest first; of equally old ones the suffix
goes before its prefix. The last use of an evicted block is remembered for a while, so that its
return counts as a second use (the paper's retained information).
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from kvstore.directory.policy import BlockKey, Prompt

_NEVER: Final = -1.0
_COMPACT_FACTOR: Final = 4
"""Stale heap entries are dropped when entries outnumber held blocks this many times."""
_RETAINED_FACTOR: Final = 8
"""Evicted blocks remembered, as a multiple of the most blocks ever held."""


class _Entry(NamedTuple):
    before_ms: float
    """The last use but one."""
    last_ms: float
    rank: int
    """Minus the depth: deeper blocks go first."""
    block: BlockKey


class Lru2:
    """Drops what was not used twice lately. Implements `kvstore.directory.policy.Policy`.

    A heap with lazy deletion: O(log n) a touch.
    """

    name = "lru2"

    def __init__(self) -> None:
        self._entries: dict[BlockKey, _Entry] = {}
        """The valid entry of every held block."""
        self._heap: list[_Entry] = []
        self._gone_ms: OrderedDict[BlockKey, float] = OrderedDict()
        """Last use of evicted blocks, the longest gone first."""
        self._capacity = 0
        self._asked: dict[BlockKey, int] = {}
        """Depth in its prompt of every block the latest request asked for."""

    def request(self, prompt: Prompt) -> None:
        """Move the last use of held blocks to the last but one."""
        now_ms, entries = prompt.now_ms, self._entries
        self._asked = {BlockKey(k): prompt.first_block + i for i, k in enumerate(prompt.keys)}
        for block, depth in self._asked.items():
            entry = entries.get(block)
            if entry is not None:
                self._put(_Entry(entry.last_ms, now_ms, -depth, block))

    def insert(self, blocks: Sequence[BlockKey], *, parent: BlockKey | None, now_ms: float) -> None:
        """Hold `blocks`, each used once."""
        depth = self._asked.get(blocks[0])
        if depth is None:
            above = None if parent is None else self._entries.get(parent)
            depth = 0 if above is None else 1 - above.rank
        for offset, block in enumerate(blocks):
            assert block not in self._entries, f"{block} is held already"
            before_ms = self._gone_ms.pop(block, _NEVER)
            self._put(_Entry(before_ms, now_ms, -depth - offset, block))
        self._capacity = max(self._capacity, len(self._entries))

    def _put(self, entry: _Entry) -> None:
        self._entries[entry.block] = entry
        heapq.heappush(self._heap, entry)
        if len(self._heap) > _COMPACT_FACTOR * len(self._entries) + 64:
            self._heap = sorted(self._entries.values())

    def remove(self, block: BlockKey) -> None:
        """Forget `block`; unknown ones are ignored."""
        entry = self._entries.pop(block, None)
        if entry is None:
            return
        self._gone_ms[block] = entry.last_ms
        while len(self._gone_ms) > _RETAINED_FACTOR * self._capacity:
            self._gone_ms.popitem(last=False)

    def victims(
        self,
        count: int,
        *,
        now_ms: float,
        may_evict: Callable[[BlockKey], bool],
        newcomers: Sequence[BlockKey] = (),
    ) -> list[BlockKey]:
        """Return the blocks whose last use but one is the longest ago."""
        chosen: list[BlockKey] = []
        aside: list[_Entry] = []
        while len(chosen) < count and self._heap:
            entry = heapq.heappop(self._heap)
            if self._entries.get(entry.block) is not entry:
                continue
            aside.append(entry)
            if may_evict(entry.block):
                chosen.append(entry.block)
        for entry in aside:
            heapq.heappush(self._heap, entry)
        return chosen

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, block: object) -> bool:
        return block in self._entries
