"""Attention over paged MLA latents: each token's one row is its key, and the start of it its value.

Queries are absorbed (multiplied into the latent space), so all heads share the rows: one program
serves one *item* (a span of one unit's context, see `kvkernels.triton.work`) and up to BLOCK_M
rows of query, and what it reads of a token serves both products. The page indices of the next
tile are loaded one iteration ahead, as in `kvkernels.triton.decode`.

A row's partial result is as large as two tokens' rows, so a unit's last item alone would merge
them longer than all attended: `merge_latents` is a launch of its own,
spread over rows and columns, and left out where no unit is split.
"""

# Triton reads a kernel's annotations as its own signature, and its decorator carries no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false

import triton
import triton.language as tl

# One parameter a line would bury the kernels under their signatures.
# fmt: off


@triton.jit
def _scan(
    q, rotary, cells, table, begin, end, seen, context, page_stride, scale,
    LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):
    """Read tiles [begin, end); return running maximum, sum and unnormalised output per row."""
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, LATENT), tl.float32)
    columns = tl.arange(0, LATENT)
    turned = LATENT + tl.arange(0, ROPE)
    spot = begin * BLOCK_N + tl.arange(0, BLOCK_N)
    page = tl.load(table + spot // PAGE, mask=spot < context, other=0)
    for _ in range(begin, end):
        ahead = spot + BLOCK_N
        next_page = tl.load(table + ahead // PAGE, mask=ahead < context, other=0)
        row = page.to(tl.int64) * page_stride + spot % PAGE * (LATENT + ROPE)
        place = cells + row[:, None]
        inside = (spot < context)[:, None]
        latent = tl.load(place + columns[None, :], mask=inside, other=0.0).to(DOT)
        rope = tl.load(place + turned[None, :], mask=inside, other=0.0).to(DOT)
        scores = tl.dot(q, tl.trans(latent), input_precision=PRECISION)
        scores = tl.dot(rotary, tl.trans(rope), scores, input_precision=PRECISION)
        scores = tl.where(spot[None, :] <= seen[:, None], scores * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row of an append may see nothing of an item's first tiles.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - safe[:, None])
        keep = tl.exp2(top - safe)
        total = total * keep + tl.sum(weights, 1)
        acc = acc * keep[:, None]
        acc = tl.dot(weights.to(DOT), latent, acc, input_precision=PRECISION)
        top = new_top
        page = next_page
        spot = ahead
    return top, total, acc


@triton.jit
def attend_latents(
    query, rotary, out, cells, tables, items, partial, stats,
    query_token, query_head, rotary_token, rotary_head, page_stride, scale,
    HEADS: tl.constexpr, BLOCKS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend for block `program_id(0) % BLOCKS` of the rows of item `program_id(0) // BLOCKS`.

    query [tokens, HEADS, LATENT] and rotary [tokens, HEADS, ROPE] with strides; out like query,
    contiguous; cells: token 0 of page 0 in this layer; items as `work.fill` makes them; partial
    float32 [n, BLOCKS * BLOCK_M, LATENT], stats [.., 2]. A unit's rows are its tokens' heads, one
    token after another. `scale` holds log2(e). Blocks of one item are neighbours, so that what one
    reads the other finds in the L2.
    """
    item, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    field = items + item * 8
    start, token, count = tl.load(field), tl.load(field + 1), tl.load(field + 2)
    position, begin, end = tl.load(field + 3), tl.load(field + 4), tl.load(field + 5)
    splits = tl.load(field + 7)
    rows, columns = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, LATENT)
    used = rows < count * HEADS
    at, head = (token + rows // HEADS).to(tl.int64), rows % HEADS
    place = query + at * query_token + head * query_head
    q = tl.load(place[:, None] + columns[None, :], mask=used[:, None], other=0.0).to(DOT)
    place = rotary + at * rotary_token + head * rotary_head
    turned = place[:, None] + tl.arange(0, ROPE)[None, :]
    r = tl.load(turned, mask=used[:, None], other=0.0).to(DOT)
    seen = position + tl.minimum(rows // HEADS, count - 1)
    top, total, acc = _scan(
        q, r, cells, tables + start, begin, end, seen, position + count, page_stride, scale,
        LATENT, ROPE, BLOCK_M, BLOCK_N, PAGE, DOT, PRECISION,
    )
    if splits == 1:
        answer = (acc / total[:, None]).to(out.dtype.element_ty)
        target = (at * HEADS + head)[:, None] * LATENT + columns[None, :]
        tl.store(out + target, answer, mask=used[:, None])
    else:
        slot = item.to(tl.int64) * (BLOCKS * BLOCK_M) + rows
        tl.store(partial + slot[:, None] * LATENT + columns[None, :], acc, mask=used[:, None])
        tl.store(stats + slot * 2, top, mask=used)
        tl.store(stats + slot * 2 + 1, total, mask=used)


@triton.jit
def merge_latents(
    out, partial, stats, items, firsts,
    HEADS: tl.constexpr, ROWS: tl.constexpr, LATENT: tl.constexpr, PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Merge COLUMNS columns of one row of a split unit and store the answer.

    firsts int32 [split units]: each one's first item. Grid: (row of a unit, columns, split unit).
    """
    row = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(firsts + tl.program_id(2))
    field = items + first * 8
    token, count, splits = tl.load(field + 1), tl.load(field + 2), tl.load(field + 7)
    if row < count * HEADS:
        top = tl.full((1,), float("-inf"), tl.float32)
        total = tl.zeros((1,), tl.float32)
        acc = tl.zeros((COLUMNS,), tl.float32)
        for base in range(0, splits, PARTS):
            index = base + tl.arange(0, PARTS)
            there = index < splits
            slot = (first + index).to(tl.int64) * ROWS + row
            high = tl.load(stats + slot * 2, mask=there, other=float("-inf"))
            mass = tl.load(stats + slot * 2 + 1, mask=there, other=0.0)
            part = tl.load(
                partial + slot[:, None] * LATENT + columns[None, :],
                mask=there[:, None], other=0.0,
            )
            new_top = tl.maximum(top, tl.max(high, 0))
            # A row may see nothing of the first items; all of them hidden is impossible.
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            weight, keep = tl.exp2(high - safe), tl.exp2(top - safe)
            acc = acc * keep + tl.sum(part * weight[:, None], 0)
            total = total * keep + tl.sum(mass * weight, 0)
            top = new_top
        target = (token + row // HEADS).to(tl.int64) * HEADS + row % HEADS
        tl.store(out + target * LATENT + columns, (acc / total).to(out.dtype.element_ty))
