"""A node over directories that outlive it, so that it can be started again where it was."""

from pathlib import Path

from kvstore import Client, Namespace
from kvstore.directory.events import TierKind
from kvstore.testing.node import RunningNode, new_run_dir, start_node


class Host:
    """Keeper and node of one host, with an NVMe tier."""

    def __init__(self, nvme: Path, *, arena_bytes: int, nvme_bytes: str = "256MiB") -> None:
        self.nvme, self.run_dir = nvme, new_run_dir()
        self._arena_bytes = arena_bytes
        self._options = ["--nvme", str(nvme), "--nvme-bytes", nvme_bytes]
        self.start()

    def start(self) -> None:
        """Start them, with an empty arena."""
        self.node: RunningNode = start_node(
            self.run_dir, arena_bytes=self._arena_bytes, options=self._options
        )

    def corrupt_blocks(self) -> int:
        """Return how many blocks of the tier were found to be damaged."""
        other = Namespace(weights_digest="o", kv_dtype="float32", layers=1, kv_heads=1, head_dim=64)
        with Client.connect(self.run_dir, namespace=other, payload_bytes=8192, shares=1) as client:
            return client.stats().tiers[TierKind.NVME].corrupt
