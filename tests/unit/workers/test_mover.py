import asyncio

import pytest
import torch
from kvworkers.stream.mover import SLICE_BYTES, Mover

from kvstore.core.errors import BadInput

BLOCK = 4096


async def test_blocks_go_into_pages_and_back() -> None:
    pool = torch.zeros((4, BLOCK), dtype=torch.uint8)
    arena = bytearray(8 * BLOCK)
    for block in range(8):
        arena[block * BLOCK : (block + 1) * BLOCK] = bytes([block]) * BLOCK
    mover = Mover(pool)
    await mover.load(memoryview(arena), [3 * BLOCK, 5 * BLOCK], [2, 0])
    assert pool[:, 0].tolist() == [5, 0, 3, 0] and bool((pool[2] == 3).all())
    pool[1] = 77
    await mover.store([1, 2], memoryview(arena), [0, 7 * BLOCK])
    assert arena[:BLOCK] == bytes([77]) * BLOCK
    assert arena[7 * BLOCK :] == bytes([3]) * BLOCK
    assert arena[BLOCK : 2 * BLOCK] == bytes([1]) * BLOCK, "others are left alone"
    mover.close()


async def test_places_outside_are_refused() -> None:
    mover = Mover(torch.zeros((2, BLOCK), dtype=torch.uint8))
    with pytest.raises(BadInput):
        await mover.load(memoryview(bytearray(BLOCK)), [BLOCK], [0])
    with pytest.raises(BadInput):
        await mover.store([2], memoryview(bytearray(BLOCK)), [0])
    mover.close()


async def test_a_cancelled_copy_is_awaited_to_its_end() -> None:
    blocks = SLICE_BYTES // (1 << 20)
    pool = torch.zeros((blocks, 1 << 20), dtype=torch.uint8)
    arena = bytearray(b"\x01") * (blocks << 20)
    mover = Mover(pool)
    at = [block << 20 for block in range(blocks)]
    copy = asyncio.create_task(mover.load(memoryview(arena), at, list(range(blocks))))
    await asyncio.sleep(0)
    copy.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copy
    assert bool((pool == 1).all()), "the copy went on after its places were given up"
    mover.close()
