"""Entries to attention and movement: what they check, where bytes go."""

import mmap
import sys
import threading

import pytest
import torch
from kvkernels import ops, reference
from kvkernels.plans import AttentionPlan, Implementation

from kvstore.core.errors import BadInput, Unsupported
from kvstore.core.layout import BlockLayout, Codec
from tests.patience import PATIENCE_S

LAYOUT = BlockLayout(layers=3, kv_heads=2, head_dim=8, codec=Codec.RAW32)


def _pool(pages: int, layout: BlockLayout = LAYOUT) -> torch.Tensor:
    return torch.zeros((pages, layout.block_bytes), dtype=torch.uint8)


def test_the_cpu_is_served_by_the_reference_and_other_devices_are_named() -> None:
    served: Implementation = ops.implementation("cpu")
    assert served is reference
    with pytest.raises(Unsupported, match="'xpu'"):
        ops.implementation("xpu")


@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 64), (3, 64), (8, 128), (2, 8)])
@pytest.mark.parametrize(
    ("codec", "dtype"),
    [(Codec.RAW32, torch.float32), (Codec.RAW16, torch.bfloat16), (Codec.RAW16, torch.float16)],
)
def test_every_element_of_the_view_lies_where_the_layout_says(
    layers: int, kv_heads: int, head_dim: int, codec: Codec, dtype: torch.dtype
) -> None:
    layout = BlockLayout(layers=layers, kv_heads=kv_heads, head_dim=head_dim, codec=codec)
    pool = _pool(2, layout)
    view = ops.page_view(pool, layout, dtype)
    assert view.shape == (2, kv_heads, layers, 2, 16, head_dim) and view.dtype == dtype
    assert view.data_ptr() == pool.data_ptr()
    size = dtype.itemsize
    for head, layer, half, token, dim in [
        (0, 0, 0, 0, 0),
        (kv_heads - 1, layers - 1, 1, 15, head_dim - 1),
        (kv_heads - 1, 0, 1, 3, 5),
    ]:
        view[1, head, layer, half, token, dim] = 1.5
        run = layout.layer_run(head, layer, 1)
        at = run.start + half * layout.codes_bytes + (token * head_dim + dim) * size
        assert at < run.stop
        expected = torch.tensor([1.5], dtype=dtype).view(torch.uint8)
        assert torch.equal(pool[1, at : at + size], expected)
        assert int((pool != 0).sum()) == int((expected != 0).sum())
        view[1, head, layer, half, token, dim] = 0.0


def test_padding_is_outside_the_view() -> None:
    pool = _pool(3)
    assert LAYOUT.payload_bytes % 4096, "this layout has padding"
    ops.page_view(pool, LAYOUT).fill_(1.0)
    assert not pool[:, LAYOUT.payload_bytes :].any()
    assert pool[:, : LAYOUT.payload_bytes].view(torch.float32).eq(1.0).all()


def test_a_view_of_quantised_pages_is_refused() -> None:
    layout = BlockLayout(layers=1, kv_heads=1, head_dim=64, codec=Codec.FP8)
    with pytest.raises(Unsupported, match="FP8"):
        ops.page_view(_pool(1, layout), layout)


