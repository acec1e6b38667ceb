"""Published models and GPUs that a plan can name. Figures only, each from its publisher.

Models: the fields of their `config.json` that `kvstore.core.model_shape` reads. GPUs: memory,
memory bandwidth and dense 16-bit FLOP/s of the vendors' data sheets (SXM where there are several).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

_LLAMA3: Final = {"vocab_size": 128_256, "num_key_value_heads": 8, "head_dim": 128}
_QWEN3_NEXT_LAYERS: Final = (["linear_attention"] * 3 + ["full_attention"]) * 12
_GPT_OSS_LAYERS: Final = ["sliding_attention", "full_attention"] * 18

MODELS: Final[Mapping[str, Mapping[str, Any]]] = {
    "smollm2-135m": {
        "num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49_152,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": {
        "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 32, "intermediate_size": 11_008, "vocab_size": 32_000,
    },
    "llama-3-8b": _LLAMA3 | {
        "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "intermediate_size": 14_336,
    },
    "llama-3-70b": _LLAMA3 | {
        "num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64,
        "intermediate_size": 28_672,
    },
    "llama-3.1-405b": _LLAMA3 | {
        "num_hidden_layers": 126, "hidden_size": 16_384, "num_attention_heads": 128,
        "intermediate_size": 53_248,
    },
    "mistral-7b": {
        "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14_336, "vocab_size": 32_000,
        "sliding_window": 4096,
    },
    "qwen3-32b": {
        "num_hidden_layers": 64, "hidden_size": 5120, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 25_600,
        "vocab_size": 151_936,
    },
    "gemma-3-27b": {
        "num_hidden_layers": 62, "hidden_size": 5376, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "intermediate_size": 21_504,
        "vocab_size": 262_208, "sliding_window": 1024, "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
    },
    "gpt-oss-120b": {
        "num_hidden_layers": 36, "hidden_size": 2880, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880,
        "vocab_size": 201_088, "sliding_window": 128, "layer_types": _GPT_OSS_LAYERS,
        "num_local_experts": 128, "num_experts_per_tok": 4,
    },
    "deepseek-v3": {
        "num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128,
        "intermediate_size": 18_432, "vocab_size": 129_280, "kv_lora_rank": 512,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "q_lora_rank": 1536,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
    },
    "qwen3-next-80b": {
        "num_hidden_layers": 48, "hidden_size": 2048, "num_attention_heads": 16,
        "num_key_value_heads": 2, "head_dim": 256, "intermediate_size": 5120,
        "vocab_size": 151_936, "layer_types": _QWEN3_NEXT_LAYERS, "linear_num_value_heads": 32,
        "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4, "num_experts": 512, "num_experts_per_tok": 10,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One accelerator by its data sheet."""

    memory_bytes: int
    memory_bytes_per_s: float
    flops: float
    """Dense bf16 FLOP/s."""
    host_bytes_per_s: float
    """One direction of its PCIe link, as a copy reaches it: 51 GB/s measured on PCIe 5."""


GPUS: Final[Mapping[str, Gpu]] = {
    "a100": Gpu(
        memory_bytes=80 * 10**9, memory_bytes_per_s=2.04e12, flops=312e12, host_bytes_per_s=25.5e9
    ),
    "l40s": Gpu(
        memory_bytes=48 * 10**9, memory_bytes_per_s=0.864e12, flops=362e12, host_bytes_per_s=25.5e9
    ),
    "h100": Gpu(
        memory_bytes=80 * 10**9, memory_bytes_per_s=3.35e12, flops=989e12, host_bytes_per_s=51e9
    ),
    "h200": Gpu(
        memory_bytes=141 * 10**9, memory_bytes_per_s=4.8e12, flops=989e12, host_bytes_per_s=51e9
    ),
    "b200": Gpu(
        memory_bytes=180 * 10**9, memory_bytes_per_s=8.0e12, flops=2250e12, host_bytes_per_s=51e9
    ),
}
