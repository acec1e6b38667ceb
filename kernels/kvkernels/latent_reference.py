"""Attention over MLA pages in plain torch: what the CPU runs, and the oracle of the kernels."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvkernels.plans import AttentionPlan
from kvkernels.reference import ReferencePlan
from kvstore.core.limits import BLOCK_TOKENS


def write_latents(latent: Tensor, rotary: Tensor, pages: Tensor, slots: Tensor, layer: int) -> None:
    """See `kvkernels.latent.write_latents`."""
    page = torch.div(slots, BLOCK_TOKENS, rounding_mode="floor")
    pages[:, layer][page, slots % BLOCK_TOKENS] = torch.cat((latent, rotary), dim=1)


def latent_attention(
    query_latent: Tensor,
    query_rotary: Tensor,
    pages: Tensor,
    *,
    layer: int,
    plan: AttentionPlan,
    scale: float,
) -> Tensor:
    """See `kvkernels.latent.latent_attention`: one KV head whose value is the start of its key."""
    assert isinstance(plan, ReferencePlan)
    query = torch.cat((query_latent, query_rotary), dim=2)
    out = torch.empty_like(query_latent)
    for sequence in plan.sequences:
        rows = pages[:, layer].index_select(0, sequence.table).flatten(0, 1)
        for tile in sequence.tiles:
            # Cut to the context: what lies in unused places cannot leak in, not even NaN.
            key = rows[None, None, : tile.context]
            attended = scaled_dot_product_attention(
                query[tile.start : tile.stop].transpose(0, 1).unsqueeze(0),
                key,
                key[..., : query_latent.shape[2]],
                attn_mask=None if tile.mask is None else tile.mask.to(query.dtype),
                is_causal=tile.square,
                scale=scale,
                enable_gqa=query.shape[1] > 1,
            )
            out[tile.start : tile.stop] = attended[0].transpose(0, 1)
    return out
