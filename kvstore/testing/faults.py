"""Things made unreliable by a seed: the faults are real in kind, and the same every time.

A faulty twin fails, loses and delays; it never lies, because the tier it stands for must not.
The contract suites run over it with `reliable = False`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from kvstore.core.names import BlockName, Root
from kvstore.core.outcomes import Outcome
from kvstore.tiers.base import ReadItem, Tier, WriteItem

_READ_FAULTS: Final = (Outcome.MISS, Outcome.LATE, Outcome.CORRUPT, Outcome.REFUSED)
_WRITE_FAULTS: Final = (Outcome.LATE, Outcome.REFUSED)


@dataclass(slots=True)
class FaultyTier:
    """Any tier over a bad device: each item of a batch fails with chance `fault_rate`.

    A failed read leaves rubbish in the buffer; a read that failed with CORRUPT also loses the
    block, as a tier drops a copy whose sum is wrong. A failed write may have been carried out:
    a device that answers late has often done its work.
    """

    inner: Tier
    seed: int
    fault_rate: float = 0.3
    faults: int = 0
    """How many items have failed so far."""
    name: str = field(init=False)
    _dice: random.Random = field(init=False)

    def __post_init__(self) -> None:
        assert 0.0 <= self.fault_rate <= 1.0
        self.name = f"faulty-{self.inner.name}"
        self._dice = random.Random(self.seed)

    def _draw(self, faults: Sequence[Outcome], count: int) -> list[Outcome | None]:
        drawn = [
            self._dice.choice(faults) if self._dice.random() < self.fault_rate else None
            for _ in range(count)
        ]
        self.faults += count - drawn.count(None)
        return drawn

    async def read(self, batch: Sequence[ReadItem], *, deadline_ms: int) -> list[Outcome]:
        """Read through, then fail some items."""
        drawn = self._draw(_READ_FAULTS, len(batch))
        outcomes = await self.inner.read(batch, deadline_ms=deadline_ms)
        for at, fault in enumerate(drawn):
            if fault is None:
                continue
            item = batch[at]
            await item.drained.wait()
            item.into[: len(item.into)] = self._dice.randbytes(len(item.into))
            if fault is Outcome.CORRUPT:
                await self.inner.remove([(item.root, item.name)])
            outcomes[at] = fault
        return outcomes

    async def write(self, batch: Sequence[WriteItem], *, deadline_ms: int) -> list[Outcome]:
        """Write some items, fail others; a late one is carried out half of the time."""
        drawn = self._draw(_WRITE_FAULTS, len(batch))
        kept = [
            at
            for at, fault in enumerate(drawn)
            if fault is None or (fault is Outcome.LATE and self._dice.random() < 0.5)
        ]
        written = await self.inner.write([batch[at] for at in kept], deadline_ms=deadline_ms)
        outcomes = [fault or Outcome.REFUSED for fault in drawn]
        for at, outcome in zip(kept, written, strict=True):
            outcomes[at] = drawn[at] or outcome
        for at in set(range(len(batch))) - set(kept):
            batch[at].drained.set()
        return outcomes

    async def remove(self, blocks: Sequence[tuple[Root, BlockName]]) -> None:
        """Pass on: forgetting is from memory and cannot fail."""
        await self.inner.remove(blocks)

    def holds(self, root: Root, name: BlockName) -> bool:
        """Pass on."""
        return self.inner.holds(root, name)

    async def close(self) -> None:
        """Pass on."""
        await self.inner.close()
