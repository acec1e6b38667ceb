"""What a model keeps per token and weighs, read from its published configuration. Pure.

Knows the field names that `config.json` files of transformers use; never opens a file and never
imports transformers, so a planner needs neither weights nor an engine. Layers fall into groups
(DESIGN §5, "Groups"), one kind of state each:

    full      K and V of every token                            MHA, GQA, MQA
    sliding   K and V of the last `window_tokens` tokens         Mistral, Gemma, gpt-oss
    latent    one compressed vector of every token (MLA)         DeepSeek-V2, V3
    state     a fixed state whatever the length (SSM, linear)    Qwen3-Next, Jamba
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from kvstore.core.errors import BadInput, Unsupported

_SIZE_FIELDS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


class LayerKind(StrEnum):
    """What a layer keeps of the past."""

    FULL = "full"
    SLIDING = "sliding"
    LATENT = "latent"
    STATE = "state"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layers of one kind; fields that the kind has no use for are 0."""

    kind: LayerKind
    layers: int
    kv_heads: int = 0
    head_dim: int = 0
    window_tokens: int = 0
    latent_values: int = 0
    """Elements kept of a token in one layer: latent rank plus rope dimensions."""
    rope_values: int = 0
    """Of those, the rotary part, which stays in 16 bits where the latent is quantised."""
    state_bytes: int = 0
    """Bytes of one layer's state of one sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Everything a capacity plan needs to know of a model."""

    name: str
    groups: tuple[LayerGroup, ...]
    query_heads: int
    attention_dim: int
    """Dimensions of one head in the product of queries and keys; FLOPs of attention follow."""
    parameters: int
    """All weights, estimated from the sizes: norms and biases are left out (< 0.1 %)."""
    active_parameters: int
    """Weights one token passes through; less than all in a mixture of experts."""

    @property
    def layers(self) -> int:
        """Layers of every kind."""
        return sum(group.layers for group in self.groups)

    @property
    def grouping(self) -> float:
        """Query heads per KV head in full and sliding layers: what GQA saves; 1.0 for MHA."""
        heads = [group.kv_heads for group in self.groups if group.kv_heads]
        return self.query_heads / heads[0] if heads else 1.0


