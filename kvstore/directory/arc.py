"""Adaptive replacement cache (Megiddo and Modha, FAST 2003), over blocks with prefixes.

Two lists of held blocks, T1 (asked for once) and T2 (more than once), and two of evicted ones, B1
and B2. A hit in B1 says that T1 was too short, one in B2 that T2 was; `_target` moves accordingly.
The capacity is not told: it is the most blocks ever held.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from kvstore.directory.policy import BlockKey, Prompt
from kvstore.directory.prefix_order import Ancestry


class Arc:
    """Balances recency against frequency. Implements `kvstore.directory.policy.Policy`."""

    name = "arc"

    def __init__(self) -> None:
        self._once: OrderedDict[BlockKey, None] = OrderedDict()
        self._often: OrderedDict[BlockKey, None] = OrderedDict()
        self._gone_once: OrderedDict[BlockKey, None] = OrderedDict()
        self._gone_often: OrderedDict[BlockKey, None] = OrderedDict()
        self._ancestry = Ancestry()
        self._target = 0.0
        """Blocks that T1 should have."""
        self._capacity = 0

    def request(self, prompt: Prompt) -> None:
        """Move held blocks to the young end of T2, the first of the prompt last."""
        for key in map(BlockKey, reversed(prompt.keys)):
            if key in self._often:
                self._often.move_to_end(key)
            elif key in self._once:
                del self._once[key]
                self._often[key] = None

    def insert(self, blocks: Sequence[BlockKey], *, parent: BlockKey | None, now_ms: float) -> None:
        """Hold `blocks`: in T2 where they are remembered, in T1 where they are new."""
        self._ancestry.add(blocks, parent)
        self._capacity = max(self._capacity, len(self._ancestry))
        for block in reversed(blocks):
            self._hold(block)
        for ancestor in self._ancestry.above(blocks[0]):
            held = self._often if ancestor in self._often else self._once
            held.move_to_end(ancestor)

    def _hold(self, block: BlockKey) -> None:
        once, often = len(self._gone_once), len(self._gone_often)
        if block in self._gone_once:
            self._target = min(self._capacity, self._target + max(1.0, often / once))
            del self._gone_once[block]
            self._often[block] = None
        elif block in self._gone_often:
            self._target = max(0.0, self._target - max(1.0, once / often))
            del self._gone_often[block]
            self._often[block] = None
        else:
            self._once[block] = None

    def remove(self, block: BlockKey) -> None:
        """Move `block` to the evicted ones; unknown ones are ignored."""
        if not self._ancestry.drop(block):
            return
        if block in self._once:
            del self._once[block]
            self._gone_once[block] = None
        else:
            del self._often[block]
            self._gone_often[block] = None
        while self._gone_once and len(self._once) + len(self._gone_once) > self._capacity:
            self._gone_once.popitem(last=False)
        while self._gone_often and self._remembered() > 2 * self._capacity:
            self._gone_often.popitem(last=False)

    def _remembered(self) -> int:
        return len(self._ancestry) + len(self._gone_once) + len(self._gone_often)

    def victims(
        self,
        count: int,
        *,
        now_ms: float,
        may_evict: Callable[[BlockKey], bool],
        newcomers: Sequence[BlockKey] = (),
    ) -> list[BlockKey]:
        """Return blocks from the old end of T1 while it is over its target, else of T2."""
        chosen: list[BlockKey] = []
        if count <= 0:
            return chosen
        once = (block for block in self._once if may_evict(block))
        often = (block for block in self._often if may_evict(block))
        left = len(self._once)
        while len(chosen) < count:
            first, second = (once, often) if left > self._target else (often, once)
            block = next(first, None)
            if block is None:
                block = next(second, None)
            if block is None:
                break
            left -= block in self._once
            chosen.append(block)
        return chosen

    def __len__(self) -> int:
        return len(self._ancestry)

    def __contains__(self, block: object) -> bool:
        return block in self._ancestry
