"""Attention of a few new tokens over paged K and V: split over the context, merged in one launch.

One program serves one *item* (a span of one unit's context, see `kvkernels.triton.work`) and one
KV head. The query heads that share the KV head lie in the rows of the tile, so each byte of K and
V is read once. The page indices of the next tile are loaded one iteration ahead: loaded inside
the iteration that needs them they would eat the stages that should hold K and V.

Where a unit has several items, each leaves (max, sum, unnormalised output) in a workspace and
adds one to the unit's counter; the one that finds all the others arrived merges. No program waits
for another, and the last one sets the counter back to 0, so a captured launch can be replayed.
"""

# Triton reads a kernel's annotations as its own signature, and its decorator carries no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false

import triton
import triton.language as tl

from kvkernels.triton.quantised import INT4, dots, nothing, weighted, word_pointer, woven

MERGE_SPLITS = tl.constexpr(16)
MERGE_ROWS = tl.constexpr(4)
"""Partial results that the merge reads at once: 16 x 4 x 128 floats are 64 registers of a thread.
Rows together, because each read of the L2 is waited for."""

TALL_ROWS = tl.constexpr(16)
"""Units of more rows have few items: they are merged one after another, all rows at once."""


# One parameter a line would bury the kernels under their signatures.
# fmt: off


