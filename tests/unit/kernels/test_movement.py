"""Movement between arena and pages: bytes and transcoded cells, kernels against the reference."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels' modules decide at their import

import pytest
import torch
from kvkernels import ops
from kvkernels.bench.moving import GATE, RAW
from kvkernels.formats import decode_block, encode_block
from kvkernels.movement import Movement
from kvkernels.triton import device
from kvkernels.triton import moving as launching

from kvstore.core.errors import BadInput, Unsupported
from kvstore.core.layout import BlockLayout, Codec

QUANTISED = [Codec.FP8, Codec.INT8, Codec.INT4]
CODECS = [Codec.RAW32, Codec.RAW16, *QUANTISED]


def layout_of(codec: Codec, *, dim: int = 32) -> BlockLayout:
    return BlockLayout(layers=5, kv_heads=3, head_dim=dim, codec=codec)


def planned(arena_codec: Codec, pool_codec: Codec, *, blocks: int = 7) -> Movement:
    """Scattered blocks and pages, both full of real K and V of different values."""
    generator = torch.Generator().manual_seed(3)
    memories = []
    for codec in (arena_codec, pool_codec):
        layout = layout_of(codec)
        kind = torch.bfloat16 if codec == Codec.RAW16 else torch.float32
        made = torch.randn(blocks + 2, 2, 5, 3, 16, 32, generator=generator).to(kind)
        memories.append(torch.stack([encode_block(key, value, layout) for key, value in made]))
    arena, pool = memories
    order = torch.randperm(blocks + 2, generator=generator)
    return ops.plan_movement(
        arena.flatten(), layout_of(arena_codec), order[:blocks] * arena.shape[1],
        pool, layout_of(pool_codec), order.flip(0)[:blocks],
    )  # fmt: skip


def both(
    arena_codec: Codec, pool_codec: Codec, layers: range | None, *, store: bool, programs: int = 3
) -> tuple[Movement, Movement]:
    """Move with the kernels and with the reference; return both plans."""
    ours, wanted = (planned(arena_codec, pool_codec) for _ in range(2))
    device.move_layers(ours, layers, None, store=store, programs=programs)
    (ops.store_layers if store else ops.load_layers)(wanted, layers)
    return ours, wanted


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("layers", [None, range(1, 4), range(4, 5)], ids=str)
@pytest.mark.parametrize("store", [False, True])
def test_equal_codecs_move_byte_for_byte(codec: Codec, layers: range | None, store: bool) -> None:
    before = planned(codec, codec)
    ours, wanted = both(codec, codec, layers, store=store)
    assert torch.equal(ours.pool, wanted.pool) and torch.equal(ours.arena, wanted.arena)
    kept, changed = (wanted.pool, wanted.arena) if store else (wanted.arena, wanted.pool)
    assert torch.equal(kept, before.pool if store else before.arena)
    run = layout_of(codec).layer_run(2, (layers or range(5)).start, len(layers or range(5)))
    block, page = (int(units[4]) * 128 for units in (wanted.arena_units, wanted.pool_units))
    mine = wanted.arena[block + run.start : block + run.stop]
    assert torch.equal(mine, wanted.pool.flatten()[page + run.start : page + run.stop])
    assert not torch.equal(changed, before.arena if store else before.pool)


@pytest.mark.parametrize("codec", QUANTISED)
@pytest.mark.parametrize("layers", [None, range(1, 4)], ids=str)
@pytest.mark.parametrize(("arena", "store"), [(True, False), (False, True)])
def test_cells_are_decoded_on_their_way(
    codec: Codec, layers: range | None, arena: bool, store: bool
) -> None:
    codecs = (codec, Codec.RAW32) if arena else (Codec.RAW32, codec)
    ours, wanted = both(*codecs, layers, store=store)
    assert torch.equal(ours.pool, wanted.pool) and torch.equal(ours.arena, wanted.arena)


@pytest.mark.parametrize("codec", QUANTISED)
@pytest.mark.parametrize("layers", [None, range(1, 4)], ids=str)
def test_cells_are_encoded_on_their_way(codec: Codec, layers: range | None) -> None:
    ours, wanted = both(codec, Codec.RAW32, layers, store=True)
    different = ours.arena != wanted.arena
    if codec == Codec.FP8:  # Triton 3.9's interpreter rounds ties its own way; see test_quantised.
        off = wanted.arena[different].int() - ours.arena[different].int()
        assert off.abs().max() <= 8 and different.float().mean() < 0.1
    else:
        assert not different.any()


@pytest.mark.parametrize("codec", QUANTISED)
def test_the_reference_moves_what_the_formats_say(codec: Codec) -> None:
    plan = planned(codec, Codec.RAW32)
    ops.load_layers(plan)
    ops.store_layers(plan, range(2, 3))
    block, page = int(plan.arena_units[2]) * 128, int(plan.pool_units[2]) * 128
    raw, coded = layout_of(Codec.RAW32), layout_of(codec)
    got = decode_block(plan.pool.flatten()[page : page + raw.block_bytes], raw)
    wanted = decode_block(planned(codec, Codec.RAW32).arena[block:][: coded.block_bytes], coded)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    again = encode_block(*got, coded)[coded.layer_run(1, 2, 1).start :][: coded.cell_bytes]
    assert torch.equal(plan.arena[block + coded.layer_run(1, 2, 1).start :][: len(again)], again)


def test_slices_are_bounded_and_any_part_can_be_moved() -> None:
    ours, wanted = (planned(Codec.INT8, Codec.RAW32) for _ in range(2))
    layers = range(1, 3)
    parts = list(ours.slices(layers, 2 * 3 * 2 * layout_of(Codec.INT8).cell_bytes))
    assert [len(part) for part in parts] == [2, 2, 2, 1]
    for part in (parts[0], range(3, 7)):
        device.move_layers(ours, layers, part, store=False, programs=16)
        ops.load_layers(wanted, layers, blocks=part)
    assert torch.equal(ours.pool, wanted.pool)
    untouched = int(ours.pool_units[2]) * 128
    before = planned(Codec.INT8, Codec.RAW32).pool.flatten()[untouched:]
    size = layout_of(Codec.RAW32).block_bytes
    assert torch.equal(ours.pool.flatten()[untouched:][:size], before[:size])


def test_what_does_not_fit_is_named() -> None:
    plan = planned(Codec.INT8, Codec.RAW32)
    for layers, blocks, message in (
        (range(4, 6), None, "layers range"),
        (None, range(7, 8), "blocks range"),
        (range(-1, 2), None, "layers range"),
    ):
        with pytest.raises(BadInput, match=message):
            ops.load_layers(plan, layers, blocks=blocks)
    with pytest.raises(BadInput, match="programs"):
        ops.store_layers(plan, programs=0)
    pool, arena = plan.pool, plan.arena
    int8, raw = layout_of(Codec.INT8), layout_of(Codec.RAW32)
    zero = torch.zeros(1, dtype=torch.int64)
    last = zero + arena.shape[0] - int8.block_bytes + 128
    for given, kind, message in (
        ((arena, int8, zero + 64, pool, raw, zero), BadInput, "multiples of 128"),
        ((arena, int8, last, pool, raw, zero), BadInput, "offsets reach"),
        ((arena, int8, zero, pool, raw, zero + 9), BadInput, "pages reach"),
        ((arena, layout_of(Codec.INT8, dim=64), zero, pool, raw, zero), BadInput, "head_dim"),
        ((arena, layout_of(Codec.RAW16), zero, pool, raw, zero), Unsupported, "RAW16"),
    ):
        with pytest.raises(kind, match=message):
            ops.plan_movement(*given)
    with pytest.raises(BadInput, match="float16"):
        ops.plan_movement(arena, int8, zero, pool, raw, zero, element=torch.float16)


def test_moving_no_block_or_layer_is_allowed() -> None:
    plan = planned(Codec.INT8, Codec.RAW32, blocks=0)
    for move in (ops.load_layers, ops.store_layers):
        move(plan)
        move(planned(Codec.INT8, Codec.RAW32), range(0))
    device.move_layers(plan, None, None, store=False, programs=4)


def test_one_launch_moves_its_layers_of_its_blocks_and_nothing_else() -> None:
    ours, wanted = (planned(Codec.INT8, Codec.RAW32) for _ in range(2))
    launching.move(ours, range(1, 3), range(2, 5), store=False, programs=2)
    ops.load_layers(wanted, range(1, 3), blocks=range(2, 5))
    untouched = planned(Codec.INT8, Codec.RAW32)
    assert torch.equal(ours.pool, wanted.pool)
    assert not torch.equal(ours.pool, untouched.pool)
    assert torch.equal(ours.arena, untouched.arena)


def test_head_dimensions_that_no_kernel_transcodes_are_named() -> None:
    raw, coded = layout_of(Codec.RAW32, dim=24), layout_of(Codec.INT8, dim=24)
    pool = torch.zeros(1, raw.block_bytes, dtype=torch.uint8)
    arena = torch.zeros(coded.block_bytes, dtype=torch.uint8)
    zero = torch.zeros(1, dtype=torch.int64)
    plan = ops.plan_movement(arena, coded, zero, pool, raw, zero)
    with pytest.raises(Unsupported, match="head_dim 24"):
        launching.move(plan, range(1), range(1), store=False, programs=1)
    ops.load_layers(plan)  # the reference serves any


def test_measured_movements_are_distinct_and_of_one_shape() -> None:
    assert len({cell.name for cell in GATE}) == len(GATE)
    assert all(RAW.layers % cell.layers == 0 for cell in GATE)
