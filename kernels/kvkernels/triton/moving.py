"""From a movement's slice to a launch of one of the three kernels in `triton.movement`."""

# A launch passes plain values where the signature says constexpr, and options that it has not.
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any, Final

from kvkernels.movement import UNIT_BYTES, Movement, Side, raw_layout, sides
from kvkernels.quantised import LARGEST_CODE
from kvkernels.triton.movement import copy_runs, decode_cells, encode_cells
from kvstore.core.errors import Unsupported

COPY_TILE: Final = 512
"""Units of 128 bytes that a program has under way: 64 KiB."""

COPY_WARPS: Final = 16

DECODING: Final = (4, 4)
"""Cells of head_dim 128 that a program decodes at once, and its warps. Measured on an H100: 16
warps fall from 94 to 58 GB/s of fp8, 4 cells are the steadiest."""

ENCODING: Final = (8, 8)

STAGES: Final = 1
"""A tile needs no stages: more of them are slower, since the bytes then cross shared memory."""


def move(movement: Movement, layers: range, blocks: range, *, store: bool, programs: int) -> None:
    """Launch once: move `layers` of the plan's `blocks`; neither is empty."""
    source, target = sides(movement, store=store)
    if source.layout.codec == target.layout.codec:
        _copy(source, target, layers, blocks, programs)
    else:
        _transcode(movement, source, target, layers, blocks, programs)


def _copy(source: Side, target: Side, layers: range, blocks: range, programs: int) -> None:
    """Move bytes: one run a head, or one a block where all layers are wanted."""
    layout = source.layout
    cell, share = layout.cell_bytes // UNIT_BYTES, layout.share_bytes // UNIT_BYTES
    if len(layers) == layout.layers:
        runs, run = 1, layout.kv_heads * share
    else:
        runs, run = layout.kv_heads, len(layers) * cell
    total = len(blocks) * runs * run
    copy_runs[(min(programs, -(-total // COPY_TILE)),)](
        *(source.memory, target.memory, *_places(source, target, blocks)),
        *(total, run, runs, share, layers.start * cell),
        UNITS=COPY_TILE,
        STAGES=STAGES,
        num_warps=COPY_WARPS,
    )


def _transcode(
    movement: Movement, source: Side, target: Side, layers: range, blocks: range, programs: int
) -> None:
    """Decode into raw cells, or encode out of them."""
    layout, raw = source.layout, raw_layout(movement)
    if layout.head_dim not in (16, 32, 64, 128, 256):
        raise Unsupported(
            f"head_dim {layout.head_dim}: the kernels serve powers of two from 16 to 256"
        )
    decoding = layout.codec in LARGEST_CODE
    codec = layout.codec if decoding else target.layout.codec
    ends: list[Any] = [source.memory, target.memory]
    ends[1 if decoding else 0] = ends[1 if decoding else 0].view(movement.element)
    total = len(blocks) * layout.kv_heads * len(layers)
    most, warps = DECODING if decoding else ENCODING
    cells = max(1, min(16, most * 128 // raw.head_dim))
    (decode_cells if decoding else encode_cells)[(min(programs, -(-total // cells)),)](
        *(*ends, *_places(source, target, blocks)),
        *(total, len(layers), layout.kv_heads, layout.layers, layers.start),
        *(layout.cell_bytes // UNIT_BYTES, target.layout.cell_bytes // UNIT_BYTES),
        CODEC=int(codec),
        DIM=layout.head_dim,
        CELLS=cells,
        STAGES=STAGES,
        num_warps=warps,
    )


def _places(source: Side, target: Side, blocks: range) -> tuple[Any, Any]:
    """Return where the chosen blocks begin on both sides."""
    part = slice(blocks.start, blocks.stop)
    return source.units[part], target.units[part]
