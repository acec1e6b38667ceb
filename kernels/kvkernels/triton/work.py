"""Cut a step's attention into equal pieces: one table of work items of fixed capacity.

A *unit* is up to a few consecutive new tokens of one sequence. An *item* is a span of the tiles
that one unit sees. Items are cut to one length, chosen from the whole load, so a ragged batch
keeps every processor busy as long as an even one does. Everything is a torch expression of
fixed shape without a look at a value, so it runs on a GPU with no synchronisation and inside a
captured graph.
"""

import torch
from torch import Tensor

from kvkernels.plans import Rules

TILE = 64
"""Tokens per tile: four pages."""

QUANTISED_TILE = 128
"""Tokens per tile where decode reads quantised pages: as many bytes as a tile of raw ones."""

APPEND_TILE = 128
"""Tokens per tile of an append where shared memory has room for three."""

LONGEST = 64
"""Tiles of an item at most (4,096 tokens): shorter ones even out the end of a large launch, and
their workspace traffic stays under 1 % of the bytes of K and V."""

FIELDS = 8
"""start, token, count, position, begin, end, first, splits: int32 each; count 0 is no work."""


MOST_PARTS = 16
"""Items of one unit of an append at most."""

_SPARE_PARTS = 4
"""Items beyond one a unit of an append, for each that runs at once: they bound the workspace."""

_PART_COST, _SPLIT_COST = 5, 8
"""Tiles of an append in whose time a part of 128 rows is written and merged, and what splitting
costs once: from an H100, where a tile of 128 x 64 takes 1.2 us."""


def capacity(
    units: int, programs: int, heads: int, *, most_tiles: int, append: bool = False
) -> int:
    """Return how many items `cut` can need: its load targets plus a partial item per unit."""
    target = max(1, programs // heads)
    if append:
        return units + min(units * (MOST_PARTS - 1), target * _SPARE_PARTS)
    return units + max(target, -(-units * most_tiles // LONGEST))


def tiles_seen(units: Tensor, rules: Rules, tile: int = TILE) -> Tensor:
    """Return how many tiles each unit reads: int32 [units], 0 for a unit without tokens.

    units int32 [units, 4]: where its pages begin in the flat tables, first row of `query` (or first
    of the listed rows, for a group), rows, position of the first.
    """
    count, position = units[:, 2], units[:, 3]
    tiles = torch.div(position + count + tile - 1, tile, rounding_mode="floor")
    if rules.window is not None:
        sinks = -(-rules.sinks // tile)
        low = (position - rules.window + 1).clamp(min=0)
        tiles = tiles - (torch.div(low, tile, rounding_mode="floor") - sinks).clamp(min=0)
    return torch.where(count > 0, tiles, torch.zeros_like(tiles))


def cut(
    units: Tensor,
    items: Tensor,
    *,
    programs: int,
    heads: int,
    rules: Rules,
    tile: int = TILE,
    append: bool = False,
) -> None:
    """Fill `items`, int32 [capacity, 8], with what one launch has to do for `units`.

    `programs` is how many programs the device runs at once; each item is run once per KV head.
    `append`: units are many rows, and items may be longer than `LONGEST`. Items past the last are
    marked empty.
    """
    tiles = tiles_seen(units, rules, tile).to(torch.int64)
    target = max(1, programs // heads)
    if append:
        splits = _parts(tiles, programs / heads, items.shape[0])
        lengths = torch.div(tiles + splits - 1, splits.clamp(min=1), rounding_mode="floor")
    else:
        load = tiles.sum()
        length = torch.div(load + target - 1, target, rounding_mode="floor").clamp(1, LONGEST)
        splits = torch.div(tiles + length - 1, length, rounding_mode="floor")
        lengths = length.expand_as(tiles)
    fill(units, items, tiles, splits, lengths)


def fill(units: Tensor, items: Tensor, tiles: Tensor, splits: Tensor, lengths: Tensor) -> None:
    """Write each unit's `splits` items of `lengths` tiles; those past the last are marked empty."""
    ends = splits.cumsum(0)
    index = torch.arange(items.shape[0], device=items.device)
    unit = torch.searchsorted(ends, index, right=True)
    there = unit < units.shape[0]
    unit = unit.clamp(max=units.shape[0] - 1)
    first, length = ends[unit] - splits[unit], lengths[unit]
    begin = (index - first) * length
    items[:, :4] = units[unit]
    items[:, 2] *= there
    items[:, 4] = begin
    items[:, 5] = torch.minimum(begin + length, tiles[unit])
    items[:, 6] = first
    items[:, 7] = splits[unit]


def _parts(tiles: Tensor, streams: float, room: int) -> Tensor:
    """Return into how many items to cut each unit of an append: int64 [units], `room` in all.

    `streams` units run at once. Lengths from all to 1 / `MOST_PARTS` of the longest unit are
    compared by when the last program ends: whole rounds of the longest item where items are alike,
    all work shared out and one item more where they are not, and what parts cost. Units of no
    tiles get none.
    """
    candidates = torch.arange(1, MOST_PARTS + 1, device=tiles.device)
    longest = tiles.max().clamp(min=1)
    length = torch.div(longest + candidates - 1, candidates, rounding_mode="floor")[:, None]
    splits = torch.div(2 * tiles + length, 2 * length, rounding_mode="floor").clamp(1, MOST_PARTS)
    each = torch.div(tiles + splits - 1, splits, rounding_mode="floor").amax(1)
    live = tiles > 0
    items = (splits * live).sum(1)
    rounds = torch.ceil(items / streams) * each
    shared = tiles.sum() / streams + each
    parts = items - live.sum()
    cost = (parts > 0) * (_SPLIT_COST + _PART_COST * parts / streams)
    ends = torch.minimum(rounds, shared) + cost
    best = torch.argmin(ends.masked_fill(items > room, float("inf")), keepdim=True)
    return torch.where(live, splits.index_select(0, best)[0], 0)
