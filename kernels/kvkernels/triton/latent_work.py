"""A step's work over MLA pages: how it is tiled, and how units are cut into items.

Lengths are known on the host, so items are cut there, in the table that `kvkernels.triton.work`
fills on the device, and a step whose units are all whole launches no merge.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvkernels.plans import Rules
from kvkernels.triton import work as cutting

Span = tuple[int, int, int]
"""First row of `query`, new tokens, context."""

_SPLIT_TILES = 1.0
"""Tiles of 64 tokens in whose time the merge is launched."""

_ROW_TILES = 7e-4
"""Tiles in whose time a row of one partial result is written and read: 4 KiB, all processors
together, against some 3 us a tile on one."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """Meta-parameters of a launch."""

    rows: int
    """Rows of query in a program: tokens x heads of a unit, or a part of one token's heads."""
    tile: int
    """Tokens of a tile."""
    warps: int
    stages: int
    hopper: bool = False
    """Whether Gluon's kernel is launched."""


@dataclass(frozen=True, slots=True)
class LatentShape:
    """What attention of one layer looks like."""

    heads: int
    latent: int
    rope: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class LatentWork:
    """One step's items for one shape, and their workspace."""

    tiling: Tiling
    items: Tensor
    partial: Tensor
    """float32 [items, blocks * rows, latent]; empty where no unit is split."""
    stats: Tensor
    firsts: Tensor
    """int32: the first item of each unit that is split."""
    tokens: int
    """Tokens of a unit at most."""
    blocks: int
    """Programs that share one item's rows."""
    most_parts: int


_TALL = 64

_HOPPER = Tiling(rows=64, tile=64, warps=8, stages=2, hopper=True)
_TILINGS = (
    Tiling(rows=16, tile=64, warps=4, stages=3),
    Tiling(rows=32, tile=64, warps=8, stages=3),
    Tiling(rows=64, tile=64, warps=8, stages=2),
)
"""For as many heads as rows, and for more. Shared memory of sm_90; others get smaller tiles."""


def tiling_of(shape: LatentShape, dtype: torch.dtype) -> Tiling:
    """Return how a shape is tiled on its device; short tiles for the interpreter on the CPU."""
    rows = next((each.rows for each in _TILINGS if shape.heads <= each.rows), _TALL)
    if shape.device.type != "cuda":
        return Tiling(rows=rows, tile=32, warps=4, stages=1)
    about: Any = torch.cuda.get_device_properties(shape.device)
    served = (about.major, shape.latent, shape.rope, dtype) == (9, 512, 64, torch.bfloat16)
    if served and rows > _TILINGS[0].rows:
        return _HOPPER
    tiling = next(each for each in _TILINGS if each.rows == rows)
    row = (shape.latent + shape.rope) * dtype.itemsize
    # By what Triton 3.6 makes: the query's rows, a tile's weights, and a buffer less than there are
    # stages, unless products read all they take from shared memory.
    buffers = tiling.stages - (rows != _TALL or about.major < 9)
    tile = tiling.tile
    room = about.shared_memory_per_block_optin - rows * row
    while tile > 16 and buffers * tile * row + rows * tile * dtype.itemsize > room:
        tile //= 2
    return replace(tiling, tile=tile)


def make_work(
    spans: Sequence[Span], shape: LatentShape, tiling: Tiling, *, table_stride: int
) -> LatentWork:
    """Cut a step into items; `table_stride` is the width of the block tables."""
    each = max(1, tiling.rows // shape.heads)
    blocks = -(-min(each, max(new for _, new, _ in spans)) * shape.heads // tiling.rows)
    units = torch.tensor(
        [
            (row * table_stride, start + at, min(each, new - at), context - new + at)
            for row, (start, new, context) in enumerate(spans)
            for at in range(0, new, each)
        ],
        dtype=torch.int32,
    )
    tiles = cutting.tiles_seen(units, Rules(), tiling.tile).to(torch.int64)
    streams = _processors(shape.device) / blocks
    splits, lengths = _parts(tiles, streams, blocks * tiling.rows, 64 / tiling.tile)
    items = torch.empty(int(splits.sum()), cutting.FIELDS, dtype=torch.int32)
    cutting.fill(units, items, tiles, splits, lengths)
    firsts = (splits.cumsum(0) - splits)[splits > 1].to(torch.int32)
    count = items.shape[0] if len(firsts) else 0
    height = blocks * tiling.rows
    device = shape.device
    return LatentWork(
        tiling=tiling,
        items=items.to(device, non_blocking=True),
        partial=torch.empty(count, height, shape.latent, device=device),
        stats=torch.empty(count, height, 2, device=device),
        firsts=firsts.to(device, non_blocking=True),
        tokens=int(units[:, 2].max()),
        blocks=blocks,
        most_parts=int(splits.max()),
    )


def _parts(tiles: Tensor, streams: float, rows: int, unit: float) -> tuple[Tensor, Tensor]:
    """Return into how many items to cut each unit, and their length in tiles: int64 [units].

    `streams` units run at once. Lengths from all of the longest unit down to one tile are compared
    by when the last program ends, as in `work._parts`, and by what merging parts of `rows` rows
    costs; `unit` is how many of these tiles have 64 tokens.
    """
    longest = int(tiles.max())
    candidates = torch.arange(1, min(longest, max(1, int(2 * streams))) + 1)
    length = torch.div(longest + candidates - 1, candidates, rounding_mode="floor")[:, None]
    splits = torch.div(2 * tiles + length, 2 * length, rounding_mode="floor").clamp(min=1)
    each = torch.div(tiles + splits - 1, splits, rounding_mode="floor")
    splits = torch.div(tiles + each - 1, each, rounding_mode="floor")
    items = splits.sum(1)
    most = each.amax(1)
    rounds = torch.ceil(items / streams) * most
    shared = tiles.sum() / streams + most
    parts = items * (items > len(tiles))
    cost = unit * ((parts > 0) * _SPLIT_TILES + _ROW_TILES * rows * parts)
    best = int(torch.argmin(torch.minimum(rounds, shared) + cost))
    return splits[best], each[best]


def _processors(device: torch.device) -> int:
    """Return the device's multiprocessors; a small number for the interpreter on the CPU."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
