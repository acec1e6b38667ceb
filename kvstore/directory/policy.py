"""The seam between tiers and what they keep: one interface for HBM, arena, NVMe and simulator.

A policy is pure: it has no clock, no lock and no memory of bytes. Whoever owns the tier calls it
from one thread, tells it every access, and asks it whom to drop. It orders; the owner decides
whether a victim can go at this moment (leases, pins).
"""

from collections.abc import Callable
from typing import NamedTuple, NewType, Protocol

BlockKey = NewType("BlockKey", int)
"""64 bits of (root, name): enough for a hint, and an int costs a third of 32 bytes in a dict."""


def block_key(root: bytes, name: bytes) -> BlockKey:
    """Return the key of a block under a root; collisions are harmless to a policy."""
    return BlockKey(int.from_bytes(root[:8], "little") ^ int.from_bytes(name[:8], "little"))


class Access(NamedTuple):
    """The evidence that comes with one touch of one block.

    A tuple: one is made for every block of every Acquire, and a frozen dataclass costs four times
    as much to make.
    """

    now_ms: float
    """The owner's monotonic clock."""
    position: int
    """Index of the block in its prompt; recompute cost grows with it."""
    block_bytes: int
    parent: BlockKey | None = None
    """The block before it: a prefix must outlive its suffixes."""
    share_domain: str = ""
    session: str = ""
    """Conversation, where the caller tells it."""
    turn: int = 0
    continued: bool = False
    """Whether the request extends a known prefix rather than starting a new one."""
    kind: str = ""
    """Request type or hint (`tool`, `stop`), where the caller tells it."""


class Policy(Protocol):
    """Orders blocks by how little would be lost without them."""

    name: str

    def admit(self, block: BlockKey, access: Access) -> bool:
        """Say whether a block not held is worth a place in a full tier. Changes nothing."""
        ...

    def insert(self, block: BlockKey, access: Access) -> None:
        """Take note that the tier now holds `block`. It must not be held already."""
        ...

    def touch(self, block: BlockKey, access: Access) -> None:
        """Take note of a use. Blocks of one request are touched from the prefix's end to its
        start, so that recency alone already drops suffixes first. Unknown blocks are ignored.
        """
        ...

    def remove(self, block: BlockKey) -> None:
        """Forget a block that is gone, evicted or not. Unknown ones are ignored."""
        ...

    def victims(
        self, count: int, *, now_ms: float, may_evict: Callable[[BlockKey], bool]
    ) -> list[BlockKey]:
        """Return at most `count` held blocks, worst first, all satisfying `may_evict`.

        The returned blocks are still held until `remove` is called for each. Never returns the
        same block twice in one call.
        """
        ...

    def __len__(self) -> int:
        """Return how many blocks are held."""
        ...

    def __contains__(self, block: object) -> bool: ...
