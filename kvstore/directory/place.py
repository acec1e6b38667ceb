"""One tier of one publisher in a view: its bit, and the digest of what is known to lie there."""

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from kvstore.core.limits import NAME_BYTES
from kvstore.directory.policy import block_key

FOLD_NAMES: Final = 1_024
"""Names of a place that wait for their digest: nobody asks between two marks, and a thousand folded
together cost what ten do."""


@dataclass(slots=True)
class Place:
    """One tier of one publisher: its bit, and the digest of what is known to lie there."""

    bit: int
    count: int = 0
    partial: bool = False
    """Blocks were left out because the index is full: the digest cannot be compared."""
    _xor: int = 0
    _unfolded: list[bytes] = field(default_factory=list)
    _waiting: int = 0
    """Names in `_unfolded`."""

    @property
    def xor_keys(self) -> int:
        """Xor over `block_key` of every block."""
        if self._unfolded:
            self._fold()
        return self._xor

    def turn(self, root: bytes, packed: bytes, change: int) -> None:
        """Note blocks that were not here or, with a `change` below 0, as many that were."""
        self.count += change
        assert self.count >= 0, "a place loses only what it has"
        if change % 2:
            self._xor ^= block_key(root, b"")
        self._unfolded.append(packed)
        self._waiting += abs(change)
        if self._waiting > FOLD_NAMES:
            self._fold()

    def _fold(self) -> None:
        words = np.frombuffer(b"".join(self._unfolded), "<u8")[:: NAME_BYTES // 8]
        self._xor ^= int(np.bitwise_xor.reduce(words))
        self._unfolded.clear()
        self._waiting = 0
