"""Quantised pages on a real GPU: attention over them, and the bytes that appends write."""

import pytest
import torch
from kvkernels import ops, reference
from kvkernels.bench.cells import Cell, attend, expected, make, plan_of
from kvkernels.bench.command import TOLERANCE, relative_error
from kvkernels.plans import Rules

from kvstore.core.layout import BlockLayout, Codec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

QUANTISED = [Codec.FP8, Codec.INT8, Codec.INT4]


@pytest.mark.parametrize("codec", QUANTISED)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("heads", "group"), [(8, 4), (3, 3), (4, 1)])
@pytest.mark.parametrize(("context", "new"), [(1, 1), (1_000, 1), (5_000, 1), (300, 37)])
def test_attention_over_codes(
    codec: Codec, dim: int, heads: int, group: int, context: int, new: int
) -> None:
    torch.manual_seed(1)
    cell = Cell("codes", 3, context, heads, group, dim, new, codec=codec)
    batch = make(cell, "cuda")
    got = attend(cell, batch, plan_of(batch), 1)
    assert relative_error(got, expected(cell, batch, 1, range(3))) < TOLERANCE


@pytest.mark.parametrize("codec", QUANTISED)
def test_rules_over_codes(codec: Codec) -> None:
    rules = Rules(window=100, sinks=4, softcap=5.0)
    cell = Cell("rules", 3, 2_000, new=40, rules=rules, codec=codec)
    batch = make(cell, "cuda")
    got = attend(cell, batch, plan_of(batch), 1)
    assert relative_error(got, expected(cell, batch, 1, range(3))) < TOLERANCE


@pytest.mark.parametrize("codec", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_appends_write_the_bytes_of_the_reference(codec: Codec, dtype: torch.dtype) -> None:
    layout = BlockLayout(layers=2, kv_heads=3, head_dim=128, codec=codec)
    pool = torch.full((80, layout.block_bytes), 255, dtype=torch.uint8)
    copied = pool.cuda()
    rows = torch.randn(2, 1_001, 3, 128) * torch.logspace(-7, 3, 1_001)[:, None, None]
    key, value = rows.to(dtype)
    slots = torch.randperm(80 * 16)[:1_001]
    reference.write_pages(key, value, ops.quantised_view(pool, layout), slots, 1)
    ops.write_pages(key.cuda(), value.cuda(), ops.quantised_view(copied, layout), slots.cuda(), 1)
    assert torch.equal(copied.cpu(), pool)
