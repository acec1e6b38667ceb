"""What `kvkernels.latent` calls for tensors on a CUDA device."""

# A launch passes plain values where the kernel's signature says constexpr.
# pyright: reportArgumentType=false

from math import e, log2
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2
from triton.runtime.interpreter import InterpretedFunction

from kvkernels.plans import AttentionPlan
from kvkernels.triton.device import DevicePlan
from kvkernels.triton.latent import attend_latents, merge_latents
from kvkernels.triton.latent_work import LatentShape, LatentWork, make_work, tiling_of
from kvstore.core.errors import Unsupported
from kvstore.core.limits import BLOCK_TOKENS

_MERGE_COLUMNS = 128
_MERGE_PARTS = 32
"""Partial results that one program of the merge reads at once: 32 x 128 floats."""

_DOTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_INTERPRETED = isinstance(attend_latents, InterpretedFunction)


def write_latents(latent: Tensor, rotary: Tensor, pages: Tensor, slots: Tensor, layer: int) -> None:
    """See `kvkernels.latent.write_latents`."""
    page = torch.div(slots, BLOCK_TOKENS, rounding_mode="floor")
    offset = slots % BLOCK_TOKENS
    rows = pages[:, layer]
    rows[..., : latent.shape[1]][page, offset] = latent
    rows[..., latent.shape[1] :][page, offset] = rotary


def latent_attention(
    query_latent: Tensor,
    query_rotary: Tensor,
    pages: Tensor,
    *,
    layer: int,
    plan: AttentionPlan,
    scale: float,
) -> Tensor:
    """See `kvkernels.latent.latent_attention`.

    Raises `Unsupported` for dimensions that are no powers of two from 16 to 512, for float32, and
    for plans whose lengths change between replays.
    """
    assert isinstance(plan, DevicePlan)
    device, latent = query_latent.device, query_latent.shape[2]
    shape = LatentShape(query_latent.shape[1], latent, query_rotary.shape[2], device)
    if plan.tables.device != device:
        plan.tables = plan.tables.to(device, non_blocking=True)
    key = shape, query_latent.dtype
    work = plan.latents.get(key)
    if work is None:
        _check(shape, query_latent.dtype, plan)
        tiling = tiling_of(shape, query_latent.dtype)
        work = make_work(plan.spans, shape, tiling, table_stride=plan.tables.stride(0))
        plan.latents[key] = work
    return attend(query_latent, query_rotary, pages[:, layer], plan.tables, work, scale=scale)


def _check(shape: LatentShape, dtype: torch.dtype, plan: DevicePlan) -> None:
    for name, size in (("latent", shape.latent), ("rope", shape.rope)):
        if size not in (16, 32, 64, 128, 256, 512):
            raise Unsupported(f"{name} dimension {size}: MLA kernels serve powers of two to 512")
    if dtype not in _DOTS and not _INTERPRETED:
        raise Unsupported(f"MLA kernels serve bfloat16 and float16, not {dtype}")
    if plan.replayed:
        raise Unsupported("MLA kernels serve plans of fixed lengths only")


def attend(
    query: Tensor, rotary: Tensor, cells: Tensor, tables: Tensor, work: LatentWork, *, scale: float
) -> Tensor:
    """Launch a step's work on one layer's cells, [pages, 16, row], and merge what was split."""
    query, rotary = (each if each.stride(2) == 1 else each.contiguous() for each in (query, rotary))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    tiling, heads, latent = work.tiling, query.shape[1], query.shape[2]
    kernel, options = _kernel(work, query.dtype)
    kernel[(work.items.shape[0] * work.blocks,)](
        *(query, rotary, out, cells, tables, work.items, work.partial, work.stats),
        *(query.stride(0), query.stride(1), rotary.stride(0), rotary.stride(1), cells.stride(0)),
        scale * log2(e),
        HEADS=heads,
        BLOCKS=work.blocks,
        LATENT=latent,
        ROPE=rotary.shape[2],
        BLOCK_M=tiling.rows,
        BLOCK_N=tiling.tile,
        PAGE=BLOCK_TOKENS,
        num_warps=tiling.warps,
        **options,
    )
    if len(work.firsts):
        columns = min(_MERGE_COLUMNS, latent)
        merge_latents[(work.tokens * heads, latent // columns, len(work.firsts))](
            *(out, work.partial, work.stats, work.items, work.firsts),
            HEADS=heads,
            ROWS=work.blocks * tiling.rows,
            LATENT=latent,
            PARTS=min(_MERGE_PARTS, next_power_of_2(work.most_parts)),
            COLUMNS=columns,
        )
    return out


def _kernel(work: LatentWork, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Return the kernel of a tiling and what it takes beyond what both take."""
    if work.tiling.hopper:
        # Gluon is imported only where it runs: it has no interpreter.
        from kvkernels.triton.latent_hopper import attend_latents_hopper

        return attend_latents_hopper, {}
    dot = tl.float32 if _INTERPRETED else _DOTS[dtype]
    return attend_latents, {"DOT": dot, "PRECISION": "ieee", "num_stages": work.tiling.stages}
