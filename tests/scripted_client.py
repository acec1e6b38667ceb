"""A client that answers what a test told it to, over memory of its own."""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from kvstore.client import Acquired, Reserved, SlotRef
from kvstore.core.errors import KvStoreError
from kvstore.core.names import BlockName
from kvstore.core.outcomes import MissReason
from kvstore.directory.events import TierKind


class ScriptedClient:
    """Stands for `AsyncClient`: `ready` and `pending` blocks are there, the rest is scripted."""

    def __init__(self, block: int, *, slots: int = 8) -> None:
        """`block` bytes each; slot n is block n of the prompt."""
        self.block_bytes = block
        self.arena = memoryview(bytearray(b"\x07") * (slots * block))
        self.first_block = 0
        """Where the prompt's part that is asked for begins."""
        self.ready = 0
        self.pending = 0
        self.reserved: list[int] = []
        self.arrives = 0
        self.stale: set[int] = set()
        self.error: KvStoreError | None = None
        self.block: asyncio.Event | None = None
        self.calls: list[str] = []
        self.asked: list[tuple[int, int, int]] = []
        """First block, names and reservations of each `acquire`."""
        self.patience: list[int | None] = []
        """Milliseconds that blocks from below were given, in asking and in waiting."""
        self.settled: list[dict[str, list[Any]]] = []

    def slot(self, number: int) -> SlotRef:
        return SlotRef(number, 1, number * self.block_bytes, TierKind.DRAM, 1)

    async def acquire(self, names: Sequence[BlockName], **options: Any) -> Acquired:
        self.calls.append("acquire")
        self.asked.append((options.get("first_block", 0), len(names), options.get("reserve", 0)))
        self.patience.append(options.get("pending_ms"))
        if self.error is not None:
            raise self.error
        first = options.get("first_block", 0) - self.first_block
        here = max(0, min(len(names), self.ready + self.pending - first))
        found = [self.slot(first + n) for n in range(here)]
        ready = max(0, self.ready - first)
        return Acquired(
            lease=5,
            lease_ms=1_000,
            ready=found[:ready],
            pending=found[ready:],
            reserved=[Reserved(index, self.slot(index)) for index in self.reserved],
            reason=MissReason.ABSENT,
            reserve_reason=MissReason.NONE,
            incarnation=1,
        )

    async def settle(self, *, deadline_ms: int, **lists: Iterable[Any]) -> None:
        self.calls.append("settle")
        if self.block is not None:
            await self.block.wait()
        if self.error is not None:
            raise self.error
        self.settled.append({name: list(items) for name, items in lists.items()})

    async def wait_ready(self, refs: Sequence[SlotRef], *, deadline_ms: int) -> int:
        self.patience.append(deadline_ms)
        return min(self.arrives, len(refs))

    def still(self, ref: SlotRef) -> bool:
        return ref.slot not in self.stale

    def view(self, ref: SlotRef) -> memoryview:
        return self.arena[ref.offset : ref.offset + self.block_bytes]