@pytest.mark.parametrize(
    ("pool", "dtype", "said"),
    [
        (torch.zeros(2, 100, dtype=torch.uint8), None, "rows have 100"),
        (torch.zeros(2, 4, dtype=torch.float32), None, "uint8"),
        (torch.zeros(LAYOUT.block_bytes, 2, dtype=torch.uint8).t(), None, "contiguous"),
        (torch.zeros(1, LAYOUT.block_bytes, dtype=torch.uint8), torch.float16, "RAW32"),
    ],
)
def test_a_pool_that_does_not_fit_is_refused(
    pool: torch.Tensor, dtype: torch.dtype | None, said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        ops.page_view(pool, LAYOUT, dtype)


def test_writing_puts_each_token_into_its_slot_of_one_layer_only() -> None:
    pages = ops.page_view(_pool(4), LAYOUT)
    pages.fill_(-1.0)
    slots = torch.tensor([2 * 16 + 15, 0, 3 * 16 + 7])
    key, value = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    ops.write_pages(key, value, pages, slots, 1)
    for row, slot in enumerate(slots.tolist()):
        assert torch.equal(pages[slot // 16, :, 1, 0, slot % 16], key[row])
        assert torch.equal(pages[slot // 16, :, 1, 1, slot % 16], value[row])
    assert int((pages != -1.0).sum()) == 2 * 3 * 2 * 8


def test_wrong_shapes_and_types_are_refused_before_anything_is_written() -> None:
    pages = ops.page_view(_pool(2), LAYOUT)
    good = torch.zeros(2, 2, 8)
    slots = torch.tensor([0, 1])
    for key, value, where, layer in (
        (torch.zeros(3, 2, 8), good, slots, 0),
        (good.double(), good, slots, 0),
        (good, torch.zeros(2, 2, 4), slots, 0),
        (good, good, slots.int(), 0),
        (good, good, slots, 3),
        (good, good, slots, -1),
    ):
        with pytest.raises(BadInput):
            ops.write_pages(key, value, pages, where, layer)
    with pytest.raises(BadInput, match="page_view"):
        ops.write_pages(good, good, pages[0], slots, 0)


def _attend(**changed: object) -> torch.Tensor:
    arguments = {
        "query": torch.zeros(2, 4, 8),
        "pages": ops.page_view(_pool(2), LAYOUT),
        "layer": 0,
        "block_tables": torch.tensor([[0, 1]], dtype=torch.int32),
        "context_lengths": torch.tensor([20], dtype=torch.int32),
        "query_starts": torch.tensor([0, 2], dtype=torch.int32),
        "scale": 1.0,
    } | changed
    query, pages = arguments.pop("query"), arguments.pop("pages")
    return ops.paged_attention(query, pages, **arguments)  # type: ignore[arg-type]


def test_a_plan_knows_the_rows_it_was_made_for() -> None:
    plan: AttentionPlan = ops.plan_attention(
        torch.tensor([[0], [1]], dtype=torch.int32),
        torch.tensor([3, 16], dtype=torch.int32),
        torch.tensor([0, 3, 4], dtype=torch.int32),
    )
    assert plan.query_tokens == 4


def test_attention_returns_rows_like_the_query() -> None:
    assert _attend().shape == (2, 4, 8)


@pytest.mark.parametrize(
    "changed",
    [
        {"query": torch.zeros(2, 3, 8)},
        {"query": torch.zeros(2, 4, 16)},
        {"query": torch.zeros(3, 4, 8)},
        {"query": torch.zeros(2, 4, 8, dtype=torch.float64)},
        {"layer": 3},
        {"block_tables": torch.tensor([[0, 1]])},
        {"block_tables": torch.tensor([[0]], dtype=torch.int32)},
        {"block_tables": torch.tensor([0, 1], dtype=torch.int32)},
        {"context_lengths": torch.tensor([1], dtype=torch.int32)},
        {"query_starts": torch.tensor([0, 1, 2], dtype=torch.int32)},
        {"query_starts": torch.tensor([1, 3], dtype=torch.int32)},
        {"query_starts": torch.tensor([0, 0], dtype=torch.int32)},
    ],
    ids=str,
)
def test_attention_refuses_what_does_not_fit_together(changed: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        _attend(**changed)


def test_blocks_move_between_an_arena_and_pages_byte_for_byte() -> None:
    size = LAYOUT.block_bytes
    mapping = mmap.mmap(-1, 8 * size)
    arena = torch.frombuffer(mapping, dtype=torch.uint8)
    arena.copy_(torch.randint(0, 256, (8 * size,), dtype=torch.uint8))
    before = arena.clone()
    pool = _pool(5)
    offsets, pages = torch.tensor([3 * size, 0, 4096]), torch.tensor([4, 1, 0])
    ops.load_blocks(arena, offsets, pool, pages)
    for offset, page in zip(offsets.tolist(), pages.tolist(), strict=True):
        assert torch.equal(pool[page], before[offset : offset + size])
    assert not pool[[2, 3]].any()
    ops.store_blocks(pool, torch.tensor([4]), arena, torch.tensor([6 * size]))
    assert torch.equal(arena[6 * size : 7 * size], pool[4])
    assert torch.equal(arena[: 6 * size], before[: 6 * size])
    assert torch.equal(arena[7 * size :], before[7 * size :])


@pytest.mark.parametrize(
    ("offsets", "pages"),
    [([-1], [0]), ([LAYOUT.block_bytes + 1], [0]), ([0], [2]), ([0], [-1]), ([0, 0], [0])],
)
def test_a_block_outside_arena_or_pool_is_refused_untouched(
    offsets: list[int], pages: list[int]
) -> None:
    arena = torch.ones(2 * LAYOUT.block_bytes, dtype=torch.uint8)
    pool = _pool(2)
    with pytest.raises(BadInput):
        ops.load_blocks(arena, torch.tensor(offsets), pool, torch.tensor(pages))
    assert not pool.any()
    with pytest.raises(BadInput):
        ops.store_blocks(pool, torch.tensor(pages), arena, torch.tensor(offsets))
    assert arena.all()


def test_moving_nothing_is_allowed() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    ops.load_blocks(torch.zeros(10, dtype=torch.uint8), nothing, _pool(1), nothing)


def test_copies_let_other_threads_run() -> None:
    """With turns of ten seconds a thread runs beside a copy only if that lets go of the GIL."""
    layout = BlockLayout(layers=64, kv_heads=16, head_dim=128, codec=Codec.RAW32)
    pool, count = _pool(1, layout), 16
    arena = torch.ones(layout.block_bytes, dtype=torch.uint8)
    nowhere = torch.zeros(count, dtype=torch.int64)
    started, done = threading.Event(), threading.Event()

    def move() -> None:
        started.set()
        reference.load_blocks(arena, nowhere, pool, nowhere)
        done.set()

    mover = threading.Thread(target=move)
    turn = sys.getswitchinterval()
    sys.setswitchinterval(10.0)
    try:
        mover.start()
        assert started.wait(PATIENCE_S)
        ran_beside = not done.is_set()
    finally:
        sys.setswitchinterval(turn)
        mover.join(PATIENCE_S)
    assert ran_beside and pool.eq(1).all()
