"""The MLA kernels on a real GPU, against plain attention in float64."""

from dataclasses import replace

import pytest
import torch
from kvkernels.bench.command import relative_error
from kvkernels.bench.latents import (
    GATE,
    SCALE,
    TOLERANCE,
    LatentCell,
    attend,
    expected,
    make,
    measure,
    plan_of,
)
from kvkernels.triton.device import DevicePlan
from kvkernels.triton.latent_launch import attend as launch_work
from kvkernels.triton.latent_work import LatentShape, Tiling, make_work

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONTEXTS = [(1,), (17, 64, 65), (1_000, 3, 5_000, 40), (20_000,)]


def assert_right(cell: LatentCell) -> None:
    torch.manual_seed(1)
    batch = make(cell, "cuda")
    got = attend(batch, plan_of(batch), 1)
    want = expected(cell, batch, 1, range(len(cell.contexts)))
    assert relative_error(got, want) < TOLERANCE
    assert torch.equal(got, attend(batch, plan_of(batch), 1)), "a second launch differs"


@pytest.mark.parametrize("contexts", CONTEXTS, ids=str)
@pytest.mark.parametrize("heads", [1, 8, 16, 24, 64, 100, 128])
def test_every_shape(heads: int, contexts: tuple[int, ...]) -> None:
    assert_right(LatentCell("shape", heads, contexts))


@pytest.mark.parametrize("heads", [4, 16, 128])
@pytest.mark.parametrize("new", [2, 5, 33])
def test_several_new_tokens(heads: int, new: int) -> None:
    assert_right(LatentCell("new", heads, (40, 700, 3_000), new=new))


@pytest.mark.parametrize("heads", [16, 128])
def test_unused_places_may_hold_anything(heads: int) -> None:
    cell = LatentCell("poison", heads, (5, 77, 1_001))
    batch = make(cell, "cuda")
    want = attend(batch, plan_of(batch), 1)
    for row, context in enumerate(cell.contexts):
        last = int(batch.tables[row, (context - 1) // 16])
        batch.pages[last, :, (context - 1) % 16 + 1 :] = float("nan")
    got = attend(batch, plan_of(batch), 1)
    assert torch.equal(got, want) and bool(torch.isfinite(got).all())


@pytest.mark.parametrize("heads", [16, 128])
def test_a_captured_launch_can_be_replayed(heads: int) -> None:
    cell = LatentCell("graph", heads, (3_000, 100, 9_000))
    batch = make(cell, "cuda")
    plan = plan_of(batch)
    first = attend(batch, plan, 1)
    assert isinstance(plan, DevicePlan)
    [work] = plan.latents.values()
    assert len(work.firsts), "a unit must be split for this test to say anything"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(batch, plan, 1)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, first)


@pytest.mark.parametrize(
    "tiling",
    [
        Tiling(rows=64, tile=64, warps=8, stages=2),
        Tiling(rows=64, tile=64, warps=8, stages=2, hopper=True),
    ],
    ids=["Triton", "Gluon"],
)
def test_every_kernel_for_many_heads_is_right(tiling: Tiling) -> None:
    if tiling.hopper and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("Gluon's kernel is for Hopper")
    torch.manual_seed(1)
    cell = LatentCell("tilings", 128, (1_000, 64, 9_000, 1))
    batch = make(cell, "cuda")
    shape = LatentShape(128, 512, 64, batch.query.device)
    spans = [(row, 1, context) for row, context in enumerate(cell.contexts)]
    work = make_work(spans, shape, tiling, table_stride=batch.tables.stride(0))
    got = launch_work(
        batch.query, batch.rotary, batch.pages[:, 1], batch.tables.cuda(), work, scale=SCALE
    )
    want = expected(cell, batch, 1, range(4))
    assert relative_error(got, want) < TOLERANCE


def test_the_benchmark_measures_what_it_checked() -> None:
    row = measure(replace(GATE[0], contexts=(2_048,)), 3_000.0, 700.0)
    assert row["value"] > 0 and row["ratio_to_limit"] > 0
