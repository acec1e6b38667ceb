"""A tensor-parallel rank's part of a model: some of its heads, and as much of every layer between.

    column: q, k, v, gate, up    a rank keeps whole output rows: its heads, its part of the middle
    row:    o, down              it keeps the matching input columns; the ranks' results are summed

What a rank attends with is whole, so its K and V are some heads of every block: one byte range
(`kvstore.core.layout`). Embedding and norms are every rank's; logits are rank 0's alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kvstore.core.errors import BadInput, Unsupported
from kvstore.core.layout import BlockLayout

_COLUMNS: Final = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"
)  # fmt: skip
_ROWS: Final = ("self_attn.o_proj", "mlp.down_proj")

Summing = Callable[[Tensor], Tensor]
"""Returns the sum over all ranks; every rank calls it at the same places, in the same order."""


def only_one(tensor: Tensor) -> Tensor:
    """Sum over the ranks where there is one."""
    return tensor


@dataclass(frozen=True, slots=True)
class Part:
    """Which of `ranks` equal parts a process has."""

    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks:
            raise BadInput(f"rank {self.rank} of {self.ranks}")

    def layout(self, whole: BlockLayout) -> BlockLayout:
        """Return how this part of a block lies in the rank's own pages."""
        if self.ranks == 1:
            return whole
        return replace(whole, kv_heads=self._heads(whole), padded=False)

    def offset(self, whole: BlockLayout) -> int:
        """Return where this part begins in a block of `whole`, in bytes."""
        heads = self._heads(whole)
        return whole.heads(self.rank * heads, heads).start

    def _heads(self, whole: BlockLayout) -> int:
        if whole.kv_heads % self.ranks:
            raise Unsupported(
                f"{whole.kv_heads} KV heads do not divide into {self.ranks} tensor-parallel ranks"
            )
        return whole.kv_heads // self.ranks

    def of(self, name: str, count: int) -> slice:
        """Return the rank's part of `count` rows; `Unsupported` naming what does not divide."""
        if count % self.ranks:
            raise Unsupported(f"{name} {count} does not divide into {self.ranks} ranks")
        each = count // self.ranks
        return slice(self.rank * each, (self.rank + 1) * each)


WHOLE: Final = Part()


class SummedLinear(nn.Module):
    """A row-parallel product: this rank's columns, summed over the ranks."""

    def __init__(self, part: nn.Linear, total: Summing) -> None:
        super().__init__()
        self.weight, self.bias = part.weight, part.bias
        self._total = total

    def forward(self, columns: Tensor) -> Tensor:
        """Return [..., out] of [..., this rank's columns]."""
        return self._total(linear(columns, self.weight, self.bias))


def cut(module: Any, part: Part, total: Summing, *, kv_heads: int) -> None:
    """Leave of transformers' `module` what `part` computes, in place; one part of one: all.

    Raises `Unsupported`, before anything is cut, for layers whose products are others than
    attention's four and a gated network's three, and for sizes that do not divide.
    """
    if part.ranks == 1:
        return
    name = module.config.model_type
    part.of(f"{name}: number of KV heads", kv_heads)
    layers = _layers(module)
    for layer in layers:
        _check(layer, name, part)
    for layer in layers:
        for place in _COLUMNS:
            _keep_rows(layer.get_submodule(place), part)
        for place in _ROWS:
            owner, _, leaf = place.rpartition(".")
            row: Any = layer.get_submodule(place)
            _keep_columns(row, part)
            setattr(layer.get_submodule(owner), leaf, SummedLinear(row, total))
    if part.rank:  # Nobody asks this rank for logits.
        module.lm_head.weight = _kept(module.lm_head.weight[:0])


def _layers(module: Any) -> list[nn.Module]:
    layers = getattr(getattr(module, "model", None), "layers", None)
    head = getattr(module, "lm_head", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(head, nn.Linear):
        raise Unsupported(f"{module.config.model_type}: its layers are not where ranks expect them")
    return list(layers)


def _check(layer: nn.Module, name: str, part: Part) -> None:
    """Raise `Unsupported` for a layer that a rank could not compute its part of."""
    found = {place for place, inner in layer.named_modules() if isinstance(inner, nn.Linear)}
    wanted = {*_COLUMNS, *_ROWS}
    if found != wanted:
        odd = ", ".join(sorted(found ^ wanted))
        raise Unsupported(f"{name}: tensor parallelism does not know layers with or without {odd}")
    attention: Any = layer.get_submodule("self_attn")
    for norm in ("q_norm", "k_norm"):
        inner = getattr(attention, norm, None)
        if inner is not None and inner.weight.numel() != attention.head_dim:
            raise Unsupported(f"{name}: {norm} over all heads is not served by several ranks")
    middle: Any = layer.get_submodule("mlp.down_proj")
    part.of(f"{name}: intermediate size", middle.in_features)


def _keep_rows(product: Any, part: Part) -> None:
    mine = part.of("output rows", product.out_features)
    product.weight = _kept(product.weight[mine])
    if product.bias is not None:
        product.bias = _kept(product.bias[mine])
    product.out_features = product.weight.shape[0]


def _keep_columns(product: Any, part: Part) -> None:
    product.weight = _kept(product.weight[:, part.of("input columns", product.in_features)])
    product.in_features = product.weight.shape[1]
    if part.rank:
        product.bias = None  # It is added once: the sum has rank 0's.


def _kept(tensor: Tensor) -> nn.Parameter:
    """Return a copy of its own, so that the whole weight can go."""
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format), False)
