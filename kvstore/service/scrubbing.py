"""Rereads blocks that nobody reads, so that bytes which went bad are found before a reader is.

A client that maps the arena can write where it may not, and memory fails now and then. Leases do
not verify (a hand-off inside a host is guarded by generations), so somebody else has to look.
"""

import asyncio
from typing import Final

import numpy as np

from kvstore.core.slots import SlotState
from kvstore.service.hashing import Hasher
from kvstore.service.slots import SlotTable

DEFAULT_BYTES_PER_S: Final = 64 << 20
"""A thousandth of what memory moves: 32 GiB are read every eight minutes."""
_PERIOD_S: Final = 0.25
_SLOTS_A_TURN: Final = 65_536
"""Slots looked at in one turn, so that an empty arena costs nothing."""
LEAST_BYTES: Final = 64 << 10
"""What a block counts for at least: a small one costs its bookkeeping more than its bytes."""


class Scrubber:
    """Walks the slots of one arena in turn, at so many bytes a second."""

    def __init__(
        self, table: SlotTable, hasher: Hasher, bytes_per_s: int = DEFAULT_BYTES_PER_S
    ) -> None:
        assert bytes_per_s >= 0
        self._table = table
        self._hasher = hasher
        self._bytes_per_s = bytes_per_s
        self._next = 0
        self._owed = 0.0

    async def run(self) -> None:
        """Scrub until cancelled; does nothing at a rate of 0."""
        while self._bytes_per_s:
            await asyncio.sleep(_PERIOD_S)
            self._owed = min(self._owed + self._bytes_per_s * _PERIOD_S, self._bytes_per_s)
            slots = self.turn()
            if slots:
                await self._hasher.scrub(slots)

    def turn(self) -> list[int]:
        """Return the idle blocks whose turn it is, as many bytes as are owed by now. Pure."""
        chosen: list[int] = []
        total = len(self._table.state)
        last = self._next + min(total, _SLOTS_A_TURN)
        for first, stop in ((self._next, min(last, total)), (0, max(0, last - total))):
            for slot in self._idle(first, stop):
                if self._owed <= 0:
                    self._next = slot
                    return chosen
                chosen.append(slot)
                size = self._table.root_of(slot).shape.payload_bytes
                self._owed -= max(size, LEAST_BYTES)
            if stop > first:
                self._next = stop % total
        return chosen

    def _idle(self, first: int, stop: int) -> list[int]:
        """Return which of the slots hold a block that nobody reads."""
        table = self._table
        sealed = np.frombuffer(table.state, np.uint8)[first:stop] == SlotState.SEALED
        servable = np.frombuffer(table.servable, np.uint8)[first:stop] != 0
        unread = np.frombuffer(table.pins, np.uint32)[first:stop] == 0
        idle: list[int] = (np.flatnonzero(sealed & servable & unread) + first).tolist()
        return idle
