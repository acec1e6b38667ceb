"""What one tier of shared files is: where, how big, how much at once."""

from dataclasses import dataclass
from pathlib import Path

from kvstore.core.errors import BadInput
from kvstore.tiers.block_rows import HEADER_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesConfig:
    """One shared directory, as this node uses it."""

    directory: Path
    capacity_bytes: int
    """Bytes of all blocks in it, whoever wrote them: beyond it a write drops others first."""
    threads: int = 8
    writers: int = 4
    round_s: float = 60.0
    """How long it takes at most to see what others have written."""

    def __post_init__(self) -> None:
        if self.capacity_bytes <= HEADER_BYTES:
            raise BadInput(f"--files-bytes {self.capacity_bytes} holds nothing")
        if not 0 < self.writers <= self.threads:
            raise BadInput(f"{self.writers} writers of {self.threads} threads")
        if self.round_s <= 0:
            raise BadInput(f"a round of {self.round_s} s")
