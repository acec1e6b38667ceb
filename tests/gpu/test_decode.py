"""The decode kernel on a real GPU, against plain attention in float64."""

from dataclasses import replace

import pytest
import torch
from kvkernels.bench.cells import GATE, Cell, attend, expected, make, plan_of
from kvkernels.bench.command import TOLERANCE, measure, relative_error
from kvkernels.bench.timing import read_limit
from kvkernels.plans import Rules

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SMALL = [
    Cell(f"d{dim} h{heads} g{group} c{context} n{new}", 3, context, heads, group, dim, new)
    for dim in (64, 128, 256)
    for heads, group in ((8, 4), (3, 3), (1, 8), (4, 1))
    for context, new in ((1, 1), (17, 1), (1_000, 1), (5_000, 1), (300, 37))
]
RULES = [
    Rules(window=128),
    Rules(window=100, sinks=4),
    Rules(softcap=30.0),
    Rules(window=64, sinks=16, softcap=5.0),
]


def assert_right(cell: Cell) -> None:
    torch.manual_seed(1)
    batch = make(cell, "cuda")
    got = attend(cell, batch, plan_of(batch), 1)
    want = expected(cell, batch, 1, range(cell.batch))
    assert relative_error(got, want) < TOLERANCE
    assert torch.equal(got, attend(cell, batch, plan_of(batch), 1)), "a second launch differs"


@pytest.mark.parametrize("cell", SMALL, ids=lambda cell: cell.name)
def test_every_shape(cell: Cell) -> None:
    assert_right(cell)


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("new", [1, 40])
def test_windows_sinks_and_caps(rules: Rules, new: int) -> None:
    assert_right(Cell("rules", 3, 2_000, new=new, rules=rules))


def test_a_captured_launch_can_be_replayed() -> None:
    cell = Cell("graph", 5, 3_000)
    batch = make(cell, "cuda")
    plan = plan_of(batch)

    def launch() -> torch.Tensor:
        return attend(cell, batch, plan, 1)

    first = launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, first)


def test_the_read_limit_is_one_of_a_gpu() -> None:
    assert 100 < read_limit() < 50_000


def test_the_benchmark_measures_what_it_checked() -> None:
    row = measure(replace(GATE[0], context=2_048), 3_000.0, 700.0)
    assert row["value"] > 0 and row["ratio_to_limit"] > 0
