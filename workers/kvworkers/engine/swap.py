"""Copies pages of those that make way to private slots of the arena, and back.

    out:    ReservePrivate ─▶ copy ─▶ still ours?
    back:   copy ─▶ still ours? ─▶ give the slots up

Pages are copied as they are, whatever form the store keeps blocks in, so they come back bit for
bit. Coming back needs no call: slots stay ours while the node is away or restarted. Every
failure is counted and means that the request is computed anew.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from kvstore.client import AsyncClient, SlotRef
from kvstore.core.errors import KvStoreError
from kvstore.core.outcomes import MissReason
from kvstore.observe.metrics import WorkerMetrics
from kvworkers.stream.mover import Mover

_UNMEASURED_BYTES_PER_S: Final = 10e9
"""A fifth of a PCIe 5 link, and what a CPU copies: good enough until something was copied."""
_SMOOTH: Final = 0.3
"""Weight of the newest copy in the measured rate."""


_SLOTS_A_CALL: Final = 1_024
"""Reserving more at once would keep the node from answering others: these take it some 15 ms."""


class SwapSpace:
    """Private slots of one client's session, filled and read by one mover."""

    def __init__(
        self,
        client: AsyncClient,
        mover: Mover,
        metrics: WorkerMetrics,
        *,
        most_bytes: int | None,
        call_ms: int,
        failed: Callable[[str, KvStoreError], MissReason],
        give_up: Callable[[Sequence[SlotRef]], None],
    ) -> None:
        """Hold at most `most_bytes` at once; None: as the node lets us.

        `failed` counts a failed call; `give_up` gives slots back, now or as soon as that works.
        """
        self._client = client
        self._mover = mover
        self._metrics = metrics
        self._most_bytes = most_bytes
        self._call_ms = call_ms
        self._failed = failed
        self._give_up = give_up
        self._page_bytes = mover.forms.pages.block_bytes
        self._bytes_per_s = _UNMEASURED_BYTES_PER_S
        self._loop = asyncio.get_running_loop()
        self.used_bytes = 0
        """In slots that we hold."""

    @property
    def block_ms(self) -> float:
        """Milliseconds that copying one page takes, as measured."""
        return self._page_bytes / self._bytes_per_s * 1000

    def has_room(self, pages: int) -> bool:
        """Say whether our own bound leaves room for so many pages; the node may have none."""
        if self._most_bytes is None:
            return True
        return self.used_bytes + pages * self._page_bytes <= self._most_bytes

    async def out(self, pages: Sequence[int]) -> list[SlotRef] | None:
        """Copy pages out; return their slots, or None where they cannot be kept.

        The caller holds the pages and nobody writes them. The slots are its to `drop`.
        """
        if not self.has_room(len(pages)):
            return None
        self.used_bytes += len(pages) * self._page_bytes
        kept, slots = False, list[SlotRef]()
        try:
            while len(slots) < len(pages):
                wanted = min(_SLOTS_A_CALL, len(pages) - len(slots))
                got = await self._client.private.reserve(
                    wanted, block_bytes=self._page_bytes, deadline_ms=self._call_ms
                )
                slots += got.slots
                if len(got.slots) < wanted:
                    break
            kept = len(slots) == len(pages) and await self._copy(slots, pages, out=True)
        except KvStoreError as error:
            self._failed("swap", error)
        finally:
            if not kept:
                self.used_bytes -= len(pages) * self._page_bytes
                self._give_up(slots)
        return slots if kept else None

    async def back(self, slots: Sequence[SlotRef], pages: Sequence[int]) -> bool:
        """Copy slots into pages; False where their bytes may not be what went out.

        The slots stay the caller's to `drop`.
        """
        try:
            good = await self._copy(slots, pages, out=False)
        except KvStoreError as error:
            self._failed("swap", error)
            return False
        if not good:
            self._metrics.void_blocks.inc(len(slots))
        return good

    def drop(self, slots: Sequence[SlotRef]) -> None:
        """Give up slots whose bytes nobody needs any more."""
        self.used_bytes -= len(slots) * self._page_bytes
        self._give_up(slots)

    async def _copy(self, slots: Sequence[SlotRef], pages: Sequence[int], *, out: bool) -> bool:
        """Copy one way; say whether the slots were ours all the time.

        Raises `SessionLost` for slots of an arena before the one that is mapped now.
        """
        self._client.view(slots[0])
        arena, offsets = self._client.arena, [slot.offset for slot in slots]
        if self._mover.reachable(arena, offsets, raw=True) < len(slots):
            return False
        began = self._loop.time()
        if out:
            await self._mover.store(pages, arena, offsets, raw=True)
        else:
            await self._mover.load(arena, offsets, pages, raw=True)
        # Only now: another keeper has another arena, whose slots were never ours.
        if not self._client.private.holds(slots):
            return False
        seconds, size = self._loop.time() - began, len(slots) * self._page_bytes
        if seconds > 0:
            self._bytes_per_s += _SMOOTH * (size / seconds - self._bytes_per_s)
        direction = "swap_out" if out else "swap_in"
        self._metrics.move_seconds.labels(direction).observe(seconds)
        self._metrics.moved_bytes.labels(direction).inc(size)
        return True
