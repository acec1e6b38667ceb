"""The tier's files: a lock, and per segment one of slots and one of rows. Blocking calls.

    DIR/lock                             held by the node that uses the directory
    DIR/segment-000012-2101248.data      slots of 2,101,248 bytes
    DIR/segment-000012-2101248.rows      128 bytes per slot

Order of a write: erase the slot's row, write header and block in one operation, write the new row.
So a process that dies anywhere leaves a row only beside the bytes that it was written for. After
a power failure the three may be on the medium in any mixture; then the header in front of the
block, which every read checks against the wanted name and the block's sum, turns it into a miss.
"""

import fcntl
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from kvstore.core.errors import BadInput, Refused
from kvstore.core.limits import GRANULE_BYTES
from kvstore.core.outcomes import Outcome
from kvstore.tiers.base import BlockHeader, ReadItem
from kvstore.tiers.block_rows import HEADER_BYTES, NO_ROW, ROW_BYTES, pack_row, unpack_row
from kvstore.tiers.nvme_device import Device, aligned_copy, aligned_page
from kvstore.tiers.sums import block_sum

_NAME: Final = re.compile(r"segment-(\d{6})-(\d+)\.rows")
_LOCK_POLL_S: Final = 0.02
_pages = threading.local()


@dataclass(frozen=True, slots=True)
class SegmentFiles:
    """Open files of one segment."""

    number: int
    slot_bytes: int
    data: int
    rows: int


def _taken(fd: int) -> bool:
    """Take the lock if nobody has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class NvmeFiles:
    """One directory. Every method blocks; none may be called from an event loop's thread."""

    def __init__(self, directory: Path, device: Device) -> None:
        self._directory = directory
        self._device = device

    def lock(self, *, within_ms: int) -> int:
        """Make the directory and take it; returns the lock's descriptor.

        Raises `BadInput` when it cannot be made or written, `Refused` when another node still has
        it after `within_ms`.
        """
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise BadInput(f"NVMe directory {self._directory}: {error.strerror}") from error
        ends = time.monotonic() + within_ms / 1000
        try:
            while not _taken(fd):
                if time.monotonic() >= ends:
                    raise Refused(f"NVMe directory {self._directory} is used by another node")
                time.sleep(_LOCK_POLL_S)  # the kernel has no lock with a deadline
        except OSError as error:
            os.close(fd)
            raise BadInput(f"NVMe directory {self._directory}: {error.strerror}") from error
        except Refused:
            os.close(fd)
            raise
        return fd

    def found(self) -> Iterator[tuple[int, int]]:
        """Yield (number, slot bytes) of the segments in the directory, in order of number."""
        for path in sorted(self._directory.glob("segment-*.rows")):
            named = _NAME.fullmatch(path.name)
            if named is not None:
                yield int(named[1]), int(named[2])

    def open(self, number: int, slot_bytes: int, slots: int) -> SegmentFiles:
        """Open a segment's files, made and preallocated where missing. Raises `OSError`."""
        data, rows = self._paths(number, slot_bytes)
        data_fd = self._device.open(data, size=slots * slot_bytes, direct=True)
        try:
            rows_fd = self._device.open(rows, size=slots * ROW_BYTES, direct=False)
        except OSError:
            self._device.close(data_fd)
            raise
        return SegmentFiles(number, slot_bytes, data_fd, rows_fd)

    def discard(self, number: int, slot_bytes: int, files: SegmentFiles | None = None) -> None:
        """Remove a segment: its rows first, so that nothing is found without its bytes."""
        data, rows = self._paths(number, slot_bytes)
        self._device.remove(rows)
        self._device.remove(data)
        if files is not None:
            self.close(files)

    def close(self, files: SegmentFiles) -> None:
        """Close the descriptors; nothing may be using them."""
        self._device.close(files.data)
        self._device.close(files.rows)

    def read_rows(self, files: SegmentFiles, slots: int) -> bytes:
        """Return the whole row file."""
        raw = bytearray(slots * ROW_BYTES)
        self._device.read(files.rows, [memoryview(raw)], 0)
        return bytes(raw)

    def sync_rows(self, files: SegmentFiles) -> None:
        """Put the rows on the medium."""
        self._device.sync(files.rows)

    def erase(self, files: SegmentFiles, slots: Sequence[int]) -> None:
        """Forget the blocks of slots, for good: also after a power failure."""
        for slot in slots:
            self._device.write(files.rows, [memoryview(NO_ROW)], slot * ROW_BYTES)
        self._device.sync(files.rows)

    def write(
        self, files: SegmentFiles, slot: int, header: BlockHeader, source: memoryview
    ) -> None:
        """Store a block in a slot that nothing else uses. Raises `OSError`."""
        row = pack_row(header)
        page = _header_page()
        page[:ROW_BYTES] = row
        if not _is_aligned(source):
            copy = aligned_copy(len(source))
            copy[:] = source
            source = copy
        rows_at = slot * ROW_BYTES
        self._device.write(files.rows, [memoryview(NO_ROW)], rows_at)
        self._device.write(files.data, [page, source], slot * files.slot_bytes)
        self._device.write(files.rows, [memoryview(row)], rows_at)

    def read(self, files: SegmentFiles, slot: int, item: ReadItem) -> Outcome:
        """Fill `item.into` with the wanted block: HIT, or MISS for another's, or CORRUPT.

        Raises `OSError` when the device fails.
        """
        page = _header_page()
        into = item.into
        aligned = _is_aligned(into)
        target = into if aligned else aligned_copy(len(into))
        self._device.read(files.data, [page, target], slot * files.slot_bytes)
        header = unpack_row(page[:ROW_BYTES])
        if header is None:
            return Outcome.CORRUPT
        if (header.root, header.name) != (item.root, item.name):
            return Outcome.MISS  # the row was older than the slot's bytes
        if header.payload_bytes > len(target):
            return Outcome.CORRUPT
        if block_sum(target[: header.payload_bytes], header.shares) != header.sum:
            return Outcome.CORRUPT
        if not aligned:
            into[:] = target
        item.sum = header.sum
        return Outcome.HIT

    def _paths(self, number: int, slot_bytes: int) -> tuple[Path, Path]:
        stem = self._directory / f"segment-{number:06d}-{slot_bytes}"
        return stem.with_suffix(".data"), stem.with_suffix(".rows")


def _header_page() -> memoryview:
    """Return this thread's page for headers; its tail beyond the row stays zero."""
    page: memoryview | None = getattr(_pages, "page", None)
    if page is None:
        page = _pages.page = aligned_page()
        assert len(page) == HEADER_BYTES
    return page


def _is_aligned(view: memoryview) -> bool:
    """Say whether a buffer starts and ends at a granule, as O_DIRECT wants it."""
    address: int = np.frombuffer(view, np.uint8).ctypes.data
    return address % GRANULE_BYTES == 0 and len(view) % GRANULE_BYTES == 0
