import asyncio
from dataclasses import replace

import pytest
import torch
from kvkernels import ops
from kvworkers.stream.forms import Forms
from kvworkers.stream.gate import Gate
from kvworkers.stream.mover import SLICE_BYTES, Mover

from kvstore.core.errors import BadInput
from kvstore.core.layout import BlockLayout, Codec

LAYOUT = BlockLayout(layers=4, kv_heads=1, head_dim=16, codec=Codec.RAW16)
BLOCK = LAYOUT.block_bytes


def forms(stored: BlockLayout = LAYOUT, pages: BlockLayout = LAYOUT) -> Forms:
    return Forms(pages, stored, torch.bfloat16)


async def test_blocks_go_into_pages_and_back() -> None:
    pool = torch.zeros((4, BLOCK), dtype=torch.uint8)
    arena = bytearray(8 * BLOCK)
    for block in range(8):
        arena[block * BLOCK : (block + 1) * BLOCK] = bytes([block]) * BLOCK
    mover = Mover(pool, forms())
    await mover.load(memoryview(arena), [3 * BLOCK, 5 * BLOCK], [2, 0])
    assert pool[:, 0].tolist() == [5, 0, 3, 0] and bool((pool[2] == 3).all())
    pool[1] = 77
    await mover.store([1, 2], memoryview(arena), [0, 7 * BLOCK])
    assert arena[:BLOCK] == bytes([77]) * BLOCK
    assert arena[7 * BLOCK :] == bytes([3]) * BLOCK
    assert arena[BLOCK : 2 * BLOCK] == bytes([1]) * BLOCK, "others are left alone"
    mover.close()


async def test_raw_pages_go_as_they_are_whatever_the_store_keeps() -> None:
    small = replace(LAYOUT, layers=32, kv_heads=8, head_dim=64)
    stored = replace(small, codec=Codec.INT4)
    assert stored.block_bytes < small.block_bytes
    pool = torch.randint(0, 255, (4, small.block_bytes), dtype=torch.uint8)
    before = pool.clone()
    arena = memoryview(bytearray(3 * small.block_bytes))
    mover = Mover(pool, forms(stored, small))
    places = [2 * small.block_bytes, 0]
    assert mover.reachable(arena, places, raw=True) == 2
    await mover.store([0, 1], arena, places, raw=True)
    assert arena[: small.block_bytes] == bytes(before[1].numpy())
    await mover.load(arena, places, [3, 2], raw=True)
    assert torch.equal(pool[3], before[0]) and torch.equal(pool[2], before[1])
    mover.close()


async def test_places_outside_are_refused() -> None:
    mover = Mover(torch.zeros((2, BLOCK), dtype=torch.uint8), forms())
    with pytest.raises(BadInput):
        await mover.load(memoryview(bytearray(BLOCK)), [BLOCK], [0])
    with pytest.raises(BadInput):
        await mover.store([2], memoryview(bytearray(BLOCK)), [0])
    mover.close()


async def test_a_cancelled_copy_is_awaited_to_its_end() -> None:
    blocks = SLICE_BYTES // (1 << 20)
    large = replace(LAYOUT, layers=32, kv_heads=8, head_dim=64)
    assert large.block_bytes == 1 << 20
    pool = torch.zeros((blocks, 1 << 20), dtype=torch.uint8)
    arena = bytearray(b"\x01") * (blocks << 20)
    mover = Mover(pool, forms(large, large))
    at = [block << 20 for block in range(blocks)]
    copy = asyncio.create_task(mover.load(memoryview(arena), at, list(range(blocks))))
    await asyncio.sleep(0)
    copy.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copy
    assert bool((pool == 1).all()), "the copy went on after its places were given up"
    mover.close()


def filled(layout: BlockLayout, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a pool and its pages as bf16, every element drawn."""
    pool = torch.zeros((pages, layout.block_bytes), dtype=torch.uint8)
    view = ops.page_view(pool, layout, torch.bfloat16)
    view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(1)))
    return pool, view


@pytest.mark.parametrize("codec", [Codec.RAW16, Codec.FP8, Codec.INT8, Codec.INT4])
async def test_groups_bring_what_a_whole_load_brings(codec: Codec) -> None:
    stored = replace(LAYOUT, codec=codec)
    pool, view = filled(LAYOUT, 6)
    before = view.clone()
    arena = memoryview(bytearray(8 * stored.block_bytes))
    at = [5 * stored.block_bytes, 2 * stored.block_bytes]
    mover = Mover(pool, forms(stored))
    await mover.store([0, 1], arena, at)
    await mover.load(arena, at, [2, 3])
    whole = view[2:4].float()
    bound = {Codec.RAW16: 0.0, Codec.FP8: 0.05, Codec.INT8: 0.02, Codec.INT4: 0.2}[codec]
    assert float((whole - before[:2].float()).norm() / whole.norm()) <= bound
    come: list[bool] = []
    gate = Gate(LAYOUT.layers, changed=lambda: come.append(bool(view[4:, -1].any())))
    view[4:].zero_()
    await mover.load_groups(arena, at, [4, 5], gate)
    assert torch.equal(view[4:6].float(), whole)
    assert gate.come_groups == len(gate.groups) == len(come) - 1
    mover.close()


async def test_a_load_that_fails_ends_its_gate() -> None:
    mover = Mover(torch.zeros((2, BLOCK), dtype=torch.uint8), forms())
    gate = Gate(LAYOUT.layers, changed=lambda: None)
    with pytest.raises(BadInput):
        await mover.load_groups(memoryview(bytearray(BLOCK)), [BLOCK], [0], gate)
    gate.pass_layer(0)  # would wait
    assert gate.come_groups == 0
    mover.close()


async def test_pages_are_looked_through_for_what_is_no_number() -> None:
    odd = replace(LAYOUT, layers=3)
    assert odd.payload_bytes < odd.block_bytes
    pool = torch.zeros((3, odd.block_bytes), dtype=torch.uint8)
    pool[:, odd.payload_bytes :] = 0xFF  # padding, which nobody writes: no number either
    mover = Mover(pool, forms(odd, odd))
    assert await mover.finite([0, 1, 2])
    assert await mover.finite([])
    pool[2, : odd.payload_bytes].view(torch.bfloat16)[-1] = torch.inf
    assert await mover.finite([0, 1])
    assert not await mover.finite([1, 2])
    mover.close()
