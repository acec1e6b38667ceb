"""The small kernels around attention, one launch each; see `kvkernels.fused` for what they do."""

# Triton reads a kernel's annotations as its own signature, and its decorator carries no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from kvstore.core.limits import BLOCK_TOKENS

_HEADS = 8
"""Heads that a program rotates: 64 tokens of 48 heads are 384 programs."""

_LOGITS = 4_096
"""Logits that a program looks at for the largest."""

_COLUMNS = 1_024
"""Columns that a program of the activation computes."""

# fmt: off


@triton.jit
def add_and_norm(
    hidden, residual, weight, normed, total, width, epsilon, ADD: tl.constexpr, BLOCK: tl.constexpr,
):
    """Do row `program_id(0)`; all tensors [tokens, width], contiguous."""
    columns = tl.arange(0, BLOCK)
    used = columns < width
    row = tl.program_id(0).to(tl.int64) * width
    element = hidden.dtype.element_ty
    x = tl.load(hidden + row + columns, mask=used, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual + row + columns, mask=used, other=0.0).to(tl.float32)
        rounded = x.to(element)
        tl.store(total + row + columns, rounded, mask=used)
        x = rounded.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / width + epsilon)
    scale = tl.load(weight + columns, mask=used, other=0.0).to(tl.float32)
    answer = x.to(element).to(tl.float32) * scale
    tl.store(normed + row + columns, answer.to(element), mask=used)


@triton.jit
def _head_norm(one, two, weight, halves, epsilon, HALF: tl.constexpr, ELEMENT: tl.constexpr):
    """Norm rows that lie in two halves, rounding where transformers does."""
    mean = (tl.sum(one * one, 1) + tl.sum(two * two, 1)) / (2 * HALF)
    scale = tl.rsqrt(mean + epsilon)[:, None]
    one = (one * scale).to(ELEMENT).to(tl.float32)
    two = (two * scale).to(ELEMENT).to(tl.float32)
    one *= tl.load(weight + halves).to(tl.float32)
    two *= tl.load(weight + halves + HALF).to(tl.float32)
    return one.to(ELEMENT).to(tl.float32), two.to(ELEMENT).to(tl.float32)


@triton.jit
def _turned(one, two, cosine, sine, ELEMENT: tl.constexpr):
    """Return one * cosine + two * sine, each product rounded.

    Launched without fusing of products and sums: ptxas would round once, and of 128 query elements
    26 differed from transformers'.
    """
    first = (one * cosine).to(ELEMENT).to(tl.float32)
    second = (two * sine).to(ELEMENT).to(tl.float32)
    return (first + second).to(ELEMENT)


@triton.jit
def rotate_and_write(
    projected, cosine, sine, query, layer_pages, slots, query_norm, key_norm, epsilon,
    token_stride, page_stride, head_stride, value_offset,
    QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
    HEADS: tl.constexpr, NORM: tl.constexpr,
):
    """Do heads [HEADS p, HEADS p + HEADS) of token `program_id(0)`, p `program_id(1)`.

    projected [tokens, (QUERY_HEADS + 2 KV_HEADS) * 2 HALF]; query [tokens, QUERY_HEADS, 2 HALF],
    contiguous; layer_pages: K of page 0, head 0, with V `value_offset` elements behind.
    """
    ELEMENT: tl.constexpr = query.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    halves = tl.arange(0, HALF)
    there = (head < QUERY_HEADS + 2 * KV_HEADS)[:, None]
    place = head[:, None] * (2 * HALF) + halves[None, :]
    row = projected + token * token_stride
    one_raw = tl.load(row + place, mask=there, other=0.0)
    two_raw = tl.load(row + place + HALF, mask=there, other=0.0)
    one, two = one_raw.to(tl.float32), two_raw.to(tl.float32)
    is_query = (head < QUERY_HEADS)[:, None]
    if NORM:
        query_one, query_two = _head_norm(one, two, query_norm, halves, epsilon, HALF, ELEMENT)
        key_one, key_two = _head_norm(one, two, key_norm, halves, epsilon, HALF, ELEMENT)
        one = tl.where(is_query, query_one, key_one)
        two = tl.where(is_query, query_two, key_two)
    angle = token * (2 * HALF) + halves
    first = _turned(
        one, -two, tl.load(cosine + angle).to(tl.float32)[None, :],
        tl.load(sine + angle).to(tl.float32)[None, :], ELEMENT,
    )
    second = _turned(
        two, one, tl.load(cosine + angle + HALF).to(tl.float32)[None, :],
        tl.load(sine + angle + HALF).to(tl.float32)[None, :], ELEMENT,
    )
    answer = query + token * (QUERY_HEADS * 2 * HALF) + place
    tl.store(answer, first, mask=is_query)
    tl.store(answer + HALF, second, mask=is_query)
    slot = tl.load(slots + token)
    kv_head = head - QUERY_HEADS
    is_value = (kv_head >= KV_HEADS)[:, None]
    within = tl.where(kv_head >= KV_HEADS, kv_head - KV_HEADS, kv_head).to(tl.int64) * head_stride
    cell = layer_pages + slot // PAGE * page_stride + slot % PAGE * (2 * HALF)
    target = cell + within[:, None] + tl.where(is_value, value_offset, 0) + halves[None, :]
    wanted = there & (kv_head >= 0)[:, None]
    tl.store(target, tl.where(is_value, one_raw, first), mask=wanted)
    tl.store(target + HALF, tl.where(is_value, two_raw, second), mask=wanted)


