"""Typed, checked entries to the small kernels around attention: norms, rotation, activation.

A decoder layer of transformers launches some twenty small kernels; on a GPU at small batches they
take as long as the matrix products. Each entry here is one launch. As with `kvkernels.ops`, the
device of the tensors decides which code runs: plain torch on the CPU (the oracle), Triton on CUDA.

Every intermediate that transformers rounds to the element type is rounded here as well, so in
float32 and bfloat16 alike results differ from its modules' only by the order of sums.
"""

from typing import Protocol

import torch
from torch import Tensor

from kvkernels.checks import check, check_pages, say
from kvstore.core.errors import Unsupported


class FusedImplementation(Protocol):
    """One device's code; this module documents and checks the arguments before it calls."""

    def add_rms_norm(
        self, hidden: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]: ...

    def rotate_into_pages(
        self,
        projected: Tensor,
        cosine: Tensor,
        sine: Tensor,
        pages: Tensor,
        slots: Tensor,
        layer: int,
        query_heads: int,
        norms: tuple[Tensor, Tensor] | None,
        epsilon: float,
    ) -> Tensor: ...

    def gated_silu(self, projected: Tensor) -> Tensor: ...

    def choose(self, logits: Tensor) -> Tensor: ...


def implementation(device_type: str) -> FusedImplementation:
    """Return the code that serves tensors on `device_type`; raises `Unsupported` naming it."""
    if device_type == "cpu":
        from kvkernels import fused_reference

        return fused_reference
    if device_type == "cuda":
        from kvkernels.triton import fused

        return fused
    raise Unsupported(f"no kernels for device {device_type!r}; there are 'cpu' and 'cuda'")


def add_rms_norm(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, *, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return `hidden + residual`, normed and as it is: two tensors like `hidden`.

    hidden, residual [tokens, width], contiguous rows; weight [width], of one type. Without
    `residual` the second tensor is `hidden` itself. The norm: Zhang and Sennrich, "Root Mean Square
    Layer Normalization" (2019).
    """
    check(hidden.dim() == 2, f"hidden must be [tokens, width], got {say(hidden)}")
    expected = hidden.shape[1:]
    check(
        weight.shape == expected and weight.dtype == hidden.dtype,
        f"weight must be {tuple(expected)} of {hidden.dtype}, got {say(weight)}",
    )
    check(
        residual is None or (residual.shape == hidden.shape and residual.dtype == hidden.dtype),
        f"residual must be like hidden, got {residual if residual is None else say(residual)}",
    )
    return implementation(hidden.device.type).add_rms_norm(hidden, residual, weight, epsilon)


def rotate_into_pages(
    projected: Tensor,
    cosine: Tensor,
    sine: Tensor,
    pages: Tensor,
    slots: Tensor,
    *,
    layer: int,
    query_heads: int,
    norms: tuple[Tensor, Tensor] | None = None,
    epsilon: float = 0.0,
) -> Tensor:
    """Rotate queries and keys by position, write K and V into their pages, return the queries.

    projected [tokens, (query_heads + 2 kv_heads) * head_dim]: each token's query heads, then key
    heads, then value heads; cosine and sine [tokens, head_dim] (the two halves of a row alike, as
    transformers makes them); pages as `ops.page_view` gives them; slots int64 [tokens], page * 16 +
    offset, unique and inside the pool. `norms`: weights [head_dim] of the norms of query and key
    heads before the rotation, with `epsilon`. Returns [tokens, query_heads, head_dim].
    The rotation: Su et al., "RoFormer" (2021).
    """
    heads, dim = check_pages(pages, layer)
    tokens = slots.shape[0]
    width = (query_heads + 2 * heads) * dim
    check(
        projected.shape == (tokens, width) and projected.dtype == pages.dtype,
        f"projected must be [{tokens}, {width}] of {pages.dtype}, got {say(projected)}",
    )
    check(slots.dtype == torch.int64, f"slots must be int64 [tokens], got {say(slots)}")
    for name, tensor in (("cosine", cosine), ("sine", sine)):
        check(
            tensor.shape == (tokens, dim) and tensor.dtype == pages.dtype,
            f"{name} must be [{tokens}, {dim}] of {pages.dtype}, got {say(tensor)}",
        )
    for tensor in norms or ():
        check(
            tensor.shape == (dim,) and tensor.dtype == pages.dtype,
            f"weights of norms must be [{dim}] of {pages.dtype}, got {say(tensor)}",
        )
    return implementation(pages.device.type).rotate_into_pages(
        projected, cosine, sine, pages, slots, layer, query_heads, norms, epsilon
    )


def gated_silu(projected: Tensor) -> Tensor:
    """Return `silu(gate) * up` of projected [tokens, 2 * width]: gate in the first half.

    Shazeer, "GLU Variants Improve Transformer" (2020).
    """
    check(
        projected.dim() == 2 and projected.shape[1] % 2 == 0,
        f"projected must be [tokens, 2 * width], got {say(projected)}",
    )
    return implementation(projected.device.type).gated_silu(projected)


def choose(logits: Tensor) -> Tensor:
    """Return the greedy choice of each row of logits, float32 [rows, vocab]: int64 [2, rows].

    First the largest logit's id, the lowest of equal ones; then 1 where all of a row's logits are
    finite, else 0 (the id is then any of the vocabulary).
    """
    check(
        logits.dim() == 2 and logits.dtype == torch.float32 and logits.shape[1] > 0,
        f"logits must be float32 [rows, vocab], got {say(logits)}",
    )
    return implementation(logits.device.type).choose(logits)
