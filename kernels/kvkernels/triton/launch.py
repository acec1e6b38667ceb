"""The call of the kernel: what each launch of a plan gets."""

# A launch passes plain values where the kernel's signature says constexpr.
# pyright: reportArgumentType=false

from collections.abc import Sequence
from math import e, log2
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from kvkernels.plans import Rules
from kvkernels.quantised import QuantisedPages
from kvkernels.triton.decode import MERGE_ROWS, attend_pages, merge_groups
from kvkernels.triton.quantised import write_rows
from kvkernels.triton.works import TALL, Work
from kvstore.core.errors import Unsupported
from kvstore.core.layout import Codec
from kvstore.core.limits import BLOCK_TOKENS

_QUANTISED_STAGES = 3
"""Measured on an H100: 461 us with tiles of 128, 473 with 4 stages, 544 with 2."""

_LEAST_INT4 = 32
"""Half of it is the shortest product that tensor cores take."""

_SHARED_STAGES = 3

_DOTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def attend(
    query: Tensor,
    pages: Tensor | QuantisedPages,
    tables: Tensor,
    works: Sequence[Work],
    *,
    layer: int,
    scale: float,
    rules: Rules,
) -> Tensor:
    """Launch each work in turn; see `kvkernels.ops.paged_attention`."""
    if query.stride(2) != 1:
        query = query.contiguous()
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for work in works:
        _launch(query, out, pages, tables, work, layer=layer, scale=scale, rules=rules)
    return out


def _launch(
    query: Tensor,
    out: Tensor,
    pages: Tensor | QuantisedPages,
    tables: Tensor,
    work: Work,
    *,
    layer: int,
    scale: float,
    rules: Rules,
) -> None:
    cells, value_offset, codec = _cells(pages, layer)
    heads, dim, raw = cells.shape[1], query.shape[2], codec == Codec.RAW16
    capped = rules.softcap is not None
    stages = _stages(dim, query.dtype) if raw else _QUANTISED_STAGES
    stages = min(stages, _SHARED_STAGES if work.shared else work.stages)
    options: dict[str, Any] = {"num_warps": 8 if work.rows > TALL else 4, "num_stages": stages}
    attend_pages[(work.items.shape[0], heads)](
        *(query, out, cells, tables, work.items, work.partial, work.stats, work.counters),
        *(work.members, work.state, work.masses),
        *(query.stride(0), query.stride(1), cells.stride(0), cells.stride(1), value_offset),
        scale if capped else scale * log2(e),
        rules.softcap if capped else 1.0,
        HEADS=heads,
        GROUP=query.shape[1] // heads,
        DIM=dim,
        BLOCK_M=work.rows,
        BLOCK_N=work.tile,
        PAGE=BLOCK_TOKENS,
        WINDOW=rules.window or 0,
        SINKS=rules.sinks,
        SOFTCAP=capped,
        DOT=_dot(query.dtype if raw else torch.float16),
        PRECISION="ieee",
        CODEC=0 if raw else int(codec),
        FROM=work.resumes,
        TO=work.shared,
        **options,
    )
    if work.shared:
        merge_groups[(work.items.shape[0], heads, work.rows // MERGE_ROWS.value)](
            *(work.partial, work.stats, work.items, work.members, work.state, work.masses),
            HEADS=heads,
            GROUP=query.shape[1] // heads,
            DIM=dim,
            BLOCK_M=work.rows,
        )


def _cells(pages: Tensor | QuantisedPages, layer: int) -> tuple[Tensor, int, Codec]:
    """Return a layer's cells, the elements from K to V, and the codec; RAW16 for all raw ones."""
    if not isinstance(pages, QuantisedPages):
        cells = pages.select(2, layer)
        return cells, cells.stride(2), Codec.RAW16
    if pages.codec == Codec.INT4 and pages.head_dim < _LEAST_INT4:
        raise Unsupported(f"head_dim {pages.head_dim}: int4 pages are served from {_LEAST_INT4}")
    return pages.cells.select(2, layer), 0, pages.codec


def _dot(dtype: torch.dtype) -> tl.dtype:
    """Return the type of products: float32 in the interpreter, whose bf16 is silently wrong."""
    return tl.float32 if _INTERPRETED else _DOTS[dtype]


def write_quantised(
    key: Tensor, value: Tensor, pages: QuantisedPages, slots: Tensor, layer: int
) -> None:
    """Launch once: quantise new rows into their places; see `kvkernels.ops.write_pages`."""
    tokens, heads, dim = key.shape
    if dim not in (16, 32, 64, 128, 256):
        raise Unsupported(f"head_dim {dim}: the kernels serve powers of two from 16 to 256")
    if tokens == 0:
        return
    key, value = (rows if rows.stride(2) == 1 else rows.contiguous() for rows in (key, value))
    cells = pages.cells.select(2, layer)
    write_rows[(-(-tokens // BLOCK_TOKENS), heads, 2)](
        key,
        value,
        cells,
        slots,
        tokens,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        cells.stride(0),
        cells.stride(1),
        CODEC=int(pages.codec),
        DIM=dim,
        PAGE=BLOCK_TOKENS,
        ROWS=BLOCK_TOKENS,
    )


_INTERPRETED = isinstance(attend_pages, InterpretedFunction)


def _stages(dim: int, dtype: torch.dtype) -> int:
    """Return how deep K and V are buffered: as deep as shared memory allows, up to four."""
    return 4 if dim * dtype.itemsize <= 256 else 2
