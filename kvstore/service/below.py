"""The tiers below DRAM of one node, wired to its table, its policies and its watchers."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry

from kvstore.core.errors import BadInput
from kvstore.core.names import BlockName, Root
from kvstore.directory.events import TierKind
from kvstore.directory.policies import make_policy
from kvstore.observe.metrics import NodeMetrics, TierMetrics
from kvstore.service.hashing import Hasher
from kvstore.service.holdings import NodeHoldings, publish
from kvstore.service.movement import Lower, Movement
from kvstore.service.store import ArenaStore
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_config import NvmeConfig
from kvstore.tiers.nvme_space import Held

_SEAL_S: Final = 1.0
_FLUSH_S: Final = 2.0
"""How long a node that ends in good order may hash, and write below, what is not there yet."""
_DISK_LOOK_S: Final = 10.0
"""Between two looks at how full the disk is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BelowConfig:
    """Which tiers a node has below DRAM."""

    nvme: Path | None = None
    nvme_bytes: int = 0
    policy: str

    def __post_init__(self) -> None:
        if (self.nvme is None) != (self.nvme_bytes == 0):
            raise BadInput("--nvme and --nvme-bytes belong together: a directory, and its bytes")
        if self.nvme is not None:
            NvmeConfig(directory=self.nvme, capacity_bytes=self.nvme_bytes)

    @property
    def kinds(self) -> tuple[TierKind, ...]:
        """Every tier that the node publishes."""
        return (TierKind.DRAM,) if self.nvme is None else (TierKind.DRAM, TierKind.NVME)


class BelowDram:
    """What lies below one arena, and the movement between. Made by `start`."""

    def __init__(
        self,
        store: ArenaStore,
        hasher: Hasher,
        metrics: NodeMetrics,
        nvme: NvmeTier | None,
        disk: "asyncio.Task[None] | None" = None,
    ) -> None:
        """For `start`: use that. `disk` is the task that looks how full the disk is."""
        self._metrics = metrics
        self._disk = disk
        self._hasher = hasher
        self.nvme = nvme
        lowers = [] if nvme is None else [Lower(TierKind.NVME, nvme)]
        self.movement = Movement(store, hasher, lowers, metrics)

    @classmethod
    async def start(
        cls,
        config: BelowConfig,
        store: ArenaStore,
        hasher: Hasher,
        metrics: NodeMetrics,
        registry: CollectorRegistry,
    ) -> "BelowDram":
        """Open the tiers; raises `BadInput` or `Refused` naming a directory that cannot be used."""
        if config.nvme is None:
            return cls(store, hasher, metrics, None)

        def tell(held: Sequence[Held], deleted: bool) -> None:
            publish(store.table.publisher, held, deleted=deleted)

        tier_metrics = TierMetrics(registry)
        nvme = await NvmeTier.start(
            NvmeConfig(directory=config.nvme, capacity_bytes=config.nvme_bytes),
            make_policy(config.policy),
            tier_metrics,
            listener=tell,
        )
        store.on_request = nvme.request
        store.table.bypass = False
        store.table.publisher.holdings = NodeHoldings(store.table, nvme)
        disk = asyncio.create_task(_watch_disk(config.nvme, tier_metrics), name="disk space")
        return cls(store, hasher, metrics, nvme, disk)

    def bits(self, root: Root, name: BlockName) -> int:
        """Return which tiers below hold a block: bit (1 << tier) for each."""
        held = self.nvme is not None and self.nvme.holds(root, name)
        return 1 << int(TierKind.NVME) if held else 0

    def measure(self) -> None:
        """Set the gauges."""
        self.movement.measure()
        if self.nvme is not None:
            self.nvme.measure()
            self._metrics.used_bytes.labels("nvme").set(self.nvme.used_bytes)
            self._metrics.capacity_bytes.labels("nvme").set(self.nvme.capacity_bytes)

    async def close(self) -> None:
        """Write what is not below yet, as far as there is time, and close the tiers.

        The hasher has to run still: what has no sum is not written.
        """
        if self._disk is not None:
            self._disk.cancel()
            await asyncio.gather(self._disk, return_exceptions=True)
        if self.nvme is not None:
            await self._hasher.sealed(_SEAL_S)
        await self.movement.flush(_FLUSH_S)
        await self.movement.close()
        if self.nvme is not None:
            await self.nvme.close()


async def _watch_disk(directory: Path, metrics: TierMetrics) -> None:
    """Say now and then how full a tier's file system is; a disk that hangs holds up nobody else."""
    while True:
        try:
            found = await asyncio.to_thread(os.statvfs, directory)
        except OSError as error:
            kind = os.strerror(error.errno) if error.errno else "other"
            metrics.device_errors.labels("nvme", "statvfs", kind).inc()
        else:
            metrics.disk_free_bytes.labels("nvme").set(found.f_bavail * found.f_frsize)
            metrics.disk_bytes.labels("nvme").set(found.f_blocks * found.f_frsize)
        await asyncio.sleep(_DISK_LOOK_S)
