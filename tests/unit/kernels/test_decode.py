"""The Triton decode kernel in the interpreter, against the torch reference on the same pages."""

import os
from dataclasses import dataclass

os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernel's module decides at its import

import pytest
import torch
from kvkernels import ops, reference
from kvkernels.plans import Rules
from kvkernels.triton import device, work, works
from kvkernels.triton.decode import MERGE_SPLITS

from kvstore.core.errors import BadInput, Unsupported
from kvstore.core.layout import BlockLayout, Codec


@dataclass(frozen=True)
class Step:
    query: torch.Tensor
    pages: torch.Tensor
    tables: torch.Tensor
    contexts: torch.Tensor
    starts: torch.Tensor


def step(
    spans: list[tuple[int, int]],
    *,
    heads: int = 2,
    group: int = 3,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Step:
    """Random sequences of (held, new) tokens on scattered pages; unused places hold NaN."""
    generator = torch.Generator().manual_seed(7)
    codec = Codec.RAW32 if dtype == torch.float32 else Codec.RAW16
    layout = BlockLayout(layers=2, kv_heads=heads, head_dim=dim, codec=codec)
    counts = [-(-(held + new) // 16) for held, new in spans]
    pool = torch.zeros(sum(counts) + 3, layout.block_bytes, dtype=torch.uint8)
    pages = ops.page_view(pool, layout, dtype)
    pages.fill_(float("nan"))
    order = torch.randperm(pages.shape[0], generator=generator)
    tables = torch.full((len(spans), max(counts) + 1), 2**31 - 1, dtype=torch.int32)
    taken, starts = 0, [0]
    for row, (held, new) in enumerate(spans):
        mine = order[taken : taken + counts[row]]
        taken += counts[row]
        tables[row, : counts[row]] = mine.int()
        places = torch.arange(held + new)
        key, value = torch.randn(2, held + new, heads, dim, generator=generator).to(dtype)
        slots = mine[places // 16] * 16 + places % 16
        ops.write_pages(key, value, pages, slots, 1)
        starts.append(starts[-1] + new)
    # As transformers hands it over: heads outermost in memory.
    query = torch.randn(heads * group, starts[-1], dim, generator=generator).to(dtype)
    contexts = torch.tensor([sum(span) for span in spans], dtype=torch.int32)
    return Step(
        query.transpose(0, 1), pages, tables, contexts, torch.tensor(starts, dtype=torch.int32)
    )


def both(given: Step, rules: Rules) -> tuple[torch.Tensor, torch.Tensor, device.DevicePlan]:
    """Return the kernel's answer, the reference's, and the kernel's plan."""
    plan = device.plan_attention(given.tables, given.contexts, given.starts)
    ours = device.paged_attention(
        given.query, given.pages, layer=1, plan=plan, scale=0.3, rules=rules
    )
    wanted = reference.paged_attention(
        given.query,
        given.pages,
        layer=1,
        plan=reference.plan_attention(given.tables, given.contexts, given.starts),
        scale=0.3,
        rules=rules,
    )
    return ours, wanted, plan


@pytest.mark.parametrize(
    "rules",
    [
        Rules(),
        Rules(window=70),
        Rules(window=70, sinks=5),
        Rules(softcap=2.0),
        Rules(window=1, softcap=1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "spans",
    [[(0, 1)], [(300, 1), (15, 1), (64, 1)], [(200, 5), (700, 1), (0, 33)]],
    ids=["first token", "decode", "mixed"],
)
def test_kernel_equals_reference(spans: list[tuple[int, int]], rules: Rules) -> None:
    ours, wanted, _ = both(step(spans), rules)
    assert torch.allclose(ours, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("heads", "group"), [(4, 1), (1, 8), (1, 17)])
def test_mha_to_mqa_and_groups_that_are_no_power_of_two(heads: int, group: int) -> None:
    ours, wanted, _ = both(step([(130, 1), (40, 2)], heads=heads, group=group, dim=32), Rules())
    assert torch.allclose(ours, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pages(dtype: torch.dtype) -> None:
    ours, wanted, _ = both(step([(150, 1)], dim=64, dtype=dtype), Rules(softcap=50.0))
    error = (ours.double() - wanted.double()).norm() / wanted.double().norm()
    assert ours.dtype == dtype and float(error) < 5e-3


def test_a_second_launch_of_one_plan_finds_its_counters_at_zero() -> None:
    given = step([(900, 1)], heads=1)
    first, wanted, plan = both(given, Rules())
    [[made]] = plan.works.values()
    assert int(made.items[0, 7]) > 1, "a long context must be split for this test to say anything"
    again = device.paged_attention(
        given.query, given.pages, layer=1, plan=plan, scale=0.3, rules=Rules()
    )
    assert torch.equal(first, again) and int(made.counters.abs().sum()) == 0
    assert torch.allclose(again, wanted, atol=2e-5)


def test_more_items_than_the_merge_reads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(works, "_processors", lambda _: 40)
    given = step([(2599, 1)], heads=1)
    given.query.mul_(4)  # maxima that differ between items, so a wrong rescaling shows
    ours, wanted, plan = both(given, Rules())
    [[made]] = plan.works.values()
    assert int(made.items[0, 7]) > MERGE_SPLITS.value
    assert torch.allclose(ours, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("rules", [Rules(), Rules(window=200, sinks=3)], ids=str)
@pytest.mark.parametrize("contexts", [[1], [64, 65, 4096, 1], [9000] * 40, [131072, 10]])
def test_items_cover_every_tile_of_every_unit_once(contexts: list[int], rules: Rules) -> None:
    units = torch.tensor([(row, row, 1, c - 1) for row, c in enumerate(contexts)]).int()
    most = -(-max(contexts) // work.TILE)
    room = work.capacity(len(contexts), 264, 8, most_tiles=most)
    items = torch.full((room, work.FIELDS), -9, dtype=torch.int32)
    work.cut(units, items, programs=264, heads=8, rules=rules)
    used = items[items[:, 2] > 0].tolist()
    for row, tiles in enumerate(work.tiles_seen(units, rules).tolist()):
        mine = [item for item in used if item[0] == row]
        assert [item[4] for item in mine] == [0, *(item[5] for item in mine[:-1])]
        assert mine[-1][5] == tiles and {item[7] for item in mine} == {len(mine)}
        assert all(0 < item[5] - item[4] <= work.LONGEST for item in mine)
        assert {item[6] for item in mine} == {used.index(mine[0])}
    assert set(items[len(used) :, 2].tolist()) <= {0}


@pytest.mark.parametrize("room", [10_000, 0], ids=["room", "no room"])
@pytest.mark.parametrize(
    ("spans", "rules"),
    [
        ([(64, 8_192)], Rules()),
        ([(640, 8_192), (1, 40), (33, 0)], Rules()),
        ([(2_048, 30_000)], Rules(window=500, sinks=4)),
        ([(4_096, 0)], Rules()),
    ],
    ids=str,
)
def test_items_of_appends_cover_every_tile_once_and_end_together(
    spans: list[tuple[int, int]], rules: Rules, room: int
) -> None:
    rows = [
        (0, at, min(32, new - at), held + at) for new, held in spans for at in range(0, new, 32)
    ]
    units = torch.tensor([*rows, (0, 0, 0, 0)]).int()
    programs, heads = 132, 8
    most = work.capacity(len(units), programs, heads, most_tiles=1, append=True)
    items = torch.full((most if room else len(rows), work.FIELDS), -9, dtype=torch.int32)
    work.cut(units, items, programs=programs, heads=heads, rules=rules, append=True)
    used = items[items[:, 2] > 0].tolist()
    tiles = work.tiles_seen(units, rules).tolist()
    for row, wanted in zip(rows, tiles, strict=False):
        mine = [item for item in used if tuple(item[1:4]) == row[1:4]]
        assert {item[7] for item in mine} == {len(mine)}
        assert {item[6] for item in mine} == {used.index(mine[0])}
        covered = [tile for item in mine for tile in range(item[4], item[5])]
        assert covered == list(range(wanted))
    assert len(used) <= len(items) and set(items[len(used) :, 2].tolist()) <= {0}
    if room:
        ends = [0] * programs
        for item in used * heads:
            ends[ends.index(min(ends))] += item[5] - item[4]
        ideal = sum(tiles) * heads / programs
        assert max(ends) <= 1.3 * ideal + 12, "some processors stand idle"


@pytest.mark.parametrize("append", [False, True])
def test_cutting_never_looks_at_a_value(*, append: bool) -> None:
    units = torch.empty(7, 4, dtype=torch.int32, device="meta")
    items = torch.empty(40, work.FIELDS, dtype=torch.int32, device="meta")
    rules = Rules(window=100, sinks=4)
    work.cut(units, items, programs=132, heads=8, rules=rules, append=append)
    assert items.shape == (40, work.FIELDS), "a look would have raised: there are no values"


def test_bad_steps_and_rules_are_named() -> None:
    given = step([(20, 1)])
    with pytest.raises(BadInput, match="sequence 0: 1 new tokens, context 999"):
        device.plan_attention(given.tables, given.contexts * 0 + 999, given.starts)
    with pytest.raises(BadInput, match="begin at 4"):
        device.plan_attention(given.tables, given.contexts, given.starts + 4)
    with pytest.raises(Unsupported, match="head_dim 8"):
        both(step([(20, 1)], dim=8), Rules())
    with pytest.raises(BadInput, match="window"):
        Rules(window=0)
    with pytest.raises(BadInput, match="sinks"):
        Rules(sinks=2)
    with pytest.raises(BadInput, match="softcap"):
        Rules(softcap=-1.0)


def test_the_entry_for_cuda_is_this_module() -> None:
    assert ops.implementation("cuda") is device
