"""The fused decoder computes what transformers' modules do, from the same memory."""

from pathlib import Path

import pytest
import torch
from kvworkers.models import load_model
from kvworkers.models.attention import plan_step
from kvworkers.models.fused import FusedDecoder, fuses
from kvworkers.models.loading import last_of

from tests.model_fixture import TINY, make_step, poisoned_pages, write_tiny_model

PROMPT = torch.randint(0, 199, (60,), generator=torch.Generator().manual_seed(5)).tolist()
OTHER = torch.randint(0, 199, (20,), generator=torch.Generator().manual_seed(6)).tolist()


@pytest.mark.parametrize("name", sorted(TINY))
def test_logits_and_pages_are_those_of_the_modules(name: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny", name)
    model = load_model(path, cache_dir=tmp_path)
    if not fuses(model.module):
        assert name not in ("llama", "qwen3")
        return
    steps = [
        make_step((PROMPT[:50], 0, [7, 2, 5, 4]), sample=[0, 17, 49]),
        make_step((PROMPT[50:], 50, [7, 2, 5, 4]), (OTHER, 0, [1, 3])),
        make_step((PROMPT[:2], 60, [7, 2, 5, 4]), sample=[]),
    ]
    theirs, ours = poisoned_pages(model, 8), poisoned_pages(model, 8)
    wanted = [model.forward(step, theirs) for step in steps]
    decoder = FusedDecoder(model.module)
    with torch.inference_mode():
        for step, want in zip(steps, wanted, strict=True):
            got = last_of(decoder.parts(step, ours, plan_step(step, ours)))
            assert got.shape == want.shape
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)
    again = model.forward(steps[0], poisoned_pages(model, 8))
    torch.testing.assert_close(again, wanted[0], rtol=1e-4, atol=1e-4)
    attention = model.module.model.layers[0].self_attn
    first, second = (part.weight.data_ptr() for part in (attention.q_proj, attention.k_proj))
    rows = attention.q_proj.weight
    assert second - first == rows.numel() * rows.element_size(), "weights lie there twice"
