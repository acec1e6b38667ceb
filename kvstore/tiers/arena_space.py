"""Which bytes of the arena belong to which slot: extents, chunks, size classes. Pure.

    arena = chunk | chunk | free extent | chunk …      chunk = slots of one size

Blocks of one size share chunks, so a freed slot fits the next block of its class exactly and
nothing fragments inside a class. Chunks come from a first-fit extent allocator that merges
neighbours; a chunk whose slots are all free can be dissolved and its bytes change class.
"""

from array import array
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from kvstore.core.layout import round_up
from kvstore.core.limits import GRANULE_BYTES

CHUNK_BYTES: Final = 64 << 20
UNIT_BYTES: Final = 2 << 20
"""Chunks start and end here where the arena is big: a huge page of the CPU and of the GPU."""
_SMALL_ARENA_BYTES: Final = 256 << 20
_CHUNKS_OF_SMALL: Final = 16
_WASTE_DIVISOR: Final = 100  # at most 1 % of a chunk is tail


class Extent(NamedTuple):
    """A contiguous part of the arena in bytes: `[start, stop)`."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Bytes inside."""
        return self.stop - self.start


class ExtentAllocator:
    """First fit over free extents kept sorted; neighbours merge when given back."""

    def __init__(self, total_bytes: int) -> None:
        self._free: list[Extent] = [Extent(0, total_bytes)] if total_bytes else []

    @property
    def free_bytes(self) -> int:
        """Bytes in no chunk."""
        return sum(extent.length for extent in self._free)

    def allocate(self, length: int) -> Extent | None:
        """Return the first free extent of `length` bytes, or None."""
        assert length > 0
        for index, extent in enumerate(self._free):
            if extent.length >= length:
                return self._cut(index, Extent(extent.start, extent.start + length))
        return None

    def largest(self) -> int:
        """Return the length of the largest free extent."""
        return max((extent.length for extent in self._free), default=0)

    def claim(self, wanted: Extent) -> None:
        """Take exactly `wanted`, which must be free: how a restart rebuilds the picture."""
        assert self.is_free(wanted), f"{wanted} is not free"
        self._cut(bisect_left(self._free, (wanted.start + 1,)) - 1, wanted)

    def is_free(self, wanted: Extent) -> bool:
        """Say whether all of `wanted` lies in one free extent."""
        index = bisect_left(self._free, (wanted.start + 1,)) - 1
        return index >= 0 and self._free[index].stop >= wanted.stop

    def give_back(self, extent: Extent) -> None:
        """Free an extent, merging it with its neighbours."""
        index = bisect_left(self._free, extent)
        start, stop = extent
        if index < len(self._free):
            after = self._free[index]
            assert stop <= after.start, "freed twice"
            if after.start == stop:
                stop = after.stop
                del self._free[index]
        if index > 0:
            before = self._free[index - 1]
            assert before.stop <= start, "freed twice"
            if before.stop == start:
                start = before.start
                del self._free[index - 1]
        insort(self._free, Extent(start, stop))

    def _cut(self, index: int, wanted: Extent) -> Extent:
        extent = self._free[index]
        rest = (Extent(extent.start, wanted.start), Extent(wanted.stop, extent.stop))
        self._free[index : index + 1] = [part for part in rest if part.length]
        return wanted


@dataclass(slots=True)
class Chunk:
    """Slots of one size side by side."""

    extent: Extent
    block_bytes: int
    slots: "array[int]"
    """Slot `slots[i]` lies at `extent.start + i * block_bytes`."""
    free: list[int] = field(default_factory=list)

    @property
    def used(self) -> int:
        """Slots that hold or will hold a block."""
        return len(self.slots) - len(self.free)


