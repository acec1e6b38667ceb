"""Least recently used: the plain `Policy` that every other one is judged against."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from kvstore.directory.policy import BlockKey, Prompt
from kvstore.directory.prefix_order import Ancestry


class Lru:
    """Orders blocks by their last use. Implements `kvstore.directory.policy.Policy`.

    One `OrderedDict` of 64-bit keys: O(1) a touch. Admits everything: recency has no evidence about
    blocks that it never saw.
    """

    name = "lru"

    def __init__(self) -> None:
        self._order: OrderedDict[BlockKey, None] = OrderedDict()
        self._ancestry = Ancestry()

    def request(self, prompt: Prompt) -> None:
        """Make the held blocks the most recently used ones, the first of the prompt most of all."""
        order = self._order
        for key in reversed(prompt.keys):
            if key in order:
                order.move_to_end(BlockKey(key))

    def insert(self, blocks: Sequence[BlockKey], *, parent: BlockKey | None, now_ms: float) -> None:
        """Hold `blocks`, below their ancestors and above everything else."""
        self._ancestry.add(blocks, parent)
        for block in reversed(blocks):
            self._order[block] = None
        for ancestor in self._ancestry.above(blocks[0]):
            self._order.move_to_end(ancestor)

    def remove(self, block: BlockKey) -> None:
        """Forget `block`; unknown ones are ignored."""
        if self._ancestry.drop(block):
            del self._order[block]

    def victims(
        self,
        count: int,
        *,
        now_ms: float,
        may_evict: Callable[[BlockKey], bool],
        newcomers: Sequence[BlockKey] = (),
    ) -> list[BlockKey]:
        """Return at most `count` blocks, least recently used first, that `may_evict` allows."""
        return first_allowed(self._order, count, may_evict)

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, block: object) -> bool:
        return block in self._order


def first_allowed(
    blocks: Iterable[BlockKey], count: int, may_evict: Callable[[BlockKey], bool]
) -> list[BlockKey]:
    """Return the first `count` of `blocks` that may go."""
    chosen: list[BlockKey] = []
    if count <= 0:
        return chosen
    for block in blocks:
        if may_evict(block):
            chosen.append(block)
            if len(chosen) == count:
                break
    return chosen
