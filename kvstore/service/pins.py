"""Blocks that stay for a time whatever the policy thinks, within a quota for each share domain.

Pure: time is passed in. A pin keeps a block in the arena, and its copies in the tiers below too; it
ends by its time, by word, when the block is cleared, and with the node's process: the next
incarnation knows of none.
"""

from collections.abc import Sequence
from typing import NamedTuple

from kvstore.core.limits import NAME_BYTES
from kvstore.directory.policy import BlockKey
from kvstore.service.roots import RootInfo, keys_of
from kvstore.service.slots import SlotTable


class _Pin(NamedTuple):
    expires_ms: float
    domain: str
    block_bytes: int


class Pins:
    """The pins of one table."""

    def __init__(self, table: SlotTable, quota_bytes: int) -> None:
        self._table = table
        self._quota_bytes = quota_bytes
        self._pins: dict[int, _Pin] = {}
        self._bytes: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._pins)

    def holds(self, key: BlockKey) -> bool:
        """Say whether the block with this key is pinned: no tier drops it to make room."""
        slot = self._table.index.get(key)
        return slot is not None and slot in self._pins

    @property
    def total_bytes(self) -> int:
        """Return the bytes of all pinned blocks."""
        return sum(self._bytes.values())

    def pin(self, info: RootInfo, packed: bytes, ttl_ms: int, now_ms: float) -> int:
        """Pin those of the names that are here until `ttl_ms` from now; returns how many are.

        In order, and only as many as the domain's quota has room for. Pinned again, a block stays
        until the later of the two times.
        """
        size = info.shape.block_bytes
        pinned = 0
        for slot in self._resident(info, packed):
            known = self._pins.get(slot)
            expires_ms = now_ms + ttl_ms
            if known is None:
                if self._bytes.get(info.domain, 0) + size > self._quota_bytes:
                    break
                self._table.pin([slot])
                self._bytes[info.domain] = self._bytes.get(info.domain, 0) + size
            else:
                expires_ms = max(expires_ms, known.expires_ms)
            self._pins[slot] = _Pin(expires_ms, info.domain, size)
            pinned += 1
        return pinned

    def unpin(self, info: RootInfo, packed: bytes) -> int:
        """End the pins of names; returns how many there were."""
        slots = [slot for slot in self._resident(info, packed) if slot in self._pins]
        for slot in slots:
            self.end(slot)
        return len(slots)

    def expire(self, now_ms: float) -> int:
        """End the pins whose time is over; returns how many."""
        over = [slot for slot, pin in self._pins.items() if pin.expires_ms <= now_ms]
        for slot in over:
            self.end(slot)
        return len(over)

    def end(self, slot: int) -> None:
        """End the pin of a slot, if it has one."""
        pin = self._pins.pop(slot, None)
        if pin is None:
            return
        self._bytes[pin.domain] -= pin.block_bytes
        if not self._bytes[pin.domain]:
            del self._bytes[pin.domain]
        self._table.unpin([slot])

    def _resident(self, info: RootInfo, packed: bytes) -> Sequence[int]:
        table = self._table
        found: list[int] = []
        for index, key in enumerate(keys_of(info, packed)):
            slot = table.find(info, key, packed[index * NAME_BYTES : (index + 1) * NAME_BYTES])
            if slot is not None and table.servable[slot]:
                found.append(slot)
        return found
