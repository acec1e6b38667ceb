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

LONGEST = 64
"""Tiles of an item at most (4,096 tokens): shorter ones even out the end of a large launch, and
their workspace traffic stays under 1 % of the bytes of K and V."""

FIELDS = 8
"""start, token, count, position, begin, end, first, splits: int32 each; count 0 is no work."""


def capacity(units: int, programs: int, heads: int, *, most_tiles: int) -> int:
    """Return how many items `cut` can need: its load targets plus a partial item per unit."""
    target = max(1, programs // heads)
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
    units: Tensor, items: Tensor, *, programs: int, heads: int, rules: Rules, tile: int = TILE
) -> None:
    """Fill `items`, int32 [capacity, 8], with what one launch has to do for `units`.

    `programs` is how many programs the device runs at once; each item is run once per KV head.
    Items past the last are marked empty.
    """
    tiles = tiles_seen(units, rules, tile).to(torch.int64)
    target = max(1, programs // heads)
    length = torch.div(tiles.sum() + target - 1, target, rounding_mode="floor").clamp(1, LONGEST)
    splits = torch.div(tiles + length - 1, length, rounding_mode="floor")
    ends = splits.cumsum(0)
    index = torch.arange(items.shape[0], device=items.device)
    unit = torch.searchsorted(ends, index, right=True)
    there = unit < units.shape[0]
    unit = unit.clamp(max=units.shape[0] - 1)
    first = ends[unit] - splits[unit]
    begin = (index - first) * length
    items[:, :4] = units[unit]
    items[:, 2] *= there
    items[:, 4] = begin
    items[:, 5] = torch.minimum(begin + length, tiles[unit])
    items[:, 6] = first
    items[:, 7] = splits[unit]
