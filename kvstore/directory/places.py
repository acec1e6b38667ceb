"""Blocks to places: dicts from names to bit sets, some for each root.

A *place* is one tier of one publisher at one snapshot, and owns one bit. A block's places are one
integer shared by the blocks of one event or of the same places, so an entry costs a dict slot and
its name (about 105 bytes). Names are the keys as they come: they know their hash, so a match makes
nothing to look one up, and two blocks are never taken for one. Replacing a whole place is O(1): its
bit is retired at once and cleaned out of the entries by `sweep`, a bounded step at a time, so that
a publisher of a million blocks that comes back never stops the process that keeps the view.

Nor does growth: a dict that is full moves all its entries at once, 120 ms for 1.4 M, so there are
`SHARDS` of them for each root, by the first byte of the name.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import countOf
from struct import Struct
from typing import Final, NamedTuple

import numpy as np

from kvstore.core.limits import NAME_BYTES
from kvstore.core.names import PackedNames
from kvstore.directory.place import Place

MAX_INTERNED: Final = 65_536
"""Distinct place sets kept for sharing; beyond it sharing starts anew, nothing else changes."""

SHARDS: Final = 64
"""More would stop for less: one of 64 grows in about 1 ms at 2 M blocks, in 10 ms at 16 M. Fewer
would make events cheaper, which touch a place in memory for each (docs/router.md)."""

ROOT_BLOCKS: Final = 64
"""What the empty dicts of a root take, in blocks (about 6.5 kB), so that many roots keep to the
bound as well."""

MANY_NAMES: Final = 16
"""From so many names on calls for all of them cost less than a loop."""

FIRST_BIT: Final = 9
"""Bit of the first place. Python keeps one object of each integer up to 256; above, the integer
made for an event is an object of its own, by which its new blocks are told from known ones."""

_CUTS: Final = tuple(Struct(f"{NAME_BYTES}s" * names).unpack for names in range(65))
"""Cut short runs of names in half the time that an array takes."""


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


class _Span(NamedTuple):
    """Reaches that hold some block of `low` blocks' end and lack the one of `high`."""

    low: int
    high: int
    at_low: int
    at_high: int
    """The places found there."""
    group: list[int]


class _Table:
    """The blocks of one root."""

    __slots__ = ("blocks", "by_first_byte", "shards")

    def __init__(self) -> None:
        self.blocks = 0
        self.shards: list[dict[bytes, int]] = [{} for _ in range(SHARDS)]
        self.by_first_byte = tuple(self.shards[byte % SHARDS] for byte in range(256))

    def halve(
        self, span: _Span, names: Sequence[bytes], live: int, answers: dict[int, int]
    ) -> None:
        """Find where each reach of a span ends; they part where one holds what another lacks."""
        pending, shards = [span], self.by_first_byte
        while pending:
            low, high, at_low, at_high, group = pending.pop()
            while high - low > 1:
                middle = (low + high) // 2
                name = names[middle - 1]
                held = shards[name[0]].get(name, 0) & live
                if held == at_low:
                    low = middle
                    continue
                lacks = group if held == at_high else [reach for reach in group if not held & reach]
                if len(lacks) == len(group):
                    high, at_high = middle, held
                    continue
                if lacks:
                    pending.append(_Span(low, middle, at_low, held, lacks))
                    group = [reach for reach in group if held & reach]
                low, at_low = middle, held
            answers.update(dict.fromkeys(group, low))


class _Batch:
    """Blocks of one event, cut and with the dict of each."""

    __slots__ = ("names", "packed", "root", "shards", "table")

    def __init__(self, root: bytes, names: Sequence[bytes], table: _Table) -> None:
        self.root = root
        self.table = table
        if isinstance(names, PackedNames):
            self.packed = names.packed
            count = len(self.packed) // NAME_BYTES
            self.names: Sequence[bytes] = (
                _CUTS[count](self.packed)
                if count < len(_CUTS)
                else np.frombuffer(self.packed, f"V{NAME_BYTES}").tolist()
            )
        else:
            self.names, self.packed = names, b"".join(names)
        self.shards = [*map(table.by_first_byte.__getitem__, self.packed[::NAME_BYTES])]

    def alike(self) -> int | None:
        """Return the places of all these blocks; None where they differ or one comes twice."""
        held = set(map(dict.get, self.shards, self.names, repeat(0)))
        if len(held) != 1 or len(set(self.names)) != len(self.names):
            return None
        return held.pop()

    def put(self, places: int) -> None:
        """Let all these blocks lie in `places`."""
        deque(map(dict.__setitem__, self.shards, self.names, repeat(places)), maxlen=0)


