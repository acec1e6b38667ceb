"""Which block lies in which slot of which segment: the tier's memory. Pure.

The tier's bytes are cut into segments of one size, each a preallocated file of slots of one
size class. A place is one integer: segment number x 2**20 + slot. Per block there are an index
entry, 8 bytes of key, 32 of name, 4 of root and one of use: about 160 bytes with the dict.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from kvstore.core.layout import round_up
from kvstore.core.limits import GRANULE_BYTES, NAME_BYTES
from kvstore.core.names import BlockName, Root
from kvstore.directory.policy import block_key
from kvstore.tiers.base import Held

SEGMENT_BYTES: Final = 1 << 30
_SEGMENTS_LEAST: Final = 16
"""A small tier still has segments enough for several size classes."""
_SLOT_BITS: Final = 20
SLOTS_MAX: Final = 1 << _SLOT_BITS


@dataclass(slots=True)
class Segment:
    """Slots of one size in one file."""

    number: int
    slot_bytes: int
    slots: int
    keys: "array[int]" = field(init=False)
    names: bytearray = field(init=False)
    roots: "array[int]" = field(init=False)
    busy: bytearray = field(init=False)
    """Operations that read or write the slot now; it is not given away meanwhile."""
    free: list[int] = field(init=False)
    held: int = 0

    def __post_init__(self) -> None:
        self.keys = array("Q", bytes(8 * self.slots))
        self.names = bytearray(NAME_BYTES * self.slots)
        self.roots = array("I", bytes(4 * self.slots))
        self.busy = bytearray(self.slots)
        self.free = list(range(self.slots - 1, -1, -1))

    def name(self, slot: int) -> BlockName:
        """Return the name of the block in a slot."""
        return BlockName(bytes(self.names[slot * NAME_BYTES : (slot + 1) * NAME_BYTES]))


class NvmeSpace:
    """Segments, free slots and the index. Knows nothing of files, threads or policies."""

    def __init__(self, capacity_bytes: int, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        assert capacity_bytes >= 0
        wanted = min(segment_bytes, capacity_bytes // _SEGMENTS_LEAST)
        self.segment_bytes = wanted - wanted % GRANULE_BYTES
        self.segments_max = capacity_bytes // self.segment_bytes if self.segment_bytes else 0
        self.segments: dict[int, Segment] = {}
        self.index: dict[int, int] = {}
        self.used_bytes = 0
        self._roots: list[Root] = []
        self._root_numbers: dict[Root, int] = {}
        self._open: dict[int, dict[int, Segment]] = {}

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all segments that may exist."""
        return self.segments_max * self.segment_bytes

    def __len__(self) -> int:
        return len(self.index)

    # -- looking ---------------------------------------------------------------------------

    def find(self, root: Root, name: BlockName) -> int | None:
        """Return the place of exactly this block, or None."""
        place = self.index.get(block_key(root, name))
        if place is None:
            return None
        held = self.at(place)
        return place if (held.root, held.name) == (root, name) else None

    def at(self, place: int) -> Held:
        """Return what lies at a place that holds a block."""
        segment, slot = self.split(place)
        return Held(self._roots[segment.roots[slot]], segment.name(slot), segment.slot_bytes)

    def split(self, place: int) -> tuple[Segment, int]:
        """Return segment and slot of a place."""
        return self.segments[place >> _SLOT_BITS], place & (SLOTS_MAX - 1)

    def key_at(self, place: int) -> int:
        """Return the key of the block at a place."""
        segment, slot = self.split(place)
        return segment.keys[slot]

    def is_idle(self, place: int) -> bool:
        """Say whether no operation uses a place."""
        segment, slot = self.split(place)
        return not segment.busy[slot]

    def of_class(self, slot_bytes: int) -> Iterator[Segment]:
        """Iterate over the segments of a size class."""
        return (one for one in self.segments.values() if one.slot_bytes == slot_bytes)

    def scan(self, cursor: int, limit: int) -> tuple[list[Held], int | None]:
        """Return what the next `limit` slots from `cursor` on hold, and the next cursor.

        A cursor is a place; every block held throughout a whole scan appears in it.
        """
        numbers = sorted(self.segments)
        found: list[Held] = []
        for number in (n for n in numbers if n >= cursor >> _SLOT_BITS):
            segment = self.segments[number]
            first = cursor & (SLOTS_MAX - 1) if number == cursor >> _SLOT_BITS else 0
            stop = min(first + limit, segment.slots)
            places = ((number << _SLOT_BITS) + slot for slot in range(first, stop))
            found += [self.at(place) for place in places if self._is_held(place)]
            limit -= stop - first
            if stop < segment.slots:
                return found, (number << _SLOT_BITS) + stop
            if limit <= 0:
                return found, (number + 1) << _SLOT_BITS
        return found, None

    def _is_held(self, place: int) -> bool:
        segment, slot = self.split(place)
        return self.index.get(segment.keys[slot]) == place

    # -- changing --------------------------------------------------------------------------

    def take(self, slot_bytes: int) -> int | None:
        """Return a free place of the class, busy from now on; None where there is none."""
        segments = self._open.get(slot_bytes)
        if not segments:
            return None
        number, segment = next(iter(segments.items()))
        slot = segment.free.pop()
        if not segment.free:
            del segments[number]
        segment.busy[slot] = 1
        return (number << _SLOT_BITS) + slot

    def has_free(self, slot_bytes: int) -> bool:
        """Say whether `take` would find a place."""
        return bool(self._open.get(slot_bytes))

    def hold(self, place: int, root: Root, name: BlockName) -> int:
        """List a block at a place that was taken; returns its key."""
        segment, slot = self.split(place)
        key = block_key(root, name)
        assert key not in self.index
        self.index[key] = place
        segment.keys[slot] = key
        segment.names[slot * NAME_BYTES : (slot + 1) * NAME_BYTES] = name
        segment.roots[slot] = self._root_number(root)
        segment.held += 1
        self.used_bytes += segment.slot_bytes
        return key

    def drop(self, place: int) -> Held:
        """Take a block out of the index; its place is free once nothing uses it (`release`)."""
        held = self.at(place)
        segment, slot = self.split(place)
        del self.index[segment.keys[slot]]
        segment.held -= 1
        self.used_bytes -= segment.slot_bytes
        if not segment.busy[slot]:
            self._give(segment, slot)
        return held

    def use(self, place: int) -> None:
        """Keep a place that holds a block from being given away."""
        segment, slot = self.split(place)
        assert segment.busy[slot] < 255, "more readers of one block than threads"
        segment.busy[slot] += 1

    def release(self, place: int) -> None:
        """End a use; a place that holds nothing any more is free then."""
        segment, slot = self.split(place)
        segment.busy[slot] -= 1
        if not segment.busy[slot] and not self._is_held(place):
            self._give(segment, slot)

    def slots_of(self, slot_bytes: int) -> int:
        """Return how many slots a segment of the class has."""
        return min(self.segment_bytes // slot_bytes, SLOTS_MAX)

    def new_number(self, slot_bytes: int) -> int | None:
        """Return the number for a new segment of the class; None where none fits any more."""
        if slot_bytes > self.segment_bytes or len(self.segments) >= self.segments_max:
            return None
        return next(n for n in range(self.segments_max) if n not in self.segments)

    def add(self, number: int, slot_bytes: int) -> Segment:
        """Add an empty segment."""
        assert number not in self.segments
        segment = Segment(number, slot_bytes, self.slots_of(slot_bytes))
        self.segments[number] = segment
        self._open.setdefault(slot_bytes, {})[number] = segment
        return segment

    def restore(
        self,
        segment: Segment,
        slots: Sequence[int],
        keys: Sequence[int],
        names: bytes,
        roots: Sequence[Root],
        root_of: Sequence[int],
    ) -> list[int]:
        """List what a restart found in a segment just added; returns the slots held already.

        `keys`, `names` (packed) and `root_of` (index into `roots`) go with `slots`. A block that is
        found twice is listed once.
        """
        first = segment.number << _SLOT_BITS
        places = [first + slot for slot in slots]
        # One look at the index for each, which is what a million of them take the longest for.
        holders = list(map(self.index.setdefault, keys, places))
        twice: list[int] = []
        if holders != places:
            found = zip(slots, places, holders, strict=True)
            twice = [slot for slot, place, holder in found if holder != place]
            unwanted = set(twice)
            kept = [at for at, slot in enumerate(slots) if slot not in unwanted]
            names = b"".join(names[at * NAME_BYTES : (at + 1) * NAME_BYTES] for at in kept)
            root_of = [root_of[at] for at in kept]
            keys = [keys[at] for at in kept]
            slots = [slots[at] for at in kept]
        taken = set(slots)
        whole = len(taken) == segment.slots
        segment.free = [] if whole else [slot for slot in segment.free if slot not in taken]
        at = np.asarray(slots, np.int64)
        np.frombuffer(segment.keys, np.uint64)[at] = np.asarray(keys, np.uint64)
        table = np.frombuffer(segment.names, np.uint8).reshape(-1, NAME_BYTES)
        table[at] = np.frombuffer(names, np.uint8).reshape(-1, NAME_BYTES)
        numbers = np.asarray([self._root_number(root) for root in roots], np.uint32)
        np.frombuffer(segment.roots, np.uint32)[at] = numbers[np.asarray(root_of, np.int64)]
        segment.held = len(slots)
        self.used_bytes += segment.held * segment.slot_bytes
        if not segment.free:
            self._open[segment.slot_bytes].pop(segment.number, None)
        return twice

    def discard(self, number: int) -> None:
        """Remove a segment that holds nothing and is not used."""
        segment = self.segments.pop(number)
        assert not segment.held and not any(segment.busy), "a segment in use cannot go"
        self._open[segment.slot_bytes].pop(number, None)

    def places_of(self, segment: Segment, root: Root | None = None) -> list[int]:
        """Return the places of a segment that hold blocks, those under one root where given."""
        first = segment.number << _SLOT_BITS
        return [
            first + slot for slot in self._slots_under(segment, root) if self._is_held(first + slot)
        ]

    def take_left(self, segment: Segment, root: Root | None) -> list[int]:
        """Take free slots whose rows may still name a block that lay there under a root.

        A block that was dropped to make room leaves its row until its slot is written anew.
        """
        free = set(segment.free)
        slots = [
            slot for slot in self._slots_under(segment, root) if slot in free and segment.keys[slot]
        ]
        return self.take_slots(segment, slots)

    def take_slots(self, segment: Segment, slots: Sequence[int]) -> list[int]:
        """Take free slots, busy from now on; returns their places."""
        taken = set(slots)
        segment.free = [slot for slot in segment.free if slot not in taken]
        if not segment.free:
            self._open[segment.slot_bytes].pop(segment.number, None)
        for slot in slots:
            segment.keys[slot] = 0
            segment.busy[slot] = 1
        return [(segment.number << _SLOT_BITS) + slot for slot in slots]

    def _slots_under(self, segment: Segment, root: Root | None) -> Iterator[int]:
        """Yield the slots whose last block stood under a root; all of them without one."""
        wanted = None if root is None else self._root_numbers.get(root, -1)
        return (
            slot for slot in range(segment.slots) if wanted is None or segment.roots[slot] == wanted
        )

    def victim_segment(
        self, slot_bytes: int, may_evict: Callable[[int], bool]
    ) -> tuple[Segment, Sequence[int]] | None:
        """Return the emptiest segment of another class that could be emptied, and its places."""
        others = [s for s in self.segments.values() if s.slot_bytes != slot_bytes]
        for segment in sorted(others, key=lambda one: one.held / one.slots):
            places = self.places_of(segment)
            if not any(segment.busy) and all(map(may_evict, places)):
                return segment, places
        return None

    def below_fair_share(self, slot_bytes: int) -> bool:
        """Say whether the class holds less than an equal part of the segments."""
        classes = {one.slot_bytes for one in self.segments.values()} | {slot_bytes}
        return sum(1 for _ in self.of_class(slot_bytes)) * len(classes) < self.segments_max

    def _give(self, segment: Segment, slot: int) -> None:
        segment.free.append(slot)
        self._open[segment.slot_bytes].setdefault(segment.number, segment)

    def _root_number(self, root: Root) -> int:
        number = self._root_numbers.get(root)
        if number is None:
            number = self._root_numbers[root] = len(self._roots)
            self._roots.append(root)
        return number


def least_capacity(slot_bytes: int) -> int:
    """Return the smallest tier in which a block with this slot size fits at all."""
    return _SEGMENTS_LEAST * round_up(slot_bytes, GRANULE_BYTES)
