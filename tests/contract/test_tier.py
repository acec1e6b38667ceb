"""The tier contract over an honest tier, its faulty twin, and liars to see that it bites.

Peers and shared files have modules of their own; the arena is not behind `Tier`, because its slots
are read in place.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvstore.core.names import BlockName, Root
from kvstore.core.outcomes import Outcome
from kvstore.testing.contracts import DEADLINE_MS, TierContract, block, wanted
from kvstore.testing.faults import FaultyTier
from kvstore.tiers.base import BlockHeader, ReadItem, Tier, WriteItem
from kvstore.tiers.sums import block_sum
from tests import nvme_fixture


class DictTier:
    """The shortest honest tier: what a reader of the interface can check by eye."""

    def __init__(self) -> None:
        self.name = "dict"
        self.blocks: dict[tuple[Root, BlockName], tuple[BlockHeader, bytes]] = {}
        self.closed = False

    async def read(self, batch: Sequence[ReadItem], *, deadline_ms: int) -> list[Outcome]:
        return [self._read(item) for item in batch]

    def _read(self, item: ReadItem) -> Outcome:
        item.drained.set()
        if self.closed:
            return Outcome.REFUSED
        if (item.root, item.name) not in self.blocks:
            return Outcome.MISS
        header, stored = self.blocks[item.root, item.name]
        item.into[:] = stored
        if block_sum(item.into[: header.payload_bytes], header.shares) != header.sum:
            del self.blocks[item.root, item.name]
            return Outcome.CORRUPT
        return Outcome.HIT

    async def write(self, batch: Sequence[WriteItem], *, deadline_ms: int) -> list[Outcome]:
        for item in batch:
            if not self.closed:
                self.blocks[item.header.root, item.header.name] = (item.header, bytes(item.source))
            item.drained.set()
        return [Outcome.REFUSED if self.closed else Outcome.HIT] * len(batch)

    async def remove(self, blocks: Sequence[tuple[Root, BlockName]]) -> None:
        for key in blocks:
            self.blocks.pop(key, None)

    def holds(self, root: Root, name: BlockName) -> bool:
        return (root, name) in self.blocks

    async def close(self) -> None:
        self.closed = True


class TestDict(TierContract):
    async def open(self) -> Tier:
        return DictTier()


class TestNvme(TierContract):
    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.directory = tmp_path
        self.opened = 0

    async def open(self) -> Tier:
        self.opened += 1
        return await nvme_fixture.start(self.directory / str(self.opened))


@pytest.mark.parametrize("seed", range(2))
class TestFaultyNvme:
    """The suite over the NVMe tier behind a seeded faulty twin."""

    @pytest.mark.parametrize("name", [n for n in dir(TierContract) if n.startswith("test_")])
    async def test_never_lies(self, seed: int, name: str, tmp_path: Path) -> None:
        class Suite(TierContract):
            reliable = False
            opened = 0

            async def open(self) -> Tier:
                self.opened += 1
                return FaultyTier(await nvme_fixture.start(tmp_path / str(self.opened)), seed)

        await getattr(Suite(), name)()


@pytest.mark.parametrize("seed", range(8))
class TestFaultyDict:
    """Every test of the suite under eight seeds; a parameter cannot go on inherited tests."""

    @pytest.mark.parametrize("name", [n for n in dir(TierContract) if n.startswith("test_")])
    async def test_never_lies(self, seed: int, name: str) -> None:
        class Suite(TierContract):
            reliable = False

            async def open(self) -> Tier:
                return FaultyTier(DictTier(), seed)

        await getattr(Suite(), name)()


async def test_faults_come_from_the_seed_alone() -> None:
    items = [block(n) for n in range(16)]

    async def life(seed: int) -> tuple[list[Outcome], list[Outcome], int]:
        tier = FaultyTier(DictTier(), seed)
        written = await tier.write(items, deadline_ms=DEADLINE_MS)
        read = await tier.read(wanted(items), deadline_ms=DEADLINE_MS)
        return written, read, tier.faults

    assert await life(3) == await life(3)
    assert (await life(3))[2] > 0
    assert len({str(await life(seed)) for seed in range(5)}) == 5


async def test_a_twin_without_faults_is_the_tier() -> None:
    tier = FaultyTier(DictTier(), seed=1, fault_rate=0.0)
    assert await tier.write([block(1)], deadline_ms=DEADLINE_MS) == [Outcome.HIT]
    assert await tier.read(wanted([block(1)]), deadline_ms=DEADLINE_MS) == [Outcome.HIT]
    assert (tier.name, tier.faults) == ("faulty-dict", 0)


class _Empty(DictTier):
    """Says HIT and fills nothing."""

    def _read(self, item: ReadItem) -> Outcome:
        item.drained.set()
        return Outcome.HIT if (item.root, item.name) in self.blocks else Outcome.MISS


class _Unverified(DictTier):
    """Does not look at sums."""

    def _read(self, item: ReadItem) -> Outcome:
        outcome = super()._read(item)
        return Outcome.HIT if outcome is Outcome.CORRUPT else outcome


class _Rootless(DictTier):
    """Finds a block by its name alone."""

    def _read(self, item: ReadItem) -> Outcome:
        for root, name in list(self.blocks):
            if name == item.name:
                return super()._read(ReadItem(root, name, item.into, item.drained))
        return super()._read(item)


class _Disordered(DictTier):
    """Answers in some other order."""

    async def read(self, batch: Sequence[ReadItem], *, deadline_ms: int) -> list[Outcome]:
        return (await super().read(batch, deadline_ms=deadline_ms))[::-1]


class _Short(DictTier):
    """Answers for some items only."""

    async def read(self, batch: Sequence[ReadItem], *, deadline_ms: int) -> list[Outcome]:
        return (await super().read(batch, deadline_ms=deadline_ms))[:1]


class _Sticky(DictTier):
    """Forgets nothing."""

    async def remove(self, blocks: Sequence[tuple[Root, BlockName]]) -> None:
        return


class _Boastful(DictTier):
    """Says that a write succeeded and drops the block."""

    async def write(self, batch: Sequence[WriteItem], *, deadline_ms: int) -> list[Outcome]:
        for item in batch:
            item.drained.set()
        return [Outcome.HIT] * len(batch)


class _Torn(DictTier):
    """Stores half of a block and forgets to check it."""

    async def write(self, batch: Sequence[WriteItem], *, deadline_ms: int) -> list[Outcome]:
        for item in batch:
            half = len(item.source) // 2
            torn = bytes(item.source[:half]) + bytes(len(item.source) - half)
            self.blocks[item.header.root, item.header.name] = (item.header, torn)
            item.drained.set()
        return [Outcome.HIT] * len(batch)

    def _read(self, item: ReadItem) -> Outcome:
        outcome = super()._read(item)
        return Outcome.HIT if outcome is Outcome.CORRUPT else outcome


class _Raising(DictTier):
    """Lets a device's failure out."""

    async def read(self, batch: Sequence[ReadItem], *, deadline_ms: int) -> list[Outcome]:
        if self.closed:
            raise OSError(9, "bad descriptor")
        return await super().read(batch, deadline_ms=deadline_ms)


@pytest.mark.parametrize(
    ("liar", "broken"),
    [
        (_Empty, "test_what_was_written_is_read_back"),
        (_Unverified, "test_bytes_that_fail_their_sum_are_never_a_hit"),
        (_Rootless, "test_the_same_name_under_another_root_is_another_block"),
        (_Disordered, "test_outcomes_stand_in_the_order_of_the_batch"),
        (_Short, "test_what_was_never_written_misses"),
        (_Sticky, "test_what_was_removed_misses"),
        (_Boastful, "test_what_was_written_is_read_back"),
        (_Torn, "test_a_cancelled_write_is_whole_or_absent"),
        (_Raising, "test_a_closed_tier_answers_without_raising"),
    ],
)
async def test_the_suite_catches(liar: Callable[[], Tier], broken: str) -> None:
    class Suite(TierContract):
        async def open(self) -> Tier:
            return liar()

    test: Any = getattr(Suite(), broken)
    with pytest.raises((AssertionError, OSError)):
        await test()
