"""The namespace of a model that vLLM serves: everything that must match before bytes are shared.

The same rules as our own workers have, so both may exchange blocks; a test compares them.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvstore.core.errors import BadInput, Unsupported
from kvstore.core.layout import RAW_CODEC, BlockLayout
from kvstore.core.names import Namespace

_IRRELEVANT: Final = frozenset(
    {
        "_name_or_path", "_model_name_or_path", "transformers_version", "torch_dtype", "dtype",
        "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "architectures",
        "id2label", "label2id", "output_attentions", "output_hidden_states", "return_dict",
        "chunk_size_feed_forward", "is_encoder_decoder", "problem_type", "initializer_range",
        "pretraining_tp",
    }
)  # fmt: skip
"""Entries of config.json that change neither K nor V."""
_UNSERVED: Final = ("kv_lora_rank", "attn_logit_softcapping", "attn_logit_softcap")
_LENGTH_DEPENDENT_ROPE: Final = ("dynamic", "longrope")
_CHUNK_BYTES: Final = 8 << 20


def model_namespace(config: Any, *, kv_dtype: str, weights: str) -> Namespace:
    """Return the namespace of the text config in effect; `weights` is a digest.

    Raises `Unsupported` naming the parameter for a model whose K and V are not served yet.
    """
    _refuse_unserved(config)
    if kv_dtype not in RAW_CODEC:
        raise Unsupported(f"KV cache of {kv_dtype}; {', '.join(RAW_CODEC)} are served")
    heads = int(config.num_attention_heads)
    return Namespace(
        weights_digest=weights,
        kv_dtype=kv_dtype,
        layers=int(config.num_hidden_layers),
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        rope=_canonical(
            {
                "parameters": dict(config.rope_parameters),
                "max_position_embeddings": config.max_position_embeddings,
                "partial_rotary_factor": getattr(config, "partial_rotary_factor", None),
            }
        ),
        attention=_canonical({"kind": "full", "query_heads": heads}),
    )


def model_layout(namespace: Namespace) -> BlockLayout:
    """Return the sizes of the namespace's blocks."""
    return BlockLayout(
        layers=namespace.layers,
        kv_heads=namespace.kv_heads,
        head_dim=namespace.head_dim,
        codec=RAW_CODEC[namespace.kv_dtype],
    )


def weights_digest(model: str, *, cache: Path | None = None) -> str:
    """Return the SHA-256 over the weights of a local Hugging Face directory and its config.

    Raises `BadInput` when `model` is not a directory: then the option `weights_digest` says it.
    """
    directory = Path(model)
    if not directory.is_dir():
        raise BadInput(
            f"{model} is no local directory: give weights_digest in kv_connector_extra_config"
        )
    patterns = ("*.safetensors", "pytorch_model*.bin")
    files = next((found for p in patterns if (found := sorted(directory.glob(p)))), [])
    if not files:
        raise BadInput(f"{model} holds no weights (looked for {', '.join(patterns)})")
    state = hashlib.sha256(b"kvstore.weights.v1")
    for path in files:
        state.update(bytes.fromhex(_file_digest(path, cache or _cache_directory())))
    config = json.loads((directory / "config.json").read_text())
    relevant = {name: value for name, value in config.items() if name not in _IRRELEVANT}
    state.update(_canonical(relevant).encode())
    return state.hexdigest()


def _refuse_unserved(config: Any) -> None:
    where = getattr(config, "model_type", "model")
    for field in _UNSERVED:
        if getattr(config, field, None):
            raise Unsupported(f"{where}: {field}={getattr(config, field)} is not served yet")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise Unsupported(f"{where}: layers of kind {', '.join(sorted(kinds))} are not served yet")
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        raise Unsupported(f"{where}: a sliding window of {window} tokens is not served yet")
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, Mapping) or "rope_type" not in rope:
        raise Unsupported(f"{where}: positions other than one RoPE for all layers are not served")
    if rope["rope_type"] in _LENGTH_DEPENDENT_ROPE:
        raise Unsupported(
            f"{where}: RoPE {rope['rope_type']} gives one token other keys in longer prompts"
        )


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvstore"


def _file_digest(path: Path, cache: Path) -> str:
    """Return a file's SHA-256, remembered by (device, inode, size, mtime): starts stay fast."""
    stat = path.stat()
    key = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns]
    place = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    sidecar = cache / "digests" / f"{place}.json"
    try:
        known = json.loads(sidecar.read_text())
        if known["key"] == key:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # one more hashing
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
    _remember(sidecar, {"file": str(path), "key": key, "sha256": state.hexdigest()})
    return state.hexdigest()


def _remember(sidecar: Path, known: dict[str, Any]) -> None:
    try:
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=sidecar.parent, prefix=".sidecar-")
        with os.fdopen(descriptor, "w") as file:
            json.dump(known, file)
        os.replace(temporary, sidecar)
    except OSError:
        return  # a full or read-only cache: the next start hashes again