class ArenaSpace:
    """Slot ids to bytes. Knows nothing of names, leases or states."""

    def __init__(self, data_bytes: int, max_slots: int) -> None:
        assert data_bytes % GRANULE_BYTES == 0 and max_slots > 0
        self.data_bytes = data_bytes
        small = data_bytes < _SMALL_ARENA_BYTES
        self.unit_bytes = GRANULE_BYTES if small else UNIT_BYTES
        self._target_bytes = min(CHUNK_BYTES, data_bytes // _CHUNKS_OF_SMALL)
        self._extents = ExtentAllocator(data_bytes - data_bytes % self.unit_bytes)
        # Popped from the end: low ids first, and an id that was freed waits longest.
        self._ids = list(range(max_slots - 1, -1, -1))
        self._chunks: dict[int, list[Chunk]] = {}
        self._open: dict[int, dict[int, Chunk]] = {}
        self._at: dict[int, Chunk] = {}
        """Chunks by the granule where they start, plus one."""
        self._chunk_of = array("I", bytes(4 * max_slots))
        """By slot: its chunk's key in `_at`; 0 where it is in none."""

    def take(self, block_bytes: int) -> int | None:
        """Return a free slot of the class, or None when its chunks are full: then `grow`."""
        chunks = self._open.get(block_bytes)
        if not chunks:
            return None
        start, chunk = next(iter(chunks.items()))
        slot = chunk.free.pop()
        if not chunk.free:
            del chunks[start]
        return slot

    def give(self, slot: int) -> None:
        """Take a slot back from its block."""
        chunk = self._at.get(self._chunk_of[slot])
        assert chunk is not None, f"slot {slot} is in no chunk"
        assert len(chunk.free) < len(chunk.slots), f"slot {slot} freed twice"
        chunk.free.append(slot)
        self._open[chunk.block_bytes].setdefault(chunk.extent.start, chunk)

    def grow(self, block_bytes: int) -> Chunk | None:
        """Make a new chunk of the class, smaller than usual where room is short, or None."""
        assert block_bytes > 0 and block_bytes % GRANULE_BYTES == 0
        wanted = self.chunk_bytes(block_bytes)
        largest = self._extents.largest()
        length = min(wanted, largest - largest % self.unit_bytes)
        count = min(length // block_bytes, len(self._ids))
        if count <= 0:
            return None
        if count < length // block_bytes:  # slot ids run short before bytes do
            length = round_up(count * block_bytes, self.unit_bytes)
        extent = self._extents.allocate(length)
        assert extent is not None
        return self._add(extent, block_bytes, [self._ids.pop() for _ in range(count)])

    def dissolve(self, chunk: Chunk) -> None:
        """Give the bytes and ids of a chunk back; none of its slots may be in use."""
        assert chunk.used == 0, "a chunk with blocks cannot change class"
        self._chunks[chunk.block_bytes].remove(chunk)
        self._open[chunk.block_bytes].pop(chunk.extent.start, None)
        for slot in chunk.slots:
            self._chunk_of[slot] = 0
        del self._at[_key(chunk.extent)]
        self._ids[:0] = chunk.slots
        self._extents.give_back(chunk.extent)

    def restore(self, extent: Extent, block_bytes: int, slots: list[int]) -> Chunk:
        """Rebuild a chunk found in the slot table; its slots count as used until given back.

        All chunks have to be restored before `forget_ids` and before anything is allocated.
        """
        self._extents.claim(extent)
        chunk = self._add(extent, block_bytes, slots)
        chunk.free.clear()
        del self._open[block_bytes][extent.start]
        return chunk

    def may_restore(self, extent: Extent) -> bool:
        """Say whether a chunk could lie here: aligned, inside, over no chunk restored before."""
        return extent.start % self.unit_bytes == 0 and self._extents.is_free(extent)

    def forget_ids(self) -> None:
        """Take the ids of restored chunks out of the free ones."""
        self._ids = [slot for slot in self._ids if not self._chunk_of[slot]]

    def victim_chunk(
        self, block_bytes: int, may_evict: Callable[[int], bool]
    ) -> tuple[Chunk, list[int]] | None:
        """Return the emptiest chunk of another class that could be emptied, and its used slots."""
        others = [
            chunk
            for size, chunks in self._chunks.items()
            if size != block_bytes
            for chunk in chunks
            if chunk.extent.length >= block_bytes
        ]
        for chunk in sorted(others, key=lambda chunk: (chunk.used, chunk.extent.start)):
            free = set(chunk.free)
            used = [slot for slot in chunk.slots if slot not in free]
            if all(may_evict(slot) for slot in used):
                return chunk, used
        return None

    def below_fair_share(self, block_bytes: int) -> bool:
        """Say whether the class holds less than an equal part of the arena."""
        sizes = {size for size, chunks in self._chunks.items() if chunks} | {block_bytes}
        return self.class_bytes(block_bytes) * len(sizes) < self.data_bytes

    def class_bytes(self, block_bytes: int) -> int:
        """Return the bytes of all chunks of a class."""
        return sum(chunk.extent.length for chunk in self._chunks.get(block_bytes, ()))

    def chunks(self) -> Iterable[Chunk]:
        """Iterate over all chunks."""
        for chunks in self._chunks.values():
            yield from chunks

    @property
    def free_bytes(self) -> int:
        """Bytes in no chunk."""
        return self._extents.free_bytes

    @property
    def largest_free_bytes(self) -> int:
        """Length of the largest extent in no chunk."""
        return self._extents.largest()

    @property
    def free_slot_bytes(self) -> int:
        """Bytes of free slots in chunks: free for blocks of their own size only."""
        return sum(
            len(chunk.free) * size
            for size, chunks in self._open.items()
            for chunk in chunks.values()
        )

    def chunk_bytes(self, block_bytes: int) -> int:
        """Return the size of a chunk: near the target, with a tail of at most 1 %."""
        least = round_up(max(self._target_bytes, block_bytes), self.unit_bytes)
        candidates = range(least, least + block_bytes + self.unit_bytes, self.unit_bytes)
        for length in candidates:
            if length % block_bytes * _WASTE_DIVISOR <= length:
                return length
        return min(candidates, key=lambda length: (length % block_bytes) / length)

    def _add(self, extent: Extent, block_bytes: int, slots: list[int]) -> Chunk:
        chunk = Chunk(extent, block_bytes, array("I", slots), free=slots[::-1])
        self._chunks.setdefault(block_bytes, []).append(chunk)
        self._open.setdefault(block_bytes, {})[extent.start] = chunk
        key = _key(extent)
        self._at[key] = chunk
        for slot in slots:
            self._chunk_of[slot] = key
        return chunk


def _key(extent: Extent) -> int:
    return extent.start // GRANULE_BYTES + 1
