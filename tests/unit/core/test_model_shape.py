"""Configurations read: published parameter counts, layer kinds, and what is refused by name."""

from typing import Any

import pytest

from kvstore.core.catalogue import MODELS
from kvstore.core.errors import BadInput, Unsupported
from kvstore.core.model_shape import LayerKind, read_config

PUBLISHED_BILLIONS = {
    "smollm2-135m": (0.1345, 0.1345),
    "llama-2-7b": (6.74, 6.74),
    "llama-3-8b": (8.03, 8.03),
    "llama-3-70b": (70.55, 70.55),
    "llama-3.1-405b": (405.9, 405.9),
    "mistral-7b": (7.24, 7.24),
    "qwen3-32b": (32.8, 32.8),
    "gemma-3-27b": (27.0, 27.0),
    "gpt-oss-120b": (116.8, 5.7),
    "deepseek-v3": (671.0, 37.6),
    "qwen3-next-80b": (79.7, 3.8),
}
"""All and active weights as the models' cards or reports state them, embeddings included."""


@pytest.mark.parametrize("name", sorted(MODELS))
def test_weights_are_what_is_published(name: str) -> None:
    total, active = PUBLISHED_BILLIONS[name]
    model = read_config(name, MODELS[name])
    assert model.parameters / 1e9 == pytest.approx(total, rel=0.01)
    assert model.active_parameters / 1e9 == pytest.approx(active, rel=0.02)
    assert model.layers == MODELS[name]["num_hidden_layers"]


SMALL: dict[str, Any] = {
    "num_hidden_layers": 8,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "vocab_size": 1000,
    "intermediate_size": 1024,
}


def _kinds(**fields: object) -> dict[LayerKind, int]:
    return {group.kind: group.layers for group in read_config("small", SMALL | fields).groups}


def test_layers_fall_into_kinds() -> None:
    assert _kinds() == {LayerKind.FULL: 8}
    assert _kinds(sliding_window=None) == {LayerKind.FULL: 8}
    assert _kinds(sliding_window=256) == {LayerKind.SLIDING: 8}
    assert _kinds(sliding_window=256, use_sliding_window=False) == {LayerKind.FULL: 8}
    pattern = _kinds(sliding_window=256, sliding_window_pattern=4)
    assert pattern == {LayerKind.FULL: 2, LayerKind.SLIDING: 6}
    named = ["chunked_attention"] * 6 + ["full_attention"] * 2
    assert _kinds(layer_types=named, attention_chunk_size=128) == pattern
    mamba = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2}
    jamba = _kinds(attn_layer_period=8, attn_layer_offset=4, **mamba)
    assert jamba == {LayerKind.FULL: 1, LayerKind.STATE: 7}


def test_a_mamba_state_and_its_weights() -> None:
    config = SMALL | {
        "attn_layer_period": 8, "attn_layer_offset": 4, "mamba_d_state": 16, "mamba_d_conv": 4,
        "mamba_expand": 2, "mamba_dt_rank": 32, "num_experts": 4, "num_experts_per_tok": 2,
        "expert_layer_period": 2, "expert_layer_offset": 1,
    }  # fmt: skip
    model = read_config("jamba", config)
    state = next(group for group in model.groups if group.kind is LayerKind.STATE)
    assert state.state_bytes == 4 * 1024 * 16 + 2 * 3 * 1024
    mixers = 7 * (3 * 512 * 1024 + 1024 * (32 + 32) + 32 * 1024) + 4 * 512 * 512
    dense, router = 3 * 512 * 1024, 4 * 512
    outer = 2 * 512 * 1000
    assert model.parameters == outer + mixers + 4 * dense + 4 * (4 * dense + router)
    assert model.active_parameters == outer + mixers + 4 * dense + 4 * (2 * dense + router)


def test_a_multimodal_configuration_is_read_at_its_text() -> None:
    assert read_config("vision", {"text_config": SMALL}).layers == 8


def test_an_mla_model_may_do_without_a_query_rank() -> None:
    latent = {"kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
    with_rank, without = (
        read_config("mla", SMALL | latent | extra) for extra in ({"q_lora_rank": 96}, {})
    )
    assert with_rank.parameters - without.parameters == 8 * (96 * (512 + 8 * 48) - 512 * 8 * 48)
    assert without.grouping == 1


@pytest.mark.parametrize(
    ("fields", "error", "named"),
    [
        ({"hidden_size": None}, BadInput, "hidden_size"),
        ({"vocab_size": True}, BadInput, "vocab_size"),
        ({"num_hidden_layers": -1}, BadInput, "num_hidden_layers"),
        ({"num_key_value_heads": "eight"}, BadInput, "num_key_value_heads"),
        ({"layer_types": ["full_attention"]}, BadInput, "layer_types"),
        ({"layer_types": ["mystery"] * 8}, Unsupported, "mystery"),
        ({"attn_layer_period": 2}, Unsupported, "Mamba"),
        ({"text_config": 3}, BadInput, "text_config"),
    ],
)
def test_what_cannot_be_read_is_named(
    fields: dict[str, object], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        read_config("small", SMALL | fields)
