"""Blocks to places: a dict from 64-bit block keys to interned bit sets.

A *place* is one tier of one publisher at one snapshot, and owns one bit. A block's places are one
integer shared by all blocks that lie in the same places, so an entry costs a dict slot and an int
key (about 110 bytes measured at 1.4 M entries). Replacing a whole place is O(1): its bit is
retired at once and cleaned out of the entries by `sweep`, a bounded step at a time, so that a
publisher of a million blocks that comes back never stops the process that keeps the view.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import xor
from struct import Struct
from typing import Final, NamedTuple

import numpy as np

from kvstore.core.limits import NAME_BYTES
from kvstore.core.names import PackedNames
from kvstore.directory.policy import BlockKey, block_key

MAX_INTERNED: Final = 65_536
"""Distinct place sets kept for sharing; beyond it sharing starts anew, nothing else changes."""


MANY_NAMES: Final = 64
"""From so many names on an array costs less than a loop."""

_FIRST_64_BITS: Final = Struct(f"<Q{NAME_BYTES - 8}x").iter_unpack


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


def _keys(root: bytes, names: Sequence[bytes]) -> list[int]:
    """Return `block_key` of every name. Unpacked together: a third of the cost of one by one."""
    under = block_key(root, b"")
    packed = names.packed if isinstance(names, PackedNames) else b"".join(names)
    if len(names) < MANY_NAMES:
        return [key ^ under for (key,) in _FIRST_64_BITS(packed)]
    words = np.frombuffer(packed, "<u8")[:: NAME_BYTES // 8]
    keys: list[int] = (words ^ np.uint64(under)).tolist()
    return keys


class _Span(NamedTuple):
    """Reaches that hold some block of `low` blocks' end and lack the one of `high`."""

    low: int
    high: int
    at_low: int
    at_high: int
    """The places found there."""
    group: list[int]


def _halve(span: _Span, held_at: Callable[[int], int], answers: dict[int, int]) -> None:
    """Find where each reach of a span ends; reaches part where one holds what another lacks."""
    pending = [span]
    while pending:
        low, high, at_low, at_high, group = pending.pop()
        while high - low > 1:
            middle = (low + high) // 2
            held = held_at(middle)
            if held == at_low:
                low = middle
                continue
            lacking = group if held == at_high else [reach for reach in group if not held & reach]
            if len(lacking) == len(group):
                high, at_high = middle, held
                continue
            if lacking:
                pending.append(_Span(low, middle, at_low, held, lacking))
                group = [reach for reach in group if held & reach]
            low, at_low = middle, held
        if low:
            answers.update(dict.fromkeys(group, low))


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
        if len(names) < MANY_NAMES and len(places) + len(names) <= self._max_blocks:
            self._add_few(place, _keys(root, names))
            return
        # Most blocks of a snapshot are new: only those that are known cost a step of their own.
        added = dict.fromkeys(_keys(root, names), interned.setdefault(bit, bit))
        known = added.keys() & places.keys()
        for key in known:
            held = places[key]
            if held & bit:
                del added[key]
            else:
                now = held | bit
                added[key] = interned.setdefault(now, now)
        room = self._max_blocks - len(places)
        if room < len(added):
            left_out = [key for key in added if key not in known][max(0, room) :]
            for key in left_out:
                del added[key]
            place.partial = place.partial or bool(left_out)
        places.update(added)
        place.count += len(added)
        place.xor_keys ^= reduce(xor, added, 0)

    def _add_few(self, place: Place, keys: list[int]) -> None:
        """Note the same of a few blocks, for all of which there is room: the shorter loop."""
        bit, places, interned = place.bit, self._places, self._interned
        added, total, alone = 0, 0, interned.setdefault(bit, bit)
        for key in keys:
            held = places.get(key)
            if held is None:
                places[key] = alone
            elif held & bit:
                continue
            else:
                now = held | bit
                places[key] = interned.setdefault(now, now)
            added += 1
            total ^= key
        place.count += added
        place.xor_keys ^= total

    def discard(self, place: Place, root: bytes, names: Sequence[bytes]) -> None:
        """Note that `place` no longer holds these blocks; unknown ones change nothing."""
        bit, places, interned = place.bit, self._places, self._interned
        removed = dict.fromkeys(_keys(root, names))
        if set(map(places.get, removed)) == {bit}:
            # Blocks that lay nowhere else, as most do: no step in Python for each.
            deque(map(places.pop, removed), maxlen=0)
        else:
            for key in list(removed):
                held = places.get(key, 0)
                if held == bit:
                    del places[key]
                elif held & bit:
                    now = held & ~bit
                    places[key] = interned.setdefault(now, now)
                else:
                    del removed[key]
        place.count -= len(removed)
        place.xor_keys ^= reduce(xor, removed, 0)

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

        def held_at(count: int) -> int:
            """Return the live places of the last of `count` blocks."""
            return places.get(int.from_bytes(names[count - 1][:8], "little") ^ under, 0) & live

        alive = [reach for reach in answers if reach]
        known, step, before = 0, 1, -1
        while alive:
            at = min(known + step, length)
            held = held_at(at)
            if held != before:  # long runs of blocks lie in the same places
                lacking = [reach for reach in alive if not held & reach]
                if lacking:
                    _halve(_Span(known, at, before, held, lacking), held_at, answers)
                    alive = [reach for reach in alive if held & reach]
            if at == length:
                answers.update(dict.fromkeys(alive, length))
                break
            known, step, before = at, step * 2, held
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
