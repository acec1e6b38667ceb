"""What a model directory says about itself, read without loading weights.

Refuses, by name, models whose K and V or attention the kernels do not serve yet: a wrong
answer from a half-understood model would be worse than none.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvstore.core.errors import BadInput, Unsupported
from kvstore.core.layout import RAW_CODEC, BlockLayout
from kvstore.core.names import Namespace
from kvworkers.models.digest import canonical, weights_digest

DESCRIPTION_FILE: Final = "kvstore_model.json"
"""Written beside converted weights: the model's name and what it was made from."""

_LENGTH_DEPENDENT_ROPE: Final = ("dynamic", "longrope")
_SIZES: Final = (
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
    "hidden_size",
    "max_position_embeddings",
)
_MLA_FIELDS: Final = ("kv_lora_rank",)
_SOFTCAP_FIELDS: Final = ("attn_logit_softcapping", "attn_logit_softcap")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Sizes and identity of a model as one worker runs it."""

    name: str
    path: Path
    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int
    vocab_size: int
    max_model_tokens: int
    """Positions that RoPE was made for; prompt and output together."""
    eos_token_ids: tuple[int, ...]
    namespace: Namespace
    layout: BlockLayout
    dtype: str
    """Element type of weights in use, K and V: `float32` on a CPU."""


def read_spec(path: str | Path, *, device: str = "cpu", cache_dir: Path | None = None) -> ModelSpec:
    """Read config and identity of the Hugging Face directory `path`.

    Hashes weight files that have no sidecar yet. Raises `BadInput` naming the file at fault,
    `Unsupported` naming the attention parameter that is not served.
    """
    model = Path(path)
    raw = _read_json(model / "config.json")
    config = _standardised(model)
    _refuse_unserved(config, model)
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    layers = int(config.num_hidden_layers)
    dtype = "float32" if device == "cpu" else "bfloat16"
    return ModelSpec(
        name=_name(model),
        path=model,
        layers=layers,
        kv_heads=kv_heads,
        query_heads=heads,
        head_dim=head_dim,
        vocab_size=int(config.vocab_size),
        max_model_tokens=int(config.max_position_embeddings),
        eos_token_ids=_eos(model, raw),
        namespace=Namespace(
            weights_digest=weights_digest(model, raw, cache=cache_dir),
            kv_dtype=dtype,
            layers=layers,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope=_rope(config),
            attention=canonical({"kind": "full", "query_heads": heads}),
        ),
        layout=BlockLayout(
            layers=layers, kv_heads=kv_heads, head_dim=head_dim, codec=RAW_CODEC[dtype]
        ),
        dtype=dtype,
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise BadInput(f"model directory {path.parent} does not exist")
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"{path.parent} has no {path.name}: not a Hugging Face model") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} is not a JSON object")
    return value


def _standardised(model: Path) -> Any:
    """Return transformers' config: it settles defaults and older spellings of RoPE."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise BadInput(f"{model / 'config.json'}: {error}") from None
    for field in _SIZES:
        if not isinstance(getattr(config, field, None), int):
            raise Unsupported(
                f"{model} ({config.model_type}): config has no {field}: not a plain decoder"
            )
    return config


def _refuse_unserved(config: Any, model: Path) -> None:
    """Raise `Unsupported` for attention that needs other kernels or another kind of cache."""
    where = f"{model} ({config.model_type})"
    for field in (*_MLA_FIELDS, *_SOFTCAP_FIELDS):
        if getattr(config, field, None):
            raise Unsupported(f"{where}: {field}={getattr(config, field)} is not served yet")
    if config.is_encoder_decoder or config.model_type == "gpt_oss":
        kind = "attention sinks" if config.model_type == "gpt_oss" else "an encoder"
        raise Unsupported(f"{where}: a model with {kind} is not served yet")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if other := kinds - {"full_attention", "sliding_attention"}:
        raise Unsupported(f"{where}: layers of kind {', '.join(sorted(other))} are not served yet")
    window = getattr(config, "sliding_window", None)
    active = window is not None and getattr(config, "use_sliding_window", True)
    if "sliding_attention" in kinds or (active and window < config.max_position_embeddings):
        raise Unsupported(f"{where}: a sliding window of {window} tokens is not served yet")
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, Mapping) or "rope_type" not in rope:
        raise Unsupported(f"{where}: positions other than one RoPE for all layers are not served")
    if rope["rope_type"] in _LENGTH_DEPENDENT_ROPE:
        raise Unsupported(
            f"{where}: RoPE {rope['rope_type']} gives one token other keys in longer prompts"
        )


def _rope(config: Any) -> str:
    """Render everything that transformers freezes RoPE's factors from."""
    return canonical(
        {
            "parameters": dict(config.rope_parameters),
            "max_position_embeddings": config.max_position_embeddings,
            "partial_rotary_factor": getattr(config, "partial_rotary_factor", None),
        }
    )


def _name(model: Path) -> str:
    description = model / DESCRIPTION_FILE
    if description.exists():
        name = _read_json(description).get("name")
        if isinstance(name, str) and name:
            return name
    return model.resolve().name


def _eos(model: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids that end a reply: the generation config's, else the config's."""
    generation = model / "generation_config.json"
    found = _read_json(generation).get("eos_token_id") if generation.exists() else None
    if found is None:
        found = raw.get("eos_token_id")
    listed = found if isinstance(found, list) else [found]
    return tuple(sorted({int(token) for token in listed if token is not None}))
