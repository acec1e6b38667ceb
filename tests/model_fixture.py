"""Models for tests: tiny ones of several architectures, and the real default one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kvworkers.models import LoadedModel, StepInputs
from kvworkers.models.provision import ensure_model

TINY: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "llama-mha": {"num_key_value_heads": 4},
    "llama-mqa": {"num_key_value_heads": 1, "attention_bias": True},
    "llama-scaled": {
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
}
"""Architectures that transformers' own code computes around our attention."""


def tiny_config(kind: str, **changed: Any) -> Any:
    """Return a config of two small layers of architecture `kind` (a key of `TINY`)."""
    from transformers import AutoConfig

    sizes = {
        "vocab_size": 199,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return AutoConfig.for_model(kind.partition("-")[0], **sizes | TINY[kind] | changed)


def write_tiny_model(path: Path, kind: str = "llama", seed: int = 0, **changed: Any) -> Path:
    """Save a model with random weights to `path`; equal seeds give equal bytes."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(tiny_config(kind, **changed)).save_pretrained(path)
    return path


def plain_model(path: Path) -> Any:
    """Return transformers' own model of a directory in fp32: what ours is compared with."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def make_step(
    *spans: tuple[list[int], int, list[int]], sample: list[int] | None = None
) -> StepInputs:
    """Return the step of (new tokens, tokens held already, pages) of some sequences.

    Samples every sequence's last row where `sample` names no rows.
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    contexts: list[int] = []
    starts = [0]
    width = max(len(pages) for *_, pages in spans)
    for new, held, pages in spans:
        places = range(held, held + len(new))
        tokens += new
        positions += places
        slots += [pages[place // 16] * 16 + place % 16 for place in places]
        contexts.append(held + len(new))
        starts.append(starts[-1] + len(new))
    rows = [stop - 1 for stop in starts[1:]] if sample is None else sample
    return StepInputs(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        block_tables=torch.tensor(
            [pages + [0] * (width - len(pages)) for *_, pages in spans], dtype=torch.int32
        ),
        context_lengths=torch.tensor(contexts, dtype=torch.int32),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        sample_rows=torch.tensor(rows, dtype=torch.int64),
    )


def poisoned_pages(model: LoadedModel, count: int) -> torch.Tensor:
    """Return the view of a pool full of NaN: whatever leaks out of it shows."""
    pages = model.page_view(model.new_pool(count))
    pages.fill_(float("nan"))
    return pages


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The default model, made ready once per machine (half a minute the first time)."""
    return ensure_model()
