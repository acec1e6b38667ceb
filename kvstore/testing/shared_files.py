"""A shared file system that misbehaves on purpose, behind `kvstore.tiers.files_device`."""

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.tiers.files_device import PlainFiles


@dataclass(slots=True)
class FaultyFiles:
    """A file system with switches. Set them from any thread; calls that hang go on at `release`."""

    inner: PlainFiles = field(default_factory=PlainFiles)
    fail_reads: int = 0
    """errno that reads and listings raise; 0: none."""
    fail_writes: int = 0
    """errno that writes raise, with half of the temporary file written."""
    delay_s: float = 0.0
    """What every read and write takes longer."""
    reads: int = 0
    writes: int = 0
    _go: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._go.set()

    def hang(self) -> None:
        """Let calls answer nothing until `release`: what a mount does when its server is gone."""
        self._go.clear()

    def release(self) -> None:
        """Let go of everything that hangs."""
        self._go.set()

    def read(self, path: Path, views: Sequence[memoryview]) -> int:
        """Read, late or never."""
        self.reads += 1
        self._trouble(self.fail_reads)
        return self.inner.read(path, views)

    def write(self, path: Path, parts: Sequence[bytes | memoryview], by_way_of: Path) -> None:
        """Write, late or never; a failure leaves what a dead writer would."""
        self.writes += 1
        if self.fail_writes:
            by_way_of.write_bytes(b"".join(parts)[: sum(map(len, parts)) // 2])
        self._trouble(self.fail_writes)
        self.inner.write(path, parts, by_way_of)

    def remove(self, path: Path) -> None:
        """Remove, late or never."""
        self._trouble(self.fail_writes)
        self.inner.remove(path)

    def names(self, directory: Path) -> list[str]:
        """List, late or never."""
        self._trouble(self.fail_reads)
        return self.inner.names(directory)

    def age_s(self, path: Path) -> float:
        """Pass on."""
        return self.inner.age_s(path)

    def make(self, directory: Path) -> None:
        """Make, late or never."""
        self._trouble(self.fail_writes)
        self.inner.make(directory)

    def _trouble(self, error: int) -> None:
        self._go.wait()
        if self.delay_s:
            time.sleep(self.delay_s)
        if error:
            raise OSError(error, os.strerror(error))
