"""Attention over quantised pages and appends that quantise; `triton.decode` has the frame.

Codes are widened to float16 in registers and multiplied as they are: a token's K scale goes onto
its column of scores, its V scale onto its weight. Weights times scales would leave float16's
range for small V, so scales are divided by the tile's largest, which the product gets back in
float32. Every codec has one 32-bit scale word per row (`kvkernels.quantised`): a word is what an
asynchronous copy moves at least, so scales are fetched ahead as the codes are.
"""

# Triton reads a kernel's annotations as its own signature, and its decorator carries no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

import triton
import triton.language as tl

# `core.layout.Codec`, as numbers that a kernel can compare.
FP8 = tl.constexpr(2)
INT4 = tl.constexpr(4)


# One parameter a line would bury the kernels under their signatures.
# fmt: off


@triton.jit
def _widen(codes, CODEC: tl.constexpr, DOT: tl.constexpr):
    """Return FP8 or INT8 codes, uint8, as numbers."""
    if CODEC == FP8:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(DOT)
    else:
        # 0x6400 is 1024 in float16, and its last bits count ones: no conversion is needed.
        shifted = (codes.to(tl.uint16) ^ 0x6480).to(tl.float16, bitcast=True)
        return (shifted - 1152.0).to(DOT)


@triton.jit
def _nibbles(codes, DOT: tl.constexpr):
    """Return the low and the high INT4 codes of bytes as numbers."""
    wide = codes.to(tl.uint16)
    low = ((wide & 15) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    high = ((wide >> 4) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    return low.to(DOT), high.to(DOT)


@triton.jit
def _scales(words):
    """Return the two float16 scales of INT4 words as float32."""
    low = (words & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    high = ((words >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, DIM: tl.constexpr):
    """Cut [BLOCK_M, DIM] into its first and last DIM / 2 columns."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, DIM // 2)), (0, 2, 1)))


@triton.jit
def joined(low, high, BLOCK_M: tl.constexpr, DIM: tl.constexpr):
    """Undo `halves`."""
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (BLOCK_M, DIM))


@triton.jit
def dots(q, codes, words, CODEC: tl.constexpr, BLOCK_M: tl.constexpr, DIM: tl.constexpr,
         DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Return q times a tile of K: float32 [BLOCK_M, tokens]."""
    if CODEC == INT4:
        q_low, q_high = halves(q, BLOCK_M, DIM)
        low, high = _nibbles(codes, DOT)
        scale_low, scale_high = _scales(words)
        first = tl.dot(q_low, tl.trans(low), input_precision=PRECISION) * scale_low[None, :]
        last = tl.dot(q_high, tl.trans(high), input_precision=PRECISION) * scale_high[None, :]
        return first + last
    else:  # What follows a return would be compiled as well.
        k = _widen(codes, CODEC, DOT)
        scale = words.to(tl.float32, bitcast=True)
        return tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale[None, :]


@triton.jit
def word_pointer(at, WORD: tl.constexpr):
    """Return a pointer to bytes as one to words of one, two or four."""
    if WORD == 1:
        return at
    elif WORD == 2:
        return at.to(tl.pointer_type(tl.int16))
    else:
        return at.to(tl.pointer_type(tl.int32))


@triton.jit
def _byte(words, AT: tl.constexpr):
    """Return one byte of each word."""
    return ((words >> (8 * AT)) & 0xFF).to(tl.uint8)


@triton.jit
def _more(acc, keep, weights, numbers, safe, PRECISION: tl.constexpr):
    """Return an output tile with another tile of V added."""
    return acc * keep + tl.dot(weights, numbers, input_precision=PRECISION) * safe


@triton.jit
def _weighted_bytes(
    weights, acc, keep, codes, words,
    CODEC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):
    """Do what `weighted` does for the many rows of an append, with codes as bytes.

    Triton 3.6 reads beyond its memory where these rows meet words (H100, head_dim 64).
    """
    low_acc, high_acc = acc
    if CODEC == INT4:
        low, high = _nibbles(codes, DOT)
        scale_low, scale_high = _scales(words)
        peak = tl.max(tl.maximum(scale_low, scale_high), 0)
        safe = tl.where(peak == 0, 1.0, peak)
        first = (weights * (scale_low / safe)[None, :]).to(DOT)
        last = (weights * (scale_high / safe)[None, :]).to(DOT)
        low_acc = low_acc * keep + tl.dot(first, low, input_precision=PRECISION) * safe
        high_acc = high_acc * keep + tl.dot(last, high, input_precision=PRECISION) * safe
    else:
        scale = words.to(tl.float32, bitcast=True)
        peak = tl.max(scale, 0)
        safe = tl.where(peak == 0, 1.0, peak)
        scaled = (weights * (scale / safe)[None, :]).to(DOT)
        v = _widen(codes, CODEC, DOT)
        low_acc = low_acc * keep + tl.dot(scaled, v, input_precision=PRECISION) * safe
    return low_acc, high_acc


@triton.jit
def weighted(
    weights, acc, keep, codes, words,
    CODEC: tl.constexpr, WORD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):
    """Add a tile of V to the output so far: tiles of every fourth column, `woven` at the end.

    Tensor cores want neighbouring tokens side by side, so codes cross shared memory by token and
    column: as words of several columns, a fourth or half as often as byte by byte.
    """
    if WORD == 1:
        return _weighted_bytes(weights, acc, keep, codes, words, CODEC, DOT, PRECISION)
    else:
        return _weighted_words(weights, acc, keep, codes, words, CODEC, DOT, PRECISION)


@triton.jit
def _weighted_words(
    weights, acc, keep, codes, words,
    CODEC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):
    """Add a tile of V whose codes are words; `acc` are four tiles of every fourth column."""
    zero, one, two, three = acc
    if CODEC == INT4:  # Words of two bytes; a byte's high code belongs to a column DIM / 2 further.
        scale_low, scale_high = _scales(words)
        peak = tl.max(tl.maximum(scale_low, scale_high), 0)
        safe = tl.where(peak == 0, 1.0, peak)
        first = (weights * (scale_low / safe)[None, :]).to(DOT)
        last = (weights * (scale_high / safe)[None, :]).to(DOT)
        low, high = _nibbles(_byte(codes, 0), DOT)
        zero = _more(zero, keep, first, low, safe, PRECISION)
        two = _more(two, keep, last, high, safe, PRECISION)
        low, high = _nibbles(_byte(codes, 1), DOT)
        one = _more(one, keep, first, low, safe, PRECISION)
        three = _more(three, keep, last, high, safe, PRECISION)
    else:  # Words of four bytes.
        scale = words.to(tl.float32, bitcast=True)
        peak = tl.max(scale, 0)
        safe = tl.where(peak == 0, 1.0, peak)
        scaled = (weights * (scale / safe)[None, :]).to(DOT)
        zero = _more(zero, keep, scaled, _widen(_byte(codes, 0), CODEC, DOT), safe, PRECISION)
        one = _more(one, keep, scaled, _widen(_byte(codes, 1), CODEC, DOT), safe, PRECISION)
        two = _more(two, keep, scaled, _widen(_byte(codes, 2), CODEC, DOT), safe, PRECISION)
        three = _more(three, keep, scaled, _widen(_byte(codes, 3), CODEC, DOT), safe, PRECISION)
    return zero, one, two, three


@triton.jit
def nothing(CODEC: tl.constexpr, WORD: tl.constexpr, BLOCK_M: tl.constexpr, DIM: tl.constexpr):
    """Return the output tiles before any V."""
    if WORD == 1:
        none = tl.zeros((BLOCK_M, DIM // 2 if CODEC == INT4 else DIM), tl.float32)
        return none, none
    else:
        part = tl.zeros((BLOCK_M, DIM // 4), tl.float32)
        return part, part, part, part


@triton.jit
def woven(
    acc, CODEC: tl.constexpr, WORD: tl.constexpr, BLOCK_M: tl.constexpr, DIM: tl.constexpr,
):
    """Put the tiles of `weighted` together as [BLOCK_M, DIM]."""
    if WORD == 1:
        return _woven_bytes(acc, CODEC, BLOCK_M, DIM)
    else:
        return _woven_words(acc, CODEC, BLOCK_M, DIM)


@triton.jit
def _woven_bytes(acc, CODEC: tl.constexpr, BLOCK_M: tl.constexpr, DIM: tl.constexpr):
    low, high = acc
    if CODEC == INT4:
        return joined(low, high, BLOCK_M, DIM)
    else:
        return low


@triton.jit
def _woven_words(acc, CODEC: tl.constexpr, BLOCK_M: tl.constexpr, DIM: tl.constexpr):
    zero, one, two, three = acc
    if CODEC == INT4:
        low = tl.reshape(tl.join(zero, one), (BLOCK_M, DIM // 2))
        high = tl.reshape(tl.join(two, three), (BLOCK_M, DIM // 2))
        return joined(low, high, BLOCK_M, DIM)
    else:
        return tl.reshape(tl.join(tl.join(zero, two), tl.join(one, three)), (BLOCK_M, DIM))


@triton.jit
def _largest(rows):
    """Return the largest magnitude of each row. As integers, NaN is above Inf above the rest."""
    bits = rows.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, 1).to(tl.float32, bitcast=True)


@triton.jit
def _whole(scaled, LIMIT: tl.constexpr):
    """Return clipped values rounded to nearest, ties to even: 1.5 * 2^23 leaves no fraction."""
    clipped = tl.minimum(tl.maximum(scaled, -LIMIT), LIMIT)
    return ((clipped + 12582912.0) - 12582912.0).to(tl.int32)


@triton.jit
def _half_scale(rows):
    """Return INT4's scale of half rows: float16, rounded up, 1 for zeros."""
    top = _largest(rows)
    exact = tl.div_rn(top, tl.full(top.shape, 7.0, tl.float32))
    exact = tl.where((exact > 65504.0) & (exact < float("inf")), 65504.0, exact)
    scale = exact.to(tl.float16)
    above = (scale.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
    scale = tl.where(scale.to(tl.float32) < exact, above, scale)
    return tl.where(scale == 0.0, 1.0, scale).to(tl.float16)


@triton.jit
def _divided(rows, scale):
    """Return rows over their scales, rounded as torch rounds."""
    return tl.div_rn(rows, tl.broadcast_to(scale.to(tl.float32)[:, None], rows.shape))


@triton.jit
def encoded_halves(first, last):
    """Return INT4 codes, uint8, and scale words of rows whose two halves are given as float32."""
    scale, last_scale = _half_scale(first), _half_scale(last)
    low = _whole(_divided(first, scale), 7.0) + 8
    high = _whole(_divided(last, last_scale), 7.0) + 8
    codes = (low | (high << 4)).to(tl.uint8)
    bits = scale.to(tl.uint16, bitcast=True).to(tl.int32)
    return codes, bits | (last_scale.to(tl.uint16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def encoded(rows, CODEC: tl.constexpr):
    """Return FP8 or INT8 codes, uint8, and scale words of float32 rows."""
    LIMIT: tl.constexpr = 448.0 if CODEC == FP8 else 127.0
    top = _largest(rows)
    scale = tl.div_rn(top, tl.full(top.shape, LIMIT, tl.float32))
    scale = tl.where(scale == 0.0, 1.0, scale)
    scaled = _divided(rows, scale)
    if CODEC == FP8:
        clipped = tl.minimum(tl.maximum(scaled, -LIMIT), LIMIT)
        codes = clipped.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        codes = (_whole(scaled, LIMIT) & 255).to(tl.uint8)
    return codes, scale.to(tl.int32, bitcast=True)


@triton.jit
def decoded(codes, words, CODEC: tl.constexpr):
    """Return float32 rows of codes and scale words; for INT4 their first and their last halves."""
    if CODEC == INT4:
        low, high = _nibbles(codes, tl.float32)
        scale_low, scale_high = _scales(words)
        return low * scale_low[:, None], high * scale_high[:, None]
    else:
        return _widen(codes, CODEC, tl.float32) * words.to(tl.float32, bitcast=True)[:, None]


@triton.jit
def write_rows(
    key, value, cells, slots, tokens, key_token, key_head, value_token, value_head,
    page_stride, head_stride,
    CODEC: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
):
    """Quantise ROWS tokens of KV head `program_id(1)` into their places; K, then V.

    key, value [tokens, heads, DIM] with strides; cells uint8: page 0, head 0 of the layer.
    """
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, half = tl.program_id(1), tl.program_id(2)
    there = token < tokens
    slot = tl.load(slots + token, mask=there, other=0)
    at = slot // PAGE * page_stride + head.to(tl.int64) * head_stride
    wide = token.to(tl.int64)
    if half == 0:
        source = key + wide * key_token + head * key_head
    else:
        source = value + wide * value_token + head * value_head
    ROW: tl.constexpr = DIM // 2 if CODEC == INT4 else DIM
    place = cells + at + half * PAGE * ROW + slot % PAGE * ROW
    word = cells + at + 2 * PAGE * ROW + half * PAGE * 4 + slot % PAGE * 4
    dims = tl.arange(0, ROW)
    mask = there[:, None]
    rows = tl.load(source[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    if CODEC == INT4:
        last = tl.load(source[:, None] + ROW + dims[None, :], mask=mask, other=0.0).to(tl.float32)
        codes, bits = encoded_halves(rows, last)
    else:
        codes, bits = encoded(rows, CODEC)
    tl.store(place[:, None] + dims[None, :], codes, mask=mask)
    tl.store(word.to(tl.pointer_type(tl.int32)), bits, mask=there)
