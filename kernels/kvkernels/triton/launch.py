"""From units to a launch: shapes of tiles, workspaces, and the call of the kernel."""

# A launch passes plain values where the kernel's signature says constexpr.
# pyright: reportArgumentType=false

from collections.abc import Sequence
from dataclasses import dataclass
from math import e, log2
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2
from triton.runtime.interpreter import InterpretedFunction

from kvkernels.plans import Rules
from kvkernels.quantised import QuantisedPages
from kvkernels.triton import work as cutting
from kvkernels.triton.decode import attend_pages
from kvkernels.triton.quantised import write_rows
from kvstore.core.errors import Unsupported
from kvstore.core.layout import Codec
from kvstore.core.limits import BLOCK_TOKENS

_APPEND_ROWS = 64
"""Rows of query (tokens x group) in a unit of an append: what one tensor-core tile takes."""

_FEW = 4
"""A launch with fewer streams than a fourth of the processors is small."""

_QUANTISED_STAGES = 3
"""Measured on an H100: 461 us with tiles of 128, 473 with 4 stages, 544 with 2."""

_LEAST_INT4 = 32
"""Half of it is the shortest product that tensor cores take."""

_DOTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True, slots=True)
class Work:
    """One step's items for one attention shape, and the workspace of its launches."""

    items: Tensor
    partial: Tensor
    stats: Tensor
    counters: Tensor
    rows: int
    """BLOCK_M of the launch."""
    tile: int
    """BLOCK_N of the launch."""


def make_work(
    spans: Sequence[tuple[int, int, int]],
    heads: int,
    group: int,
    dim: int,
    device: torch.device,
    rules: Rules,
    *,
    quantised: bool = False,
) -> Work:
    """Cut `spans`, (first token, new tokens, context) each, into items on `device`.

    Raises `Unsupported` for a head dimension that is no power of two from 16 to 256.
    """
    if dim not in (16, 32, 64, 128, 256):
        raise Unsupported(f"head_dim {dim}: the kernels serve powers of two from 16 to 256")
    longest = max(new for _, new, _ in spans)
    each = min(longest, max(1, _APPEND_ROWS // group))
    rows = max(16, next_power_of_2(each * group))
    units = torch.tensor(
        [
            (row, start + at, min(each, new - at), context - new + at)
            for row, (start, new, context) in enumerate(spans)
            for at in range(0, new, each)
        ],
        dtype=torch.int32,
    ).to(device, non_blocking=True)
    programs = _programs(units.shape[0] * heads, dim, _processors(device))
    tile = cutting.QUANTISED_TILE if quantised and rows == 16 and dim <= 128 else cutting.TILE
    most = max(-(-context // tile) for _, _, context in spans)
    count = cutting.capacity(units.shape[0], programs, heads, most_tiles=most)
    items = torch.empty(count, cutting.FIELDS, dtype=torch.int32, device=device)
    cutting.cut(units, items, programs=programs, heads=heads, rules=rules, tile=tile)
    return Work(
        items=items,
        partial=torch.empty(count, heads, rows, dim, device=device),
        stats=torch.empty(count, heads, rows, 2, device=device),
        counters=torch.zeros(count, heads, dtype=torch.int32, device=device),
        rows=rows,
        tile=tile,
    )


def attend(
    query: Tensor,
    pages: Tensor | QuantisedPages,
    tables: Tensor,
    work: Work,
    *,
    layer: int,
    scale: float,
    rules: Rules,
) -> Tensor:
    """Launch once: attention of every unit of `work`; see `kvkernels.ops.paged_attention`."""
    cells, value_offset, codec = _cells(pages, layer)
    heads, dim, raw = cells.shape[1], query.shape[2], codec == Codec.RAW16
    if query.stride(2) != 1:
        query = query.contiguous()
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    capped = rules.softcap is not None
    stages = _stages(dim, query.dtype) if raw else _QUANTISED_STAGES
    options: dict[str, Any] = {"num_warps": 4, "num_stages": stages}
    attend_pages[(work.items.shape[0], heads)](
        *(query, out, cells, tables, work.items, work.partial, work.stats, work.counters),
        *(query.stride(0), query.stride(1), cells.stride(0), cells.stride(1), value_offset),
        tables.stride(0),
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
        **options,
    )
    return out


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


def _programs(streams: int, dim: int, processors: int) -> int:
    """Return over how many programs a launch is spread; `streams` are its units times KV heads.

    Measured on an H100 (benchmarks/results/kernels_h100.jsonl): two a processor keep its memory
    pipes full, three where rows are short; a single sequence is fastest on one each, since more
    parts take longer to merge than they save.
    """
    if streams * _FEW < processors:
        return processors
    return processors * (3 if dim <= 64 else 2)


def _stages(dim: int, dtype: torch.dtype) -> int:
    """Return how deep K and V are buffered: as deep as shared memory allows, up to four."""
    return 4 if dim * dtype.itemsize <= 256 else 2


def _processors(device: torch.device) -> int:
    """Return the device's multiprocessors; a small number for the interpreter on the CPU."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