@triton.jit
def _merge(
    out, partial, stats, members, state, masses, first, splits, head, token, base_row, used_rows,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    TO: tl.constexpr,
):
    """Combine some rows of all a unit's items by their running maxima and sums, and store them."""
    rows, dims = base_row + tl.arange(0, MERGE_ROWS), tl.arange(0, DIM)
    used = rows < used_rows
    top = tl.full((MERGE_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((MERGE_ROWS,), tl.float32)
    acc = tl.zeros((MERGE_ROWS, DIM), tl.float32)
    for base in range(0, splits, MERGE_SPLITS):
        index = base + tl.arange(0, MERGE_SPLITS)
        there = (index < splits)[:, None] & used[None, :]
        place = ((first + index) * HEADS + head).to(tl.int64)[:, None] * BLOCK_M + rows[None, :]
        # .cg: what other programs wrote lies in the L2, never in this processor's L1.
        high = tl.load(stats + place * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
        mass = tl.load(stats + place * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
        part = tl.load(
            partial + place[:, :, None] * DIM + dims[None, None, :],
            mask=there[:, :, None], other=0.0, cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(high, 0))
        # A row may see nothing of the first items; all of them hidden is impossible.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(high - safe[None, :])
        keep = tl.exp2(top - safe)
        acc = acc * keep[:, None] + tl.sum(part * weight[:, :, None], 0)
        total = total * keep + tl.sum(mass * weight, 0)
        top = new_top
    at = _tokens(members, token + rows // GROUP, used, TO) * (HEADS * GROUP)
    at = at + head * GROUP + rows % GROUP
    _give(out, state, masses, at, dims, top, total, acc, used, TO)


@triton.jit
def _merge_tall(
    out, partial, stats, state, masses, first, splits, head, token, used_rows,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """Do what `_merge` does for all rows of a unit of many, one item after another."""
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, DIM)
    used = rows < used_rows
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DIM), tl.float32)
    for index in range(0, splits):
        place = ((first + index) * HEADS + head).to(tl.int64) * BLOCK_M + rows
        high = tl.load(stats + place * 2, mask=used, other=float("-inf"), cache_modifier=".cg")
        mass = tl.load(stats + place * 2 + 1, mask=used, other=0.0, cache_modifier=".cg")
        part = tl.load(
            partial + place[:, None] * DIM + dims[None, :],
            mask=used[:, None], other=0.0, cache_modifier=".cg",
        )
        new_top = tl.maximum(top, high)
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        keep, weight = tl.exp2(top - safe), tl.exp2(high - safe)
        acc = acc * keep[:, None] + part * weight[:, None]
        total = total * keep + mass * weight
        top = new_top
    at = (token + rows // GROUP).to(tl.int64) * (HEADS * GROUP) + head * GROUP + rows % GROUP
    _give(out, state, masses, at, dims, top, total, acc, used, False)


@triton.jit
def _tokens(members, index, used, TO: tl.constexpr):
    """Return rows of `query`: a sequence's own follow one another, a group's are listed."""
    if TO:
        return tl.load(members + index, mask=used, other=0).to(tl.int64)
    else:
        return index.to(tl.int64)


@triton.jit
def _give(out, state, masses, at, dims, top, total, acc, used, TO: tl.constexpr):
    """Store rows' answers, or what they have so far for the launch that goes on with it."""
    place = at[:, None] * dims.shape[0] + dims[None, :]
    if TO:
        tl.store(state + place, acc, mask=used[:, None])
        tl.store(masses + at * 2, top, mask=used)
        tl.store(masses + at * 2 + 1, total, mask=used)
    else:
        answer = (acc / tl.where(used, total, 1.0)[:, None]).to(out.dtype.element_ty)
        tl.store(out + place, answer, mask=used[:, None])


@triton.jit
def _with_state(state, masses, at, dims, top, total, acc, used):
    """Combine rows with what launches over shared pages left for them; nothing for most."""
    high = tl.load(masses + at * 2, mask=used, other=float("-inf"))
    mass = tl.load(masses + at * 2 + 1, mask=used, other=0.0)
    place = state + at[:, None] * dims.shape[0] + dims[None, :]
    part = tl.load(place, mask=used[:, None], other=0.0)
    new_top = tl.maximum(top, high)
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    keep, weight = tl.exp2(top - safe), tl.exp2(high - safe)
    acc = acc * keep[:, None] + part * weight[:, None]
    return new_top, total * keep + mass * weight, acc


@triton.jit
def _spots(tile, skip, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr):
    """Return the token positions of a unit's tile: those between sinks and window are no tiles."""
    if WINDOW > 0:
        sink_tiles = (SINKS + BLOCK_N - 1) // BLOCK_N
        tile = tile + tl.where(tile >= sink_tiles, skip, 0)
    return tile * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def _scores(
    scores, spot, seen, softcap,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, SOFTCAP: tl.constexpr, FULL: tl.constexpr,
):
    """Return scaled scores in units of log2, -inf where a row (not FULL) sees none."""
    if SOFTCAP:
        # tanh by exp2, in a form that saturates instead of overflowing; 2 log2(e), then log2(e).
        grown = tl.exp2(-tl.abs(scores) * (2.8853900817779268 / softcap))
        capped = softcap * (1.0 - grown) / (1.0 + grown)
        scores = tl.where(scores < 0, -capped, capped) * 1.4426950408889634
    if not FULL:
        visible = spot[None, :] <= seen[:, None]
        if WINDOW > 0:
            inside = (spot[None, :] > seen[:, None] - WINDOW) | (spot[None, :] < SINKS)
            visible = visible & inside
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def _row_tile(at, inside, FULL: tl.constexpr):
    """Load rows of K or V, zeros past the context."""
    if FULL:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside[:, None], other=0.0)


@triton.jit
def _scan(
    q, top, total, acc, keys, table, begin, end, skip, seen, context, page_stride, value_offset,
    scale, softcap,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, SOFTCAP: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, FULL: tl.constexpr,
):
    """Read tiles [begin, end); return running maximum, sum and unnormalised output per row."""
    spot = _spots(begin, skip, BLOCK_N, WINDOW, SINKS)
    page = tl.load(table + spot // PAGE, mask=spot < context, other=0)
    for tile in range(begin, end):
        ahead = _spots(tile + 1, skip, BLOCK_N, WINDOW, SINKS)
        next_page = tl.load(table + ahead // PAGE, mask=ahead < context, other=0)
        inside = spot < context
        place = page.to(tl.int64) * page_stride + (spot % PAGE) * DIM
        k = _row_tile(keys + place[:, None], inside, FULL).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if FULL and not SOFTCAP:  # One multiplication and addition an element; nothing is -inf.
            new_top = tl.maximum(top, tl.max(scores, 1) * scale)
            safe = new_top
            weights = tl.exp2(scores * scale - safe[:, None])
        else:
            scores = _scores(scores * scale, spot, seen, softcap, WINDOW, SINKS, SOFTCAP, FULL)
            new_top = tl.maximum(top, tl.max(scores, 1))
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(scores - safe[:, None])
        keep = tl.exp2(top - safe)
        total = total * keep + tl.sum(weights, 1)
        v = _row_tile(keys + value_offset + place[:, None], inside, FULL).to(DOT)
        acc = acc * keep[:, None] + tl.dot(weights.to(DOT), v, input_precision=PRECISION)
        top = new_top
        page = next_page
        spot = ahead
    return top, total, acc


@triton.jit
def _scan_codes(
    q, cells, table, begin, end, skip, seen, context, page_stride, scale, softcap,
    CODEC: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, SOFTCAP: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr,
):
    """Do what `_scan` does over quantised cells; page_stride in bytes."""
    ROW: tl.constexpr = DIM // 2 if CODEC == INT4 else DIM
    rows = tl.arange(0, ROW)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    WORD: tl.constexpr = 1 if BLOCK_M > 16 else 2 if CODEC == INT4 else 4
    acc = nothing(CODEC, WORD, BLOCK_M, DIM)
    words = (cells + 2 * PAGE * ROW).to(tl.pointer_type(tl.int32))
    values = word_pointer(cells + PAGE * ROW, WORD)
    columns = tl.arange(0, ROW // WORD)
    spot = _spots(begin, skip, BLOCK_N, WINDOW, SINKS)
    page = tl.load(table + spot // PAGE, mask=spot < context, other=0)
    for tile in range(begin, end):
        ahead = _spots(tile + 1, skip, BLOCK_N, WINDOW, SINKS)
        next_page = tl.load(table + ahead // PAGE, mask=ahead < context, other=0)
        inside = spot < context
        far = page.to(tl.int64) * page_stride
        place = cells + far + spot % PAGE * ROW
        word = words + far // 4 + spot % PAGE
        k = tl.load(place[:, None] + rows[None, :], mask=inside[:, None], other=0)
        k_words = tl.load(word, mask=inside, other=0)
        scores = dots(q, k, k_words, CODEC, BLOCK_M, DIM, DOT, PRECISION) * scale
        scores = _scores(scores, spot, seen, softcap, WINDOW, SINKS, SOFTCAP, FULL)
        new_top = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - safe[:, None])
        keep = tl.exp2(top - safe)
        total = total * keep + tl.sum(weights, 1)
        value = values + (far + spot % PAGE * ROW) // WORD
        v = tl.load(value[:, None] + columns[None, :], mask=inside[:, None], other=0)
        v_words = tl.load(word + PAGE, mask=inside, other=0)
        acc = weighted(weights, acc, keep[:, None], v, v_words, CODEC, WORD, DOT, PRECISION)
        top = new_top
        page = next_page
        spot = ahead
    return top, total, woven(acc, CODEC, WORD, BLOCK_M, DIM)


@triton.jit
def _scan_any(
    q, place, table, begin, end, skip, seen, context, page_stride, value_offset, scale, softcap,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, SOFTCAP: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, CODEC: tl.constexpr, FULL: tl.constexpr, APPEND: tl.constexpr,
):
    """Read raw or quantised tiles, as CODEC says; all rows see the tokens of all tiles if FULL.

    APPEND: tiles that the first row sees whole are read first, without a look at what is hidden.
    """
    dims = tl.arange(0, DIM)
    if CODEC == 0:
        keys = place + dims[None, :]
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, DIM), tl.float32)
        if APPEND:
            whole = tl.maximum(begin, tl.minimum(end, (tl.min(seen, 0) + 1) // BLOCK_N))
            top, total, acc = _scan(
                q, top, total, acc, keys, table, begin, whole, skip, seen, context,
                page_stride, value_offset, scale, softcap,
                DIM, BLOCK_M, BLOCK_N, PAGE, WINDOW, SINKS, SOFTCAP, DOT, PRECISION, True,
            )
            begin = whole
        return _scan(
            q, top, total, acc, keys, table, begin, end, skip, seen, context,
            page_stride, value_offset, scale, softcap,
            DIM, BLOCK_M, BLOCK_N, PAGE, WINDOW, SINKS, SOFTCAP, DOT, PRECISION, FULL,
        )
    else:
        return _scan_codes(
            q, place, table, begin, end, skip, seen, context, page_stride, scale, softcap,
            CODEC, DIM, BLOCK_M, BLOCK_N, PAGE, WINDOW, SINKS, SOFTCAP, DOT, PRECISION, FULL,
        )


@triton.jit
def _leave(
    out, partial, stats, counters, members, state, masses,
    top, total, acc, item, head, token, count, first, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    TO: tl.constexpr,
):
    """Store an item's partial result; merge the unit's if every other item has arrived."""
    rows = tl.arange(0, BLOCK_M)
    used = rows < count * GROUP
    slot = (item * HEADS + head).to(tl.int64) * BLOCK_M + rows
    cells = slot[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(partial + cells, acc, mask=used[:, None])
    tl.store(stats + slot * 2, top, mask=used)
    tl.store(stats + slot * 2 + 1, total, mask=used)
    if not TO:  # `merge_groups` merges what is left for groups.
        # Every thread's stores come before the one thread's release below.
        tl.debug_barrier()
        counter = counters + first * HEADS + head
        arrived = tl.atomic_add(counter, 1, sem="acq_rel")
        if arrived == splits - 1:
            tl.store(counter, 0)
            if BLOCK_M > TALL_ROWS:
                _merge_tall(
                    out, partial, stats, state, masses, first, splits, head, token, count * GROUP,
                    HEADS, GROUP, DIM, BLOCK_M,
                )
            else:
                for base_row in range(0, count * GROUP, MERGE_ROWS):
                    _merge(
                        out, partial, stats, members, state, masses, first, splits, head, token,
                        base_row, count * GROUP, HEADS, GROUP, DIM, BLOCK_M, TO,
                    )


@triton.jit
def merge_groups(
    partial, stats, items, members, state, masses,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """Merge rows [4 p, 4 p + 4) of a group's unit, p `program_id(2)`, into `state` and `masses`.

    A launch of its own: a group has many rows, and its last item alone would take longer to merge
    them than all items took to attend.
    """
    field, head = items + tl.program_id(0) * 8, tl.program_id(1)
    token, count, begin = tl.load(field + 1), tl.load(field + 2), tl.load(field + 4)
    first, splits = tl.load(field + 6), tl.load(field + 7)
    base_row = tl.program_id(2) * MERGE_ROWS
    if (begin == 0) & (splits > 1) & (base_row < count * GROUP):
        _merge(
            state, partial, stats, members, state, masses, first, splits, head, token, base_row,
            count * GROUP, HEADS, GROUP, DIM, BLOCK_M, True,
        )


@triton.jit
def attend_pages(
    query, out, layer_pages, tables, items, partial, stats, counters, members, state, masses,
    query_token, query_head, page_stride, head_stride, value_offset, scale, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, CODEC: tl.constexpr,
    FROM: tl.constexpr, TO: tl.constexpr,
):
    """Attend for item `program_id(0)` and KV head `program_id(1)`.

    query [tokens, HEADS * GROUP, DIM] with strides; out like it, contiguous; layer_pages: K of
    page 0, head 0; items as `work.cut` makes them; partial float32 [n, HEADS, BLOCK_M, DIM], stats
    [.., 2], counters int32 [n, HEADS], 0. WINDOW 0: none. `scale` holds log2(e) if not SOFTCAP.
    CODEC 0: layer_pages are elements; else it is `Codec`'s number, and they are bytes of cells.
    TO: a unit is a group of sequences that share all its tokens; its rows of `query` are listed in
    `members`, and their results so far go to `state` and `masses`, float32 [tokens, HEADS * GROUP,
    DIM] and [.., 2] (maximum, sum). FROM: what lies there is combined with a unit's first item.
    """
    item, head, field = tl.program_id(0), tl.program_id(1), items + tl.program_id(0) * 8
    start, token, count = tl.load(field), tl.load(field + 1), tl.load(field + 2)
    position, begin, end = tl.load(field + 3), tl.load(field + 4), tl.load(field + 5)
    first, splits = tl.load(field + 6), tl.load(field + 7)
    if count == 0:
        return
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, DIM)
    used = rows < count * GROUP
    at = _tokens(members, token + rows // GROUP, used, TO)
    query_heads = head * GROUP + rows % GROUP
    places = at * query_token + query_heads.to(tl.int64) * query_head
    q = tl.load(query + places[:, None] + dims[None, :], mask=used[:, None], other=0.0).to(DOT)
    seen = position + tl.minimum(rows // GROUP, count - 1)
    low = tl.maximum(position - WINDOW + 1, 0) // BLOCK_N
    skip = tl.maximum(low - (SINKS + BLOCK_N - 1) // BLOCK_N, 0)
    place = layer_pages + head.to(tl.int64) * head_stride
    top, total, acc = _scan_any(
        q, place, tables + start, begin, end, skip, seen, position + count, page_stride,
        value_offset, scale, softcap, DIM, BLOCK_M, BLOCK_N, PAGE, WINDOW, SINKS, SOFTCAP, DOT,
        PRECISION, CODEC, TO, BLOCK_M > 16 and WINDOW == 0 and not TO,
    )
    target = at * (HEADS * GROUP) + query_heads
    if FROM:  # noqa: SIM102 - a branch for what is constant, another for what is not
        if begin == 0:
            top, total, acc = _with_state(state, masses, target, dims, top, total, acc, used)
    if splits == 1:
        _give(out, state, masses, target, dims, top, total, acc, used, TO)
    else:
        _leave(
            out, partial, stats, counters, members, state, masses, top, total, acc,
            item, head, token, count, first, splits, HEADS, GROUP, DIM, BLOCK_M, TO,
        )
