"""Rereads blocks that nobody reads, so that bytes which went bad are found before a reader is.

A client that maps the arena can write where it may not, and memory fails now and then. Leases do
not verify (a hand-off inside a host is guarded by generations), so somebody else has to look.
"""

import asyncio
from typing import Final

from kvstore.core.slots import SlotState
from kvstore.service.hashing import Hasher
from kvstore.service.slots import SlotTable

DEFAULT_BYTES_PER_S: Final = 64 << 20
"""A thousandth of what memory moves: 32 GiB are read every eight minutes."""
_PERIOD_S: Final = 0.25
_SLOTS_A_TURN: Final = 65_536
"""Slots looked at in one turn, so that an empty arena costs nothing."""


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
        table, chosen = self._table, list[int]()
        for _ in range(min(len(table.state), _SLOTS_A_TURN)):
            if self._owed <= 0:
                break
            slot, self._next = self._next, (self._next + 1) % len(table.state)
            sealed = table.state[slot] == SlotState.SEALED
            if sealed and table.servable[slot] and not table.pins[slot]:
                chosen.append(slot)
                self._owed -= table.root_of(slot).shape.payload_bytes
        return chosen
