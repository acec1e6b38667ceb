"""What one NVMe tier is: where, how big, how much at once."""

from dataclasses import dataclass
from pathlib import Path

from kvstore.core.errors import BadInput
from kvstore.tiers.block_rows import HEADER_BYTES
from kvstore.tiers.nvme_space import SEGMENT_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmeConfig:
    """One directory on one disk."""

    directory: Path
    capacity_bytes: int
    segment_bytes: int = SEGMENT_BYTES
    threads: int = 8
    """Operations inside the device at once: the queue depth at which NVMe reaches its rate."""
    writers: int = 4
    """How many of them may be writes, so that reads always find a thread."""
    sync_ms: int = 5_000
    """How long rows may lie in the page cache: what a power failure may cost in index, not in
    correctness."""
    lock_ms: int = 5_000
    """How long another process may still have the directory: one that was killed takes a moment
    to end, and the node of a killed keeper may be at its start."""

    def __post_init__(self) -> None:
        if self.capacity_bytes < 16 * 2 * HEADER_BYTES:
            raise BadInput(f"an NVMe tier of {self.capacity_bytes} bytes holds nothing")
