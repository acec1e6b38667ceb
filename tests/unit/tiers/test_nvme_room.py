"""Room on the disk: restarts told to policy and listener, and disks that have none left."""

import asyncio
import errno
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from kvstore.directory.lru import Lru
from kvstore.directory.policy import block_key
from kvstore.observe.metrics import TierMetrics
from kvstore.testing.contracts import block
from kvstore.testing.devices import FaultyDisk
from kvstore.tiers.base import Held
from kvstore.tiers.block_rows import ROW_BYTES
from kvstore.tiers.device_threads import DeviceThreads
from kvstore.tiers.nvme_files import NvmeFiles
from kvstore.tiers.nvme_room import NvmeRoom
from kvstore.tiers.nvme_space import NvmeSpace
from tests.nvme_fixture import SLOT_BYTES, start, write


class Told:
    """What a listener heard."""

    def __init__(self) -> None:
        self.held: set[bytes] = set()

    def __call__(self, blocks: Sequence[Held], deleted: bool) -> None:
        for one in blocks:
            if deleted:
                self.held.remove(one.name)  # KeyError: it was never told of this one
            else:
                assert one.name not in self.held
                self.held.add(one.name)


@asynccontextmanager
async def room(
    directory: Path, told: Told, disk: FaultyDisk | None = None
) -> AsyncIterator[NvmeRoom]:
    """Return the room of a directory, not loaded yet."""
    threads = DeviceThreads(2, 2)
    errors: list[BaseException] = []
    made = NvmeRoom(
        NvmeSpace(64 * SLOT_BYTES), NvmeFiles(directory, disk or FaultyDisk()), threads, Lru(),
        TierMetrics(CollectorRegistry()), listener=told, failed=errors.append,
    )  # fmt: skip
    yield made
    threads.close()
    assert await threads.drained(5)
    made.close_files()
    assert not errors


async def filled(directory: Path, count: int) -> None:
    tier = await start(directory)
    await write(tier, [block(n) for n in range(count)])
    await tier.close()


async def test_a_restart_tells_policy_and_listener_of_every_block(tmp_path: Path) -> None:
    await filled(tmp_path, 20)
    told = Told()
    async with room(tmp_path, told) as made:
        assert await made.load() == 20
        assert (len(made.policy), made.scan(0, 1_000)) == (0, ([], None))
        await made.introduce()
        assert told.held == {block(n).header.name for n in range(20)}
        assert len(made.policy) == 20
        found, _ = made.scan(0, 1_000_000)
        assert {one.name for one in found} == told.held


async def test_what_goes_before_it_was_told_of_is_never_told_of(tmp_path: Path) -> None:
    await filled(tmp_path, 6)
    told = Told()
    async with room(tmp_path, told) as made:
        await made.load()
        gone = block(2).header
        place = made.space.find(gone.root, gone.name)
        assert place is not None
        (erasing,) = made.erase([place], "corrupt")
        await erasing.future
        again = await made.take([gone])
        assert again is not None
        made.hold(again, gone)
        made.space.release(again)
        await made.introduce()
        assert len(told.held) == len(made.policy) == 6


def row_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.rows"))


async def test_a_disk_that_fails_while_rows_are_read_leaves_no_file_open(tmp_path: Path) -> None:
    """Several segments are read at a time: those before the bad one are open already."""
    await filled(tmp_path, 12)
    assert len(row_files(tmp_path)) > 1

    class Counting(FaultyDisk):
        opened = 0

        def open(self, path: Path, *, size: int, direct: bool) -> int:
            fd = super().open(path, size=size, direct=direct)
            self.opened += 1
            return fd

        def read(self, fd: int, into: Sequence[memoryview], offset: int) -> None:
            super().read(fd, into, offset)
            self.fail_reads = errno.EIO  # the next one

        def close(self, fd: int) -> None:
            super().close(fd)
            self.opened -= 1

    disk = Counting()
    async with room(tmp_path, Told(), disk) as made:
        with pytest.raises(OSError, match="Input/output"):
            await made.load()
        assert (disk.reads, disk.opened) == (2, 0)
        assert len(made.space) == 0


async def test_a_block_found_twice_is_told_of_once(tmp_path: Path) -> None:
    """Two rows of one segment can name one block after a power failure, as those of two can."""
    await filled(tmp_path, 6)
    first = row_files(tmp_path)[0]
    raw = first.read_bytes()
    assert raw[:ROW_BYTES].strip(b"\0") and raw[ROW_BYTES : 2 * ROW_BYTES].strip(b"\0")
    first.write_bytes(raw[:ROW_BYTES] + raw[:ROW_BYTES] + raw[2 * ROW_BYTES :])
    told = Told()
    async with room(tmp_path, told) as made:
        assert await made.load() == 5
        assert len(made.scan(0, 1_000)[0]) == 0
        await made.introduce()
        assert len(told.held) == len(made.policy) == len(made.scan(0, 1_000)[0]) == 5
        segment = made.space.segments[0]
        places = [*made.space.index.values()]
        assert sum(place in places for place in range(segment.slots)) == segment.held


async def test_a_restart_keeps_the_prefix_order_of_prompts(tmp_path: Path) -> None:
    tier = await start(tmp_path)
    items = [block(n) for n in range(8)]
    for before, item in pairwise(items):
        parent = block_key(before.header.root, before.header.name)
        object.__setattr__(item.header, "parent", parent)
    await write(tier, items)
    await tier.close()
    told: list[bytes] = []
    async with room(tmp_path, Told()) as made:
        await made.load()
        made._listener = lambda blocks, deleted: told.extend(one.name for one in blocks)
        await made.introduce()
    assert told == [item.header.name for item in items]


async def test_many_at_once_share_one_new_segment(tmp_path: Path) -> None:
    async with room(tmp_path, Told()) as made:
        places = await asyncio.gather(*(made.take([block(n).header]) for n in range(4)))
        assert len(set(places)) == 4
        assert len(made.space.segments) == 1
