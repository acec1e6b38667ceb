"""The seam between tiers and what they keep: one interface for HBM, arena, NVMe and simulator.

A policy is pure: it has no clock, no lock and no memory of bytes. Whoever owns the tier calls it
from one thread, tells it of every request, and asks it whom to drop. It orders; the owner decides
whether a victim can go at this moment (leases, pins).

    request(prompt)        a request asks for these blocks, held or not: evidence
    victims(n, newcomers)  who should go to make room for these; fewer where they are not worth it
    insert(blocks)         the tier holds them now
    remove(block)          it is gone
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType, Protocol

if TYPE_CHECKING:
    Keys = array[int]
else:  # generic in the type stubs only
    Keys = array

BlockKey = NewType("BlockKey", int)
"""64 bits of (root, name): enough for a hint, and an int costs a third of 32 bytes in a dict."""


def block_key(root: bytes, name: bytes) -> BlockKey:
    """Return the key of a block under a root; collisions are harmless to a policy."""
    return BlockKey(int.from_bytes(root[:8], "little") ^ int.from_bytes(name[:8], "little"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The blocks one request asks for, and the evidence that comes with them.

    One object for all blocks of a request: a policy's cost per block has to stay far below a
    microsecond's worth of attributes.
    """

    keys: Keys
    """Block keys (type `Q`) in prefix order, from block `first_block` of the prompt on."""
    now_ms: float
    """The owner's monotonic clock; never goes back from one call to the next."""
    first_block: int = 0
    block_bytes: int = 0
    partial: bool = False
    """Whether the last key stands for a block that is not full (traces only)."""
    share_domain: str = ""
    kind: str = ""
    """Request type or hint (`chat`, `tool`, `stop` …), where the caller tells it."""
    depth_cost: float = 0.0
    """What a block costs to compute more per block before it, as a share of the first one's cost;
    0: the caller has not measured it."""


class Policy(Protocol):
    """Orders blocks by how little would be lost without them."""

    name: str

    def request(self, prompt: Prompt) -> None:
        """Take note that a request asks for these blocks. Call it before choosing victims for it.

        Blocks that are held count as used, the prefix more recently than its suffixes. Blocks
        that are not held are evidence too.
        """
        ...

    def insert(self, blocks: Sequence[BlockKey], *, parent: BlockKey | None, now_ms: float) -> None:
        """Take note that the tier now holds `blocks`, which follow one another in one prompt.

        `parent` is the block before the first; None at a prompt's start or where the owner does not
        know. None of `blocks` may be held already. They need not have been requested.
        """
        ...

    def remove(self, block: BlockKey) -> None:
        """Forget a block that is gone, evicted or not. Unknown ones are ignored."""
        ...

    def victims(
        self,
        count: int,
        *,
        now_ms: float,
        may_evict: Callable[[BlockKey], bool],
        newcomers: Sequence[BlockKey] = (),
    ) -> list[BlockKey]:
        """Return at most `count` held blocks, worst first, all satisfying `may_evict`.

        With `newcomers`, `count` blocks in prefix order that requests asked for, the i-th victim is
        worth less than the i-th newcomer, so the answer may be short: the rest should stay, and
        the newcomers without a victim not come. Without them the answer is short only where nothing
        else may go.

        The returned blocks are still held until `remove` is called for each. Never returns the
        same block twice in one call.
        """
        ...

    def __len__(self) -> int:
        """Return how many blocks are held."""
        ...

    def __contains__(self, block: object) -> bool: ...
