"""Movement on a real GPU: bytes of every codec, and blocks between pinned memory and pages."""

import pytest
import torch
from kvkernels import ops
from kvkernels.formats import encode_block
from kvkernels.movement import Movement
from kvworkers.stream.device_mover import make_mover
from kvworkers.stream.forms import Forms

from kvstore.core.errors import BadInput
from kvstore.core.layout import BlockLayout, Codec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CODECS = [Codec.RAW16, Codec.FP8, Codec.INT8, Codec.INT4]


def planned(device: str, codec: Codec, dim: int, element: torch.dtype) -> Movement:
    """Scattered blocks; the arena holds encoded K and V, the pool other elements."""
    torch.manual_seed(2)
    raw = BlockLayout(layers=10, kv_heads=3, head_dim=dim, codec=Codec.RAW16)
    coded = BlockLayout(layers=10, kv_heads=3, head_dim=dim, codec=codec)
    made = torch.randn(9, 2, 10, 3, 16, dim).to(element)
    arena = torch.stack([encode_block(key, value, coded) for key, value in made]).flatten()
    pool = torch.stack([encode_block(key, value, raw) for key, value in made * 2])
    order = torch.randperm(9)
    return ops.plan_movement(
        arena.pin_memory(), coded, order[:7] * coded.block_bytes,
        pool.to(device), raw, order.flip(0)[:7], element=element,
    )  # fmt: skip


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("layers", [None, range(8), range(9, 10)], ids=str)
@pytest.mark.parametrize("element", [torch.bfloat16, torch.float16])
def test_blocks_come_and_go_with_the_bytes_of_the_reference(
    codec: Codec, dim: int, layers: range | None, element: torch.dtype
) -> None:
    for store in (False, True):
        ours, wanted = (planned(name, codec, dim, element) for name in ("cuda", "cpu"))
        move = ops.store_layers if store else ops.load_layers
        move(ours, layers, programs=5)
        move(wanted, layers)
        torch.cuda.synchronize()
        assert torch.equal(ours.pool.cpu(), wanted.pool)
        assert torch.equal(ours.arena, wanted.arena)


def test_memory_that_the_gpu_cannot_reach_is_refused() -> None:
    layout = BlockLayout(layers=1, kv_heads=1, head_dim=64, codec=Codec.RAW16)
    zero = torch.zeros(1, dtype=torch.int64)
    arena = torch.zeros(layout.block_bytes, dtype=torch.uint8)
    with pytest.raises(BadInput, match="pinned"):
        ops.plan_movement(arena, layout, zero, arena[None].cuda(), layout, zero)


async def test_pages_are_looked_through_for_what_is_no_number() -> None:
    layout = BlockLayout(layers=3, kv_heads=1, head_dim=16, codec=Codec.RAW16)
    pool = torch.zeros((3, layout.block_bytes), dtype=torch.uint8, device="cuda")
    pool[:, layout.payload_bytes :] = 0xFF  # padding, which nobody writes: no number either
    mover = make_mover(pool, Forms(layout, layout, torch.bfloat16))
    assert await mover.finite([0, 1, 2])
    pool[2, : layout.payload_bytes].view(torch.bfloat16)[-1] = torch.nan
    torch.cuda.synchronize()
    assert await mover.finite([0, 1])
    assert not await mover.finite([1, 2])
    mover.close()
