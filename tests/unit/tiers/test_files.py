"""Shared files: several nodes over one directory, and file systems that fail, hang or lie."""

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from kvstore.core.errors import BadInput
from kvstore.core.outcomes import Outcome
from kvstore.directory.lru import Lru
from kvstore.observe.metrics import TierMetrics
from kvstore.testing.contracts import OTHER_ROOT, ROOT, TierContract, block
from kvstore.testing.faults import FaultyTier
from kvstore.testing.shared_files import FaultyFiles
from kvstore.tiers.base import Held, Tier
from kvstore.tiers.block_rows import HEADER_BYTES
from kvstore.tiers.files import FilesTier
from kvstore.tiers.files_config import FilesConfig
from kvstore.tiers.files_device import LEAVES, BlockFiles, PlainFiles, leaf_of
from kvstore.tiers.files_index import FilesIndex
from kvstore.tiers.quotas import Quotas
from tests.nvme_fixture import SLOT_BYTES, read, write
from tests.patience import PATIENCE_S, until

HIT, MISS, LATE, CORRUPT = Outcome.HIT, Outcome.MISS, Outcome.LATE, Outcome.CORRUPT
REFUSED = Outcome.REFUSED


async def start(
    directory: Path, *, blocks: int = 64, round_s: float = 60, **more: Any
) -> FilesTier:
    config = FilesConfig(
        directory=directory, capacity_bytes=blocks * SLOT_BYTES, threads=4, writers=2,
        round_s=round_s,
    )  # fmt: skip
    tier = await FilesTier.start(config, Lru(), TierMetrics(CollectorRegistry()), **more)
    async with asyncio.timeout(PATIENCE_S):
        await tier.loaded()
    return tier


@asynccontextmanager
async def open_tier(directory: Path, **more: Any) -> AsyncIterator[FilesTier]:
    tier = await start(directory, **more)
    try:
        yield tier
    finally:
        await tier.close()


class TestFiles(TierContract):
    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.directory = tmp_path
        self.opened = 0

    async def open(self) -> Tier:
        self.opened += 1
        return await start(self.directory / str(self.opened))


@pytest.mark.parametrize("name", [n for n in dir(TierContract) if n.startswith("test_")])
async def test_its_faulty_twin_never_lies(name: str, tmp_path: Path) -> None:
    class Suite(TierContract):
        reliable = False
        opened = 0

        async def open(self) -> Tier:
            self.opened += 1
            return FaultyTier(await start(tmp_path / str(self.opened)), 3)

    await getattr(Suite(), name)()


def files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.block"))


async def test_blocks_outlive_the_tier_and_are_seen_by_others(tmp_path: Path) -> None:
    items = [block(n) for n in range(8)]
    async with open_tier(tmp_path) as one:
        assert await write(one, items) == [HIT] * 8
        assert len(files(tmp_path)) == 8
        assert files(tmp_path)[0].relative_to(tmp_path).parts.__len__() == 3, "two levels"
        assert not list((tmp_path / "tmp").iterdir())
    told: list[tuple[int, bool]] = []

    def listen(held: Sequence[Held], deleted: bool) -> None:
        told.append((len(held), deleted))

    async with open_tier(tmp_path, listener=listen) as again:
        assert len(again) == 8
        assert again.used_bytes == 8 * SLOT_BYTES
        assert sum(count for count, deleted in told if not deleted) == 8
        assert await read(again, range(8)) == [HIT] * 8
        assert await read(again, [9]) == [MISS]


async def test_what_another_node_writes_or_removes_is_seen_within_a_round(tmp_path: Path) -> None:
    async with open_tier(tmp_path, round_s=0.5) as one, open_tier(tmp_path, round_s=0.5) as two:
        await write(one, [block(1), block(2)])
        await until(lambda: two.holds(ROOT, block(1).header.name) and len(two) == 2)
        assert await read(two, [1, 2]) == [HIT] * 2
        await two.remove([(ROOT, block(1).header.name)])
        await until(lambda: not one.holds(ROOT, block(1).header.name))
        assert await read(one, [1, 2]) == [MISS, HIT]


async def test_a_file_that_is_gone_is_a_miss_and_forgotten(tmp_path: Path) -> None:
    async with open_tier(tmp_path) as tier:
        await write(tier, [block(1)])
        files(tmp_path)[0].unlink()
        assert await read(tier, [1]) == [MISS]
        assert not tier.holds(ROOT, block(1).header.name)
        assert await write(tier, [block(1)]) == [HIT], "and can be written again"
        assert await read(tier, [1]) == [HIT]


async def test_two_nodes_may_write_the_same_block(tmp_path: Path) -> None:
    async with open_tier(tmp_path) as one, open_tier(tmp_path) as two:
        first, second = await asyncio.gather(write(one, [block(1)]), write(two, [block(1)]))
        assert first == second == [HIT]
        assert len(files(tmp_path)) == 1
        assert await read(one, [1]) == await read(two, [1]) == [HIT]


async def test_every_spoilt_byte_is_found(tmp_path: Path) -> None:
    """Every 97th byte of header and payload, a cut and an empty file: the copy is dropped."""
    async with open_tier(tmp_path) as tier:
        await write(tier, [block(1)])
        path = files(tmp_path)[0]
        whole = path.read_bytes()
        # The row's 128 bytes and the payload; padding belongs to nobody.
        spots = [*range(0, 128, 7), *range(HEADER_BYTES, HEADER_BYTES + 7_680, 97)]
        spoilt = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in spots]
        for content in [*spoilt, whole[:-1], whole[:100], b""]:
            path.write_bytes(content)
            assert await read(tier, [1]) == [CORRUPT]
            assert not tier.holds(ROOT, block(1).header.name)
            await until(lambda: not path.exists())
            assert await write(tier, [block(1)]) == [HIT]
        assert tier.corrupt == len(spoilt) + 3


