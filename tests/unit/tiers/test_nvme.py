"""The NVMe tier on real files: restarts, faults, eviction, and every kind of spoilt bytes."""

import asyncio
import errno
import os
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from kvstore.core.errors import BadInput, Refused, Unreachable
from kvstore.core.outcomes import Outcome
from kvstore.directory.lru import Lru
from kvstore.observe.metrics import TierMetrics
from kvstore.testing.contracts import OTHER_ROOT, ROOT, block, wanted
from kvstore.testing.devices import FaultyDisk
from kvstore.tiers.base import Held
from kvstore.tiers.block_rows import ROW_BYTES
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_config import NvmeConfig
from kvstore.tiers.nvme_device import DiskDevice
from tests.nvme_fixture import SLOT_BYTES, read, start, write
from tests.patience import PATIENCE_MS, PATIENCE_S, until

HIT, MISS, LATE, CORRUPT, REFUSED = Outcome


def _bytes_on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.data"))


async def test_a_restart_finds_everything(tmp_path: Path) -> None:
    tier = await start(tmp_path)
    items = [block(n) for n in range(20)] + [block(3, root=OTHER_ROOT)]
    assert set(await write(tier, items)) == {HIT}
    await tier.close()
    tier = await start(tmp_path)
    assert (len(tier), tier.used_bytes) == (21, 21 * SLOT_BYTES)
    assert await read(tier, range(21)) == [HIT] * 20 + [MISS]
    await tier.close()


async def test_what_a_killed_process_wrote_is_found(tmp_path: Path) -> None:
    script = (
        "import asyncio, os, sys; from pathlib import Path\n"
        "from tests.nvme_fixture import start, write\n"
        "from kvstore.testing.contracts import block\n"
        "async def main():\n"
        "    tier = await start(Path(sys.argv[1]))\n"
        "    outcomes = await write(tier, [block(n) for n in range(8)])\n"
        "    os.write(1, bytes(map(int, outcomes)))\n"
        "    writing = asyncio.create_task(write(tier, [block(n) for n in range(8, 30)]))\n"
        "    await asyncio.sleep(0.001)\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert (process.returncode, set(out)) == (-9, {int(HIT)})
    tier = await start(tmp_path)
    assert await read(tier, range(8)) == [HIT] * 8
    assert set(await read(tier, range(8, 30))) <= {HIT, MISS}
    await tier.close()


async def test_blocks_that_moved_in_are_read_back_whole_in_every_size(tmp_path: Path) -> None:
    tier = await start(tmp_path, slots=256)
    items = [block(n, block_bytes=4096 * (1 + n % 5)) for n in range(20)]
    assert set(await write(tier, items)) == {HIT}
    reads = wanted(items)
    assert set(await tier.read(reads, deadline_ms=PATIENCE_MS)) == {HIT}
    for item, one in zip(items, reads, strict=True):
        assert one.into[: item.header.payload_bytes] == item.source[: item.header.payload_bytes]
    await tier.close()


async def test_a_full_tier_drops_the_oldest_and_stays_in_its_bytes(tmp_path: Path) -> None:
    gone: list[Held] = []
    tier = await start(
        tmp_path, slots=16, listener=lambda held, deleted: gone.extend(held if deleted else ())
    )
    for n in range(40):
        assert await write(tier, [block(n)]) == [HIT]
    assert len(tier) <= 16 and tier.used_bytes <= tier.capacity_bytes
    assert await read(tier, range(24)) == [MISS] * 24
    assert await read(tier, range(24, 40)) == [HIT] * 16
    assert [one.name for one in gone] == [block(n).header.name for n in range(24)]
    assert _bytes_on_disk(tmp_path) <= tier.capacity_bytes
    await tier.close()
    tier = await start(tmp_path, slots=16)
    assert await read(tier, range(24, 40)) == [HIT] * 16
    await tier.close()


async def test_size_classes_share_the_tier(tmp_path: Path) -> None:
    tier = await start(tmp_path, slots=32)
    await write(tier, [block(n) for n in range(32)])
    big = [block(100 + n, block_bytes=5 * 4096) for n in range(8)]
    assert set(await write(tier, big)) == {HIT}
    assert set(await tier.read(wanted(big), deadline_ms=PATIENCE_MS)) == {HIT}
    assert (await read(tier, range(32))).count(HIT) >= 8
    await tier.close()


async def test_a_block_too_big_for_the_tier_is_refused(tmp_path: Path) -> None:
    tier = await start(tmp_path, slots=16)
    assert await write(tier, [block(1, block_bytes=64 * 4096)]) == [REFUSED]
    await tier.close()


async def test_a_directory_that_cannot_be_read_is_told_and_refused(tmp_path: Path) -> None:
    tier = await start(tmp_path)
    await write(tier, [block(1)])
    await tier.close()
    disk = FaultyDisk(fail_opens=errno.EIO)
    config = NvmeConfig(directory=tmp_path, capacity_bytes=64 * SLOT_BYTES)
    tier = await NvmeTier.start(config, Lru(), TierMetrics(CollectorRegistry()), device=disk)
    with pytest.raises(Unreachable, match="was not read"):
        await tier.loaded(0.2)
    assert await read(tier, [1]) == [REFUSED]
    assert await write(tier, [block(2)]) == [REFUSED]
    await tier.close()


async def test_a_directory_has_one_node(tmp_path: Path) -> None:
    tier = await start(tmp_path)
    with pytest.raises(Refused, match="used by another node"):
        await start(tmp_path)
    await tier.close()
    await (await start(tmp_path)).close()


async def test_a_directory_is_waited_for_while_its_last_node_ends(tmp_path: Path) -> None:
    tier = await start(tmp_path)
    other = asyncio.create_task(start(tmp_path, lock_ms=PATIENCE_MS))
    await asyncio.wait([other], timeout=0.05)
    assert not other.done()
    await tier.close()
    await (await other).close()


async def test_an_impossible_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"file/x: Not a directory"):
        await start(tmp_path / "file" / "x")
    with pytest.raises(BadInput, match="holds nothing"):
        NvmeConfig(directory=tmp_path, capacity_bytes=4096)


