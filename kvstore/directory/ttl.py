"""Time to live: keeps a block for a fixed time after its last use, as hosted prompt caches promise.

Within its time a block is not given up for a newcomer; beyond it blocks go in the order of their
last use. The comparison that shows what a promise without evidence costs.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Final

from kvstore.directory.lru import Lru, first_allowed
from kvstore.directory.policy import BlockKey, Prompt

DEFAULT_TTL_MS: Final = 300_000.0
"""Five minutes, what hosted APIs give by default."""


class Ttl(Lru):
    """LRU that refuses newcomers while nothing has expired. Implements `Policy`."""

    name = "ttl"

    def __init__(self, ttl_ms: float = DEFAULT_TTL_MS) -> None:
        assert ttl_ms >= 0
        super().__init__()
        self._ttl_ms = ttl_ms
        self._used_ms: dict[BlockKey, float] = {}

    def request(self, prompt: Prompt) -> None:
        """Renew the held blocks."""
        super().request(prompt)
        for key in prompt.keys:
            if key in self._used_ms:
                self._used_ms[BlockKey(key)] = prompt.now_ms

    def insert(self, blocks: Sequence[BlockKey], *, parent: BlockKey | None, now_ms: float) -> None:
        """Hold `blocks` for their time."""
        super().insert(blocks, parent=parent, now_ms=now_ms)
        self._used_ms.update(dict.fromkeys(blocks, now_ms))
        for ancestor in self._ancestry.above(blocks[0]):
            self._used_ms[ancestor] = now_ms

    def remove(self, block: BlockKey) -> None:
        """Forget `block`; unknown ones are ignored."""
        super().remove(block)
        self._used_ms.pop(block, None)

    def victims(
        self,
        count: int,
        *,
        now_ms: float,
        may_evict: Callable[[BlockKey], bool],
        newcomers: Sequence[BlockKey] = (),
    ) -> list[BlockKey]:
        """Return blocks in the order of their last use; for a newcomer only expired ones."""
        if not newcomers:
            return first_allowed(self._order, count, may_evict)
        limit = now_ms - self._ttl_ms
        expired = takewhile(lambda block: self._used_ms[block] <= limit, self._order)
        return first_allowed(expired, count, may_evict)