async def test_another_blocks_file_under_this_name_is_no_hit(tmp_path: Path) -> None:
    async with open_tier(tmp_path) as tier:
        await write(tier, [block(1)])
        first = files(tmp_path)[0].read_bytes()
        await write(tier, [block(2)])
        other = next(path for path in files(tmp_path) if path.read_bytes() != first)
        other.write_bytes(first)
        assert await read(tier, [2]) == [CORRUPT]


async def test_it_is_bounded_and_drops_what_is_worth_least(tmp_path: Path) -> None:
    async with open_tier(tmp_path, blocks=8) as tier:
        for number in range(24):
            assert await write(tier, [block(number)]) == [HIT]
            assert tier.used_bytes <= tier.capacity_bytes
        assert tier.evictions == 16
        await until(lambda: len(files(tmp_path)) == 8)
        assert await read(tier, range(16, 24)) == [HIT] * 8
        assert await write(tier, [block(50, block_bytes=1 << 20)]) == [REFUSED], "more than all"


async def test_clearing_a_root_leaves_others(tmp_path: Path) -> None:
    async with open_tier(tmp_path) as tier:
        await write(tier, [block(1), block(2), block(1, root=OTHER_ROOT)])
        assert await tier.clear(ROOT) == 2
        assert len(files(tmp_path)) == 1
        assert await read(tier, [1, 2]) == [MISS, MISS]
        assert await tier.clear(None) == 1
        assert not files(tmp_path)


async def test_what_is_cleared_while_it_is_written_does_not_come_back(tmp_path: Path) -> None:
    system = FaultyFiles()
    async with open_tier(tmp_path, system=system) as tier:
        system.hang()
        writing = asyncio.create_task(write(tier, [block(1)]))
        await until(lambda: system.writes == 1 or bool(tier._writing))
        assert await tier.clear(None) == 0
        system.release()
        assert await writing == [REFUSED]
        await until(lambda: not files(tmp_path))


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
async def test_a_mount_that_fails_opens_the_breaker(tmp_path: Path, error: int) -> None:
    system = FaultyFiles()
    async with open_tier(tmp_path, system=system) as tier:
        await write(tier, [block(n) for n in range(4)])
        system.fail_reads = error
        assert set(await read(tier, range(3))) == {REFUSED}
        asked = system.reads
        assert await read(tier, [3]) == [REFUSED]
        assert system.reads == asked, "it is not asked any more"
        assert not tier.holds(ROOT, block(3).header.name), "nor is anything promised"
        assert len(tier) == 4, "and what is there is not forgotten for it"


async def test_a_full_file_system_refuses_writes_and_reads_on(tmp_path: Path) -> None:
    system = FaultyFiles()
    async with open_tier(tmp_path, system=system) as tier:
        await write(tier, [block(1)])
        system.fail_writes = errno.ENOSPC
        assert await write(tier, [block(2)]) == [REFUSED]
        tried = system.writes
        assert await write(tier, [block(3)]) == [REFUSED]
        assert system.writes == tried, "it is left alone for a while"
        assert await read(tier, [1, 2]) == [HIT, MISS]


async def test_a_mount_that_hangs_costs_one_deadline_and_lets_the_tier_end(tmp_path: Path) -> None:
    system = FaultyFiles()
    tier = await start(tmp_path, system=system)
    await write(tier, [block(n) for n in range(4)])
    system.hang()
    assert await read(tier, range(4), ms=100) == [LATE] * 4
    await tier.close()  # although four threads stand in the kernel
    system.release()


async def test_a_directory_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BadInput, match="--files"):
        await start(tmp_path / "file")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("capacity_bytes", 4_096, "holds nothing"),
        ("writers", 9, "writers"),
        ("round_s", 0, "round"),
    ],
)
def test_a_config_that_makes_no_sense(field: str, value: int, says: str) -> None:
    options: dict[str, Any] = {"capacity_bytes": 1 << 20, field: value}
    with pytest.raises(BadInput, match=says):
        FilesConfig(directory=Path("d"), **options)


def test_what_dead_writers_left_is_removed_in_time(tmp_path: Path) -> None:
    store = BlockFiles(tmp_path, PlainFiles())
    store.prepare()
    old, new = tmp_path / "tmp" / "a.part", tmp_path / "tmp" / "b.part"
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    past = time.time() - 7_200
    os.utime(old, (past, past))
    assert store.tidy() == 1
    assert (old.exists(), new.exists()) == (False, True)


def test_names_that_are_no_blocks_are_passed_over(tmp_path: Path) -> None:
    store = BlockFiles(tmp_path, PlainFiles())
    item = block(1)
    store.write(item.header, item.source)
    leaf = leaf_of(item.header.name)
    directory = files(tmp_path)[0].parent
    for name in ("x.block", f"{'0' * 64}.{'f' * 64}.8192.block", "README"):
        (directory / name).write_bytes(b"?")
    assert [held.name for held in store.list(leaf)] == [item.header.name]
    assert store.list((leaf + 1) % LEAVES) == []


def test_a_listing_that_began_before_a_write_says_nothing_of_what_is_gone() -> None:
    index = FilesIndex(Quotas().book("files"))
    one, two = (Held(ROOT, block(n).header.name, SLOT_BYTES) for n in (1, 2))
    assert index.add(one)
    assert not index.add(one)
    leaf = leaf_of(one.name)
    before = index.changes(leaf)
    assert index.compare(leaf, [], before) == ([], [one])
    assert index.compare(leaf, [], before - 1) == ([], [])
    assert index.compare(leaf, [one, two], before) == ([two], [])
    assert (index.used_bytes, len(index)) == (SLOT_BYTES, 1)
