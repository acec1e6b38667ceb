"""Models of real shapes with random weights, made on the device: for benchmarks and kernels' tests.

The default spread of weights gives near ties among logits; `initializer_range` 0.2 does not.
"""

import hashlib
from pathlib import Path
from typing import Any, Final

import torch

from kvstore.core.errors import BadInput
from kvstore.core.layout import RAW_CODEC, BlockLayout
from kvstore.core.names import Fidelity, Namespace
from kvworkers.models import attention
from kvworkers.models.digest import canonical
from kvworkers.models.loading import LoadedModel, quiet_loading
from kvworkers.models.spec import ModelSpec

SPREAD: Final = 0.2

SHAPES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama-3.1-8b": (
        "llama",
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3-0.6b": (
        "qwen3",
        {
            "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
            "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
        },
    ),
    "smollm2-135m": (
        "llama",
        {
            "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
            "vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000.0,
            "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip
"""Architecture and sizes, as the published configs have them."""


def random_model(
    name: str,
    *,
    device: str,
    seed: int = 0,
    layers: int | None = None,
    fidelity: Fidelity = Fidelity.EXACT,
) -> LoadedModel:
    """Return a model of shape `name`, its weights drawn from `seed` on `device`.

    `layers` cuts its depth; `fidelity` as `load_model` takes it. Raises `BadInput` for an unknown
    shape.
    """
    if name not in SHAPES:
        raise BadInput(f"model shape {name!r} is unknown; there are {', '.join(sorted(SHAPES))}")
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes = SHAPES[name]
    sizes = sizes | {"initializer_range": SPREAD}
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    config: Any = AutoConfig.for_model(kind, **sizes)
    dtype = "float32" if device == "cpu" else "bfloat16"
    make: Any = AutoModelForCausalLM.from_config  # its overloads fit no checker
    with quiet_loading(), torch.device(device):
        attention.register()
        torch.manual_seed(seed)
        module = make(
            config, dtype=getattr(torch, dtype), attn_implementation=attention.IMPLEMENTATION
        )
    module.requires_grad_(False)
    model = LoadedModel(_spec(name, config, dtype, seed), torch.device(device), module.eval())
    model.keep_as(fidelity)
    model.fuse()
    return model


def _spec(name: str, config: Any, dtype: str, seed: int) -> ModelSpec:
    layers, heads = int(config.num_hidden_layers), int(config.num_key_value_heads)
    dim, codec = int(config.head_dim), RAW_CODEC[dtype]
    digest = hashlib.sha256(f"random {name} {layers} {dtype} {seed}".encode()).hexdigest()
    return ModelSpec(
        name=f"random-{name}",
        path=Path(name),
        layers=layers,
        kv_heads=heads,
        query_heads=int(config.num_attention_heads),
        head_dim=dim,
        vocab_size=int(config.vocab_size),
        max_model_tokens=int(config.max_position_embeddings),
        eos_token_ids=(),
        namespace=Namespace(
            weights_digest=digest,
            kv_dtype=dtype,
            layers=layers,
            kv_heads=heads,
            head_dim=dim,
            rope=canonical({"parameters": dict(config.rope_parameters)}),
            attention=canonical({"kind": "full"}),
        ),
        layout=BlockLayout(layers=layers, kv_heads=heads, head_dim=dim, codec=codec),
        dtype=dtype,
    )
