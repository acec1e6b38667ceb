"""Typed, checked entries to MLA pages: what one row a token, shared by all heads, is attended with.

Multi-head latent attention keeps one compressed row of a token in a layer: `latent_dim` elements
that are key and value at once, and `rope_dim` rotated ones that are key only (DeepSeek-AI,
"DeepSeek-V2", 2024). Queries come *absorbed*: multiplied with the key's up-projection, so that they
are compared with latents as they lie; what comes out is yet to be multiplied with the value's.

Pages are those of `kvstore.core.layout.LatentLayout`. As with `kvkernels.ops`, whose plans and
block copies serve them too, the device decides which code runs: torch on the CPU (the oracle),
Triton and Gluon on CUDA.
"""

from typing import Protocol

import torch
from torch import Tensor

from kvkernels import ops
from kvkernels.checks import check, say
from kvkernels.plans import AttentionPlan
from kvstore.core.errors import BadInput, Unsupported
from kvstore.core.layout import Codec, LatentLayout
from kvstore.core.limits import BLOCK_TOKENS

_ELEMENT_TYPES = {
    Codec.RAW32: (torch.float32,),
    Codec.RAW16: (torch.bfloat16, torch.float16),
}


class LatentImplementation(Protocol):
    """One device's code; this module documents and checks the arguments before it calls."""

    def write_latents(
        self, latent: Tensor, rotary: Tensor, pages: Tensor, slots: Tensor, layer: int
    ) -> None: ...

    def latent_attention(
        self,
        query_latent: Tensor,
        query_rotary: Tensor,
        pages: Tensor,
        *,
        layer: int,
        plan: AttentionPlan,
        scale: float,
    ) -> Tensor: ...


def implementation(device_type: str) -> LatentImplementation:
    """Return the code that serves tensors on `device_type`; raises `Unsupported` naming it."""
    if device_type == "cpu":
        from kvkernels import latent_reference

        return latent_reference
    if device_type == "cuda":
        from kvkernels.triton import latent_launch

        return latent_launch
    raise Unsupported(f"no kernels for device {device_type!r}; there are 'cpu' and 'cuda'")


def latent_view(pool: Tensor, layout: LatentLayout, dtype: torch.dtype | None = None) -> Tensor:
    """Return `pool` seen as rows of latents, without a copy and without the padding.

    pool uint8 [pages, block_bytes], rows contiguous; the result is [pages, layers, 16,
    latent_dim + rope_dim] of `dtype`, by default float32 for RAW32 and bfloat16 for RAW16.
    Raises `BadInput` for a pool or type that does not fit the layout.
    """
    types = _ELEMENT_TYPES[layout.codec]
    element = types[0] if dtype is None else dtype
    if element not in types:
        raise BadInput(f"codec {layout.codec.name} does not hold {element}")
    check(
        pool.dtype == torch.uint8 and pool.dim() == 2 and pool.shape[1] == layout.block_bytes,
        f"pool must be uint8 [n, {layout.block_bytes}], got {say(pool)}",
    )
    check(pool.stride(1) == 1, "pool rows must be contiguous")
    rows = pool[:, : layout.payload_bytes].view(element)
    width = layout.latent_dim + layout.rope_dim
    return rows.as_strided(
        (pool.shape[0], layout.layers, BLOCK_TOKENS, width),
        (rows.stride(0), BLOCK_TOKENS * width, width, 1),
    )


def write_latents(latent: Tensor, rotary: Tensor, pages: Tensor, slots: Tensor, layer: int) -> None:
    """Write new tokens' rows into their places.

    latent [tokens, latent_dim] and rotary [tokens, rope_dim], rotated, of the type of pages as
    `latent_view` gives them; slots int64 [tokens] = page * 16 + offset, unique and inside the pool.
    """
    width = _width(pages, layer)
    check(
        slots.dim() == 1 and slots.dtype == torch.int64,
        f"slots must be int64 [tokens], got {say(slots)}",
    )
    for name, rows in (("latent", latent), ("rotary", rotary)):
        check(
            rows.dim() == 2 and rows.shape[0] == slots.shape[0] and rows.dtype == pages.dtype,
            f"{name} must be [{slots.shape[0]}, n] of {pages.dtype}, got {say(rows)}",
        )
    check(
        latent.shape[1] + rotary.shape[1] == width,
        f"rows of {latent.shape[1]} and {rotary.shape[1]} elements for pages of {width}",
    )
    implementation(pages.device.type).write_latents(latent, rotary, pages, slots, layer)


def latent_attention(
    query_latent: Tensor,
    query_rotary: Tensor,
    pages: Tensor,
    *,
    layer: int,
    block_tables: Tensor,
    context_lengths: Tensor,
    query_starts: Tensor,
    scale: float,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Attend causally from absorbed queries to everything their sequence holds in its pages.

    query_latent [tokens, heads, latent_dim], query_rotary [tokens, heads, rope_dim], the
    sequences' rows one after another; the index tensors and `plan` are `ops.paged_attention`'s. A
    token's score is the sum of both parts' products, times `scale`; the result, like query_latent,
    is the weighted sum of latents. Meant for few new tokens a sequence: each reads the context anew
    unless `heads` is below a tile's rows.
    """
    width = _width(pages, layer)
    check(query_latent.dim() == 3, f"query_latent must be [n, heads, dim], got {say(query_latent)}")
    rope = width - query_latent.shape[2]
    check(
        rope > 0 and query_rotary.shape == (*query_latent.shape[:2], rope),
        f"query_rotary must be {[*query_latent.shape[:2], max(rope, 0)]}, got {say(query_rotary)}",
    )
    for name, query in (("query_latent", query_latent), ("query_rotary", query_rotary)):
        check(query.dtype == pages.dtype, f"{name} is {query.dtype}, pages are {pages.dtype}")
    if plan is None:
        plan = ops.plan_attention(
            block_tables, context_lengths, query_starts, device_type=pages.device.type
        )
    check(
        plan.query_tokens == query_latent.shape[0],
        f"query has {query_latent.shape[0]} tokens, its starts say {plan.query_tokens}",
    )
    return implementation(pages.device.type).latent_attention(
        query_latent, query_rotary, pages, layer=layer, plan=plan, scale=scale
    )


def _width(pages: Tensor, layer: int) -> int:
    """Return the elements of a token's row in pages that `latent_view` made."""
    check(
        pages.dim() == 4 and pages.shape[2] == BLOCK_TOKENS and pages.stride(3) == 1,
        f"pages must come from latent_view, got {say(pages)}",
    )
    check(0 <= layer < pages.shape[1], f"layer {layer} of {pages.shape[1]}")
    return pages.shape[3]
