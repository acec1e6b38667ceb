"""Blocks to places: dicts from 64-bit block keys to interned bit sets.

A *place* is one tier of one publisher at one snapshot, and owns one bit. A block's places are one
integer shared by all blocks that lie in the same places, so an entry costs a dict slot and an int
key (about 80 bytes). Replacing a whole place is O(1): its bit is retired at once and cleaned out
of the entries by `sweep`, a bounded step at a time, so that a publisher of a million blocks that
comes back never stops the process that keeps the view.

Nor does growth: a dict that is full moves all its entries at once, 120 ms for 1.4 M, so there are
`SHARDS` of them, by the first byte of the name.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import repeat
from operator import xor
from struct import Struct
from typing import Final, NamedTuple

import numpy as np

from kvstore.core.limits import NAME_BYTES
from kvstore.core.names import PackedNames
from kvstore.directory.policy import block_key

MAX_INTERNED: Final = 65_536
"""Distinct place sets kept for sharing; beyond it sharing starts anew, nothing else changes."""


SHARDS: Final = 64
"""More would stop for less: one of 64 grows in about 1 ms at 2 M blocks, in 10 ms at 16 M. Fewer
would make events cheaper, which touch a place in memory for each (docs/router.md)."""

MANY_NAMES: Final = 16
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


def _keys(root: bytes, packed: bytes) -> list[int]:
    """Return `block_key` of every name. Unpacked together: a third of the cost of one by one."""
    under = block_key(root, b"")
    if len(packed) < MANY_NAMES * NAME_BYTES:
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
        answers.update(dict.fromkeys(group, low))


@dataclass(slots=True)
class _Sweep:
    """Where a sweep stands."""

    places: int
    """What is cleaned out; 0 while none runs."""
    shards: list[dict[int, int]]
    """Not begun yet."""
    shard: dict[int, int] = field(default_factory=dict)
    keys: list[int] = field(default_factory=list)
    """Entries of `shard` still to be looked at."""


class BlockIndex:
    """Which blocks lie in which places. Holds at most `max_blocks` blocks."""

    def __init__(self, *, max_blocks: int) -> None:
        assert max_blocks > 0
        self._max_blocks = max_blocks
        self._shards: list[dict[int, int]] = [{} for _ in range(SHARDS)]
        self._by_first_byte = tuple(self._shards[byte % SHARDS] for byte in range(256))
        self._blocks = 0
        self._interned: dict[int, int] = {}
        self._free_bits: list[int] = []
        self._next_bit = 0
        self._retired = 0
        self._sweep = _Sweep(0, [])

    def __len__(self) -> int:
        """Return the number of blocks with at least one entry, retired places included."""
        return self._blocks

    def places_of(self, root: bytes, name: bytes) -> int:
        """Return the bits of the live places that hold a block."""
        return self._by_first_byte[name[0]].get(block_key(root, name), 0) & ~self._retired

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
        keys, shards, held = self._find(root, names)
        if len(self._interned) > MAX_INTERNED:
            self._interned.clear()
        if held is None or self._blocks + len(keys) > self._max_blocks:
            self._add_each(place, keys, shards)
        elif not held & place.bit:
            # All lie in the same places, mostly nowhere: no step in Python for each.
            now = self._intern(held | place.bit)
            deque(map(dict.__setitem__, shards, keys, repeat(now)), maxlen=0)
            self._blocks += 0 if held else len(keys)
            place.count += len(keys)
            place.xor_keys ^= reduce(xor, keys, 0)

    def discard(self, place: Place, root: bytes, names: Sequence[bytes]) -> None:
        """Note that `place` no longer holds these blocks; unknown ones change nothing."""
        keys, shards, held = self._find(root, names)
        if held is None:
            self._discard_each(place, keys, shards)
        elif held & place.bit:
            now = self._intern(held & ~place.bit)
            if now:
                deque(map(dict.__setitem__, shards, keys, repeat(now)), maxlen=0)
            else:
                deque(map(dict.pop, shards, keys), maxlen=0)
                self._blocks -= len(keys)
            place.count -= len(keys)
            place.xor_keys ^= reduce(xor, keys, 0)

    def _find(
        self, root: bytes, names: Sequence[bytes]
    ) -> tuple[list[int], list[dict[int, int]], int | None]:
        """Return keys and shards of blocks, and their places where all lie in the same ones."""
        packed = names.packed if isinstance(names, PackedNames) else b"".join(names)
        keys = _keys(root, packed)
        shards = [*map(self._by_first_byte.__getitem__, packed[::NAME_BYTES])]
        held = set(map(dict.get, shards, keys, repeat(0)))
        if len(held) != 1 or len(set(keys)) != len(keys):
            return keys, shards, None
        return keys, shards, held.pop()

    def _intern(self, places: int) -> int:
        return self._interned.setdefault(places, places)

    def _add_each(self, place: Place, keys: list[int], shards: list[dict[int, int]]) -> None:
        bit, added, total = place.bit, 0, 0
        room = self._max_blocks - self._blocks
        for key, shard in zip(keys, shards, strict=True):
            held = shard.get(key, 0)
            if held & bit:
                continue
            if not held:
                if room <= 0:
                    place.partial = True
                    continue
                room -= 1
            shard[key] = self._intern(held | bit)
            added += 1
            total ^= key
        self._blocks = self._max_blocks - room
        place.count += added
        place.xor_keys ^= total

    def _discard_each(self, place: Place, keys: list[int], shards: list[dict[int, int]]) -> None:
        bit = place.bit
        for key, shard in zip(keys, shards, strict=True):
            held = shard.get(key, 0)
            if held == bit:
                del shard[key]
                self._blocks -= 1
            elif held & bit:
                shard[key] = self._intern(held & ~bit)
            else:
                continue
            place.count -= 1
            place.xor_keys ^= key

    def match(self, root: bytes, names: Sequence[bytes], reaches: Iterable[int]) -> dict[int, int]:
        """Return, for each set of places, how many leading blocks lie somewhere in it.

        A hint: with holes it can promise too much or too little (see `longest_prefix`). All sets
        are halved together and part where one holds a block that another lacks, so a probe of the
        index is made once for all whose answer it can change: log2(blocks) + 2 probes where none
        parts, one where nothing is held.
        """
        length = len(names)
        answers = dict.fromkeys(reaches, 0)
        if not length:
            return answers
        under, shards, live = block_key(root, b""), self._by_first_byte, ~self._retired
        number = int.from_bytes

        def held_at(count: int) -> int:
            """Return the live places of the last of `count` blocks."""
            name = names[count - 1]
            return shards[name[0]].get(number(name[:8], "little") ^ under, 0) & live

        at_first = held_at(1)
        alive = [reach for reach in answers if at_first & reach]
        if not alive:
            return answers
        at_last = held_at(length)
        answers.update(dict.fromkeys(alive, length))
        ended = [reach for reach in alive if not at_last & reach]
        if ended:
            _halve(_Span(1, length, at_first, at_last, ended), held_at, answers)
        return answers

    def sweep(self, limit: int) -> int:
        """Clean retired places out of at most `limit` entries; return how many were looked at.

        0 means that nothing is left to do. Call it again and again, with pauses, from the owner.
        """
        sweep = self._sweep
        if not sweep.places:
            if not self._retired:
                return 0
            sweep = self._sweep = _Sweep(self._retired, list(self._shards))
        looked = 0
        while looked < limit and (sweep.keys or sweep.shards):
            if not sweep.keys:
                sweep.shard = sweep.shards.pop()
                sweep.keys = list(sweep.shard)
            batch = sweep.keys[looked - limit :]
            del sweep.keys[looked - limit :]
            looked += len(batch)
            self._clean(sweep, batch)
        if not sweep.keys and not sweep.shards:
            self._finish_sweep(sweep.places)
        return max(1, looked)

    def _clean(self, sweep: _Sweep, keys: list[int]) -> None:
        """Take swept places out of some blocks of one shard."""
        shard, swept = sweep.shard, sweep.places
        for key in keys:
            held = shard.get(key, 0)
            if not held & swept:
                continue
            now = held & ~swept
            if now:
                shard[key] = self._intern(now)
            else:
                del shard[key]
                self._blocks -= 1

    def _finish_sweep(self, swept: int) -> None:
        """Give the swept bits back for new places."""
        self._retired &= ~swept
        self._sweep = _Sweep(0, [])
        while swept:
            lowest = swept & -swept
            self._free_bits.append(lowest.bit_length() - 1)
            swept ^= lowest
