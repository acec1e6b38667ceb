"""A step's units, and the launches that do them: each with its items and a workspace."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import next_power_of_2

from kvkernels.plans import Rules
from kvkernels.triton import work as cutting
from kvkernels.triton.sharing import Group, find_groups
from kvstore.core.errors import Unsupported
from kvstore.core.limits import BLOCK_TOKENS

TALL = 64
"""Rows of query (tokens x group) of what one tensor-core tile takes; units of more have two."""

_APPEND_ROWS = 128
"""Rows of query in a unit of an append: two tiles share what is read."""

_APPEND_STAGES = 3
"""Buffers for which a tile of 128 tokens has to leave room. Measured on an H200, TFLOP/s at 2,048
new tokens over 8,192: 437 with them, 378 with 2, 418 and 412 with 3 and 4 of tiles of 64."""

_FEW = 4
"""A launch with fewer streams than a fourth of the processors is small."""

_FEW_NEW = 8
"""New tokens of a sequence that may share a prefix pass; more of them are bound by arithmetic."""

_LEAST_SAVED = 48 << 20
"""Bytes of K and V that a prefix pass has to save: some 16 us of an H100's memory; a launch and
the results handed on take half as long."""

_SHARED_ROWS = 128
"""Rows of query in a unit of a group: a page is read once for all of them."""

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

    @property
    def stages(self) -> int:
        """Buffers of K and V that fit beside the rows of query."""
        return _APPEND_STAGES if self.rows > TALL else 4


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
    each = unit_tokens(longest, shape)
    # The last tokens see most: what takes longest begins first.
    units = [
        (
            row * table_stride + done[row],
            start + at,
            min(each, new - at),
            context - new + at - done[row] * BLOCK_TOKENS,
        )
        for row, (start, new, context) in enumerate(spans)
        for at in reversed(range(0, new, each))
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
    most = _SHARED_ROWS if shape.dim <= 128 else TALL
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
    programs = _programs(len(units), rows, shape, shared=shared)
    append = rows > TALL and not shared
    tile = _tile(rows, shape, append=append) if not shared else cutting.TILE
    most = max(-(-(position + count) // tile) for _, _, count, position in units)
    count = cutting.capacity(len(units), programs, heads, most_tiles=most, append=append)
    items = torch.empty(count, cutting.FIELDS, dtype=torch.int32, device=device)
    cut_into(table, len(units), items, shape, rules, rows=rows, tile=tile, shared=shared)
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


def unit_tokens(new: int, shape: Shape) -> int:
    """Return how many tokens a unit has where a sequence brings `new` at most."""
    # Rows of 128 elements of two bytes fit; codes are widened in registers, which are full then.
    narrow = shape.quantised or shape.dim > 128 or shape.cell_bytes > 64 * shape.dim
    rows = TALL if narrow and shape.device.type == "cuda" else _APPEND_ROWS
    return min(new, max(1, rows // shape.group))


def _tile(rows: int, shape: Shape, *, append: bool) -> int:
    """Return how many tokens a tile has where units are no groups."""
    if shape.quantised and rows == 16 and shape.dim <= 128:
        return cutting.QUANTISED_TILE
    if append and shape.device.type == "cuda":
        row = 2 * shape.dim
        about: Any = torch.cuda.get_device_properties(shape.device)
        room = about.shared_memory_per_block_optin
        if rows * row + _APPEND_STAGES * 2 * cutting.APPEND_TILE * row <= room:
            return cutting.APPEND_TILE
    return cutting.TILE


def cut_into(
    table: Tensor,
    units: int,
    items: Tensor,
    shape: Shape,
    rules: Rules,
    *,
    rows: int,
    tile: int,
    shared: bool = False,
) -> None:
    """Fill `items` from `units` rows of `table` on the device; see `work.cut`."""
    cutting.cut(
        table,
        items,
        programs=_programs(units, rows, shape, shared=shared),
        heads=shape.heads,
        rules=rules,
        tile=tile,
        append=rows > TALL and not shared,
    )


def _programs(units: int, rows: int, shape: Shape, *, shared: bool) -> int:
    """Return over how many programs a launch of so many units is spread.

    Measured on an H100 (benchmarks/results/kernels_h100.jsonl): two a processor keep its memory
    pipes full, three where rows are short; a single sequence is fastest on one each, since more
    parts take longer to merge than they save. Units of more than 64 rows fill a processor.
    """
    processors, streams = _processors(shape.device), units * shape.heads
    if shared:
        # As many items for each unit as all run at once: none is left for a second round.
        programs = processors * (1 if rows > TALL else _SHARED_PROGRAMS)
        return streams * max(1, programs // streams)
    if rows > TALL or streams * _FEW < processors:
        return processors
    return processors * (3 if shape.dim <= 64 else 2)


def _processors(device: torch.device) -> int:
    """Return the device's multiprocessors; a small number for the interpreter on the CPU."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