async def test_files_of_another_size_of_tier_are_put_away(tmp_path: Path) -> None:
    tier = await start(tmp_path, slots=64)
    await write(tier, [block(n) for n in range(60)])
    await tier.close()
    tier = await start(tmp_path, slots=16)
    outcomes = await read(tier, range(60))
    assert len(tier) == outcomes.count(HIT) <= 16
    assert _bytes_on_disk(tmp_path) <= tier.capacity_bytes
    await tier.close()


# -- bytes that are not what they were -----------------------------------------------------


def _spoil(directory: Path, suffix: str, at: int) -> None:
    """Flip a bit of the first segment."""
    path = directory / f"segment-000000-{SLOT_BYTES}.{suffix}"
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x10
    path.write_bytes(raw)


def _swap_slots(directory: Path) -> None:
    """Let the first two slots change places behind their rows."""
    path = directory / f"segment-000000-{SLOT_BYTES}.data"
    raw = path.read_bytes()
    first, second = raw[:SLOT_BYTES], raw[SLOT_BYTES : 2 * SLOT_BYTES]
    path.write_bytes(second + first + raw[2 * SLOT_BYTES :])


@pytest.mark.parametrize("at", [*range(0, ROW_BYTES, 9), 4096, 4096 + 3_000, 4096 + 7_679])
async def test_a_flipped_bit_on_disk_is_found_and_the_block_is_gone(
    tmp_path: Path, at: int
) -> None:
    tier = await start(tmp_path)
    await write(tier, [block(0), block(1)])
    await tier.close()
    _spoil(tmp_path, "data", at)
    tier = await start(tmp_path)
    assert await read(tier, [0, 1]) == [CORRUPT, HIT]
    assert await read(tier, [0]) == [MISS]
    assert await write(tier, [block(0)]) == [HIT]
    assert await read(tier, [0]) == [HIT]
    await tier.close()


