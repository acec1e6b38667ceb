"""How many pages a device's memory leaves, measured with the largest step that will ever run."""

from typing import Final

import torch

from kvstore.core.errors import Refused
from kvstore.core.limits import BLOCK_TOKENS
from kvworkers.models.loading import LoadedModel
from kvworkers.models.step import StepInputs

CPU_PAGES_BYTES: Final = 512 << 20
_RESERVE_BYTES: Final = 3 << 30
"""Left free: captured graphs, work lists of long contexts, what fragments, other processes."""
_SPARE: Final = 1.25
"""Of the largest step's own memory: sizes in between fragment the allocator."""


def fit_pages(model: LoadedModel, *, step_tokens: int) -> int:
    """Return how many pages fit beside weights and a step of `step_tokens` on the model's device.

    On a CPU, `CPU_PAGES_BYTES` of them. Raises `Refused` when nothing is left.
    """
    block = model.spec.layout.block_bytes
    if model.device.type != "cuda":
        return max(1, CPU_PAGES_BYTES // block)
    peak = _largest_step(model, step_tokens)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(model.device)
    pages = (int(free - _SPARE * peak) - _RESERVE_BYTES) // block - 1
    if pages < 1:
        raise Refused(
            f"{free >> 20} MiB of {total >> 20} are free: no room for pages beside a step of "
            f"{step_tokens} tokens ({peak >> 20} MiB)"
        )
    return int(pages)


def _largest_step(model: LoadedModel, step_tokens: int) -> int:
    """Return the bytes that one step of so many tokens takes beside weights and pages."""
    pages = -(-step_tokens // BLOCK_TOKENS)
    view = model.page_view(model.new_pool(pages))
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    each = torch.arange(step_tokens, dtype=torch.int64)
    model.forward(
        StepInputs(
            tokens=torch.zeros_like(each),
            positions=each,
            slots=each.clone(),
            block_tables=torch.arange(pages, dtype=torch.int32)[None],
            context_lengths=torch.tensor([step_tokens], dtype=torch.int32),
            query_starts=torch.tensor([0, step_tokens], dtype=torch.int32),
            sample_rows=each[-1:],
        ),
        view,
    )
    torch.cuda.synchronize(model.device)
    return torch.cuda.max_memory_allocated(model.device) - before
