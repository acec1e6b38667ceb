"""Movement between arena memory and pages: scattered cells as they are, decoded or encoded.

A few programs walk the cells of all blocks in order, so a launch takes few processors from the
kernels beside it and still keeps a PCIe bus full: what counts is bytes in flight, hence large
tiles and places that are fetched one iteration ahead. Cells lie at multiples of 128 bytes, and
places are counted in them, so every access is as wide as the hardware has it. Pinned host memory
is read and written in place. No program waits for another.
"""

# Triton reads a kernel's annotations as its own signature, and its decorator carries no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from kvkernels.triton.quantised import INT4, decoded, encoded, encoded_halves

UNIT = tl.constexpr(128)
"""Bytes in which places are counted: `kvkernels.movement.UNIT_BYTES`."""
ROWS = tl.constexpr(32)
"""Rows of a cell: K and V of 16 tokens."""

# One parameter a line would bury the kernels under their signatures.
# fmt: off


@triton.jit
def _piece(place, mask, units, pieces_each, stride, first):
    """Return where the runs with these numbers begin, in units: run = (block, head)."""
    block = place // pieces_each
    return tl.load(units + block, mask=mask, other=0) + place % pieces_each * stride + first


@triton.jit
def copy_runs(
    source, target, source_units, target_units, total, run_units, runs_each, stride, first,
    UNITS: tl.constexpr, STAGES: tl.constexpr,
):
    """Copy runs of `run_units` * 128 bytes, `runs_each` a block, `stride` units apart.

    source, target uint8; source_units, target_units int64 [blocks]; total = blocks * runs_each *
    run_units; first: units from a block's begin to its first run. Both sides have one layout.
    """
    words = tl.arange(0, UNIT // 8)
    here = source.to(tl.pointer_type(tl.int64))
    there = target.to(tl.pointer_type(tl.int64))
    step = tl.num_programs(0) * UNITS
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    begin = _piece(unit // run_units, unit < total, source_units, runs_each, stride, first)
    end = _piece(unit // run_units, unit < total, target_units, runs_each, stride, first)
    for _ in tl.range(tl.program_id(0) * UNITS, total, step, num_stages=STAGES):
        ahead = unit + step
        inside = ahead < total
        next_begin = _piece(ahead // run_units, inside, source_units, runs_each, stride, first)
        next_end = _piece(ahead // run_units, inside, target_units, runs_each, stride, first)
        mask = (unit < total)[:, None]
        at = unit % run_units
        read = here + ((begin + at) * (UNIT // 8))[:, None] + words[None, :]
        written = there + ((end + at) * (UNIT // 8))[:, None] + words[None, :]
        tl.store(written, tl.load(read, mask=mask), mask=mask)
        unit, begin, end = ahead, next_begin, next_end


@triton.jit
def _cell(cell, mask, units, run, heads, layers, first, cell_units):
    """Return where cells with these numbers begin, in units: (block, head, layer of the run)."""
    share = cell // run
    block = tl.load(units + share // heads, mask=mask, other=0)
    return block + (share % heads * layers + first + cell % run) * cell_units


@triton.jit
def decode_cells(
    source, target, source_units, target_units, total, run, heads, layers, first,
    source_cell, target_cell,
    CODEC: tl.constexpr, DIM: tl.constexpr, CELLS: tl.constexpr, STAGES: tl.constexpr,
):
    """Decode cells of a quantised codec into elements of target's type.

    source uint8; target raw elements; total cells = blocks * heads * run, layers `first` and on of
    `layers`; source_cell, target_cell: units of a cell.
    """
    ROW: tl.constexpr = DIM // 2 if CODEC == INT4 else DIM
    SIZE: tl.constexpr = target.dtype.element_ty.primitive_bitwidth // 8
    number = tl.arange(0, CELLS * ROWS)
    row, bytes_ = (number % ROWS)[:, None], tl.arange(0, ROW)[None, :]
    words = source.to(tl.pointer_type(tl.int32))
    step = tl.num_programs(0) * CELLS
    cell = tl.program_id(0).to(tl.int64) * CELLS + number // ROWS
    begin = _cell(cell, cell < total, source_units, run, heads, layers, first, source_cell)
    end = _cell(cell, cell < total, target_units, run, heads, layers, first, target_cell)
    for _ in tl.range(tl.program_id(0) * CELLS, total, step, num_stages=STAGES):
        ahead = cell + step
        inside = ahead < total
        next_begin = _cell(ahead, inside, source_units, run, heads, layers, first, source_cell)
        next_end = _cell(ahead, inside, target_units, run, heads, layers, first, target_cell)
        mask = cell < total
        codes = tl.load(
            source + (begin * UNIT)[:, None] + row * ROW + bytes_, mask=mask[:, None], other=0,
        )
        word = words + begin * (UNIT // 4) + ROWS * ROW // 4 + number % ROWS
        scale = tl.load(word, mask=mask, other=0)
        out = target + (end * (UNIT // SIZE))[:, None] + row * DIM + bytes_
        if CODEC == INT4:
            low, high = decoded(codes, scale, CODEC)
            tl.store(out, low.to(target.dtype.element_ty), mask=mask[:, None])
            tl.store(out + ROW, high.to(target.dtype.element_ty), mask=mask[:, None])
        else:
            wide = decoded(codes, scale, CODEC)
            tl.store(out, wide.to(target.dtype.element_ty), mask=mask[:, None])
        cell, begin, end = ahead, next_begin, next_end


@triton.jit
def encode_cells(
    source, target, source_units, target_units, total, run, heads, layers, first,
    source_cell, target_cell,
    CODEC: tl.constexpr, DIM: tl.constexpr, CELLS: tl.constexpr, STAGES: tl.constexpr,
):
    """Encode raw elements as cells of a quantised codec: `decode_cells` backwards."""
    ROW: tl.constexpr = DIM // 2 if CODEC == INT4 else DIM
    SIZE: tl.constexpr = source.dtype.element_ty.primitive_bitwidth // 8
    number = tl.arange(0, CELLS * ROWS)
    row, bytes_ = (number % ROWS)[:, None], tl.arange(0, ROW)[None, :]
    words = target.to(tl.pointer_type(tl.int32))
    step = tl.num_programs(0) * CELLS
    cell = tl.program_id(0).to(tl.int64) * CELLS + number // ROWS
    begin = _cell(cell, cell < total, source_units, run, heads, layers, first, source_cell)
    end = _cell(cell, cell < total, target_units, run, heads, layers, first, target_cell)
    for _ in tl.range(tl.program_id(0) * CELLS, total, step, num_stages=STAGES):
        ahead = cell + step
        inside = ahead < total
        next_begin = _cell(ahead, inside, source_units, run, heads, layers, first, source_cell)
        next_end = _cell(ahead, inside, target_units, run, heads, layers, first, target_cell)
        mask = cell < total
        read = source + (begin * (UNIT // SIZE))[:, None] + row * DIM + bytes_
        rows = tl.load(read, mask=mask[:, None], other=0.0).to(tl.float32)
        if CODEC == INT4:
            last = tl.load(read + ROW, mask=mask[:, None], other=0.0).to(tl.float32)
            codes, bits = encoded_halves(rows, last)
        else:
            codes, bits = encoded(rows, CODEC)
        tl.store(target + (end * UNIT)[:, None] + row * ROW + bytes_, codes, mask=mask[:, None])
        word = words + end * (UNIT // 4) + ROWS * ROW // 4 + number % ROWS
        tl.store(word, bits, mask=mask)
        cell, begin, end = ahead, next_begin, next_end
