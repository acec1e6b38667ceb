"""Whole-block files in a shared directory, as blocking calls. The seam where file systems fail.

    DIR/3f/a/<root>.<name>.<bytes>.block      header page | block, padded
    DIR/tmp/<random>.part                     on its way; renamed when it is whole

A name says all that a listing needs, so that finding the blocks of others costs one call for each
directory and none for each file. The header decides all the same: a read is a hit only when it is
whole, names the wanted block, and the block has its sum.
"""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from kvstore.core.names import BlockName, Root
from kvstore.core.outcomes import Outcome
from kvstore.tiers.base import BlockHeader, Held, ReadItem
from kvstore.tiers.block_rows import HEADER_BYTES, ROW_BYTES, pack_row, unpack_row
from kvstore.tiers.sums import block_sum

LEAVES: Final = 4_096
"""Directories of two levels, 256 x 16, by the first 12 bits of a block's name."""
_FILE: Final = re.compile(r"([0-9a-f]{64})\.([0-9a-f]{64})\.(\d{1,12})\.block")
_STALE_S: Final = 3_600.0
"""A file that was on its way for so long is nobody's any more."""


def leaf_of(name: bytes) -> int:
    """Return the number of the directory that a block's file lies in."""
    return name[0] << 4 | name[1] >> 4


class SharedFiles(Protocol):
    """What the tier asks of a file system. Every call may raise `OSError`, hang, or be slow."""

    def read(self, path: Path, views: Sequence[memoryview]) -> int:
        """Fill `views` from the start of a file; return the bytes read."""
        ...

    def write(self, path: Path, parts: Sequence[bytes | memoryview], by_way_of: Path) -> None:
        """Make a file of `parts` that is seen whole or not at all; replaces an older one."""
        ...

    def remove(self, path: Path) -> None:
        """Remove a file; one that is not there is no error."""
        ...

    def names(self, directory: Path) -> list[str]:
        """Return the names in a directory; none where there is no directory."""
        ...

    def age_s(self, path: Path) -> float:
        """Return for how long a file has not changed."""
        ...

    def make(self, directory: Path) -> None:
        """Make a directory and those above it, where they are missing."""
        ...


class PlainFiles:
    """The operating system's."""

    def read(self, path: Path, views: Sequence[memoryview]) -> int:
        """See `SharedFiles`."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _all(lambda rest, at: os.preadv(fd, rest, at), views)
        finally:
            os.close(fd)

    def write(self, path: Path, parts: Sequence[bytes | memoryview], by_way_of: Path) -> None:
        """See `SharedFiles`."""
        fd = os.open(by_way_of, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                _all(lambda rest, at: os.pwritev(fd, rest, at), [memoryview(one) for one in parts])
            finally:
                os.close(fd)  # where NFS tells of errors of writing
            os.rename(by_way_of, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(by_way_of)
            raise

    def remove(self, path: Path) -> None:
        """See `SharedFiles`."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def names(self, directory: Path) -> list[str]:
        """See `SharedFiles`."""
        try:
            return os.listdir(directory)
        except FileNotFoundError:
            return []

    def age_s(self, path: Path) -> float:
        """See `SharedFiles`."""
        return time.time() - os.stat(path).st_mtime

    def make(self, directory: Path) -> None:
        """See `SharedFiles`."""
        os.makedirs(directory, mode=0o700, exist_ok=True)


class BlockFiles:
    """Blocks as files. Blocking; safe from several threads, since no two share a file's name."""

    def __init__(self, directory: Path, system: SharedFiles) -> None:
        self.directory = directory
        self._system = system
        self._made: set[int] = set()

    def prepare(self) -> None:
        """Make the directory; raises `OSError`."""
        self._system.make(self.directory / "tmp")

    def read(self, item: ReadItem) -> Outcome:
        """Fill `item.into` with the wanted block: HIT, or MISS, or CORRUPT; raises `OSError`."""
        page = memoryview(bytearray(HEADER_BYTES))
        path = self.path(item.root, item.name, HEADER_BYTES + len(item.into))
        try:
            found = self._system.read(path, [page, item.into])
        except FileNotFoundError:
            return Outcome.MISS
        header = unpack_row(page[:ROW_BYTES])
        if found != HEADER_BYTES + len(item.into) or header is None:
            return Outcome.CORRUPT
        if (header.root, header.name) != (item.root, item.name):
            return Outcome.CORRUPT
        if header.payload_bytes > len(item.into):
            return Outcome.CORRUPT
        if block_sum(item.into[: header.payload_bytes], header.shares) != header.sum:
            return Outcome.CORRUPT
        item.sum = header.sum
        return Outcome.HIT

    def write(self, header: BlockHeader, source: memoryview) -> None:
        """Store a block; raises `OSError`."""
        leaf = leaf_of(header.name)
        if leaf not in self._made:
            self._system.make(self._leaf(leaf))
            self._made.add(leaf)
        row = pack_row(header)
        page = row + bytes(HEADER_BYTES - len(row))
        path = self.path(header.root, header.name, HEADER_BYTES + len(source))
        part = self.directory / "tmp" / f"{secrets.token_hex(12)}.part"
        try:
            self._system.write(path, [page, source], part)
        except FileNotFoundError:  # somebody cleared the tree behind our back
            self._made.clear()
            self.prepare()
            self._system.make(self._leaf(leaf))
            self._system.write(path, [page, source], part)

    def remove(self, blocks: Sequence[Held]) -> None:
        """Remove blocks; raises the first `OSError` after all were tried."""
        failure: OSError | None = None
        for one in blocks:
            try:
                self._system.remove(self.path(one.root, one.name, one.slot_bytes))
            except OSError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def list(self, leaf: int) -> list[Held]:
        """Return the blocks in one directory; names that are no block's are passed over."""
        found: list[Held] = []
        for name in self._system.names(self._leaf(leaf)):
            match = _FILE.fullmatch(name)
            if match is not None:
                root, block, size = match.groups()
                held = Held(Root(bytes.fromhex(root)), BlockName(bytes.fromhex(block)), int(size))
                if leaf_of(held.name) == leaf and held.slot_bytes > HEADER_BYTES:
                    found.append(held)
        return found

    def tidy(self) -> int:
        """Remove files that writers who died left half-way; return how many."""
        removed = 0
        for name in self._system.names(self.directory / "tmp"):
            path = self.directory / "tmp" / name
            with contextlib.suppress(FileNotFoundError):
                if name.endswith(".part") and self._system.age_s(path) > _STALE_S:
                    self._system.remove(path)
                    removed += 1
        return removed

    def path(self, root: Root, name: BlockName, slot_bytes: int) -> Path:
        """Return where a block lies."""
        return self._leaf(leaf_of(name)) / f"{root.hex()}.{name.hex()}.{slot_bytes}.block"

    def _leaf(self, leaf: int) -> Path:
        return self.directory / f"{leaf >> 4:02x}" / f"{leaf & 15:x}"


def _all(call: "_Transfer", views: Sequence[memoryview]) -> int:
    """Repeat a vectored call until everything moved or the file ends; return the bytes."""
    rest, at = [view for view in views if len(view)], 0
    while rest:
        moved = call(rest, at)
        if not moved:
            break
        at += moved
        while rest and moved >= len(rest[0]):
            moved -= len(rest.pop(0))
        if rest and moved:
            rest[0] = rest[0][moved:]
    return at


class _Transfer(Protocol):
    def __call__(self, rest: "list[memoryview]", at: int, /) -> int: ...
