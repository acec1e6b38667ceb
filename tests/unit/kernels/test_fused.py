"""The small kernels in the interpreter, against plain torch on the same numbers."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels' module decides at its import

from typing import Any

import pytest
import torch
from kvkernels import fused, fused_reference, ops
from kvkernels.checks import check_pages
from kvkernels.triton import fused as kernels

from kvstore.core.errors import BadInput, Unsupported
from kvstore.core.layout import BlockLayout, Codec

DIM, QUERY_HEADS, KV_HEADS = 16, 7, 3


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [48, 64])
def test_add_and_norm(width: int) -> None:
    hidden, residual, weight = numbers(5, width), numbers(5, width, seed=2), numbers(width, seed=3)
    for other in (residual, None):
        got = kernels.add_rms_norm(hidden, other, weight, 1e-5)
        want = fused.add_rms_norm(hidden, other, weight, epsilon=1e-5)
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(got[1], hidden)


def paged() -> torch.Tensor:
    layout = BlockLayout(layers=2, kv_heads=KV_HEADS, head_dim=DIM, codec=Codec.RAW32)
    view = ops.page_view(torch.zeros(4, layout.block_bytes, dtype=torch.uint8), layout)
    return view.fill_(float("nan"))


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "heads normed"])
def test_rotated_heads_lie_in_their_pages(*, normed: bool) -> None:
    projected = numbers(6, (QUERY_HEADS + 2 * KV_HEADS) * DIM)
    angles = numbers(6, DIM // 2, seed=2).repeat(1, 2)
    norms = (numbers(DIM, seed=3), numbers(DIM, seed=4)) if normed else None
    slots = torch.tensor([33, 0, 15, 16, 63, 40])
    ours, theirs = paged(), paged()
    got = kernels.rotate_into_pages(
        projected, angles.cos(), angles.sin(), ours, slots, 1, QUERY_HEADS, norms, 1e-6
    )
    want = fused.rotate_into_pages(
        projected, angles.cos(), angles.sin(), theirs, slots,
        layer=1, query_heads=QUERY_HEADS, norms=norms, epsilon=1e-6,
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert int(ours.isfinite().sum()) == 6 * 2 * KV_HEADS * DIM, "what no slot names was written"
    values = projected.view(6, -1, DIM)[:, QUERY_HEADS + KV_HEADS :]
    assert torch.equal(ours[slots // 16, :, 1, 1, slots % 16], values)


@pytest.mark.parametrize("width", [40, 1_500])
def test_gated_silu(width: int) -> None:
    projected = numbers(3, 2 * width) * 4
    torch.testing.assert_close(
        kernels.gated_silu(projected), fused.gated_silu(projected), rtol=1e-5, atol=1e-6
    )


def test_the_largest_logit_is_chosen_the_first_of_equals_and_what_is_no_number_is_said() -> None:
    logits = numbers(6, 9_000)
    logits[0, 8_999] = 50.0
    logits[1, [7, 4_095, 4_096]] = 50.0
    logits[2, 3] = float("nan")
    logits[3, 8_500] = float("inf")
    logits[4, 17] = float("-inf")
    got, want = kernels.choose(logits), fused.choose(logits)
    assert got[1].tolist() == want[1].tolist() == [1, 1, 0, 0, 0, 1]
    assert got[0, [0, 1, 5]].tolist() == want[0, [0, 1, 5]].tolist()
    assert got[0, :2].tolist() == [8_999, 7]
    whole = kernels.choose(torch.full((1, 9_000), float("nan")))
    assert whole[1].tolist() == [0] and 0 <= int(whole[0]) < 9_000
    assert kernels.choose(numbers(0, 5)).shape == fused.choose(numbers(0, 5)).shape == (2, 0)


def test_no_tokens_are_no_launch() -> None:
    assert kernels.gated_silu(numbers(0, 8)).shape == (0, 4)
    assert kernels.add_rms_norm(numbers(0, 8), None, numbers(8), 1e-5)[0].shape == (0, 8)
    none = numbers(0, (QUERY_HEADS + 2 * KV_HEADS) * DIM)
    angle, slots = numbers(0, DIM), torch.zeros(0, dtype=torch.int64)
    query = kernels.rotate_into_pages(none, angle, angle, paged(), slots, 0, QUERY_HEADS, None, 0.0)
    assert query.shape == (0, QUERY_HEADS, DIM)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(BadInput, match="weight must be"):
        fused.add_rms_norm(numbers(2, 8), None, numbers(7), epsilon=1e-5)
    with pytest.raises(BadInput, match="residual must be like hidden"):
        fused.add_rms_norm(numbers(2, 8), numbers(3, 8), numbers(8), epsilon=1e-5)
    with pytest.raises(BadInput, match="hidden must be"):
        fused.add_rms_norm(numbers(8), None, numbers(8), epsilon=1e-5)
    with pytest.raises(BadInput, match=r"projected must be \[tokens, 2"):
        fused.gated_silu(numbers(2, 7))
    with pytest.raises(BadInput, match="logits must be float32"):
        fused.choose(numbers(2, 7).double())
    slots, angle = torch.zeros(2, dtype=torch.int64), numbers(2, DIM)
    right = numbers(2, (QUERY_HEADS + 2 * KV_HEADS) * DIM)

    def rotate(projected: torch.Tensor = right, **change: torch.Tensor) -> None:
        given: dict[str, Any] = {"cosine": angle, "sine": angle, "slots": slots} | change
        norms = (given.pop("norm"), angle[0]) if "norm" in given else None
        fused.rotate_into_pages(
            projected, pages=paged(), layer=0, query_heads=QUERY_HEADS, norms=norms, **given
        )

    rotate()
    for match, wrong in (
        ("projected must be", {"projected": right[:, 1:]}),
        ("slots must be int64", {"slots": slots.int()}),
        ("cosine must be", {"cosine": angle[:1]}),
        ("sine must be", {"sine": angle.double()}),
        ("weights of norms must be", {"norm": angle}),
    ):
        with pytest.raises(BadInput, match=match):
            rotate(**wrong)


def test_pages_that_no_view_made_and_layers_that_are_not_there_are_named() -> None:
    assert check_pages(paged(), 1) == (KV_HEADS, DIM)
    with pytest.raises(BadInput, match="layer 2 of 2"):
        check_pages(paged(), 2)
    with pytest.raises(BadInput, match="must come from page_view"):
        check_pages(paged()[0], 0)


def test_each_device_has_its_code() -> None:
    assert fused.implementation("cpu") is fused_reference
    assert fused.implementation("cuda") is kernels
    with pytest.raises(Unsupported, match="'tpu'"):
        fused.implementation("tpu")
