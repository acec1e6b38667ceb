"""Llama-like decoders in few launches: transformers' weights, merged products, kernels of ours.

transformers' modules are right but launch some twenty small kernels a layer; here a layer is four
matrix products, attention, and four launches around them. The weights stay the module's own: the
merged ones are views into one tensor, so either way of computing uses the same memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from kvkernels import fused, ops
from kvkernels.plans import AttentionPlan
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from kvworkers.models.sharding import Summing, only_one
from kvworkers.models.step import StepInputs
from kvworkers.stream.gate import layer_groups

KINDS: Final = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` whose layers are computed here; others run as transformers does."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's weights, the merged ones once."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    head_norms: tuple[Tensor, Tensor] | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class FusedDecoder:
    """Computes a step of a model that `fuses` says yes to. For one thread at a time."""

    def __init__(self, module: Any, total: Summing = only_one) -> None:
        """Merge `module`'s weights, layer by layer: at most one layer's lie there twice.

        `total` sums over the ranks that have parts of it.
        """
        config, model = module.config, module.model
        self._epsilon = float(config.rms_norm_eps)
        self._module = module
        self._total = total
        self._rotary = model.rotary_emb
        self._layers = [_merged(layer) for layer in model.layers]
        attention = model.layers[0].self_attn
        # Not the configuration's number: a rank has some of them.
        self._query_heads = attention.q_proj.weight.shape[0] // int(attention.head_dim)
        self._later_groups = {group.start for group in layer_groups(len(self._layers))} - {0}

    def parts(self, step: StepInputs, pages: Tensor, plan: AttentionPlan) -> Iterator[Tensor]:
        """Compute a step on the device and write K and V, yielding after each group of layers.

        What comes last are the logits, fp32 [sampled rows, vocab]. Loads that the step follows are
        waited for in front of each group. Rows that nobody samples are left out behind the
        attention of the last layer.
        """
        model, epsilon = self._module.model, self._epsilon
        hidden: Tensor = embedding(step.tokens, model.embed_tokens.weight)
        cosine, sine = (x[0] for x in self._rotary(hidden[None], step.positions[None]))
        residual: Tensor | None = None
        for index, layer in enumerate(self._layers):
            if index in self._later_groups:
                yield hidden
            step.pass_layer(index)
            normed, residual = fused.add_rms_norm(
                hidden, residual, layer.input_norm, epsilon=epsilon
            )
            query = fused.rotate_into_pages(
                linear(normed, layer.qkv, layer.qkv_bias),
                cosine,
                sine,
                pages,
                step.slots,
                layer=index,
                query_heads=self._query_heads,
                norms=layer.head_norms,
                epsilon=epsilon,
            )
            attended = _attend(query, pages, step, plan, index).flatten(1)
            if index == len(self._layers) - 1:
                attended, residual = attended[step.sample_rows], residual[step.sample_rows]
            hidden = self._total(linear(attended, layer.out, layer.out_bias))
            normed, residual = fused.add_rms_norm(hidden, residual, layer.mlp_norm, epsilon=epsilon)
            hidden = linear(fused.gated_silu(linear(normed, layer.gate_up)), layer.down)
            hidden = self._total(hidden)
        normed, _ = fused.add_rms_norm(hidden, residual, model.norm.weight, epsilon=epsilon)
        yield linear(normed, self._module.lm_head.weight).float()


def fuses(module: Any) -> bool:
    """Say whether `FusedDecoder` computes what `module` does."""
    config = module.config
    windows = getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", True
    )
    return (
        config.model_type in KINDS
        and config.hidden_act == "silu"
        and not getattr(config, "mlp_bias", False)
        and not windows
        and module.lm_head.bias is None
    )


def _attend(
    query: Tensor, pages: Tensor, step: StepInputs, plan: AttentionPlan, layer: int
) -> Tensor:
    return ops.paged_attention(
        query,
        pages,
        layer=layer,
        block_tables=step.block_tables,
        context_lengths=step.context_lengths,
        query_starts=step.query_starts,
        scale=float(query.shape[-1] ** -0.5),
        plan=plan,
    )


def _merged(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = _merge(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, _ = _merge(mlp.gate_proj, mlp.up_proj)
    norms = None
    if hasattr(attention, "q_norm"):
        norms = (attention.q_norm.weight, attention.k_norm.weight)
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=qkv,
        qkv_bias=qkv_bias,
        head_norms=norms,
        out=attention.o_proj.weight,
        out_bias=attention.o_proj.bias,
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=gate_up,
        down=mlp.down_proj.weight,
    )


def _merge(*parts: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Return weights and biases one below another, and make the parts' own views of them."""
    weight = _stacked(parts, "weight")
    assert weight is not None
    return weight, _stacked(parts, "bias")


def _stacked(parts: tuple[nn.Linear, ...], name: str) -> Tensor | None:
    each = [getattr(part, name) for part in parts]
    if each[0] is None:
        return None
    whole = torch.cat([tensor.detach() for tensor in each])
    rows = torch.split(whole, [tensor.shape[0] for tensor in each])
    for part, mine in zip(parts, rows, strict=True):
        setattr(part, name, nn.Parameter(mine, requires_grad=False))
    return whole
