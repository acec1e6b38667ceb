"""Movement between pinned host memory and pages: what is measured, and what must come out."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from kvkernels import ops
from kvkernels.movement import UNIT_BYTES, Movement
from kvstore.core.errors import Corrupt
from kvstore.core.layout import BlockLayout, Codec

RAW: Final = BlockLayout(layers=32, kv_heads=8, head_dim=128, codec=Codec.RAW16)
"""Pages of 2 MiB: Llama-3-8B."""
_BLOCKS: Final = 512
"""Moved by one run, scattered over twice as many: 1 GiB of raw bytes."""
_RUNS: Final = 7
_CHECKED: Final = 3


@dataclass(frozen=True, slots=True)
class Move:
    """One way of moving blocks: layers of a call, programs of a launch."""

    codec: Codec
    layers: int
    programs: int
    store: bool = False

    @property
    def name(self) -> str:
        """What `--case` is compared with."""
        way = "store" if self.store else "load"
        what = {32: "whole blocks", 8: "8-layer runs", 1: "single layers"}[self.layers]
        return f"{way} {self.codec.name.lower()} {what} {self.programs} programs"

    @property
    def layout(self) -> BlockLayout:
        """The arena's layout; the pool's is `RAW`."""
        return replace(RAW, codec=self.codec)


GATE: Final = (
    Move(Codec.RAW16, 1, 16),
    Move(Codec.RAW16, 8, 16),
    Move(Codec.RAW16, 32, 16),
    Move(Codec.FP8, 1, 16),
    Move(Codec.FP8, 8, 16),
    Move(Codec.FP8, 32, 16),
    Move(Codec.INT8, 8, 16),
    Move(Codec.INT4, 1, 64),
    Move(Codec.INT4, 8, 32),
    Move(Codec.INT4, 8, 64),
    Move(Codec.INT4, 32, 64),
    Move(Codec.RAW16, 1, 16, store=True),
    Move(Codec.RAW16, 8, 16, store=True),
    Move(Codec.FP8, 8, 16, store=True),
    Move(Codec.FP8, 8, 32, store=True),
    Move(Codec.FP8, 8, 64, store=True),
    Move(Codec.INT4, 8, 64, store=True),
)


@dataclass(slots=True)
class Memories:
    """Pinned host memory and a pool of raw pages, shared by all cells."""

    arena: Tensor
    pool: Tensor


def memories() -> Memories:
    """Return 2 GiB of each; the pool holds normal K and V."""
    pool = torch.empty(2 * _BLOCKS, RAW.block_bytes // 2, dtype=torch.bfloat16, device="cuda")
    for row in range(0, len(pool), 64):
        pool[row : row + 64].normal_()
    arena = torch.zeros(pool.numel() * 2, dtype=torch.uint8, pin_memory=True)
    return Memories(arena, pool.view(torch.uint8))


def copy_limit(both: Memories, *, store: bool) -> float:
    """Return the GB/s at which the copy engine moves 1 GiB that lies together."""
    size = _BLOCKS * RAW.block_bytes
    pool, arena = both.pool.view(-1)[:size], both.arena[-size:]
    source, target = (pool, arena) if store else (arena, pool.clone())
    return size / _microseconds(lambda: target.copy_(source, non_blocking=True)) / 1e3


def plan(cell: Move, both: Memories) -> Movement:
    """Return scattered blocks and pages of one cell."""
    torch.manual_seed(5)
    order = torch.randperm(2 * _BLOCKS)
    return ops.plan_movement(
        both.arena, cell.layout, order[:_BLOCKS] * cell.layout.block_bytes,
        both.pool, RAW, order.flip(0)[:_BLOCKS],
    )  # fmt: skip


def move(cell: Move, movement: Movement) -> None:
    """Move all layers of all blocks, `cell.layers` at a time."""
    way = ops.store_layers if cell.store else ops.load_layers
    for first in range(0, RAW.layers, cell.layers):
        way(movement, range(first, first + cell.layers), programs=cell.programs)


def check(cell: Move, both: Memories) -> None:
    """Store and load a few blocks; raises `Corrupt` where the reference has other bytes."""
    movement = plan(cell, both)
    size, chosen = cell.layout.block_bytes, range(_BLOCKS - _CHECKED, _BLOCKS)
    rows = (movement.pool_units * UNIT_BYTES // RAW.block_bytes)[chosen.start :]
    starts = (movement.arena_units * UNIT_BYTES).tolist()[chosen.start :]
    place = torch.arange(_CHECKED)
    arena = torch.zeros(_CHECKED * size, dtype=torch.uint8)
    wanted = ops.plan_movement(
        arena, cell.layout, place * size, both.pool[rows].cpu(), RAW, place
    )  # fmt: skip
    move(replace(cell, store=True), movement)
    ops.store_layers(wanted)
    torch.cuda.synchronize()
    got = torch.stack([both.arena[at : at + cell.layout.payload_bytes] for at in starts])
    if not torch.equal(got, arena.view(_CHECKED, size)[:, : cell.layout.payload_bytes]):
        raise Corrupt("blocks were stored with other bytes than the reference's")
    before = both.pool.clone()
    both.pool.zero_()
    move(replace(cell, store=False), movement)
    ops.load_layers(wanted)
    same = torch.equal(both.pool[rows].cpu(), wanted.pool)
    both.pool.copy_(before)
    if not same:
        raise Corrupt("blocks were loaded with other bytes than the reference's")


def measure(cell: Move, both: Memories, copies: float) -> dict[str, Any]:
    """Return the row of one cell: GB/s of bf16, beside what the copy engine would give.

    The limit is the copy engine's rate times raw bytes over the bytes that cross the bus. Raises
    `Corrupt` when bytes were wrong.
    """
    check(cell, both)
    movement = plan(cell, both)
    taken = _microseconds(lambda: move(cell, movement))
    value = _BLOCKS * RAW.payload_bytes / taken / 1e3
    limit = copies * RAW.payload_bytes / cell.layout.payload_bytes
    return {
        "bench": "kernels",
        "case": cell.name,
        "value": round(value, 1),
        "unit": "GB/s",
        "limit": round(limit, 1),
        "limit_name": "copy engine of this run, times raw over moved bytes",
        "ratio_to_limit": round(value / limit, 3),
        "peer": None,
        "peer_name": None,
        "ratio_to_peer": None,
        "runs": _RUNS,
        "microseconds": round(taken, 1),
        "device": torch.cuda.get_device_name(),
    }


def _microseconds(launch: Callable[[], object]) -> float:
    """Return the median time of a launch that is too long to be captured."""
    times: list[float] = []
    for _ in range(_RUNS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        launch()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times[1:])
