"""The arena: one memfd that outlives the node, with the slot table in front of the blocks.

    header (4 KiB) | slot table (128 B a slot) | data (blocks, 4 KiB granules)

The keeper creates the memfd, the node is the only writer of header and table, and every client
maps table read-only and data read-write. Stores to slot words are single aligned 8-byte stores.
The memfd is sealed against shrinking and growing: a mapping can never fault on a truncated file.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.core.errors import BadInput
from kvstore.core.layout import round_up
from kvstore.core.limits import GRANULE_BYTES, NAME_BYTES
from kvstore.core.names import BlockName, Root
from kvstore.core.slots import SlotWord, unpack
from kvstore.transport.numa import place

HEADER_BYTES: Final = 4096
RECORD_BYTES: Final = 128
_MAGIC: Final = b"kvarena1"
_HEADER: Final = struct.Struct("<8sQQQQ")  # magic, max_slots, data_bytes, data_offset, incarnation
_INCARNATION_AT: Final = 32
# word, offset granules, padded bytes, payload bytes, shares, group, position, root, name, sum
_RECORD: Final = struct.Struct("<QIIIHHI32s32s16s")
_BEHIND_WORD: Final = struct.Struct("<IIIHHI32s32s16s")
_WORD_BYTES: Final = 8
_PLACE: Final = struct.Struct(f"<8xII{RECORD_BYTES - 16}x")
_NAME_AT: Final = 60
_SUM_AT: Final = 92
_SUM_BYTES: Final = 16
_ROW: Final = np.dtype(
    {"names": ["name", "sum"], "formats": [f"V{NAME_BYTES}", f"V{_SUM_BYTES}"],
     "offsets": [_NAME_AT, _SUM_AT], "itemsize": RECORD_BYTES}
)  # fmt: skip
HUGE_PAGE_BYTES: Final = 2 << 20
_PREFAULT_STEP: Final = 64 << 20
_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14; missing from the mmap module of Python 3.11
# Not `mmap.madvise`: that holds the interpreter for as long as the kernel works.
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True, slots=True)
class ArenaSize:
    """How big an arena is; fixed for its life."""

    data_bytes: int
    max_slots: int

    def __post_init__(self) -> None:
        if self.data_bytes < GRANULE_BYTES or self.data_bytes % GRANULE_BYTES:
            raise BadInput(f"arena of {self.data_bytes} bytes: not a multiple of {GRANULE_BYTES}")
        if self.max_slots <= 0:
            raise BadInput(f"arena with {self.max_slots} slots")

    @property
    def data_offset(self) -> int:
        """Where blocks start in the memfd: where a huge page may start, too."""
        return round_up(HEADER_BYTES + self.max_slots * RECORD_BYTES, HUGE_PAGE_BYTES)

    @property
    def total_bytes(self) -> int:
        """Size of the memfd."""
        return self.data_offset + self.data_bytes


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """What the table says about a slot besides its word."""

    offset: int
    """Bytes from the start of the data area."""
    block_bytes: int
    """Padded size: the extent of the slot."""
    payload_bytes: int
    shares: int
    position: int
    root: Root
    name: BlockName
    sum: bytes
    """16 bytes, zero until sealed."""
    group: int = 0


def create_arena(size: ArenaSize) -> int:
    """Return the descriptor of a new sealed memfd with an empty slot table."""
    fd = os.memfd_create("kvstore-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size.total_bytes)
        header = _HEADER.pack(_MAGIC, size.max_slots, size.data_bytes, size.data_offset, 0)
        os.pwrite(fd, header, 0)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


class ArenaMapping:
    """One process's view of an arena. The node maps the table writable, clients do not."""

    def __init__(self, fd: int, *, owner: bool = False) -> None:
        """Map `fd` (not taken over). Raises `BadInput` when it is not an arena."""
        header = os.pread(fd, _HEADER.size, 0)
        if len(header) < _HEADER.size or header[:8] != _MAGIC:
            raise BadInput("descriptor is not a kvstore arena")
        _, max_slots, data_bytes, data_offset, _ = _HEADER.unpack(header)
        self.size = ArenaSize(data_bytes, max_slots)
        if self.size.data_offset != data_offset or os.fstat(fd).st_size != self.size.total_bytes:
            raise BadInput("arena header does not fit its size")
        table_access = mmap.PROT_READ | (mmap.PROT_WRITE if owner else 0)
        self._table = mmap.mmap(fd, data_offset, flags=mmap.MAP_SHARED, prot=table_access)
        self._data = mmap.mmap(fd, data_bytes, flags=mmap.MAP_SHARED, offset=data_offset)
        with contextlib.suppress(OSError):
            # Where the host lets shared memory have them (shmem_enabled): fewer faults and misses.
            self._data.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = memoryview(self._table)
        self._words = self._bytes.cast("Q")
        first, step = HEADER_BYTES // _WORD_BYTES, RECORD_BYTES // _WORD_BYTES
        self.slot_words = self._words[first : first + max_slots * step : step]
        """Every slot's word as a raw integer; the owner stores into it, one word at a time."""
        self.data = memoryview(self._data)
        """All blocks: `data[record.offset : record.offset + record.block_bytes]`."""
        self.descriptor = os.dup(fd)
        """The memory's, as long as this object lives: to be passed to other processes."""
        self._forget_descriptor = weakref.finalize(self, os.close, self.descriptor)

    @property
    def incarnation(self) -> int:
        """Incarnation of the node that owns the arena now."""
        return self._words[_INCARNATION_AT // _WORD_BYTES]

    @incarnation.setter
    def incarnation(self, value: int) -> None:
        self._words[_INCARNATION_AT // _WORD_BYTES] = value

    def word(self, slot: int) -> SlotWord:
        """Return the slot's word as it stands at this moment."""
        return unpack(self._words[(HEADER_BYTES + slot * RECORD_BYTES) // _WORD_BYTES])

    def raw_words(self) -> memoryview:
        """Return every slot's word as raw integers, a live strided view of the table."""
        return self.slot_words[:]

    def set_word(self, slot: int, word: SlotWord) -> None:
        """Store a slot word; owner only."""
        assert 0 <= slot < self.size.max_slots
        self._words[(HEADER_BYTES + slot * RECORD_BYTES) // _WORD_BYTES] = word.pack()

    def record(self, slot: int) -> SlotRecord:
        """Return the slot's record without its word."""
        assert 0 <= slot < self.size.max_slots
        at = HEADER_BYTES + slot * RECORD_BYTES
        _, granules, block, payload, shares, group, position, root, name, block_sum = (
            _RECORD.unpack_from(self._bytes, at)
        )
        return SlotRecord(
            offset=granules * GRANULE_BYTES,
            block_bytes=block,
            payload_bytes=payload,
            shares=shares,
            position=position,
            root=Root(root),
            name=BlockName(name),
            sum=block_sum,
            group=group,
        )

    def set_record(self, slot: int, record: SlotRecord) -> None:
        """Store everything but the word; owner only, while nobody may read the slot."""
        self.write_record(
            slot,
            record.offset // GRANULE_BYTES,
            (record.block_bytes, record.payload_bytes, record.shares),
            record.position,
            record.root,
            record.name,
            block_sum=record.sum,
            group=record.group,
        )

    def write_record(
        self,
        slot: int,
        granules: int,
        shape: tuple[int, int, int],
        position: int,
        root: bytes,
        name: bytes,
        *,
        block_sum: bytes = b"",
        group: int = 0,
    ) -> None:
        """Do what `set_record` does, without the object; `shape` is (block, payload, shares)."""
        assert 0 <= slot < self.size.max_slots
        block_bytes, payload_bytes, shares = shape
        # The word is left alone: it changes only by its own atomic store.
        _BEHIND_WORD.pack_into(
            self._bytes,
            HEADER_BYTES + slot * RECORD_BYTES + _WORD_BYTES,
            granules, block_bytes, payload_bytes, shares, group, position, root, name, block_sum,
        )  # fmt: skip

    def name(self, slot: int) -> bytes:
        """Return the name in the slot's record; cheaper than the whole record."""
        at = HEADER_BYTES + slot * RECORD_BYTES + _NAME_AT
        return self._table[at : at + NAME_BYTES]

    def sum(self, slot: int) -> bytes:
        """Return the sum in the slot's record; zeros until it is sealed."""
        at = HEADER_BYTES + slot * RECORD_BYTES + _SUM_AT
        return self._table[at : at + _SUM_BYTES]

    def names(self, slots: NDArray[np.int64]) -> bytes:
        """Return the packed names of several slots in one gather."""
        # Made for the call: a view that is kept would keep the mapping from being closed.
        rows = np.frombuffer(self._bytes, _ROW, self.size.max_slots, HEADER_BYTES)
        names: bytes = rows["name"][slots].tobytes()
        return names

    def named(self, first: int, packed: bytes) -> int:
        """Return how many of the packed names stand, in order, in the records from `first` on."""
        count = min(len(packed) // NAME_BYTES, self.size.max_slots - first)
        rows = np.frombuffer(self._bytes, _ROW, count, HEADER_BYTES + first * RECORD_BYTES)
        there = rows["name"].tobytes()
        if packed.startswith(there):
            return count
        same = np.frombuffer(there, np.uint8) == np.frombuffer(packed, np.uint8, len(there))
        return int(same.argmin()) // NAME_BYTES

    def set_sum(self, slot: int, block_sum: bytes) -> None:
        """Store the sum of a slot's payload; owner only, before the word turns SEALED."""
        at = HEADER_BYTES + slot * RECORD_BYTES + _SUM_AT
        self._table[at : at + len(block_sum)] = block_sum

    def set_sums(self, slots: NDArray[np.int64], sums: bytes) -> None:
        """Store the packed sums of several slots; owner only, before their words turn SEALED."""
        rows = np.frombuffer(self._bytes, _ROW, self.size.max_slots, HEADER_BYTES)
        rows["sum"][slots] = np.frombuffer(sums, _ROW["sum"])

    def set_words(self, slots: NDArray[np.int64], words: NDArray[np.uint64]) -> None:
        """Store the words of several slots, each in one piece; owner only."""
        np.asarray(self.slot_words)[slots] = words

    def lay(self, slot: int, offset: int, block_bytes: int) -> None:
        """Say where a slot of a new chunk lies; owner only, while the slot is free."""
        self.clear(slot)
        at = HEADER_BYTES + slot * RECORD_BYTES
        struct.pack_into("<II", self._bytes, at + _WORD_BYTES, offset // GRANULE_BYTES, block_bytes)

    def clear(self, slot: int) -> None:
        """Zero everything but the word: the slot belongs to no chunk any more; owner only."""
        at = HEADER_BYTES + slot * RECORD_BYTES
        self._table[at + _WORD_BYTES : at + RECORD_BYTES] = bytes(RECORD_BYTES - _WORD_BYTES)

    def placed(self) -> list[tuple[int, int, int]]:
        """Return (slot, offset, block bytes) of every slot that belongs to a chunk."""
        table = self._bytes[HEADER_BYTES : HEADER_BYTES + self.size.max_slots * RECORD_BYTES]
        return [
            (slot, granules * GRANULE_BYTES, block_bytes)
            for slot, (granules, block_bytes) in enumerate(_PLACE.iter_unpack(table))
            if block_bytes
        ]

    def slots(self) -> Iterator[int]:
        """Iterate over the indexes of all slots."""
        return iter(range(self.size.max_slots))

    def block(self, offset: int, block_bytes: int) -> memoryview:
        """Return the bytes of one block."""
        assert 0 <= offset and offset + block_bytes <= self.size.data_bytes
        return self.data[offset : offset + block_bytes]

    def place(self, nodes: Sequence[int]) -> None:
        """Let pages that nobody touched yet lie on these NUMA nodes; raises `OSError`."""
        view = np.frombuffer(self.data, np.uint8)
        place(view.ctypes.data, self.size.data_bytes, nodes)

    def prefault(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Bring every page of the data into this process, in steps, reporting (done, total) bytes.

        The first process touches memory at 1 to 3 GB/s; each later one fills its page tables at
        10 GB/s, and without that writes into fresh slots at a quarter of its speed. Blocking, with
        the interpreter let go.
        """
        total = self.size.data_bytes
        view = np.frombuffer(self.data, np.uint8)  # keeps the mapping in place
        try:
            for start in range(0, total, _PREFAULT_STEP):
                length = min(_PREFAULT_STEP, total - start)
                if _LIBC.madvise(view.ctypes.data + start, length, _MADV_POPULATE_WRITE):
                    return  # an older kernel: the pages fault in at first use instead
                if progress is not None:
                    progress(start + length, total)
        finally:
            del view

    def prefault_soon(self) -> None:
        """Do what `prefault` does in a thread that nobody waits for."""
        threading.Thread(target=self.prefault, name="kvstore-prefault", daemon=True).start()

    def close(self) -> None:
        """Unmap. Views handed out earlier must be gone, else `BufferError` names the bug."""
        self.slot_words.release()
        self._words.release()
        self._bytes.release()
        self.data.release()
        self._table.close()
        self._data.close()
        self._forget_descriptor()