@pytest.mark.parametrize("at", range(0, ROW_BYTES, 5))
async def test_a_spoilt_row_loses_its_block_and_no_other(tmp_path: Path, at: int) -> None:
    tier = await start(tmp_path)
    await write(tier, [block(0), block(1)])
    await tier.close()
    _spoil(tmp_path, "rows", at)
    tier = await start(tmp_path)
    assert await read(tier, [0, 1]) == [MISS, HIT]
    await tier.close()


async def test_a_row_older_than_its_slot_is_a_miss(tmp_path: Path) -> None:
    tier = await start(tmp_path)
    await write(tier, [block(0), block(1)])
    await tier.close()
    _swap_slots(tmp_path)
    tier = await start(tmp_path)
    assert await read(tier, [0, 1]) == [MISS, MISS]
    assert len(tier) == 0
    await tier.close()


# -- devices that fail ---------------------------------------------------------------------


async def _hits(tier: NvmeTier, number: int) -> bool:
    return await read(tier, [number]) == [HIT]


async def test_a_failing_disk_opens_the_breaker_and_is_tried_again(tmp_path: Path) -> None:
    disk = FaultyDisk()
    tier = await start(tmp_path, device=disk)
    await write(tier, [block(n) for n in range(8)])
    disk.fail_reads = errno.EIO
    assert await read(tier, [0, 1, 2, 3]) == [REFUSED] * 4
    asked = disk.reads
    assert await read(tier, [4, 5]) == [REFUSED] * 2
    assert disk.reads == asked, "an open breaker lets nothing through"
    assert not tier.holds(ROOT, block(5).header.name)
    disk.fail_reads = 0
    await until(lambda: _hits(tier, 5))
    assert await read(tier, [4, 5, 6, 7]) == [HIT] * 4
    await tier.close()


async def test_a_full_disk_refuses_writes_and_serves_reads(tmp_path: Path) -> None:
    disk = FaultyDisk()
    tier = await start(tmp_path, device=disk)
    await write(tier, [block(n) for n in range(4)])
    disk.fail_opens = errno.ENOSPC
    outcomes = await write(tier, [block(n) for n in range(4, 20)])
    assert REFUSED in outcomes or len(tier) == 4
    assert len(tier) == 4, "one segment of four slots, and the disk had no room for another"
    newest = [n for n in range(20) if tier.holds(ROOT, block(n).header.name)]
    assert await read(tier, newest) == [HIT] * 4
    await tier.close()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
async def test_a_failed_write_leaves_nothing(tmp_path: Path, error: int) -> None:
    disk = FaultyDisk()
    tier = await start(tmp_path, device=disk)
    disk.fail_writes = error
    assert await write(tier, [block(1)]) == [REFUSED]
    disk.fail_writes = 0
    assert (len(tier), await read(tier, [1])) == (0, [MISS])
    assert await write(tier, [block(1)]) == [HIT]
    await tier.close()


async def test_a_hung_disk_costs_one_stall_deadline(tmp_path: Path) -> None:
    disk = FaultyDisk()
    tier = await start(tmp_path, device=disk)
    await write(tier, [block(n) for n in range(12)])
    disk.hang()
    reads = wanted([block(n) for n in range(12)])
    assert await tier.read(reads, deadline_ms=200) == [LATE] * 12
    await asyncio.sleep(0)
    inside = [not one.drained.is_set() for one in reads]
    assert 1 <= sum(inside) == tier.in_device <= 4, "what a thread has is not given back"
    # Twice more and the breaker knows.
    for _ in range(2):
        assert set(await read(tier, [1], ms=20)) == {LATE}
    assert set(await read(tier, [1], ms=20)) == {REFUSED}
    disk.release()
    for one in reads:
        await asyncio.wait_for(one.drained.wait(), PATIENCE_S)
    await until(lambda: _hits(tier, 1))
    assert await read(tier, range(12)) == [HIT] * 12
    await tier.close()


