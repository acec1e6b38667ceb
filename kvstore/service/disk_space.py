"""How full the file systems are that tiers lie on: a look now and then, on a thread."""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from kvstore.directory.events import TierKind
from kvstore.observe.metrics import TierMetrics

_LOOK_S: Final = 10.0


class DiskWatch:
    """Sets the gauges of several tiers until closed."""

    def __init__(self, directories: Mapping[TierKind, Path | None], metrics: TierMetrics) -> None:
        self._tasks = [
            asyncio.create_task(_look(kind.name.lower(), directory, metrics), name="disk space")
            for kind, directory in directories.items()
            if directory is not None
        ]

    async def close(self) -> None:
        """Look no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _look(tier: str, directory: Path, metrics: TierMetrics) -> None:
    """Look at one file system; one that hangs holds up nobody else."""
    while True:
        try:
            found = await asyncio.to_thread(os.statvfs, directory)
        except OSError as error:
            kind = os.strerror(error.errno) if error.errno else "other"
            metrics.device_errors.labels(tier, "statvfs", kind).inc()
        else:
            metrics.disk_free_bytes.labels(tier).set(found.f_bavail * found.f_frsize)
            metrics.disk_bytes.labels(tier).set(found.f_blocks * found.f_frsize)
        await asyncio.sleep(_LOOK_S)
