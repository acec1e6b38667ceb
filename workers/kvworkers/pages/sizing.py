"""How many pages a device's memory leaves, measured with the largest step that will ever run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvstore.core.errors import BadInput, Refused
from kvstore.core.limits import BLOCK_TOKENS
from kvworkers.models.loading import LoadedModel
from kvworkers.models.step import StepInputs

CPU_PAGES_BYTES: Final = 512 << 20
_RESERVE_BYTES: Final = 3 << 30
"""Left free: captured graphs, work lists of long contexts, what fragments, other processes."""
_SPARE: Final = 1.25
"""Of the largest step's own memory: sizes in between fragment the allocator."""


_CAPTURED_PAGES: Final = 256
"""Pages of a sequence that steps are captured for at the start: 4k tokens."""


@dataclass(frozen=True, slots=True)
class DevicePages:
    """A worker's pages on its device."""

    memory: Tensor
    """uint8 [pages, block_bytes]; on a GPU one page more than `count`, for padded rows."""
    view: Tensor
    """The same, as `LoadedModel.forward` takes it."""
    count: int
    """Pages that sequences may be given."""


def allocate_pages(model: LoadedModel, count: int, *, batch: int) -> DevicePages:
    """Allocate and touch `count` pages, and capture steps of up to `batch` sequences over them."""
    scratch = 1 if model.device.type == "cuda" else 0
    memory = model.new_pool(count + scratch).fill_(0)  # First touch costs seconds, paid here.
    view = model.page_view(memory)
    model.capture(view, batch=batch, max_pages=_CAPTURED_PAGES)
    return DevicePages(memory, view, count)


def new_pages(
    model: LoadedModel,
    pool_bytes: int | None,
    *,
    step_tokens: int,
    batch: int,
    agreed: Callable[[int], int] = int,
) -> DevicePages:
    """Return pages of `pool_bytes` in all (None: as many as fit); `batch` as in `allocate_pages`.

    `agreed` makes of each rank's count the one that all ranks have. Raises `BadInput` when that is
    none, and `Refused` when a GPU has no room for them.
    """
    if pool_bytes is None:
        count = fit_pages(model, step_tokens=step_tokens)
    else:
        count = _asked(model, pool_bytes, step_tokens)
    return allocate_pages(model, agreed(count), batch=batch)


def _asked(model: LoadedModel, pool_bytes: int, step_tokens: int) -> int:
    block_bytes = model.page_bytes
    count = pool_bytes // block_bytes
    if count == 0:
        raise BadInput(f"pool_bytes {pool_bytes} is below one block of {block_bytes}")
    if model.device.type == "cuda":
        most = fit_pages(model, step_tokens=step_tokens)
        if count > most:
            raise Refused(f"pool_bytes {pool_bytes}: the GPU has room for {most * block_bytes}")
    return count


def fit_pages(model: LoadedModel, *, step_tokens: int) -> int:
    """Return how many pages fit beside weights and a step of `step_tokens` on the model's device.

    On a CPU, `CPU_PAGES_BYTES` of them. Raises `Refused` when nothing is left.
    """
    block = model.page_bytes
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