@triton.jit
def gate_and_multiply(projected, out, width, BLOCK: tl.constexpr):
    """Do columns [BLOCK p, BLOCK p + BLOCK) of row `program_id(0)`, p `program_id(1)`."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    used = columns < width
    row = tl.program_id(0).to(tl.int64)
    place = projected + row * 2 * width + columns
    element = projected.dtype.element_ty
    gate = tl.load(place, mask=used, other=0.0).to(tl.float32)
    up = tl.load(place + width, mask=used, other=0.0).to(tl.float32)
    opened = (gate / (1.0 + tl.exp(-gate))).to(element).to(tl.float32)
    tl.store(out + row * width + columns, (opened * up).to(element), mask=used)


@triton.jit
def best_of_parts(logits, tops, places, finite, vocab, BLOCK: tl.constexpr):
    """Find the largest of logits [BLOCK p, BLOCK p + BLOCK) of row `program_id(0)`, and where.

    tops float32, places int32, finite int32: [rows, parts].
    """
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    used = columns < vocab
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(logits + row * vocab + columns, mask=used, other=float("-inf"))
    good = tl.min(tl.where(used & ((x != x) | (tl.abs(x) == float("inf"))), 0, 1), 0)
    x = tl.where(x == x, x, float("-inf"))
    top = tl.max(x, 0)
    place = tl.min(tl.where(used & (x == top), columns, vocab - 1), 0)
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(tops + at, top)
    tl.store(places + at, place)
    tl.store(finite + at, good)


@triton.jit
def best_of_row(tops, places, finite, chosen, parts, vocab, PARTS: tl.constexpr):
    """Join the parts of row `program_id(0)` into chosen int64 [2, rows]."""
    row, each = tl.program_id(0), tl.arange(0, PARTS)
    at, used = row * parts + each, each < parts
    top = tl.load(tops + at, mask=used, other=float("-inf"))
    place = tl.load(places + at, mask=used, other=0)
    best = tl.min(tl.where(used & (top == tl.max(top, 0)), place, vocab - 1), 0)
    good = tl.min(tl.load(finite + at, mask=used, other=1), 0)
    tl.store(chosen + row, best.to(tl.int64))
    tl.store(chosen + tl.num_programs(0) + row, good.to(tl.int64))


# fmt: on


def add_rms_norm(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """See `kvkernels.fused.add_rms_norm`."""
    hidden = hidden.contiguous()
    tokens, width = hidden.shape
    normed = torch.empty_like(hidden)
    total = hidden if residual is None else torch.empty_like(hidden)
    if tokens:
        block = next_power_of_2(width)
        add_and_norm[(tokens,)](
            hidden,
            hidden if residual is None else residual.contiguous(),
            weight,
            normed,
            total,
            width,
            epsilon,
            ADD=residual is not None,
            BLOCK=block,
            num_warps=max(1, min(8, block // 512)),
        )
    return normed, total


def rotate_into_pages(
    projected: Tensor,
    cosine: Tensor,
    sine: Tensor,
    pages: Tensor,
    slots: Tensor,
    layer: int,
    query_heads: int,
    norms: tuple[Tensor, Tensor] | None,
    epsilon: float,
) -> Tensor:
    """See `kvkernels.fused.rotate_into_pages`."""
    heads, dim = pages.shape[1], pages.shape[5]
    tokens = projected.shape[0]
    query = torch.empty(tokens, query_heads, dim, dtype=projected.dtype, device=projected.device)
    if tokens:
        cells = pages.select(2, layer)
        query_norm, key_norm = norms or (cosine, cosine)
        rotate_and_write[(tokens, -(-(query_heads + 2 * heads) // _HEADS))](
            *(projected, cosine.contiguous(), sine.contiguous(), query, cells, slots),
            *(query_norm, key_norm, epsilon),
            *(projected.stride(0), cells.stride(0), cells.stride(1), cells.stride(2)),
            QUERY_HEADS=query_heads,
            KV_HEADS=heads,
            HALF=dim // 2,
            PAGE=BLOCK_TOKENS,
            HEADS=_HEADS,
            NORM=norms is not None,
            num_warps=2,
            enable_fp_fusion=False,
        )
    return query


def gated_silu(projected: Tensor) -> Tensor:
    """See `kvkernels.fused.gated_silu`."""
    projected = projected.contiguous()
    tokens, width = projected.shape[0], projected.shape[1] // 2
    out = torch.empty(tokens, width, dtype=projected.dtype, device=projected.device)
    if tokens:
        gate_and_multiply[(tokens, -(-width // _COLUMNS))](projected, out, width, BLOCK=_COLUMNS)
    return out


def choose(logits: Tensor) -> Tensor:
    """See `kvkernels.fused.choose`."""
    logits = logits.contiguous()
    rows, vocab = logits.shape
    chosen = torch.empty(2, rows, dtype=torch.int64, device=logits.device)
    if rows:
        parts = -(-vocab // _LOGITS)
        tops = torch.empty(rows, parts, device=logits.device)
        places, finite = torch.empty(2, rows, parts, dtype=torch.int32, device=logits.device)
        best_of_parts[(rows, parts)](logits, tops, places, finite, vocab, BLOCK=_LOGITS)
        best_of_row[(rows,)](
            tops, places, finite, chosen, parts, vocab, PARTS=next_power_of_2(parts)
        )
    return chosen