def read_config(name: str, config: Mapping[str, Any]) -> ModelShape:
    """Return the shape that a transformers configuration describes.

    A multimodal configuration is read at its `text_config`. Raises `BadInput` naming a missing or
    impossible field, `Unsupported` naming a layer kind that is not understood.
    """
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        raise BadInput(f"{name}: text_config is not an object")
    fields = _Fields(name, text)
    for field in _SIZE_FIELDS:
        fields.size(field)
    groups = _groups(fields)  # first: it says which layers are not understood
    total, active = _parameters(fields)
    heads = fields.size("num_attention_heads")
    latent = fields.optional("kv_lora_rank") > 0
    attention_dim = (
        fields.size("qk_nope_head_dim") + fields.size("qk_rope_head_dim")
        if latent
        else _head_dim(fields)
    )
    return ModelShape(
        name=name,
        groups=groups,
        query_heads=heads,
        attention_dim=attention_dim,
        parameters=total,
        active_parameters=active,
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    """Checked access to a configuration."""

    name: str
    values: Mapping[str, Any]

    def size(self, field: str) -> int:
        """Return a field that must be a positive integer."""
        value = self.values.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise BadInput(f"{self.name}: {field} must be a positive integer, got {value!r}")
        return value

    def optional(self, field: str, default: int = 0) -> int:
        """Return a field that may be absent or null."""
        return default if self.values.get(field) is None else self.size(field)


def _head_dim(fields: _Fields) -> int:
    default = fields.size("hidden_size") // fields.size("num_attention_heads")
    return fields.optional("head_dim", default)


def _kv_heads(fields: _Fields) -> int:
    return fields.optional("num_key_value_heads", fields.size("num_attention_heads"))


def _layer_kinds(fields: _Fields) -> list[LayerKind]:
    """Return the kind of every layer, first to last."""
    layers = fields.size("num_hidden_layers")
    if fields.optional("kv_lora_rank"):
        return [LayerKind.LATENT] * layers
    named = fields.values.get("layer_types")
    if named is not None:
        return _named_kinds(fields, named, layers)
    period = fields.optional("attn_layer_period")
    if period:  # Jamba: one attention layer in `period`
        offset = fields.optional("attn_layer_offset")
        return [
            LayerKind.FULL if index % period == offset else LayerKind.STATE
            for index in range(layers)
        ]
    if not fields.optional("sliding_window") or fields.values.get("use_sliding_window") is False:
        return [LayerKind.FULL] * layers
    every = fields.optional("sliding_window_pattern")  # Gemma 3: each `every`-th layer is full
    return [
        LayerKind.FULL if every and (index + 1) % every == 0 else LayerKind.SLIDING
        for index in range(layers)
    ]


_NAMED_KINDS = {
    "full_attention": LayerKind.FULL,
    "sliding_attention": LayerKind.SLIDING,
    "chunked_attention": LayerKind.SLIDING,
    "linear_attention": LayerKind.STATE,
}


def _named_kinds(fields: _Fields, named: object, layers: int) -> list[LayerKind]:
    if not isinstance(named, list) or len(named) != layers:
        raise BadInput(f"{fields.name}: layer_types must list {layers} layers")
    unknown = sorted({str(kind) for kind in named if kind not in _NAMED_KINDS})
    if unknown:
        raise Unsupported(f"{fields.name}: layer_types {', '.join(unknown)} are not understood")
    return [_NAMED_KINDS[kind] for kind in named]


def _groups(fields: _Fields) -> tuple[LayerGroup, ...]:
    kinds = _layer_kinds(fields)
    return tuple(_group(fields, kind, kinds.count(kind)) for kind in LayerKind if kind in kinds)


def _group(fields: _Fields, kind: LayerKind, layers: int) -> LayerGroup:
    if kind is LayerKind.LATENT:
        rope = fields.size("qk_rope_head_dim")
        latent = fields.size("kv_lora_rank") + rope
        return LayerGroup(kind=kind, layers=layers, latent_values=latent, rope_values=rope)
    if kind is LayerKind.STATE:
        return LayerGroup(kind=kind, layers=layers, state_bytes=_state_bytes(fields))
    window = 0
    if kind is LayerKind.SLIDING:
        window = fields.optional("attention_chunk_size") or fields.size("sliding_window")
    return LayerGroup(
        kind=kind,
        layers=layers,
        kv_heads=_kv_heads(fields),
        head_dim=_head_dim(fields),
        window_tokens=window,
    )


def _state_bytes(fields: _Fields) -> int:
    """Return the bytes of one layer's recurrent (float32) and convolution (16-bit) state.

    Gated delta nets (Qwen3-Next) keep a matrix per value head; Mamba (Jamba) `d_state` numbers
    per inner channel. Both keep the last `kernel - 1` inputs of their convolution.
    """
    if fields.optional("linear_num_value_heads"):
        values = fields.size("linear_num_value_heads")
        key_dim, value_dim = (
            fields.size("linear_key_head_dim"),
            fields.size("linear_value_head_dim"),
        )
        channels = 2 * fields.size("linear_num_key_heads") * key_dim + values * value_dim
        kernel = fields.size("linear_conv_kernel_dim")
        return 4 * values * key_dim * value_dim + 2 * (kernel - 1) * channels
    if fields.optional("mamba_d_state"):
        inner = fields.size("mamba_expand") * fields.size("hidden_size")
        recurrent = 4 * inner * fields.size("mamba_d_state")
        return recurrent + 2 * (fields.size("mamba_d_conv") - 1) * inner
    raise Unsupported(f"{fields.name}: its state layers are neither Mamba nor gated delta nets")


def _parameters(fields: _Fields) -> tuple[int, int]:
    """Return (all, active) weights by the sizes of the matrices."""
    hidden, vocab = fields.size("hidden_size"), fields.size("vocab_size")
    tied = fields.values.get("tie_word_embeddings") is True
    outer = hidden * vocab * (1 if tied else 2)
    kinds = _layer_kinds(fields)
    mixing = sum(_mixer_weights(fields, kind) for kind in kinds)
    total = active = outer + mixing
    dense = 3 * hidden * fields.optional("intermediate_size", 4 * hidden)
    experts = _experts(fields)
    for index in range(len(kinds)):
        if not experts or not _is_expert_layer(fields, index):
            total, active = total + dense, active + dense
            continue
        expert = 3 * hidden * fields.optional("moe_intermediate_size", dense // (3 * hidden))
        shared = fields.optional("n_shared_experts") * expert
        shared += 3 * hidden * fields.optional("shared_expert_intermediate_size")
        used = fields.optional("num_experts_per_tok", 1)
        total += experts * expert + shared + experts * hidden
        active += used * expert + shared + experts * hidden
    return total, active


def _experts(fields: _Fields) -> int:
    for field in ("n_routed_experts", "num_local_experts", "num_experts"):
        if fields.optional(field):
            return fields.optional(field)
    return 0


def _is_expert_layer(fields: _Fields, index: int) -> bool:
    if index < fields.optional("first_k_dense_replace"):
        return False
    period = fields.optional("expert_layer_period", 1)
    return index % period == fields.optional("expert_layer_offset")


def _mixer_weights(fields: _Fields, kind: LayerKind) -> int:
    """Return the weights of one layer's attention or of what stands in its place."""
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if kind is LayerKind.STATE:
        if fields.optional("mamba_d_state"):
            inner = fields.size("mamba_expand") * hidden
            rank = fields.optional("mamba_dt_rank", -(-hidden // 16))
            state = fields.size("mamba_d_state")
            return 3 * hidden * inner + inner * (rank + 2 * state) + rank * inner
        values = fields.size("linear_num_value_heads") * fields.size("linear_value_head_dim")
        keys = fields.size("linear_num_key_heads") * fields.size("linear_key_head_dim")
        return hidden * (2 * keys + 3 * values)
    if kind is LayerKind.LATENT:
        rank, rope = fields.size("kv_lora_rank"), fields.size("qk_rope_head_dim")
        nope, value = fields.size("qk_nope_head_dim"), fields.size("v_head_dim")
        query_rank = fields.optional("q_lora_rank")
        query_width = heads * (nope + rope)
        queries = (hidden + query_width) * query_rank if query_rank else hidden * query_width
        return (
            queries
            + hidden * (rank + rope)
            + rank * heads * (nope + value)
            + heads * value * hidden
        )
    return 2 * hidden * _head_dim(fields) * (heads + _kv_heads(fields))
