"""Blocks to places: dicts from names to bit sets, some for each root.

A *place* is one tier of one publisher at one snapshot, and owns one bit. A block's places are one
integer shared by the blocks of one event or of the same places, so an entry costs a dict slot and
its name (about 105 bytes). Names are the keys as they come: they know their hash, so a match makes
nothing to look one up, and two blocks are never taken for one. Replacing a whole place is O(1): its
bit is retired at once and cleaned out of the entries by `sweep`, a bounded step at a time, so that
a publisher of a million blocks that comes back never stops the process that keeps the view.

Nor does growth: a dict that is full moves all its entries at once, 120 ms for 1.4 M, so there is
one for each first byte of a name, in each root.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from struct import Struct
from sys import getrefcount
from typing import Final, NamedTuple

import numpy as np

from kvstore.core.limits import NAME_BYTES
from kvstore.core.names import PackedNames
from kvstore.directory.place import Place

MAX_INTERNED: Final = 65_536
"""Distinct place sets kept for sharing; beyond it sharing starts anew, nothing else changes."""

FIRST_BYTES: Final = 256
"""So many dicts: one grows in 0.6 ms at 2 M blocks under a root, in some 5 ms at 16 M. With 64 it
was 2.3 ms at 2 M, which decisions of a router that learns had to wait for (docs/router.md)."""

ROOT_BLOCKS: Final = 600
"""What the dicts of a root take while they are nearly empty, in blocks (about 60 kB), so that many
roots keep to the bound as well."""

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
    """Indexes of the reaches: as keys they would be slow, all one-bit integers have 61 hashes."""


class _Table:
    """The blocks of one root."""

    __slots__ = ("blocks", "shards")

    def __init__(self) -> None:
        self.blocks = 0
        self.shards: list[dict[bytes, int]] = [{} for _ in range(FIRST_BYTES)]
        """By the first byte of the name."""

    def halve(
        self, span: _Span, names: Sequence[bytes], live: int, reaches: Sequence[int],
        answers: list[int],
    ) -> None:  # fmt: skip
        """Find where each reach of a span ends; they part where one holds what another lacks."""
        pending, shards = [span], self.shards
        while pending:
            low, high, at_low, at_high, group = pending.pop()
            while high - low > 1:
                middle = (low + high) // 2
                name = names[middle - 1]
                held = shards[name[0]].get(name, 0) & live
                if held == at_low:
                    low = middle
                    continue
                lacks = group if held == at_high else [r for r in group if not held & reaches[r]]
                if len(lacks) == len(group):
                    high, at_high = middle, held
                    continue
                if lacks:
                    pending.append(_Span(low, middle, at_low, held, lacks))
                    group = [r for r in group if held & reaches[r]]
                low, at_low = middle, held
            for reach in group:
                answers[reach] = low

    def alike(self, names: Sequence[bytes]) -> int | None:
        """Return the places of all these blocks; None where they differ or one comes twice."""
        shards = self.shards
        held = {shards[name[0]].get(name, 0) for name in names}
        if len(held) != 1 or len(set(names)) != len(names):
            return None
        return held.pop()

    def put(self, names: Sequence[bytes], places: int) -> None:
        """Let all these blocks lie in `places`."""
        shards = self.shards
        for name in names:
            shards[name[0]][name] = places


def _cut(names: Sequence[bytes]) -> tuple[Sequence[bytes], bytes]:
    """Return names one by one, and in one piece."""
    if not isinstance(names, PackedNames):
        return names, b"".join(names)
    packed = names.packed
    count = len(packed) // NAME_BYTES
    if count < len(_CUTS):
        return _CUTS[count](packed), packed
    return np.frombuffer(packed, f"V{NAME_BYTES}").tolist(), packed


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
        return table.shards[name[0]].get(name, 0) & ~self._retired if table else 0

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
        cut, packed = _cut(names)
        many = MANY_NAMES <= len(cut) <= room
        if many and cut[0] not in table.shards[cut[0][0]]:
            self._add_new(place, root, table, cut, packed)
        elif many and (held := table.alike(cut)):
            if not held & place.bit:
                table.put(cut, self._intern(held | place.bit))
                place.turn(root, packed, len(cut))
        else:
            self._add_each(place, root, table, cut, room)

    def _add_new(
        self, place: Place, root: bytes, table: _Table, names: Sequence[bytes], packed: bytes
    ) -> None:
        """Add blocks that are probably all unknown: one look at each tells and sets."""
        shards, many = table.shards, len(names)
        fresh = place.bit ^ 0  # another object than any in the index (`FIRST_BIT`)
        unused = getrefcount(fresh)
        found = [shards[name[0]].setdefault(name, fresh) for name in names]
        # A new block holds `fresh` and has found it; any other has or does one of them at most.
        # Where the count is not that, the tables are: 256 lengths, a third of the cost of an event.
        if getrefcount(fresh) - unused == 2 * many:
            self._count(root, table, many)
            place.turn(root, packed, many)
            return
        self._count(root, table, sum(map(len, table.shards)) - table.blocks)
        came: dict[bytes, None] = {}  # a set in order
        for name, held in zip(names, found, strict=True):
            if held is not fresh:
                shard = shards[name[0]]
                now = shard[name]  # `held` is older where a name comes twice
                if now & place.bit:
                    continue
                shard[name] = self._intern(now | place.bit)
            came[name] = None
        place.turn(root, b"".join(came), len(came))

    def _add_each(
        self, place: Place, root: bytes, table: _Table, names: Sequence[bytes], room: int
    ) -> None:
        shards, bit, came, new = table.shards, place.bit, list[bytes](), 0
        for name in names:
            shard = shards[name[0]]
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
        self._count(root, table, new)
        place.turn(root, b"".join(came), len(came))

    def discard(self, place: Place, root: bytes, names: Sequence[bytes]) -> None:
        """Note that `place` no longer holds these blocks; unknown ones change nothing."""
        table = self._tables.get(root)
        if table is None:
            return
        cut, packed = _cut(names)
        many = len(cut) >= MANY_NAMES
        held = table.shards[cut[0][0]].get(cut[0], 0) if many else 0
        if held & ~place.bit and (held := table.alike(cut) or 0) & place.bit:
            table.put(cut, self._intern(held & ~place.bit))
            place.turn(root, packed, -len(cut))
        else:
            self._discard_each(place, root, table, cut, packed)

    def _discard_each(
        self, place: Place, root: bytes, table: _Table, names: Sequence[bytes], packed: bytes
    ) -> None:
        """Take blocks out that probably lie nowhere else, and put back those that do."""
        shards, bit = table.shards, place.bit
        found = [shards[name[0]].pop(name, 0) for name in names]
        gone = found.count(bit)
        if gone == len(names):
            place.turn(root, packed, -gone)
        else:
            went: list[bytes] = []
            for name, held in zip(names, found, strict=True):
                if held & bit:
                    went.append(name)
                if held & ~bit:
                    shards[name[0]][name] = self._intern(held & ~bit)
            place.turn(root, b"".join(went), -len(went))
        self._count(root, table, -gone)

    def _count(self, root: bytes, table: _Table, change: int) -> None:
        """Count blocks that came or, below 0, went; a root without blocks is forgotten."""
        table.blocks += change
        self._blocks += change
        if not table.blocks and self._tables.get(root) is table:
            del self._tables[root]

    def _intern(self, places: int) -> int:
        return self._interned.setdefault(places, places)

    def match(self, root: bytes, names: Sequence[bytes], reaches: Sequence[int]) -> list[int]:
        """Return, for each set of places, how many leading blocks lie somewhere in it.

        A hint: with holes it can promise too much or too little (see `longest_prefix`). All sets
        are halved together and part where one holds a block that another lacks, so a probe of the
        index is made once for all whose answer it can change: log2(blocks) + 2 probes where none
        parts, one where nothing is held.
        """
        length = len(names)
        answers = [0] * len(reaches)
        table = self._tables.get(root)
        if not length or table is None:
            return answers
        shards, live, first = table.shards, ~self._retired, names[0]
        at_first = shards[first[0]].get(first, 0) & live
        alive = [r for r, reach in enumerate(reaches) if at_first & reach]
        if not alive:
            return answers
        last = names[length - 1]
        at_last = shards[last[0]].get(last, 0) & live
        ended = [r for r in alive if not at_last & reaches[r]] if at_last else alive
        if len(ended) < len(alive):
            for reach in alive:
                answers[reach] = length
        if ended:
            table.halve(_Span(1, length, at_first, at_last, ended), names, live, reaches, answers)
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
