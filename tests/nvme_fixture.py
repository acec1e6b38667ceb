"""NVMe tiers in a test's directory, ended with the test."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from kvstore.core.outcomes import Outcome
from kvstore.directory.lru import Lru
from kvstore.observe.metrics import TierMetrics
from kvstore.testing.contracts import block, wanted
from kvstore.tiers.base import Tier, WriteItem
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_config import NvmeConfig
from tests.patience import PATIENCE_MS

SLOT_BYTES = 3 * 4096
"""Header and two granules: what `contracts.block` takes."""


async def start(
    directory: Path, *, slots: int = 64, loaded: bool = True, lock_ms: int = 50, **options: Any
) -> NvmeTier:
    """Return a tier with room for `slots` blocks of 8 KiB in 16 segments, its index read or not."""
    config = NvmeConfig(
        directory=directory,
        capacity_bytes=slots * SLOT_BYTES,
        threads=4,
        writers=2,
        sync_ms=60_000,
        lock_ms=lock_ms,
    )
    tier = await NvmeTier.start(config, Lru(), TierMetrics(CollectorRegistry()), **options)
    if loaded:
        await tier.loaded()
    return tier


async def write(tier: Tier, items: Sequence[WriteItem], *, ms: int = PATIENCE_MS) -> list[Outcome]:
    """Write, and wait until nothing reads the sources."""
    outcomes = await tier.write(items, deadline_ms=ms)
    for item in items:
        await item.drained.wait()
    return outcomes


async def read(tier: Tier, numbers: Sequence[int], *, ms: int = PATIENCE_MS) -> list[Outcome]:
    """Read blocks; a hit has the block's very bytes, always."""
    items = [block(number) for number in numbers]
    reads = wanted(items)
    outcomes = await tier.read(reads, deadline_ms=ms)
    for item, one, outcome in zip(items, reads, outcomes, strict=True):
        size = item.header.payload_bytes
        assert outcome is not Outcome.HIT or one.into[:size] == item.source[:size]
    return outcomes
