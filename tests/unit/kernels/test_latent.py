"""Attention over MLA pages: checks of the entries, the oracle, the kernels in the interpreter."""

import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels' modules decide at their import

import pytest
import torch
from kvkernels import latent, latent_reference, ops, reference
from kvkernels.triton import device, latent_launch, latent_work
from kvkernels.triton.latent_work import LatentShape, Tiling, make_work, tiling_of
from kvkernels.triton.replayed import ReplayedDecode

from kvstore.core.errors import BadInput, Unsupported
from kvstore.core.layout import Codec, LatentLayout

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Step:
    query: torch.Tensor
    rotary: torch.Tensor
    pages: torch.Tensor
    tables: torch.Tensor
    contexts: torch.Tensor
    starts: torch.Tensor


def step(
    spans: list[tuple[int, int]], *, heads: int = 4, width: int = 32, rope: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Step:  # fmt: skip
    """Random sequences of (held, new) tokens on scattered pages; unused places hold NaN."""
    generator = torch.Generator().manual_seed(7)
    codec = Codec.RAW32 if dtype == torch.float32 else Codec.RAW16
    layout = LatentLayout(layers=2, latent_dim=width, rope_dim=rope, codec=codec)
    counts = [-(-(held + new) // 16) for held, new in spans]
    pool = torch.zeros(sum(counts) + 3, layout.block_bytes, dtype=torch.uint8)
    pages = latent.latent_view(pool, layout, dtype)
    pages.fill_(float("nan"))
    order = torch.randperm(pages.shape[0], generator=generator)
    tables = torch.full((len(spans), max(counts) + 1), 2**31 - 1, dtype=torch.int32)
    taken, starts = 0, [0]
    for row, (held, new) in enumerate(spans):
        mine = order[taken : taken + counts[row]]
        taken += counts[row]
        tables[row, : counts[row]] = mine.int()
        places = torch.arange(held + new)
        rows = torch.randn(held + new, width + rope, generator=generator).to(dtype)
        slots = mine[places // 16] * 16 + places % 16
        latent.write_latents(rows[:, :width], rows[:, width:], pages, slots, 1)
        starts.append(starts[-1] + new)
    # As a projection leaves them: both parts side by side.
    query = torch.randn(starts[-1], heads, width + rope, generator=generator).to(dtype)
    contexts = torch.tensor([sum(span) for span in spans], dtype=torch.int32)
    return Step(
        query[..., :width], query[..., width:], pages, tables, contexts,
        torch.tensor(starts, dtype=torch.int32),
    )  # fmt: skip


def textbook(given: Step, scale: float) -> torch.Tensor:
    """Return attention token by token, in float64, every score written out."""
    out = torch.empty(given.query.shape, dtype=torch.float64)
    width = given.query.shape[2]
    for row, context in enumerate(given.contexts.tolist()):
        first, end = given.starts[row : row + 2].tolist()
        table = given.tables[row, : -(-context // 16)].long()
        keys = given.pages[table, 1].flatten(0, 1).double()
        for token in range(first, end):
            seen = keys[: context - (end - first) + token - first + 1]
            query = torch.cat((given.query[token], given.rotary[token]), -1).double()
            out[token] = (query @ seen.T * scale).softmax(-1) @ seen[:, :width]
    return out


def by_kernel(given: Step) -> tuple[torch.Tensor, device.DevicePlan]:
    plan = device.plan_attention(given.tables, given.contexts, given.starts)
    out = latent_launch.latent_attention(
        given.query, given.rotary, given.pages, layer=1, plan=plan, scale=0.2
    )
    return out, plan


STEPS = [[(0, 1)], [(300, 1), (15, 1), (64, 1)], [(120, 5), (700, 1), (0, 19)]]
NAMES = ["first token", "decode", "mixed"]


@pytest.mark.parametrize("spans", STEPS, ids=NAMES)
@pytest.mark.parametrize("heads", [1, 4, 24])
def test_the_reference_is_attention_by_the_textbook(
    spans: list[tuple[int, int]], heads: int
) -> None:
    given = step(spans, heads=heads)
    got = latent.latent_attention(
        given.query, given.rotary, given.pages, layer=1, block_tables=given.tables,
        context_lengths=given.contexts, query_starts=given.starts, scale=0.2,
    )  # fmt: skip
    torch.testing.assert_close(got.double(), textbook(given, 0.2), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("spans", STEPS, ids=NAMES)
@pytest.mark.parametrize("heads", [1, 4, 16, 24, 128])
def test_the_kernel_is_attention_by_the_textbook(spans: list[tuple[int, int]], heads: int) -> None:
    given = step(spans, heads=heads)
    got, _ = by_kernel(given)
    torch.testing.assert_close(got.double(), textbook(given, 0.2), atol=2e-5, rtol=1e-4)


def test_half_precision_pages_at_the_size_of_deepseek() -> None:
    given = step([(150, 1)], heads=16, width=512, rope=64, dtype=torch.bfloat16)
    ours, _ = by_kernel(given)
    wanted = textbook(given, 0.2)
    assert ours.dtype == torch.bfloat16
    assert float((ours.double() - wanted).norm() / wanted.norm()) < 5e-3


def test_more_parts_than_the_merge_reads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_work, "_processors", lambda _: 60)
    monkeypatch.setattr(latent_work, "_ROW_TILES", 0.0)
    monkeypatch.setattr(latent_launch, "_MERGE_PARTS", 8)
    given = step([(1_700, 1), (20, 1)], heads=2)
    given.query.mul_(4)  # maxima that differ between items, so a wrong rescaling shows
    ours, plan = by_kernel(given)
    [work] = plan.latents.values()
    assert work.most_parts > 8 and len(work.firsts) == 1, "one unit is split, the other is whole"
    torch.testing.assert_close(ours.double(), textbook(given, 0.2), atol=2e-5, rtol=1e-4)


def test_a_plan_is_cut_once_and_may_be_used_again() -> None:
    given = step([(900, 1)])
    first, plan = by_kernel(given)
    [work] = plan.latents.values()
    assert work.most_parts > 1
    again = latent_launch.latent_attention(
        given.query, given.rotary, given.pages, layer=1, plan=plan, scale=0.2
    )
    assert torch.equal(first, again) and [*plan.latents.values()] == [work]


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize(
    "contexts", [[1], [64, 65, 4_096, 1], [9_000] * 40, [131_072, 10]], ids=["1", "4", "40", "2"]
)
def test_items_cover_every_tile_once_and_end_together(
    monkeypatch: pytest.MonkeyPatch, contexts: list[int], heads: int
) -> None:
    monkeypatch.setattr(latent_work, "_processors", lambda _: 132)
    shape = LatentShape(heads, 16, 16, CPU)
    tiling = Tiling(rows=min(heads, 64), tile=64, warps=8, stages=2)
    spans = [(row, 1, context) for row, context in enumerate(contexts)]
    work = make_work(spans, shape, tiling, table_stride=10_000)
    items = work.items.tolist()
    tiles = [-(-context // 64) for context in contexts]
    for row, wanted in enumerate(tiles):
        mine = [item for item in items if item[1] == row]
        assert [tile for item in mine for tile in range(item[4], item[5])] == [*range(wanted)]
        assert {(item[0], item[7], item[6]) for item in mine} == {
            (row * 10_000, len(mine), items.index(mine[0]))
        }
        assert all(item[5] > item[4] for item in mine)
    split = [first for first in {item[6] for item in items} if items[first][7] > 1]
    assert work.firsts.tolist() == sorted(split)
    ends = [0] * (132 // work.blocks)
    for item in items:
        ends[ends.index(min(ends))] += item[5] - item[4]
    ideal = sum(tiles) / len(ends)
    # Parts cost a write and a read each, so a lone sequence is cut less finely than it could be.
    assert max(ends) <= 1.4 * ideal + 12, "some processors stand idle"


def test_one_sequence_is_spread_and_a_full_batch_is_not_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(latent_work, "_processors", lambda _: 132)
    shape = LatentShape(128, 512, 64, torch.device("meta"))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor)
    tiling = Tiling(rows=64, tile=64, warps=8, stages=2)
    alone = make_work([(0, 1, 131_072)], shape, tiling, table_stride=9_000)
    assert 60 <= alone.items.shape[0] <= 66
    full = make_work([(row, 1, 8_192) for row in range(64)], shape, tiling, table_stride=9_000)
    assert full.items.shape[0] == 64 and not len(full.firsts) and not full.partial.numel()


@pytest.mark.parametrize(
    ("generation", "shared", "heads", "rope", "dtype", "wanted"),
    [
        (9, 232_448, 16, 64, torch.bfloat16, (16, 64, False)),
        (9, 232_448, 17, 64, torch.bfloat16, (64, 64, True)),
        (9, 232_448, 128, 64, torch.bfloat16, (64, 64, True)),
        (9, 232_448, 128, 64, torch.float16, (64, 64, False)),
        (9, 232_448, 128, 128, torch.bfloat16, (64, 32, False)),
        (9, 232_448, 32, 32, torch.bfloat16, (32, 64, False)),
        (8, 166_912, 16, 64, torch.bfloat16, (16, 32, False)),
        (8, 101_376, 128, 64, torch.bfloat16, (64, 16, False)),
    ],
)
def test_tiles_fit_the_shared_memory_and_gluon_serves_what_it_was_built_for(
    monkeypatch: pytest.MonkeyPatch, generation: int, shared: int, heads: int, rope: int,
    dtype: torch.dtype, wanted: tuple[int, int, bool],
) -> None:  # fmt: skip
    about = SimpleNamespace(major=generation, shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
    tiling = tiling_of(LatentShape(heads, 512, rope, torch.device("cuda")), dtype)
    assert (tiling.rows, tiling.tile, tiling.hopper) == wanted


def test_blocks_of_latents_are_copied_like_any_others() -> None:
    given = step([(100, 1)])
    layout = LatentLayout(layers=2, latent_dim=32, rope_dim=16, codec=Codec.RAW32)
    pool = torch.zeros(given.pages.shape[0], layout.block_bytes, dtype=torch.uint8)
    view = latent.latent_view(pool, layout)
    view.copy_(given.pages)
    arena = torch.zeros(pool.numel(), dtype=torch.uint8)
    pages = torch.arange(pool.shape[0])
    ops.store_blocks(pool, pages, arena, pages * layout.block_bytes)
    other = torch.zeros_like(pool)
    ops.load_blocks(arena, pages.flip(0) * layout.block_bytes, other, pages)
    assert torch.equal(other.flip(0), pool)


def test_every_row_lies_where_the_layout_says() -> None:
    layout = LatentLayout(layers=3, latent_dim=24, rope_dim=8)
    assert layout.payload_bytes % 4096, "this layout has padding"
    pool = torch.zeros(2, layout.block_bytes, dtype=torch.uint8)
    view = latent.latent_view(pool, layout)
    assert view.shape == (2, 3, 16, 32) and view.dtype == torch.bfloat16
    one = torch.ones(1, dtype=torch.bfloat16)
    for layer, token in [(0, 0), (2, 15), (1, 3)]:
        pool.zero_()
        latent.write_latents(
            one.expand(1, 24), one.expand(1, 8) * 2, view, torch.tensor([16 + token]), layer
        )
        start = layout.layer_run(layer, 1).start + token * 64
        row = pool[1, start : start + 64].view(torch.bfloat16)
        assert torch.equal(row, torch.tensor([1.0] * 24 + [2.0] * 8, dtype=torch.bfloat16))
        assert int((pool != 0).sum()) == int((row.view(torch.uint8) != 0).sum())


def test_bad_shapes_types_and_plans_are_named() -> None:
    given = step([(20, 1)])
    index: dict[str, Any] = {
        "block_tables": given.tables,
        "context_lengths": given.contexts,
        "query_starts": given.starts,
    }
    for query, rotary, layer, said in (
        (given.query[0], given.rotary, 1, "query_latent must be"),
        (given.query, given.rotary[..., :8], 1, "query_rotary must be"),
        (given.query.repeat(1, 1, 2), given.rotary, 1, "query_rotary must be"),
        (given.query.double(), given.rotary, 1, "query_latent is torch.float64"),
        (given.query, given.rotary.half(), 1, "query_rotary is torch.float16"),
        (given.query, given.rotary, 2, "layer 2 of 2"),
        (given.query.repeat(2, 1, 1), given.rotary.repeat(2, 1, 1), 1, "query has 2 tokens"),
    ):
        with pytest.raises(BadInput, match=said):
            latent.latent_attention(query, rotary, given.pages, layer=layer, scale=1.0, **index)
    with pytest.raises(BadInput, match="latent_view"):
        latent.latent_attention(
            given.query, given.rotary, given.pages[0], layer=0, scale=1.0, **index
        )
    with pytest.raises(Unsupported, match="'xpu'"):
        latent.implementation("xpu")
    with pytest.raises(Unsupported, match="rope dimension 8"):
        by_kernel(step([(20, 1)], rope=8))
    with pytest.raises(Unsupported, match="fixed lengths"):
        latent_launch.latent_attention(
            given.query, given.rotary, given.pages, layer=1,
            plan=ReplayedDecode(1, 4, CPU), scale=1.0,
        )  # fmt: skip


def test_bad_pools_and_rows_are_refused_before_anything_is_written() -> None:
    layout = LatentLayout(layers=2, latent_dim=24, rope_dim=8)
    pool = torch.zeros(2, layout.block_bytes, dtype=torch.uint8)
    with pytest.raises(BadInput, match="RAW16 does not hold"):
        latent.latent_view(pool, layout, torch.float32)
    with pytest.raises(BadInput, match="pool must be uint8"):
        latent.latent_view(pool[:, :-128], layout)
    view = latent.latent_view(pool, layout)
    good, turned, slots = view.new_ones(1, 24), view.new_ones(1, 8), torch.tensor([3])
    for rows, rotary, where, said in (
        (good, turned, slots.int(), "slots"),
        (good.float(), turned, slots, "latent must be"),
        (good, turned.repeat(2, 1), slots, "rotary must be"),
        (good[:, :16], turned, slots, "rows of 16 and 8"),
    ):
        with pytest.raises(BadInput, match=said):
            latent.write_latents(rows, rotary, view, where, 0)
    assert not pool.any()


def test_the_devices_entries_are_these_modules() -> None:
    assert latent.implementation("cpu") is latent_reference
    assert latent.implementation("cuda") is latent_launch
    assert ops.implementation("cpu") is reference
