"""What the MLA benchmark measures and checks; the measuring itself needs a GPU (tests/gpu)."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels' modules decide at their import

import pytest
import torch
from kvkernels.bench.latents import GATE, LatentCell, attend, check, make, plan_of

from kvstore.core.errors import Corrupt


def test_cases_are_told_apart_and_count_what_is_read() -> None:
    names = [cell.name for cell in GATE]
    assert len(set(names)) == len(names) == 12
    cell = GATE[names.index("mla h128 b64 c8192")]
    assert cell.read_bytes == 64 * 8_192 * 1_152
    assert cell.products == 2 * 128 * 1_088 * 64 * 8_192
    assert all(each.read_bytes * each.layers >= 256 << 20 for each in GATE)


@pytest.mark.parametrize("new", [1, 10])
def test_the_check_passes_what_the_reference_gives_and_nothing_else(new: int) -> None:
    torch.manual_seed(3)
    cell = LatentCell("small", 3, (20, 70), new=new)
    batch = make(cell, "cpu")
    got = attend(batch, plan_of(batch), 1)
    check(cell, batch, got, 1)
    got[-1, -1] *= 1.1
    with pytest.raises(Corrupt, match="differs"):
        check(cell, batch, got, 1)
