"""What is forgotten on purpose stays forgotten: after restarts, and if it was under way."""

import asyncio
from pathlib import Path

import pytest

from kvstore.core.names import BlockName
from kvstore.core.outcomes import Outcome
from kvstore.directory.policy import block_key
from kvstore.testing.contracts import OTHER_ROOT, ROOT, block, wanted
from kvstore.testing.devices import FaultyDisk
from kvstore.tiers.nvme import NvmeTier
from tests.nvme_fixture import SLOT_BYTES, read, start, write
from tests.patience import PATIENCE_MS, until

HIT, MISS, LATE, CORRUPT, REFUSED = Outcome


def _copy_segment(directory: Path) -> None:
    """Let a segment that is not there yet be a copy of the first one."""
    for suffix in ("data", "rows"):
        raw = (directory / f"segment-000000-{SLOT_BYTES}.{suffix}").read_bytes()
        (directory / f"segment-000009-{SLOT_BYTES}.{suffix}").write_bytes(raw)


async def test_removed_blocks_stay_removed_after_a_restart(tmp_path: Path) -> None:
    tier = await start(tmp_path)
    await write(tier, [block(n) for n in range(4)])
    await tier.remove([(ROOT, block(1).header.name)])
    await tier.close()
    tier = await start(tmp_path)
    assert await read(tier, range(4)) == [HIT, MISS, HIT, HIT]
    await tier.close()


async def test_a_cleared_root_stays_gone_with_all_rows_that_were_left_behind(
    tmp_path: Path,
) -> None:
    tier = await start(tmp_path, slots=16)
    await write(tier, [block(n) for n in range(16)])
    # Evicted and not written over: its row is still on disk.
    space = tier._space
    place = space.find(ROOT, block(3).header.name)
    assert place is not None
    tier._room.drop([place], "evicted")
    assert await write(tier, [block(50, root=OTHER_ROOT)]) == [HIT]
    tier._room.drop([space.index[block_key(ROOT, block(4).header.name)]], "evicted")
    assert await tier.clear(ROOT) == 14
    await tier.close()
    tier = await start(tmp_path, slots=16)
    assert await read(tier, range(16)) == [MISS] * 16
    kept = wanted([block(50, root=OTHER_ROOT)])
    assert await tier.read(kept, deadline_ms=PATIENCE_MS) == [HIT]
    assert await tier.clear(None) == 1
    assert set(await write(tier, [block(n) for n in range(16)])) == {HIT}, "all slots are free"
    await tier.close()


@pytest.mark.parametrize("everything", [True, False])
async def test_what_is_being_written_when_it_is_forgotten_is_forgotten(
    tmp_path: Path, everything: bool
) -> None:
    disk = FaultyDisk()
    tier = await start(tmp_path, device=disk)
    await write(tier, [block(0)])
    disk.hang()
    writing = asyncio.create_task(write(tier, [block(1), block(1, root=OTHER_ROOT)]))
    await until(lambda: tier.in_device == 2)
    forgetting = asyncio.create_task(
        tier.clear(ROOT) if everything else _remove(tier, block(1).header.name)
    )
    await asyncio.sleep(0)
    disk.release()
    assert await writing == [REFUSED, HIT]
    await forgetting
    await tier.close()
    tier = await start(tmp_path)
    assert await read(tier, [0, 1]) == [MISS if everything else HIT, MISS]
    assert len(tier) == (1 if everything else 2)
    await tier.close()


async def _remove(tier: NvmeTier, name: BlockName) -> int:
    await tier.remove([(ROOT, name)])
    return 1


async def test_a_row_that_two_segments_hold_is_erased_once_found(tmp_path: Path) -> None:
    tier = await start(tmp_path)
    await write(tier, [block(n) for n in range(8)])
    await tier.close()
    _copy_segment(tmp_path)
    tier = await start(tmp_path)
    assert len(tier) == 8
    assert await tier.clear(ROOT) == 8
    await tier.close()
    tier = await start(tmp_path)
    assert (len(tier), await read(tier, range(8))) == (0, [MISS] * 8)
    await tier.close()
