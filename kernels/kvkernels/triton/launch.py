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
from kvkernels.triton.decode import MERGE_ROWS, attend_pages, merge_groups
from kvkernels.triton.quantised import write_rows
from kvkernels.triton.sharing import Group, find_groups
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

_FEW_NEW = 8
"""New tokens of a sequence that may share a prefix pass; more of them are bound by arithmetic."""

_LEAST_SAVED = 48 << 20
"""Bytes of K and V that a prefix pass has to save: some 16 us of an H100's memory; a launch and
the results handed on take half as long."""

_SHARED_ROWS = 128
"""Rows of query in a unit of a group: a page is read once for all of them."""

_SHARED_STAGES = 3

_SHARED_PROGRAMS = 2
"""A processor holds two tiles of 64 rows."""

Span = tuple[int, int, int]
"""First row of `query`, new tokens, context."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What attention of one layer looks like."""

    heads: int
    """KV heads; `group` query heads share each."""
    group: int
    dim: int
    device: torch.device
    quantised: bool
    cell_bytes: int


_DOTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True, slots=True)
class Work:
    """One launch's items for one attention shape, and its workspace."""

    items: Tensor
    partial: Tensor
    stats: Tensor
    counters: Tensor
    members: Tensor
    """int32: rows of `query` of the groups' sequences; unused where none are groups."""
    state: Tensor
    masses: Tensor
    rows: int
    """BLOCK_M of the launch."""
    tile: int
    """BLOCK_N of the launch."""
    resumes: bool
    """Whether launches before this one left results to go on with."""
    shared: bool
    """Whether the units are groups."""


Unit = tuple[int, int, int, int]
"""Start in the flat tables, first row, rows, position of the first."""


def make_works(
    spans: Sequence[Span],
    shape: Shape,
    rules: Rules,
    *,
    table_stride: int,
    host_tables: Tensor | None,
) -> tuple[Work, ...]:
    """Cut a step into launches: one for each level of shared prefixes, then one for the rest.

    spans: (first token, new tokens, context) each; `host_tables` are the block tables where their
    sharing may be used. Raises `Unsupported` for a head dimension that is no power of two from 16
    to 256.
    """
    if shape.dim not in (16, 32, 64, 128, 256):
        raise Unsupported(f"head_dim {shape.dim}: the kernels serve powers of two from 16 to 256")
    groups = _groups(spans, shape, rules, host_tables)
    tokens = spans[-1][0] + spans[-1][1]
    state, masses = _state(tokens, shape) if groups else _nothing(shape)
    works = []
    for level in sorted({group.level for group in groups}):
        chosen = [group for group in groups if group.level == level]
        works.append(_group_work(chosen, spans, shape, table_stride, state, masses))
    done = [0] * len(spans)
    for group in groups:
        for row in group.rows:
            done[row] = group.end
    longest = max(new for _, new, _ in spans)
    each = min(longest, max(1, _APPEND_ROWS // shape.group))
    units = [
        (
            row * table_stride + done[row],
            start + at,
            min(each, new - at),
            context - new + at - done[row] * BLOCK_TOKENS,
        )
        for row, (start, new, context) in enumerate(spans)
        for at in range(0, new, each)
    ]
    rows = max(16, next_power_of_2(each * shape.group))
    works.append(
        _work(units, rows, shape, rules, [], state, masses, resumes=bool(groups), shared=False)
    )
    return tuple(works)


def _groups(
    spans: Sequence[Span], shape: Shape, rules: Rules, tables: Tensor | None
) -> list[Group]:
    """Return the groups of sequences with few new tokens that are worth a launch."""
    if tables is None or rules.window is not None or len(spans) < 2:
        return []
    usable = [
        (context - new) // BLOCK_TOKENS if new <= _FEW_NEW else 0 for _, new, context in spans
    ]
    least = _LEAST_SAVED / (shape.heads * shape.cell_bytes)
    if sum(usable) < least:
        return []
    return find_groups(tables.numpy(), usable, tile_pages=cutting.TILE // BLOCK_TOKENS, least=least)


def _group_work(
    groups: Sequence[Group],
    spans: Sequence[Span],
    shape: Shape,
    table_stride: int,
    state: Tensor,
    masses: Tensor,
) -> Work:
    """Cut one level's groups into units of as many queries as a tile has rows."""
    lists = [
        [spans[row][0] + at for row in group.rows for at in range(spans[row][1])]
        for group in groups
    ]
    most = _SHARED_ROWS if shape.dim <= 128 else _APPEND_ROWS
    rows = min(most, max(16, next_power_of_2(max(map(len, lists)) * shape.group)))
    rows = max(rows, next_power_of_2(shape.group))
    each = rows // shape.group
    units: list[Unit] = []
    members: list[int] = []
    for group, listed in zip(groups, lists, strict=True):
        start = group.rows[0] * table_stride + group.begin
        for at in range(0, len(listed), each):
            count = min(each, len(listed) - at)
            # All rows see all tokens: the position is such that position + count is where they end.
            end = (group.end - group.begin) * BLOCK_TOKENS
            units.append((start, len(members) + at, count, end - count))
        members.extend(listed)
    resumes = groups[0].level > 0
    return _work(units, rows, shape, Rules(), members, state, masses, resumes=resumes, shared=True)


def _state(tokens: int, shape: Shape) -> tuple[Tensor, Tensor]:
    """Return results so far of all rows: none."""
    heads = shape.heads * shape.group
    masses = torch.zeros(tokens, heads, 2, device=shape.device)
    masses[:, :, 0] = float("-inf")
    return torch.zeros(tokens, heads, shape.dim, device=shape.device), masses


def _nothing(shape: Shape) -> tuple[Tensor, Tensor]:
    none = torch.empty(0, device=shape.device)
    return none, none


def _work(
    units: Sequence[Unit],
    rows: int,
    shape: Shape,
    rules: Rules,
    members: Sequence[int],
    state: Tensor,
    masses: Tensor,
    *,
    resumes: bool,
    shared: bool,
) -> Work:
    """Cut units into the items of one launch and give it a workspace."""
    device, heads = shape.device, shape.heads
    table = torch.tensor(units, dtype=torch.int32).to(device, non_blocking=True)
    programs = _programs(len(units) * heads, shape.dim, _processors(device))
    if shared:
        # As many items for each unit as all run at once: none is left for a second round.
        programs = _processors(device) * (1 if rows > _APPEND_ROWS else _SHARED_PROGRAMS)
        programs = heads * len(units) * max(1, programs // (heads * len(units)))
    wide = shape.quantised and rows == 16 and shape.dim <= 128 and not shared
    tile = cutting.QUANTISED_TILE if wide else cutting.TILE
    most = max(-(-(position + count) // tile) for _, _, count, position in units)
    count = cutting.capacity(len(units), programs, heads, most_tiles=most)
    items = torch.empty(count, cutting.FIELDS, dtype=torch.int32, device=device)
    cutting.cut(table, items, programs=programs, heads=heads, rules=rules, tile=tile)
    return Work(
        items=items,
        partial=torch.empty(count, heads, rows, shape.dim, device=device),
        stats=torch.empty(count, heads, rows, 2, device=device),
        counters=torch.zeros(count, heads, dtype=torch.int32, device=device),
        members=torch.tensor(members, dtype=torch.int32).to(device, non_blocking=True),
        state=state,
        masses=masses,
        rows=rows,
        tile=tile,
        resumes=resumes,
        shared=shared,
    )


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
    warps = 8 if work.rows > _APPEND_ROWS else 4
    if work.shared:
        stages = min(stages, _SHARED_STAGES)
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
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
