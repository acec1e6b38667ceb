"""Blocks to places: a dict from 64-bit block keys to interned bit sets.

A *place* is one tier of one publisher at one snapshot, and owns one bit. A block's places are one
integer shared by all blocks that lie in the same places, so an entry costs a dict slot and an int
key (about 110 bytes measured at 1.4 M entries). Replacing a whole place is O(1): its bit is
retired at once and cleaned out of the entries by `sweep`, a bounded step at a time, so that a
publisher of a million blocks that comes back never stops the process that keeps the view.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from kvstore.directory.policy import BlockKey, block_key

MAX_INTERNED: Final = 65_536
"""Distinct place sets kept for sharing; beyond it sharing starts anew, nothing else changes."""


@dataclass(slots=True)
class Place:
    """One tier of one publisher: its bit, and the digest of what is known to lie there."""

    bit: int
    count: int = 0
    xor_keys: int = 0
    partial: bool = False
    """Blocks were left out because the index is full: the digest cannot be compared."""


def longest_prefix(has: Callable[[int], bool], length: int) -> int:
    """Return how many leading indexes satisfy `has`, by doubling and then halving.

    Exact when `has` is true up to some index and false after it. With holes the answer is some
    index whose predecessor satisfied `has`, or 0: a hint, in O(log answer) probes for short ones.
    """
    known, step = 0, 1
    while known + step <= length and has(known + step - 1):
        known += step
        step *= 2
    limit = min(known + step - 1, length)  # `has(limit)` is known to be false, or limit == length
    while known < limit:
        middle = (known + limit + 1) // 2
        if has(middle - 1):
            known = middle
        else:
            limit = middle - 1
    return known


class BlockIndex:
    """Which blocks lie in which places. Holds at most `max_blocks` blocks."""

    def __init__(self, *, max_blocks: int) -> None:
        assert max_blocks > 0
        self._max_blocks = max_blocks
        self._places: dict[int, int] = {}
        self._interned: dict[int, int] = {}
        self._free_bits: list[int] = []
        self._next_bit = 0
        self._retired = 0
        self._sweeping = 0
        self._sweep_keys: list[int] = []

    def __len__(self) -> int:
        """Return the number of blocks with at least one entry, retired places included."""
        return len(self._places)

    def places_of(self, key: BlockKey) -> int:
        """Return the bits of the live places that hold a block."""
        return self._places.get(key, 0) & ~self._retired

    def new_place(self) -> Place:
        """Return an empty place with a bit of its own."""
        if self._free_bits:
            return Place(1 << self._free_bits.pop())
        self._next_bit += 1
        return Place(1 << (self._next_bit - 1))

    def retire(self, place: Place) -> None:
        """Void a place: no match sees it from now on; `sweep` gives its bit back later."""
        assert not self._retired & place.bit, "a place is retired once"
        self._retired |= place.bit

    def add(self, place: Place, root: bytes, names: Sequence[bytes]) -> None:
        """Note that `place` holds these blocks; those known already change nothing."""
        bit, places, interned = place.bit, self._places, self._interned
        if len(interned) > MAX_INTERNED:
            interned.clear()
        under, added, xor = block_key(root, b""), 0, 0
        room = self._max_blocks - len(places)
        for name in names:
            key = int.from_bytes(name[:8], "little") ^ under
            held = places.get(key)
            if held is None:
                if room <= 0:
                    place.partial = True
                    continue
                room -= 1
                held = 0
            elif held & bit:
                continue
            now = held | bit
            places[key] = interned.setdefault(now, now)
            added += 1
            xor ^= key
        place.count += added
        place.xor_keys ^= xor

    def discard(self, place: Place, root: bytes, names: Sequence[bytes]) -> None:
        """Note that `place` no longer holds these blocks; unknown ones change nothing."""
        bit, places, interned = place.bit, self._places, self._interned
        under, removed, xor = block_key(root, b""), 0, 0
        for name in names:
            key = int.from_bytes(name[:8], "little") ^ under
            held = places.get(key, 0)
            if not held & bit:
                continue
            now = held & ~bit
            if now:
                places[key] = interned.setdefault(now, now)
            else:
                del places[key]
            removed += 1
            xor ^= key
        place.count -= removed
        place.xor_keys ^= xor

    def match(self, root: bytes, names: Sequence[bytes], reaches: Sequence[int]) -> list[int]:
        """Return, for each set of places, how many leading blocks lie somewhere in it.

        A hint: with holes it can promise too much or too little (see `longest_prefix`). All sets
        gallop together and part where one holds a block that another lacks, so a probe of the
        index is made once for all whose answer it can change: O(log blocks) probes where few part.
        """
        length = len(names)
        answers: dict[int, int] = dict.fromkeys(reaches, 0)
        if not length:
            return [0] * len(reaches)
        under, places, live = block_key(root, b""), self._places, ~self._retired
        alive = [reach for reach in answers if reach]
        pending: list[tuple[int, int, list[int]]] = []
        known, step = 0, 1
        while alive:
            at = min(known + step, length)
            held = places.get(int.from_bytes(names[at - 1][:8], "little") ^ under, 0) & live
            lacking = [reach for reach in alive if not held & reach]
            if lacking:
                pending.append((known, at, lacking))
                alive = [reach for reach in alive if held & reach]
            if at == length:
                answers.update(dict.fromkeys(alive, length))
                break
            known, step = at, step * 2
        while pending:
            low, high, group = pending.pop()  # all hold block `low - 1`, none `high - 1`
            while high - low > 1:
                middle = (low + high) // 2
                name = names[middle - 1]
                held = places.get(int.from_bytes(name[:8], "little") ^ under, 0) & live
                holding = [reach for reach in group if held & reach]
                if not holding:
                    high = middle
                    continue
                if len(holding) < len(group):
                    pending.append((low, middle, [reach for reach in group if not held & reach]))
                    group = holding
                low = middle
            if low:
                answers.update(dict.fromkeys(group, low))
        return [answers[reach] for reach in reaches]

    def sweep(self, limit: int) -> int:
        """Clean retired places out of at most `limit` entries; return how many were looked at.

        0 means that nothing is left to do. Call it again and again, with pauses, from the owner.
        """
        if not self._sweeping:
            if not self._retired:
                return 0
            self._sweeping = self._retired
            self._sweep_keys = list(self._places)
        keep = ~self._sweeping
        batch = self._sweep_keys[-limit:]
        del self._sweep_keys[-limit:]
        for key in batch:
            held = self._places.get(key, 0)
            if not held & self._sweeping:
                continue
            now = held & keep
            if now:
                self._places[key] = self._interned.setdefault(now, now)
            else:
                del self._places[key]
        if not self._sweep_keys:
            self._finish_sweep()
        return max(1, len(batch))

    def _finish_sweep(self) -> None:
        """Give the swept bits back for new places."""
        swept = self._sweeping
        self._retired &= ~swept
        self._sweeping = 0
        while swept:
            lowest = swept & -swept
            self._free_bits.append(lowest.bit_length() - 1)
            swept ^= lowest