@dataclass(slots=True)
class _Sweep:
    """Where a sweep stands."""

    places: int
    """What is cleaned out; 0 while none runs."""
    roots: list[tuple[bytes, _Table]]
    """Not begun yet."""
    root: bytes = b""
    table: _Table = field(default_factory=_Table)
    shards: list[dict[bytes, int]] = field(default_factory=list)
    """Those of `table` not begun yet."""
    shard: dict[bytes, int] = field(default_factory=dict)
    keys: list[bytes] = field(default_factory=list)
    """Entries of `shard` still to be looked at."""

    def next_keys(self, limit: int) -> list[bytes]:
        """Return the next entries of one shard, at most `limit`; none where all were looked at."""
        while not self.keys:
            if not self.shards:
                if not self.roots:
                    return []
                self.root, self.table = self.roots.pop()
                self.shards = list(self.table.shards)
            self.shard = self.shards.pop()
            self.keys = list(self.shard)
        batch = self.keys[-limit:]
        del self.keys[-limit:]
        return batch


class BlockIndex:
    """Which blocks lie in which places. Holds at most `max_blocks` blocks."""

    def __init__(self, *, max_blocks: int) -> None:
        assert max_blocks > 0
        self._max_blocks = max_blocks
        self._tables: dict[bytes, _Table] = {}
        self._blocks = 0
        self._interned: dict[int, int] = {}
        self._free_bits: list[int] = []
        self._next_bit = FIRST_BIT
        self._retired = 0
        self._sweep: _Sweep | None = None

    def __len__(self) -> int:
        """Return the number of blocks with at least one entry, retired places included."""
        return self._blocks

    def places_of(self, root: bytes, name: bytes) -> int:
        """Return the bits of the live places that hold a block."""
        table = self._tables.get(root)
        return table.by_first_byte[name[0]].get(name, 0) & ~self._retired if table else 0

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
        if len(self._interned) > MAX_INTERNED:
            self._interned.clear()
        table = self._tables.get(root)
        others = len(self._tables) - (table is not None)  # roots besides this one
        room = self._max_blocks - self._blocks - ROOT_BLOCKS * others
        if table is None:
            if room <= 0:
                place.partial = True
                return
            table = self._tables[root] = _Table()
        batch = _Batch(root, names, table)
        many = MANY_NAMES <= len(batch.names) <= room
        if many and batch.names[0] not in batch.shards[0]:
            self._add_new(place, batch)
        elif many and (held := batch.alike()):
            if not held & place.bit:
                batch.put(self._intern(held | place.bit))
                place.came(root, batch.packed, len(batch.names))
        else:
            self._add_each(place, batch, room)

    def _add_new(self, place: Place, batch: _Batch) -> None:
        """Add blocks that are probably all unknown: one look at each tells and sets."""
        names, table = batch.names, batch.table
        fresh = place.bit ^ 0  # another object than any in the index (`FIRST_BIT`)
        found = [*map(dict.setdefault, batch.shards, names, repeat(fresh))]
        added = sum(map(len, table.shards)) - table.blocks
        table.blocks += added
        self._blocks += added
        if added == len(names):
            place.came(batch.root, batch.packed, added)
            return
        came: dict[bytes, None] = {}  # a set in order
        for name, shard, held in zip(names, batch.shards, found, strict=True):
            if held is not fresh:
                now = shard[name]  # `held` is older where a name comes twice
                if now & place.bit:
                    continue
                shard[name] = self._intern(now | place.bit)
            came[name] = None
        place.came(batch.root, b"".join(came), len(came))

    def _add_each(self, place: Place, batch: _Batch, room: int) -> None:
        bit, came, new = place.bit, list[bytes](), 0
        for name, shard in zip(batch.names, batch.shards, strict=True):
            held = shard.get(name, 0)
            if held & bit:
                continue
            if not held:
                if new >= room:
                    place.partial = True
                    continue
                new += 1
            shard[name] = self._intern(held | bit)
            came.append(name)
        self._count(batch.root, batch.table, new)
        place.came(batch.root, b"".join(came), len(came))

    def discard(self, place: Place, root: bytes, names: Sequence[bytes]) -> None:
        """Note that `place` no longer holds these blocks; unknown ones change nothing."""
        table = self._tables.get(root)
        if table is None:
            return
        batch = _Batch(root, names, table)
        many = len(batch.names) >= MANY_NAMES
        held = batch.shards[0].get(batch.names[0], 0) if many else 0
        if held & ~place.bit and (held := batch.alike() or 0) & place.bit:
            batch.put(self._intern(held & ~place.bit))
            place.went(root, batch.packed, len(batch.names))
        else:
            self._discard_each(place, batch)

    def _discard_each(self, place: Place, batch: _Batch) -> None:
        """Take blocks out that probably lie nowhere else, and put back those that do."""
        bit, names = place.bit, batch.names
        found = [*map(dict.pop, batch.shards, names, repeat(0))]
        gone = countOf(found, bit)
        if gone == len(names):
            place.went(batch.root, batch.packed, gone)
        else:
            went: list[bytes] = []
            for name, shard, held in zip(names, batch.shards, found, strict=True):
                if held & bit:
                    went.append(name)
                if held & ~bit:
                    shard[name] = self._intern(held & ~bit)
            place.went(batch.root, b"".join(went), len(went))
        self._count(batch.root, batch.table, -gone)

    def _count(self, root: bytes, table: _Table, change: int) -> None:
        """Count blocks that came or, below 0, went; a root without blocks is forgotten."""
        table.blocks += change
        self._blocks += change
        if not table.blocks and self._tables.get(root) is table:
            del self._tables[root]

    def _intern(self, places: int) -> int:
        return self._interned.setdefault(places, places)

    def match(self, root: bytes, names: Sequence[bytes], reaches: Iterable[int]) -> dict[int, int]:
        """Return, for each set of places, how many leading blocks lie somewhere in it.

        A hint: with holes it can promise too much or too little (see `longest_prefix`). All sets
        are halved together and part where one holds a block that another lacks, so a probe of the
        index is made once for all whose answer it can change: log2(blocks) + 2 probes where none
        parts, one where nothing is held.
        """
        length = len(names)
        answers = dict.fromkeys(reaches, 0)
        table = self._tables.get(root)
        if not length or table is None:
            return answers
        shards, live, first = table.by_first_byte, ~self._retired, names[0]
        at_first = shards[first[0]].get(first, 0) & live
        alive = [reach for reach in answers if at_first & reach]
        if not alive:
            return answers
        last = names[length - 1]
        at_last = shards[last[0]].get(last, 0) & live
        ended = [reach for reach in alive if not at_last & reach] if at_last else alive
        if len(ended) < len(alive):
            answers.update(dict.fromkeys(alive, length))
        if ended:
            table.halve(_Span(1, length, at_first, at_last, ended), names, live, answers)
        return answers

    def sweep(self, limit: int) -> int:
        """Clean retired places out of at most `limit` entries; return how many were looked at.

        0 means that nothing is left to do. Call it again and again, with pauses, from the owner.
        """
        if self._sweep is None:
            if not self._retired:
                return 0
            self._sweep = _Sweep(self._retired, list(self._tables.items()))
        looked = 0
        while looked < limit and (batch := self._sweep.next_keys(limit - looked)):
            looked += len(batch)
            self._clean(self._sweep, batch)
        if looked < limit:
            self._finish_sweep(self._sweep.places)
        return max(1, looked)

    def _clean(self, sweep: _Sweep, names: list[bytes]) -> None:
        """Take swept places out of some blocks of one shard."""
        shard, swept, gone = sweep.shard, sweep.places, 0
        for name in names:
            held = shard.get(name, 0)
            if not held & swept:
                continue
            now = held & ~swept
            if now:
                shard[name] = self._intern(now)
            else:
                del shard[name]
                gone += 1
        self._count(sweep.root, sweep.table, -gone)

    def _finish_sweep(self, swept: int) -> None:
        """Give the swept bits back for new places."""
        self._retired &= ~swept
        self._sweep = None
        while swept:
            lowest = swept & -swept
            self._free_bits.append(lowest.bit_length() - 1)
            swept ^= lowest
