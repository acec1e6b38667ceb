"""Plain torch for `kvkernels.fused`: what the CPU runs, and the oracle of the Triton kernels."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from kvkernels import reference


def add_rms_norm(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """See `kvkernels.fused.add_rms_norm`."""
    total = hidden if residual is None else residual + hidden
    return _normed(total, weight, epsilon), total


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
    each = projected.view(projected.shape[0], -1, dim)
    query, key, value = torch.split(each, [query_heads, heads, heads], dim=1)
    if norms is not None:
        query, key = (_normed(x, w, epsilon) for x, w in zip((query, key), norms, strict=True))
    query, key = (_rotated(x, cosine, sine) for x in (query, key))
    reference.write_pages(key, value, pages, slots, layer)
    return query


def gated_silu(projected: Tensor) -> Tensor:
    """See `kvkernels.fused.gated_silu`."""
    gate, up = projected.chunk(2, dim=1)
    return silu(gate) * up


def choose(logits: Tensor) -> Tensor:
    """See `kvkernels.fused.choose`."""
    return torch.stack([torch.argmax(logits, dim=-1), torch.isfinite(logits).all(dim=-1).long()])


def _normed(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = rows.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(rows.dtype)


def _rotated(rows: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate [tokens, heads, dim]; element i of a row is paired with i + dim / 2."""
    first, second = rows.chunk(2, dim=2)
    turned = torch.cat((-second, first), dim=2)
    return rows * cosine[:, None] + turned * sine[:, None]
