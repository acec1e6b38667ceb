"""Where prefixes were found to end inside what a view promised: positions to look at as well.

A match halves its way to the end of a prefix (`places`), so a block that is missing in the middle
may be stepped over, and the answer is too long. The worker that was sent there says where the
prefix really ended. That position is then looked at in every match of the same blocks: one answer,
and the promise is right. Positions are kept, not what lies there, so nothing is to be taken back
when the hole is filled.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

MAX_HOLES: Final = 64
"""Positions remembered, the oldest give way: each costs every match about 0.1 us, and holes are
rare, since caches give up the ends of prefixes first."""


class Holes:
    """Positions at which prefixes of some names ended."""

    def __init__(self) -> None:
        self._at: OrderedDict[tuple[bytes, bytes], int] = OrderedDict()

    def __len__(self) -> int:
        """Return how many positions are remembered; at most `MAX_HOLES`."""
        return len(self._at)

    def note(self, root: bytes, names: Sequence[bytes], blocks: int) -> None:
        """Note that `names[blocks]` is missing although later ones are there."""
        assert 0 <= blocks < len(names), "a prefix ends before a block"
        self._at[root, names[blocks]] = blocks
        self._at.move_to_end((root, names[blocks]))
        while len(self._at) > MAX_HOLES:
            self._at.popitem(last=False)

    def within(self, root: bytes, names: Sequence[bytes]) -> list[int]:
        """Return the noted positions of these names, in no order."""
        length = len(names)
        return [
            blocks
            for (under, name), blocks in self._at.items()
            if blocks < length and names[blocks] == name and under == root
        ]
