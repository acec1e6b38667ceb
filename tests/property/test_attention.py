"""Paged attention against attention written token by token."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvkernels import ops

from kvstore.core.layout import BlockLayout, Codec

Dense = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""query, key and value of one sequence, not paged."""


@dataclass(frozen=True)
class Case:
    kv_heads: int
    group: int
    head_dim: int
    spans: tuple[tuple[int, int], ...]
    """(tokens held already, new tokens) of each sequence."""
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    span = st.tuples(st.integers(0, 70), st.integers(1, 40))
    return Case(
        kv_heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 2, 3])),
        head_dim=draw(st.sampled_from([8, 16])),
        spans=tuple(draw(st.lists(span, min_size=1, max_size=4))),
        seed=draw(st.integers(0, 2**31)),
    )


def naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> list[float]:
    """Attend from one query row [dim] over [context, dim], in plain Python floats."""
    scores = [
        scale * sum(a * b for a, b in zip(query.tolist(), k, strict=True)) for k in key.tolist()
    ]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = sum(weights)
    columns = zip(*value.tolist(), strict=True)
    return [sum(w * v for w, v in zip(weights, column, strict=True)) / total for column in columns]


def run(case: Case, *, layer: int = 1) -> tuple[torch.Tensor, list[Dense]]:
    """Lay a case out over scattered pages of a poisoned pool; return output and dense parts."""
    torch.manual_seed(case.seed)
    layout = BlockLayout(
        layers=2, kv_heads=case.kv_heads, head_dim=case.head_dim, codec=Codec.RAW32
    )
    counts = [-(-(held + new) // 16) for held, new in case.spans]
    pool = torch.zeros(sum(counts) + 3, layout.block_bytes, dtype=torch.uint8)
    pages = ops.page_view(pool, layout)
    pages.fill_(float("nan"))
    order = torch.randperm(pages.shape[0])
    tables = torch.full((len(counts), max(counts) + 1), 2**31 - 1, dtype=torch.int32)
    dense, queries, starts, taken = [], [], [0], 0
    for row, (held, new) in enumerate(case.spans):
        mine = order[taken : taken + counts[row]]
        taken += counts[row]
        tables[row, : counts[row]] = mine.int()
        places = torch.arange(held + new)
        slots = mine[places // 16] * 16 + places % 16
        key, value = torch.randn(2, held + new, case.kv_heads, case.head_dim)
        ops.write_pages(key, value, pages, slots, layer)
        query = torch.randn(new, case.kv_heads * case.group, case.head_dim)
        dense.append((query, key, value))
        queries.append(query)
        starts.append(starts[-1] + new)
    out = ops.paged_attention(
        torch.cat(queries),
        pages,
        layer=layer,
        block_tables=tables,
        context_lengths=torch.tensor([sum(s) for s in case.spans], dtype=torch.int32),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        scale=0.3,
    )
    return out, dense


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_every_row_equals_attention_by_hand(case: Case) -> None:
    out, dense = run(case)
    assert not out.isnan().any(), "bytes of unused places leaked into the result"
    row = 0
    for (held, new), (query, key, value) in zip(case.spans, dense, strict=True):
        for token in {0, new // 2, new - 1}:
            for head in range(query.shape[1]):
                kv = head // case.group
                seen = held + token + 1
                wanted = naive(query[token, head], key[:seen, kv], value[:seen, kv], 0.3)
                assert out[row + token, head].tolist() == pytest.approx(wanted, abs=1e-5)
        row += new


@pytest.mark.parametrize("held", [0, 5, 700])
@pytest.mark.parametrize("new", [1, 127, 128, 129, 400])
def test_long_chunks_equal_masked_attention_over_dense_tensors(held: int, new: int) -> None:
    out, [(query, key, value)] = run(Case(2, 3, 16, ((held, new),), seed=held + new))
    mask = torch.ones(new, held + new, dtype=torch.bool).tril(held)
    keys, values = (x.repeat_interleave(3, 1).transpose(0, 1).double() for x in (key, value))
    scores = (query.double().transpose(0, 1) @ keys.transpose(1, 2) * 0.3).masked_fill(
        ~mask, float("-inf")
    )
    wanted = (scores.softmax(-1) @ values).transpose(0, 1)
    assert float((out.double() - wanted).abs().max()) < 1e-5


def test_a_plan_made_once_serves_every_layer() -> None:
    layout = BlockLayout(layers=2, kv_heads=1, head_dim=8, codec=Codec.RAW32)
    pages = ops.page_view(torch.zeros(2, layout.block_bytes, dtype=torch.uint8), layout)
    pages.normal_()
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    lengths = torch.tensor([19], dtype=torch.int32)
    starts = torch.tensor([0, 4], dtype=torch.int32)
    plan = ops.plan_attention(table, lengths, starts)
    assert plan.query_tokens == 4
    query = torch.randn(4, 2, 8)
    for layer in range(2):
        planned, fresh = (
            ops.paged_attention(
                query,
                pages,
                layer=layer,
                block_tables=table,
                context_lengths=lengths,
                query_starts=starts,
                scale=1.0,
                plan=given_plan,
            )
            for given_plan in (plan, None)
        )
        assert torch.equal(planned, fresh)
