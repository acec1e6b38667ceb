"""What a movement between arena memory and a pool needs, and how it is cut into slices.

A block of the arena and a page of the pool hold the same layers, heads and head dimension; their
codecs may differ. Equal codecs move as bytes; between a raw and a quantised one the bytes are
encoded or decoded on the way, so only the smaller form crosses the bus.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvkernels.quantised import LARGEST_CODE
from kvstore.core.errors import BadInput, Unsupported
from kvstore.core.layout import CELL_ALIGNMENT, BlockLayout

SLICE_BYTES: Final = 64 << 20
"""Bytes of the arena that one launch moves, unless more are asked for: some 1.3 ms of a PCIe 5 bus,
so that urgent work gets its turn and a cancelled load ends soon (DESIGN D2)."""

UNIT_BYTES: Final = CELL_ALIGNMENT
"""Cells and blocks begin at multiples of this many bytes; kernels count in them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Movement:
    """Blocks of an arena and the pages they belong to; `ops.plan_movement` checks and makes it."""

    arena: Tensor
    """uint8 [bytes], on the host."""
    arena_layout: BlockLayout
    pool: Tensor
    """uint8 [pages, block_bytes], on the device that does the work."""
    pool_layout: BlockLayout
    element: torch.dtype
    """The type of the raw side's elements, where one side is quantised."""
    arena_units: Tensor
    """int64 [n] on the pool's device: where blocks begin in the arena, in `UNIT_BYTES`."""
    pool_units: Tensor
    """int64 [n] on the pool's device: where pages begin in the pool, in `UNIT_BYTES`."""

    @property
    def blocks(self) -> int:
        """How many blocks the plan names."""
        return self.arena_units.shape[0]

    def slices(self, layers: range, most_bytes: int = SLICE_BYTES) -> Iterator[range]:
        """Yield the plan's blocks in runs whose `layers` are at most `most_bytes` together."""
        layout = self.arena_layout
        each = max(1, most_bytes // (layout.cell_bytes * layout.kv_heads * max(1, len(layers))))
        for start in range(0, self.blocks, each):
            yield range(start, min(start + each, self.blocks))


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One end of a movement as kernels see it."""

    memory: Tensor
    layout: BlockLayout
    units: Tensor


def sides(movement: Movement, *, store: bool) -> tuple[Side, Side]:
    """Return source and target: arena and pool, or the other way round for a store."""
    arena = Side(memory=movement.arena, layout=movement.arena_layout, units=movement.arena_units)
    pool = Side(memory=movement.pool, layout=movement.pool_layout, units=movement.pool_units)
    return (pool, arena) if store else (arena, pool)


def check_layouts(arena: BlockLayout, pool: BlockLayout) -> None:
    """Raise `BadInput` for different shapes, `Unsupported` for codecs that have no way between."""
    for name in ("layers", "kv_heads", "head_dim"):
        mine, other = getattr(arena, name), getattr(pool, name)
        if mine != other:
            raise BadInput(f"{name} is {mine} in the arena's layout, {other} in the pool's")
    quantised = (arena.codec in LARGEST_CODE) + (pool.codec in LARGEST_CODE)
    if arena.codec != pool.codec and quantised != 1:
        raise Unsupported(f"no way between {arena.codec.name} blocks and {pool.codec.name} pages")


def raw_layout(movement: Movement) -> BlockLayout:
    """Return the layout of the side that is not quantised."""
    if movement.arena_layout.codec in LARGEST_CODE:
        return movement.pool_layout
    return movement.arena_layout
