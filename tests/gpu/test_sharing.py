"""Shared prefixes on a real GPU: attended once for all their sequences, with the same answers."""

import pytest
import torch
from kvkernels.bench.cells import Cell, attend, expected, make, plan_of
from kvkernels.bench.command import TOLERANCE, relative_error
from kvkernels.triton import works
from kvkernels.triton.device import DevicePlan

from kvstore.core.layout import Codec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("codec", [Codec.RAW16, Codec.FP8, Codec.INT8, Codec.INT4])
@pytest.mark.parametrize(
    ("batch", "heads", "group", "dim"),
    [(2, 8, 4, 128), (50, 8, 4, 128), (70, 3, 3, 64), (20, 1, 8, 128), (9, 4, 4, 256)],
)
@pytest.mark.parametrize("new", [1, 3])
def test_shared_pages_are_read_once(
    monkeypatch: pytest.MonkeyPatch,
    codec: Codec, batch: int, heads: int, group: int, dim: int, new: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(works, "_LEAST_SAVED", 1)
    torch.manual_seed(1)
    cell = Cell("shared", batch, 2_100, heads, group, dim, new, codec=codec, shared=2_000)
    made = make(cell, "cuda")
    plan = plan_of(made)
    for layer in (0, 1):
        got = attend(cell, made, plan, layer)
    assert isinstance(plan, DevicePlan) and len(next(iter(plan.works.values()))) == 2
    assert relative_error(got, expected(cell, made, 1, range(batch))) < TOLERANCE
