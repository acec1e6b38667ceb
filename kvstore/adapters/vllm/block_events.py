"""What vLLM publishes of its blocks in the node, under its own hashes, without a package of it.

An engine block is several of ours. It is told as stored once the node lists all of them, and as
removed when the first of them is gone from every tier: a router may count on whole blocks only.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from kvstore.adapters.vllm.tier_events import Following, TierEvents, Told
from kvstore.core.limits import NAME_BYTES
from kvstore.core.names import BlockName, Root

MAX_DESCRIBED: Final = 1 << 16
"""Engine blocks whose tokens are kept until the node lists them; later ones are told without."""


class Placed(NamedTuple):
    """An engine block that was stored or loaded, as vLLM's events describe one."""

    block_hash: bytes
    parent: bytes | None
    tokens: tuple[int, ...]
    salt: str | None
    """Only of a prompt's first block."""


class BlockWord(NamedTuple):
    """One block that the node has now, or has no longer."""

    removed: bool
    block: Placed


class BlockEvents:
    """Engine blocks in the node, told once each way. `placed` and `take` are the scheduler's."""

    def __init__(self, publisher: Callable[[], tuple[str, Root] | None], *, parts: int) -> None:
        """`parts` blocks of ours make one of the engine's; `publisher` as for `TierEvents`."""
        assert parts > 0
        self._parts = parts
        self._watched = TierEvents(publisher, Following(name_of=_name_of), engine="vllm")
        self._described: OrderedDict[bytes, Placed] = OrderedDict()
        self._held: dict[bytes, int] = {}
        """Of an engine block: how many of its parts the node lists."""

    def placed(self, names: Sequence[BlockName], blocks: Sequence[Placed]) -> None:
        """Take note of blocks that are being stored or loaded; `names` are their parts in order."""
        assert len(names) == len(blocks) * self._parts
        keys: list[bytes] = []
        for at, block in enumerate(blocks):
            if self._held.get(block.block_hash, 0) < self._parts:
                self._described[block.block_hash] = block
            parts = names[at * self._parts : (at + 1) * self._parts]
            keys += [name + block.block_hash for name in parts]
        while len(self._described) > MAX_DESCRIBED:
            self._described.popitem(last=False)
        self._watched.stored(keys)

    def take(self) -> list[BlockWord]:
        """Return what changed since the last time, in order."""
        return [word for told in self._watched.take() for word in self._count(told)]

    def close(self) -> None:
        """Stop following the node."""
        self._watched.close()

    def _count(self, told: Told) -> list[BlockWord]:
        words: list[BlockWord] = []
        for key in told.keys:
            block_hash = key[NAME_BYTES:]
            before = self._held.get(block_hash, 0)
            # Words are lost where nobody took them for long: a count never leaves its range.
            after = max(0, before - 1) if told.removed else min(self._parts, before + 1)
            if after == before:
                continue
            if after:
                self._held[block_hash] = after
            else:
                del self._held[block_hash]
            nameless = Placed(block_hash, None, (), None)
            if after == self._parts:
                words.append(BlockWord(False, self._described.pop(block_hash, nameless)))
            elif before == self._parts:
                words.append(BlockWord(True, nameless))
        return words


def _name_of(key: bytes) -> BlockName:
    return BlockName(key[:NAME_BYTES])
