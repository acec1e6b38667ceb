"""A client that answers what a test told it to, over memory of its own."""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from kvstore.client import Acquired, Reserved, SlotRef
from kvstore.client.private import PrivateReserved
from kvstore.core.errors import KvStoreError
from kvstore.core.names import BlockName
from kvstore.core.outcomes import MissReason
from kvstore.directory.events import TierKind


class ScriptedPrivate:
    """Stands for `PrivateSlots`: places behind the blocks, of the blocks' own size."""

    def __init__(self, client: "ScriptedClient") -> None:
        self.error: KvStoreError | None = None
        self.lost = False
        """Whether the slots are another's now, as after a keeper's restart."""
        self.free: list[int] = []
        self.taken: set[int] = set()
        self._client = client

    def room(self, slots: int) -> None:
        """Make room for so many; before anyone has looked at the arena."""
        client = self._client
        first = len(client.arena) // client.block_bytes
        client.arena = memoryview(bytearray(len(client.arena) + slots * client.block_bytes))
        self.free = list(range(first, first + slots))

    async def reserve(self, count: int, *, block_bytes: int, deadline_ms: int) -> PrivateReserved:
        assert block_bytes == self._client.block_bytes
        self._client.calls.append("reserve")
        if self.error is not None:
            raise self.error
        numbers = [self.free.pop() for _ in range(min(count, len(self.free)))]
        self.taken.update(numbers)
        reason = MissReason.NONE if len(numbers) == count else MissReason.QUOTA
        return PrivateReserved([self._client.slot(n) for n in numbers], reason)

    def holds(self, slots: Sequence[SlotRef]) -> bool:
        return not self.lost and self.taken.issuperset(ref.slot for ref in slots)

    def give_back(self, slots: Iterable[SlotRef]) -> None:
        for ref in slots:
            if ref.slot in self.taken:
                self.taken.remove(ref.slot)
                self.free.append(ref.slot)


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
        self.private = ScriptedPrivate(self)

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
        kept = {name: list(items) for name, items in lists.items()}
        self.settled.append(kept)
        self.private.give_back(kept.get("abort", []))

    async def wait_ready(self, refs: Sequence[SlotRef], *, deadline_ms: int) -> int:
        self.patience.append(deadline_ms)
        return min(self.arrives, len(refs))

    def still(self, ref: SlotRef) -> bool:
        return ref.slot not in self.stale

    def view(self, ref: SlotRef) -> memoryview:
        return self.arena[ref.offset : ref.offset + self.block_bytes]
