"""`kvkernels.triton.latent`'s attention in Gluon for Hopper: 64 rows over two warp groups.

64 rows of 512 columns are as many sums as the registers of two warp groups hold. Triton gives both
groups all the scores of a tile: twice the products over 576 columns. Here layouts are named:
each group computes the scores of half of a tile's tokens and owns half of the output's columns.
A tile lies in shared memory once, as keys and as values.
"""

# Triton reads a kernel's annotations as its own signature, and its decorator carries no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

_load_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or getattr(gl, "thread_barrier")  # noqa: B009
"""Names of later versions of Triton and, where those are not there, of 3.6."""

_SCORED = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 32, 16])
)
_SUMMED = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 256, 16])
)
_WEIGHED = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=_SUMMED.value, k_width=2))
_TILED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
_WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0]))
_NARROW = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
"""Scores and sums of 64 rows over two warp groups; rows of 512 and of 64 as they are copied."""

# One parameter a line would bury the kernels under their signatures.
# fmt: off


@gluon.jit
def _pages(
    table, tile, context, BLOCK_N: gl.constexpr, PAGE: gl.constexpr, LAYOUT: gl.constexpr,
):
    """Return the page of each of a tile's tokens, 0 past the context."""
    spot = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LAYOUT))
    return gl.load(table + spot // PAGE, mask=spot < context, other=0)


@gluon.jit
def _copy(
    target, cells, page, tile, context, page_stride,
    WIDTH: gl.constexpr, ROW: gl.constexpr, BLOCK_N: gl.constexpr, PAGE: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Begin to copy WIDTH columns of a tile into shared memory, zeros past the context."""
    spot = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    row = page.to(gl.int64) * page_stride + spot % PAGE * ROW
    place = cells + gl.expand_dims(row, 1) + gl.expand_dims(columns, 0)
    _load_async(
        target, place, mask=gl.expand_dims(spot < context, 1)
    )


@gluon.jit
def _load_rows(
    target, source, used, WIDTH: gl.constexpr, LAYOUT: gl.constexpr,
):
    columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    place = gl.expand_dims(source, 1) + gl.expand_dims(columns, 0)
    target.store(gl.load(place, mask=gl.expand_dims(used, 1), other=0.0))


@gluon.jit
def _load_query(
    target, source, token, block, count, token_stride, head_stride,
    HEADS: gl.constexpr, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr,
):
    rows = block * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT))
    at = (token + rows // HEADS).to(gl.int64)
    place = source + at * token_stride + (rows % HEADS) * head_stride
    _load_rows(target, place, rows < count * HEADS, WIDTH, LAYOUT)


@gluon.jit
def _copy_tile(
    latents, ropes, buffer, cells, page, rope_page, tile, context, page_stride,
    LATENT: gl.constexpr, ROPE: gl.constexpr, BLOCK_N: gl.constexpr, PAGE: gl.constexpr,
):
    """Begin to copy a tile into one of the buffers."""
    _copy(
        latents.index(buffer), cells, page, tile, context, page_stride,
        LATENT, LATENT + ROPE, BLOCK_N, PAGE, _WIDE,
    )
    _copy(
        ropes.index(buffer), cells + LATENT, rope_page, tile, context, page_stride,
        ROPE, LATENT + ROPE, BLOCK_N, PAGE, _NARROW,
    )
    async_copy.commit_group()


@gluon.jit
def _weigh(scores, spot, seen, scale, top, total):
    """Return a tile's weights, what earlier sums are kept by, and the new maximum and sum."""
    hidden = gl.expand_dims(spot, 0) > gl.expand_dims(seen, 1)
    scores = gl.where(hidden, float("-inf"), scores * scale)
    new_top = gl.maximum(top, gl.max(scores, 1))
    safe = gl.where(new_top == float("-inf"), 0.0, new_top)
    weights = gl.exp2(scores - gl.expand_dims(safe, 1))
    keep = gl.exp2(top - safe)
    return weights, keep, new_top, total * keep + gl.sum(weights, 1)


@gluon.jit
def _scan(
    q, r, latents, ropes, cells, table, page, rope_page, begin, end, context, seen, page_stride,
    scale,
    LATENT: gl.constexpr, ROPE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    PAGE: gl.constexpr,
):
    """Read tiles [begin, end), the first of them on its way; return maximum, sum and output."""
    offsets = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, _SCORED))
    top = gl.full([BLOCK_M], float("-inf"), gl.float32, layout=gl.SliceLayout(1, _SCORED))
    total = gl.zeros([BLOCK_M], gl.float32, layout=gl.SliceLayout(1, _SCORED))
    acc = gl.zeros([BLOCK_M, LATENT], gl.float32, layout=_SUMMED)
    nothing = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=_SCORED)
    for tile in range(begin, end):
        at = (tile - begin) % 2
        async_copy.wait_group(0)
        # All warps have read the other buffer, and see what each of them has copied into this one.
        fence_async_shared()
        _barrier()
        latent, rope = latents.index(at), ropes.index(at)
        pending = warpgroup_mma(
            q, latent.permute([1, 0]), nothing, use_acc=False, is_async=True
        )
        pending = warpgroup_mma(r, rope.permute([1, 0]), pending, is_async=True)
        _copy_tile(
            latents, ropes, 1 - at, cells, page, rope_page, tile + 1, context, page_stride,
            LATENT, ROPE, BLOCK_N, PAGE,
        )
        page = _pages(table, tile + 2, context, BLOCK_N, PAGE, _WIDE)
        rope_page = _pages(table, tile + 2, context, BLOCK_N, PAGE, _NARROW)
        scores = warpgroup_mma_wait(0, deps=[pending])
        weights, keep, top, total = _weigh(
            scores, tile * BLOCK_N + offsets, seen, scale, top, total
        )
        acc = acc * gl.expand_dims(gl.convert_layout(keep, gl.SliceLayout(1, _SUMMED)), 1)
        operand = gl.convert_layout(weights.to(gl.bfloat16), _WEIGHED)
        acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(operand, latent, acc, is_async=True)])
    async_copy.wait_group(0)
    return top, total, acc


