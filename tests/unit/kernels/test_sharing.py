"""Prefixes that sequences share are attended once: which they are, and that answers stay right."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels' modules decide at their import

import random

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvkernels import ops
from kvkernels.plans import Rules
from kvkernels.quantised import QuantisedPages
from kvkernels.triton import device, works
from kvkernels.triton.sharing import MOST_LEVELS, find_groups

from kvstore.core.layout import BlockLayout, Codec

Tables = list[list[int]]


def tables_of(seed: int, sequences: int, most: int) -> Tables:
    """Tables in which every sequence begins as an earlier one does, for a while."""
    rng = random.Random(seed)
    fresh = iter(range(10_000))
    tables: Tables = []
    for _ in range(sequences):
        start = rng.choice(tables)[: rng.randint(0, most)] if tables else []
        own = rng.randint(0 if start else 1, most // 3 + 1)
        tables.append([*start, *(next(fresh) for _ in range(own))])
    rng.shuffle(tables)
    return tables


def padded(tables: Tables) -> torch.Tensor:
    wide = torch.full((len(tables), max(map(len, tables)) + 1), 2**31 - 1, dtype=torch.int32)
    for row, table in enumerate(tables):
        wide[row, : len(table)] = torch.tensor(table).int()
    return wide


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 40), st.integers(1, 30))
def test_groups_hold_equal_pages_and_nest(seed: int, sequences: int, most: int, least: int) -> None:
    tables = tables_of(seed, sequences, most)
    usable = [len(table) - 1 for table in tables]
    groups = find_groups(padded(tables).numpy(), usable, tile_pages=2, least=least)
    assert [group.level for group in groups] == sorted(group.level for group in groups)
    done = [(0, -1)] * sequences
    for group in groups:
        assert len(set(group.rows)) == len(group.rows) > 1 and group.level < MOST_LEVELS
        assert group.begin < group.end and group.end % 2 == 0
        assert (len(group.rows) - 1) * (group.end - group.begin) >= least
        for row in group.rows:
            assert done[row] == (group.begin, group.level - 1) and group.end <= usable[row]
            assert tables[row][: group.end] == tables[group.rows[0]][: group.end]
            done[row] = (group.end, group.level)


def test_all_that_is_worth_it_is_found() -> None:
    system, chat = list(range(9)), list(range(20, 27))
    tables = [
        [*system, 50, 51], [*system, *chat, 52], [60, *system], [*system, *chat, 53, 54], [*system],
    ]  # fmt: skip
    usable = [len(table) - 1 for table in tables]
    found = find_groups(padded(tables).numpy(), usable, tile_pages=4, least=6)
    assert [(group.rows, group.begin, group.end) for group in found] == [
        ((0, 1, 3, 4), 0, 8), ((1, 3), 8, 16),
    ]  # fmt: skip
    assert find_groups(padded(tables).numpy(), usable, tile_pages=4, least=25) == []
    none = numpy.zeros((3, 4), dtype=numpy.int32)
    assert find_groups(none, [0, 3, 0], tile_pages=1, least=1) == []


def attended(
    tables: Tables, news: list[int], codec: Codec, group: int, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor, device.DevicePlan]:
    """Attend with the kernels and with the reference over the same shared pages."""
    layout = BlockLayout(layers=1, kv_heads=2, head_dim=32, codec=codec)
    pool = torch.zeros(max(map(max, tables)) + 1, layout.block_bytes, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2, len(pool) * 16, 2, 32, generator=generator)
    pages: torch.Tensor | QuantisedPages = (
        ops.page_view(pool, layout) if codec == Codec.RAW32 else ops.quantised_view(pool, layout)
    )
    ops.write_pages(rows[0], rows[1], pages, torch.arange(len(pool) * 16), 0)
    contexts = torch.tensor(
        [16 * len(table) - row % 5 for row, table in enumerate(tables)], dtype=torch.int32
    )
    starts = torch.tensor([0, *numpy.cumsum(news)], dtype=torch.int32)
    query = torch.randn(int(starts[-1]), 2 * group, 32, generator=generator) * 3
    rules, wide = Rules(softcap=softcap), padded(tables)
    plan = device.plan_attention(wide, contexts, starts)
    # The second launch finds counters and results as the first found them.
    _, ours = (
        device.paged_attention(query, pages, layer=0, plan=plan, scale=0.3, rules=rules)
        for _ in range(2)
    )
    wanted = ops.paged_attention(
        query, pages, layer=0, block_tables=wide, context_lengths=contexts, query_starts=starts,
        scale=0.3, rules=rules,
    )  # fmt: skip
    return ours, wanted, plan


@pytest.mark.parametrize("seed", [1, 3])
@pytest.mark.parametrize(
    ("codec", "group", "softcap"),
    [(Codec.RAW32, 3, None), (Codec.RAW32, 4, 2.0), (Codec.INT8, 2, None), (Codec.INT4, 3, None)],
)
def test_answers_are_those_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, seed: int, codec: Codec, group: int, softcap: float | None
) -> None:
    monkeypatch.setattr(works, "_LEAST_SAVED", 1)
    tables = tables_of(seed, 7, 24)
    news = [1 + (row * 7 + seed) % 3 for row in range(7)]
    ours, wanted, plan = attended(tables, news, codec, group, softcap)
    assert len(next(iter(plan.works.values()))) > 1, "nothing was shared: the test says nothing"
    assert ours.isfinite().all()
    assert float((ours - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.slow
def test_more_rows_than_a_tile_and_many_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(works, "_LEAST_SAVED", 1)
    monkeypatch.setattr(works, "_processors", lambda _: 24)
    tables = [[*range(16), 100 + row] for row in range(36)]
    ours, wanted, plan = attended(tables, [1] * 36, Codec.RAW32, 4, None)
    prefix, rest = next(iter(plan.works.values()))
    assert prefix.rows == 128 and int(prefix.items[:, 7].max()) > 1
    assert int((prefix.items[:, 2] > 0).sum()) < int((rest.items[:, 2] > 0).sum())
    assert float((ours - wanted).norm() / wanted.norm()) < 1e-5


def test_little_sharing_windows_and_long_appends_stay_one_launch() -> None:
    tables = [[*range(4), 100 + row] for row in range(3)]
    for news in ([1, 1, 1], [9, 9, 9]):
        ours, wanted, plan = attended(tables, news, Codec.RAW32, 1, None)
        assert [len(works) for works in plan.works.values()] == [1]
        assert torch.allclose(ours, wanted, atol=1e-5)
