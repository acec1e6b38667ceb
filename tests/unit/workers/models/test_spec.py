"""What a directory says about itself, and which models are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from kvworkers.models import ModelSpec, read_spec
from kvworkers.models.spec import DESCRIPTION_FILE

from kvstore.core.errors import BadInput, Unsupported
from kvstore.core.layout import Codec
from tests.model_fixture import tiny_config


def _directory(path: Path, kind: str = "llama", **changed: Any) -> Path:
    """Write a config and some bytes for weights: a spec never loads them."""
    tiny_config(kind).save_pretrained(path)
    config = json.loads((path / "config.json").read_text()) | changed
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def _read(path: Path) -> ModelSpec:
    return read_spec(path, cache_dir=path.parent / "cache")


def test_sizes_and_identity(tmp_path: Path) -> None:
    spec = _read(_directory(tmp_path / "tiny-1"))
    assert (spec.name, spec.layers, spec.kv_heads, spec.query_heads) == ("tiny-1", 2, 2, 4)
    assert (spec.head_dim, spec.vocab_size, spec.max_model_tokens) == (16, 199, 512)
    assert spec.eos_token_ids == (2,) and spec.dtype == "float32"
    assert spec.layout.codec is Codec.RAW32 and spec.layout.layers == 2
    assert spec.layout.payload_bytes == 2 * 2 * 2 * 16 * 16 * 4
    assert spec.namespace.kv_dtype == "float32" and len(spec.namespace.weights_digest) == 64
    assert '"rope_type":"default"' in spec.namespace.rope


def test_heads_and_head_dim_follow_the_config(tmp_path: Path) -> None:
    assert _read(_directory(tmp_path / "a", "qwen3")).head_dim == 24
    assert _read(_directory(tmp_path / "b", "llama-mha")).kv_heads == 4
    assert _read(_directory(tmp_path / "c", "llama-mqa")).layout.kv_heads == 1


def test_a_description_names_the_model(tmp_path: Path) -> None:
    path = _directory(tmp_path / "hash")
    (path / DESCRIPTION_FILE).write_text('{"name": "SmolLM2"}')
    assert _read(path).name == "SmolLM2"


@pytest.mark.parametrize(
    ("generation", "wanted"),
    [({"eos_token_id": [7, 3]}, (3, 7)), ({"eos_token_id": 5}, (5,)), ({}, (2,))],
)
def test_the_generation_config_says_what_ends_a_reply(
    tmp_path: Path, generation: dict[str, Any], wanted: tuple[int, ...]
) -> None:
    path = _directory(tmp_path / "tiny")
    (path / "generation_config.json").write_text(json.dumps(generation))
    assert _read(path).eos_token_ids == wanted


def test_what_changes_keys_changes_the_namespace(tmp_path: Path) -> None:
    theta = {"rope_type": "default", "rope_theta": 5e5}
    specs = [
        _read(_directory(tmp_path / "a")),
        _read(_directory(tmp_path / "b", rope_parameters=theta)),
        _read(_directory(tmp_path / "c", rms_norm_eps=0.1)),
    ]
    digests = {spec.namespace.digest() for spec in specs}
    assert len(digests) == 3
    assert _read(_directory(tmp_path / "d")).namespace.digest() in digests


@pytest.mark.parametrize(
    ("kind", "changed", "said"),
    [
        ("mistral", {"sliding_window": 128}, "sliding window of 128"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ("llama", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("llama", {"kv_lora_rank": 64}, "kv_lora_rank"),
        ("llama", {"is_encoder_decoder": True}, "encoder"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic",
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "original_max_position_embeddings": 64,
                }
            },
            "longrope",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_that_are_not_served_yet_are_refused_by_reason(
    tmp_path: Path, kind: str, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(Unsupported, match=said):
        _read(_directory(tmp_path / "tiny", kind, **changed))


def test_a_window_that_no_position_reaches_is_no_window(tmp_path: Path) -> None:
    assert _read(_directory(tmp_path / "a", "mistral", sliding_window=512)).max_model_tokens == 512
    spec = _read(_directory(tmp_path / "b", "qwen2", sliding_window=16, use_sliding_window=False))
    assert spec.layers == 2


@pytest.mark.parametrize("model_type", ["gpt_oss", "gpt2", "t5"])
def test_other_families_are_refused(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(Unsupported, match=model_type):
        _read(tmp_path)


def test_missing_and_broken_configs_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        _read(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"config\.json"):
        _read(tmp_path)
    for content in ("{", "[]", '{"model_type": "no-such-model"}', "{}"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(BadInput, match=r"config\.json"):
            _read(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    path = _directory(tmp_path / "tiny")
    (path / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="no weights"):
        _read(path)
