"""The function that transformers calls in every layer."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kvkernels import ops
from kvworkers.models import attention

from kvstore.core.errors import Unsupported
from kvstore.core.layout import BlockLayout, Codec
from tests.model_fixture import make_step

LAYOUT = BlockLayout(layers=2, kv_heads=2, head_dim=8, codec=Codec.RAW32)


def _call(**arguments: Any) -> torch.Tensor:
    module: Any = SimpleNamespace(layer_idx=1)
    query = torch.randn(1, 4, 3, 8)
    key, value = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    mask = arguments.pop("mask", None)
    return attention.paged_attention(module, query, key, value, mask, **arguments)[0]


def test_outside_a_running_step_it_refuses_to_guess() -> None:
    with pytest.raises(LookupError):
        _call()


def test_the_step_ends_with_its_context_even_when_the_forward_fails() -> None:
    pages = ops.page_view(torch.zeros(1, LAYOUT.block_bytes, dtype=torch.uint8), LAYOUT)
    step = make_step(([1, 2, 3], 0, [0]))
    with attention.running(step, pages):
        assert _call(dropout=0.0, scaling=0.5, sliding_window=None).shape == (1, 3, 4, 8)
        assert pages[0, :, 1, :, :3].ne(0).all() and not pages[0, :, 0].any()
    with pytest.raises(ZeroDivisionError), attention.running(step, pages):
        raise ZeroDivisionError
    with pytest.raises(LookupError):
        _call()


@pytest.mark.parametrize(
    "arguments",
    [
        {"sliding_window": 128},
        {"softcap": 30.0},
        {"s_aux": torch.zeros(4)},
        {"mask": torch.ones(1, 1, 3, 3)},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_attention_that_the_kernels_do_not_compute_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match=next(iter(arguments))):
        _call(**arguments)