@gluon.jit
def attend_latents_hopper(
    query, rotary, out, cells, tables, items, partial, stats,
    query_token, query_head, rotary_token, rotary_head, page_stride, scale,
    HEADS: gl.constexpr, BLOCKS: gl.constexpr, LATENT: gl.constexpr, ROPE: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, PAGE: gl.constexpr,
):
    """Do what `attend_latents` does, with 8 warps and two buffers of tiles; bfloat16 only."""
    gl.static_assert(BLOCK_M == 64 and BLOCK_N == 64)
    gl.static_assert(gl.num_warps() == 8)
    item, block = gl.program_id(0) // BLOCKS, gl.program_id(0) % BLOCKS
    field = items + item * 8
    start, token, count = gl.load(field), gl.load(field + 1), gl.load(field + 2)
    position, begin, end = gl.load(field + 3), gl.load(field + 4), gl.load(field + 5)
    splits = gl.load(field + 7)
    context, table = position + count, tables + start
    q = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M, LATENT], _TILED)
    r = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M, ROPE], _TILED)
    latents = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_N, LATENT], _TILED)
    ropes = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_N, ROPE], _TILED)
    page = _pages(table, begin, context, BLOCK_N, PAGE, _WIDE)
    rope_page = _pages(table, begin, context, BLOCK_N, PAGE, _NARROW)
    _copy_tile(
        latents, ropes, 0, cells, page, rope_page, begin, context, page_stride,
        LATENT, ROPE, BLOCK_N, PAGE,
    )
    page = _pages(table, begin + 1, context, BLOCK_N, PAGE, _WIDE)
    rope_page = _pages(table, begin + 1, context, BLOCK_N, PAGE, _NARROW)
    _load_query(
        q, query, token, block, count, query_token, query_head, HEADS, LATENT, BLOCK_M, _WIDE
    )
    _load_query(
        r, rotary, token, block, count, rotary_token, rotary_head, HEADS, ROPE, BLOCK_M, _NARROW
    )
    fence_async_shared()
    rows = block * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, _SCORED))
    seen = position + gl.minimum(rows // HEADS, count - 1)
    top, total, acc = _scan(
        q, r, latents, ropes, cells, table, page, rope_page, begin, end, context, seen,
        page_stride, scale, LATENT, ROPE, BLOCK_M, BLOCK_N, PAGE,
    )
    _store(
        out, partial, stats, top, total, acc, item, block, token, count, splits,
        HEADS, BLOCKS, LATENT, BLOCK_M, _SCORED, _SUMMED,
    )


@gluon.jit
def _store(
    out, partial, stats, top, total, acc, item, block, token, count, splits,
    HEADS: gl.constexpr, BLOCKS: gl.constexpr, LATENT: gl.constexpr, BLOCK_M: gl.constexpr,
    SCORED: gl.constexpr, SUMMED: gl.constexpr,
):
    """Store the answer, or an item's partial result."""
    rows = block * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, SUMMED))
    columns = gl.expand_dims(gl.arange(0, LATENT, layout=gl.SliceLayout(0, SUMMED)), 0)
    used = gl.expand_dims(rows < count * HEADS, 1)
    if splits == 1:
        mass = gl.convert_layout(total, gl.SliceLayout(1, SUMMED))
        answer = (acc / gl.expand_dims(mass, 1)).to(out.dtype.element_ty)
        target = (token + rows // HEADS).to(gl.int64) * HEADS + rows % HEADS
        gl.store(out + gl.expand_dims(target, 1) * LATENT + columns, answer, mask=used)
    else:
        slot = item.to(gl.int64) * (BLOCKS * BLOCK_M) + rows
        gl.store(partial + gl.expand_dims(slot, 1) * LATENT + columns, acc, mask=used)
        mine = block * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, SCORED))
        slot = item.to(gl.int64) * (BLOCKS * BLOCK_M) + mine
        there = mine < count * HEADS
        gl.store(stats + slot * 2, top, mask=there)
        gl.store(stats + slot * 2 + 1, total, mask=there)
