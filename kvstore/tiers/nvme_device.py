"""The seam to a disk: blocking calls that either do the whole thing or raise `OSError`.

`kvstore.testing.devices` has devices behind the same seam that lose unsynced writes, fail, hang,
slow down and flip bits; so the tier's behaviour under them is tested and not hoped for.
"""

import errno
import logging
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from kvstore.core.limits import GRANULE_BYTES

_log = logging.getLogger(__name__)
_NO_DIRECT: Final = (errno.EINVAL, errno.EOPNOTSUPP)


class Device(Protocol):
    """What the tier asks of a disk. Called from threads; each call blocks until it is done."""

    def open(self, path: Path, *, size: int, direct: bool) -> int:
        """Return a descriptor of a file of `size` bytes, made, preallocated or cut to that.

        `direct` files bypass the page cache: their buffers, offsets and sizes are whole granules.
        """
        ...

    def close(self, fd: int) -> None: ...

    def remove(self, path: Path) -> None:
        """Remove a file; one that is missing is fine."""
        ...

    def read(self, fd: int, into: Sequence[memoryview], offset: int) -> None:
        """Fill `into` from `offset` on; `EIO` where the file ends before."""
        ...

    def write(self, fd: int, source: Sequence[memoryview], offset: int) -> None:
        """Write all of `source` at `offset`."""
        ...

    def sync(self, fd: int) -> None:
        """Return when what was written is on the medium."""
        ...


class DiskDevice:
    """A local file system, with O_DIRECT where it offers that."""

    def __init__(self) -> None:
        self.direct = True
        """False once the file system refused O_DIRECT: then the page cache is in the way."""

    def open(self, path: Path, *, size: int, direct: bool) -> int:
        """Open, make and preallocate; `ENOSPC` here, and not in the middle of a write."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        fd = self._open_direct(path, flags) if direct and self.direct else None
        fd = os.open(path, flags, 0o600) if fd is None else fd
        try:
            found = os.fstat(fd).st_size
            if found < size:
                os.posix_fallocate(fd, 0, size)
            elif found > size:
                os.ftruncate(fd, size)
        except OSError:
            os.close(fd)
            raise
        return fd

    def _open_direct(self, path: Path, flags: int) -> int | None:
        try:
            return os.open(path, flags | os.O_DIRECT, 0o600)
        except OSError as error:
            if error.errno not in _NO_DIRECT:
                raise
        self.direct = False
        _log.warning("%s: no O_DIRECT here; blocks go through the page cache", path.parent)
        return None

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def remove(self, path: Path) -> None:
        """Unlink."""
        path.unlink(missing_ok=True)

    def read(self, fd: int, into: Sequence[memoryview], offset: int) -> None:
        """Read with one system call, and go on where it came back short."""
        views = [view for view in into if len(view)]
        while views:
            got = os.preadv(fd, views, offset)
            if not got:
                raise OSError(errno.EIO, "the file ends before the block does")
            offset += got
            views = _rest(views, got)

    def write(self, fd: int, source: Sequence[memoryview], offset: int) -> None:
        """Write with one system call, and go on where it came back short."""
        views = [view for view in source if len(view)]
        while views:
            done = os.pwritev(fd, views, offset)
            offset += done
            views = _rest(views, done)

    def sync(self, fd: int) -> None:
        """Flush data and size."""
        os.fdatasync(fd)


def aligned_page() -> memoryview:
    """Return a granule of zeros that starts at a page: what O_DIRECT takes."""
    return memoryview(mmap.mmap(-1, GRANULE_BYTES))


def aligned_copy(length: int) -> memoryview:
    """Return `length` bytes at a page boundary, for buffers that are not at one."""
    return memoryview(mmap.mmap(-1, max(length, 1)))[:length]


def _rest(views: list[memoryview], done: int) -> list[memoryview]:
    """Return what is left of `views` after their first `done` bytes."""
    rest: list[memoryview] = []
    for view in views:
        if done >= len(view):
            done -= len(view)
        else:
            rest.append(view[done:])
            done = 0
    return rest
