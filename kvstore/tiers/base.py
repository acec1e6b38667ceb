"""The seam of a tier: bytes at rest, read and written in batches, never lying.

Contract (`kvstore.testing.contracts.TierContract` runs over every tier and its faulty twin):

- a read answers one outcome per item, in order; only HIT means that `into` holds the block's
  bytes, and they were verified against their sum; on any other outcome `into` is rubbish;
- a write that answers HIT can be read back until evicted; after any other outcome a read
  gives MISS or the whole block, never a part;
- `deadline_ms` is a stall deadline: it passes when nothing moved for so long. At a deadline the
  waiter leaves with LATE; the device may still be using the buffer, so the caller keeps it in
  `draining` until `drained` is set;
- nothing raises for a fault of the device; only a caller's bug asserts.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from kvstore.core.errors import Unreachable
from kvstore.core.names import BlockName, Root
from kvstore.core.outcomes import Outcome
from kvstore.directory.policy import BlockKey, Prompt
from kvstore.tiers.quotas import Book


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """What identifies and verifies a block wherever its bytes lie."""

    root: Root
    name: BlockName
    payload_bytes: int
    """Before padding; a multiple of `shares`."""
    shares: int
    sum: bytes
    """16 bytes: `kvstore.tiers.sums.block_sum` of the payload."""
    position: int = 0
    """Index of the block in its prompt (keys are stored after RoPE)."""
    group: str = "full"
    parent: int = 0
    """Key of the block before it in its prompt (`kvstore.directory.policy.block_key`); 0 at the
    start of a prompt or where it is not known. A hint for the tier's policy, never an identity."""


@dataclass(slots=True)
class ReadItem:
    """One block wanted; `into` has its padded size."""

    root: Root
    name: BlockName
    into: memoryview
    drained: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when no device writes `into` any more, whatever the outcome was."""
    sum: bytes = b""
    """Set by the tier with a HIT: the sum that the bytes were verified against."""


@dataclass(frozen=True, slots=True)
class WriteItem:
    """One block given; `source` has its padded size and must not change until `drained`."""

    header: BlockHeader
    source: memoryview
    drained: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class Held:
    """One block that a tier with a medium of its own holds."""

    root: Root
    name: BlockName
    slot_bytes: int
    """On the medium, header page included."""


Listener = Callable[[Sequence[Held], bool], None]
"""Told of blocks that the tier holds now (False), or does not hold any more (True: deleted)."""


def _never(key: BlockKey) -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a tier with a medium of its own keeps to, beside its policy."""

    book: Book | None = None
    """Quotas, and what stands under them; None: there are none."""
    pinned: Callable[[BlockKey], bool] = _never
    """Says whether a block may not be dropped to make room."""


NO_TERMS: Final = Terms()


async def reached(event: asyncio.Event, deadline_s: float, what: str) -> None:
    """Wait for an event; raises `Unreachable` naming `what` was not read at the deadline."""
    try:
        async with asyncio.timeout(deadline_s):
            await event.wait()
    except TimeoutError as error:
        raise Unreachable(f"{what} was not read in {deadline_s:g} s") from error


class Tier(Protocol):
    """A place blocks can live. Reads may miss, writes may be refused; neither may lie."""

    name: str

    async def read(self, batch: Sequence[ReadItem], *, deadline_ms: int) -> list[Outcome]: ...

    async def write(self, batch: Sequence[WriteItem], *, deadline_ms: int) -> list[Outcome]: ...

    async def remove(self, blocks: Sequence[tuple[Root, BlockName]]) -> None:
        """Forget blocks; unknown ones are ignored. When it returns no read gives HIT for them."""
        ...

    def holds(self, root: Root, name: BlockName) -> bool:
        """Say whether a read would probably hit: a hint from memory, never a device access."""
        ...

    async def close(self) -> None:
        """Stop. Operations in flight end with LATE or REFUSED; buffers drain."""
        ...


class StoredTier(Tier, Protocol):
    """A tier with a medium of its own: bounded, listed, counted, and there after a restart."""

    @property
    def used_bytes(self) -> int:
        """Bytes that blocks take on the medium."""
        ...

    @property
    def capacity_bytes(self) -> int:
        """Bytes that they may take."""
        ...

    @property
    def hits(self) -> int:
        """Blocks read and verified, since the start."""
        ...

    @property
    def misses(self) -> int:
        """Blocks asked for and not got, for whatever reason."""
        ...

    @property
    def corrupt(self) -> int:
        """Blocks that failed their sums."""
        ...

    @property
    def evictions(self) -> int:
        """Blocks dropped to make room."""
        ...

    def __len__(self) -> int:
        """Return the number of blocks."""
        ...

    def request(self, prompt: Prompt) -> None:
        """Tell the tier's policy what a request asks for."""
        ...

    def scan(self, cursor: int, limit: int) -> tuple[list[Held], int | None]:
        """Return what the listener was told of, a slice at a time, and where the next begins."""
        ...

    async def clear(self, root: Root | None) -> int:
        """Forget every block under a root (None: all) for good; return how many."""
        ...

    def measure(self) -> None:
        """Set the gauges."""
        ...