async def test_a_hung_write_is_whole_when_the_disk_comes_back(tmp_path: Path) -> None:
    disk = FaultyDisk()
    tier = await start(tmp_path, device=disk)
    await write(tier, [block(0)])  # the segment is there
    disk.hang()
    item = block(1)
    assert await tier.write([item], deadline_ms=30) == [LATE]
    assert not item.drained.is_set()
    assert await read(tier, [1]) == [MISS], "not listed before it is whole"
    disk.release()
    await asyncio.wait_for(item.drained.wait(), PATIENCE_S)
    assert await read(tier, [1]) == [HIT]
    await tier.close()


async def test_slow_is_not_late_while_it_moves(tmp_path: Path) -> None:
    disk = FaultyDisk()
    tier = await start(tmp_path, device=disk)
    await write(tier, [block(n) for n in range(32)])
    disk.delay_s = 0.25
    # 32 reads by 4 threads take at least 2 s; none is nearly as far behind the one before.
    assert await read(tier, range(32), ms=1_900) == [HIT] * 32
    await tier.close()


async def test_closing_a_hung_tier_ends(tmp_path: Path) -> None:
    disk = FaultyDisk()
    tier = await start(tmp_path, device=disk)
    await write(tier, [block(0)])
    disk.hang()
    reading = asyncio.create_task(tier.read(wanted([block(0)]), deadline_ms=100))
    await asyncio.sleep(0)
    async with asyncio.timeout(PATIENCE_S):
        await tier.close()
    assert await reading == [LATE]
    disk.release()


async def test_reads_overtake_writes_that_wait(tmp_path: Path) -> None:
    disk = FaultyDisk()
    tier = await start(tmp_path, device=disk)
    await write(tier, [block(0)])
    disk.hang()
    writing = asyncio.create_task(write(tier, [block(n) for n in range(1, 12)]))
    for _ in range(20):
        await asyncio.sleep(0)
    reading = asyncio.create_task(read(tier, [0]))
    await asyncio.sleep(0.01)
    assert tier.in_device == 3, "two writers at most, and the read found a thread"
    disk.release()
    assert await reading == [HIT]
    assert set(await writing) == {HIT}
    await tier.close()


async def test_a_file_system_without_direct_io_still_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def no_direct(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, mode)

    monkeypatch.setattr("kvstore.tiers.nvme_device.os.open", no_direct)
    device = DiskDevice()
    tier = await start(tmp_path, device=device)
    assert await write(tier, [block(1)]) == [HIT]
    assert await read(tier, [1]) == [HIT]
    assert not device.direct
    await tier.close()


async def test_outcomes_bytes_and_breakers_are_counted(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    config = NvmeConfig(directory=tmp_path, capacity_bytes=64 * SLOT_BYTES)
    tier = await NvmeTier.start(config, Lru(), TierMetrics(registry))
    await tier.loaded()
    await tier.introduced()
    await write(tier, [block(1), block(2)])
    await read(tier, [1, 3])
    tier.measure()

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"kvstore_tier_{name}", {"tier": "nvme", **labels})

    assert value("operations_total", operation="write", outcome="hit") == 2
    assert value("operations_total", operation="read", outcome="miss") == 1
    assert value("moved_bytes_total", operation="read") == 8192
    assert value("breaker", operation="read") == value("in_device") == 0
    await tier.close()


async def test_a_block_that_comes_before_the_index_is_read_is_written_all_the_same(
    tmp_path: Path,
) -> None:
    tier = await start(tmp_path)
    await write(tier, [block(n) for n in range(20)])
    await tier.close()
    tier = await start(tmp_path, loaded=False)
    assert await write(tier, [block(20)]) == [HIT], "nobody offers it again"
    assert len(tier) == 21
    await tier.close()
