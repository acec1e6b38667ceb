"""Disks that misbehave on purpose, behind the seam of `kvstore.tiers.nvme_device`.

`FaultyDisk` wraps a real one and fails, hangs, slows down or flips bits when told to.
`PowerLossDisk` keeps what was written and not synced apart, and on `lose_power` keeps any part of
that which a seed picks: whole writes, nothing, or a torn one, in 512-byte sectors. That is what
a disk with a volatile cache may do, and more than a good one does.
"""

import errno
import os
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kvstore.tiers.nvme_device import DiskDevice

SECTOR: Final = 512


@dataclass(slots=True)
class FaultyDisk:
    """A disk with switches. Set them from any thread; calls that hang go on at `release`."""

    inner: DiskDevice = field(default_factory=DiskDevice)
    fail_reads: int = 0
    """errno that reads raise; 0: none."""
    fail_writes: int = 0
    fail_opens: int = 0
    delay_s: float = 0.0
    """What every read and write takes longer."""
    reads: int = 0
    writes: int = 0
    _go: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._go.set()

    def hang(self) -> None:
        """Let reads and writes answer nothing until `release`."""
        self._go.clear()

    def release(self) -> None:
        """Let go of everything that hangs."""
        self._go.set()

    def open(self, path: Path, *, size: int, direct: bool) -> int:
        """Open, or fail."""
        _raise(self.fail_opens)
        return self.inner.open(path, size=size, direct=direct)

    def close(self, fd: int) -> None:
        """Pass on."""
        self.inner.close(fd)

    def remove(self, path: Path) -> None:
        """Pass on."""
        self.inner.remove(path)

    def read(self, fd: int, into: Sequence[memoryview], offset: int) -> None:
        """Read, late or never."""
        self.reads += 1
        self._trouble(self.fail_reads)
        self.inner.read(fd, into, offset)

    def write(self, fd: int, source: Sequence[memoryview], offset: int) -> None:
        """Write, late or never."""
        self.writes += 1
        self._trouble(self.fail_writes)
        self.inner.write(fd, source, offset)

    def sync(self, fd: int) -> None:
        """Pass on."""
        self._trouble(self.fail_writes)
        self.inner.sync(fd)

    def _trouble(self, error: int) -> None:
        self._go.wait()
        if self.delay_s:
            time.sleep(self.delay_s)
        _raise(error)


@dataclass(slots=True)
class _File:
    path: Path
    fd: int
    pending: list[tuple[int, bytes]] = field(default_factory=list)
    """(offset, bytes) written since the last sync, in order."""


class PowerLossDisk:
    """A disk whose cache forgets. What was synced is in the files; the rest is in memory."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._lock = threading.Lock()
        self._files: dict[int, _File] = {}

    def open(self, path: Path, *, size: int, direct: bool) -> int:
        """Open through the page cache: the medium is the file itself."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)
        with self._lock:
            self._files[fd] = _File(path, fd)
        return fd

    def close(self, fd: int) -> None:
        """Close; unsynced writes stay at risk no longer than the process: they are kept."""
        with self._lock:
            self._settle(self._files.pop(fd))
        os.close(fd)

    def remove(self, path: Path) -> None:
        """Unlink; a removed file's writes are nobody's."""
        path.unlink(missing_ok=True)

    def read(self, fd: int, into: Sequence[memoryview], offset: int) -> None:
        """Read what the medium and the cache together say."""
        with self._lock:
            for view in into:
                got = bytearray(os.pread(fd, len(view), offset))
                if len(got) < len(view):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                for start, written in self._files[fd].pending:
                    low, high = max(start, offset), min(start + len(written), offset + len(view))
                    if low < high:
                        got[low - offset : high - offset] = written[low - start : high - start]
                view[:] = got
                offset += len(view)

    def write(self, fd: int, source: Sequence[memoryview], offset: int) -> None:
        """Write into the cache."""
        with self._lock:
            self._files[fd].pending.append((offset, b"".join(source)))

    def sync(self, fd: int) -> None:
        """Put a file's writes on the medium."""
        with self._lock:
            self._settle(self._files[fd])

    def lose_power(self) -> None:
        """Keep an arbitrary part of what was not synced, and end: the disk is unplugged."""
        with self._lock:
            for file in self._files.values():
                for offset, written in file.pending:
                    for at in self._survivors(len(written)):
                        os.pwrite(file.fd, written[at : at + SECTOR], offset + at)
                file.pending.clear()

    def _survivors(self, length: int) -> list[int]:
        """Return the offsets of the sectors of one write that reached the medium."""
        sectors = list(range(0, length, SECTOR))
        fate = self._dice.choice(("whole", "lost", "torn", "torn"))
        if fate == "whole":
            return sectors
        return [at for at in sectors if fate == "torn" and self._dice.random() < 0.5]

    def _settle(self, file: _File) -> None:
        for offset, written in file.pending:
            os.pwrite(file.fd, written, offset)
        file.pending.clear()


def _raise(error: int) -> None:
    if error:
        raise OSError(error, os.strerror(error))
