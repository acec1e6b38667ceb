"""S3-FIFO (Yang et al., SOSP 2023): a small queue for newcomers, a main queue, a ghost queue.

A block enters the small queue; asked for again it is promoted to the main one, otherwise it leaves
early and only its key is remembered. A remembered block that returns goes to the main queue. The
capacity is not told: it is the most blocks ever held.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

from kvstore.directory.policy import BlockKey, Prompt

SMALL_SHARE: Final = 0.1
"""Share of the capacity that newcomers get; the paper's value."""
_MAX_USES: Final = 3
_PROMOTED_USES: Final = 1
"""Uses that promote out of the small queue: a prefix block is asked for once more, or never."""
_Queue = OrderedDict[BlockKey, None]


class S3Fifo:
    """Drops what is asked for once, early. Implements `kvstore.directory.policy.Policy`."""

    name = "s3fifo"

    def __init__(self) -> None:
        self._small: OrderedDict[BlockKey, None] = OrderedDict()
        self._main: OrderedDict[BlockKey, None] = OrderedDict()
        self._gone: OrderedDict[BlockKey, None] = OrderedDict()
        self._uses: dict[BlockKey, int] = {}
        """Uses since a held block came, or since it was last spared; at most 3."""
        self._capacity = 0

    def request(self, prompt: Prompt) -> None:
        """Count a use of every held block."""
        uses = self._uses
        for key in map(BlockKey, prompt.keys):
            if key in uses:
                uses[key] = min(_MAX_USES, uses[key] + 1)

    def insert(self, blocks: Sequence[BlockKey], *, parent: BlockKey | None, now_ms: float) -> None:
        """Hold `blocks`, in the main queue where they are remembered; suffixes leave first."""
        for block in reversed(blocks):
            assert block not in self._uses, f"{block} is held already"
            queue = self._main if block in self._gone else self._small
            self._gone.pop(block, None)
            queue[block] = None
            self._uses[block] = 0
        self._capacity = max(self._capacity, len(self._uses))

    def remove(self, block: BlockKey) -> None:
        """Forget `block`, but remember its key if it left the small queue."""
        if self._uses.pop(block, None) is None:
            return
        if block in self._small:
            del self._small[block]
            self._gone[block] = None
            while len(self._gone) > self._capacity:
                self._gone.popitem(last=False)
        else:
            del self._main[block]

    def victims(
        self,
        count: int,
        *,
        now_ms: float,
        may_evict: Callable[[BlockKey], bool],
        newcomers: Sequence[BlockKey] = (),
    ) -> list[BlockKey]:
        """Return blocks from the small queue while it is over its share, else from the main one.

        Promotes and spares on the way, as the algorithm does; asked again it gives the same.
        """
        chosen: list[BlockKey] = []
        aside: list[tuple[_Queue, BlockKey]] = []
        small = self._small
        while len(chosen) < count:
            block = None
            if len(small) > SMALL_SHARE * self._capacity:
                block = self._from_small(aside, may_evict)
            if block is None:
                block = self._from_main(aside, may_evict)
            if block is None:
                block = self._from_small(aside, may_evict)
            if block is None:
                break
            chosen.append(block)
        for queue, block in reversed(aside):
            queue[block] = None
            queue.move_to_end(block, last=False)
        return chosen

    def _from_small(
        self, aside: list[tuple[_Queue, BlockKey]], may_evict: Callable[[BlockKey], bool]
    ) -> BlockKey | None:
        """Take the oldest block that was not asked for again; promote those that were."""
        while self._small:
            block, _ = self._small.popitem(last=False)
            if self._uses[block] >= _PROMOTED_USES:
                self._uses[block] = 0
                self._main[block] = None
                continue
            aside.append((self._small, block))
            if may_evict(block):
                return block
        return None

    def _from_main(
        self, aside: list[tuple[_Queue, BlockKey]], may_evict: Callable[[BlockKey], bool]
    ) -> BlockKey | None:
        """Take the oldest block without a use; every use spares it one round."""
        while self._main:
            block, _ = self._main.popitem(last=False)
            if self._uses[block]:
                self._uses[block] -= 1
                self._main[block] = None
                continue
            aside.append((self._main, block))
            if may_evict(block):
                return block
        return None

    def __len__(self) -> int:
        return len(self._uses)

    def __contains__(self, block: object) -> bool:
        return block in self._uses
