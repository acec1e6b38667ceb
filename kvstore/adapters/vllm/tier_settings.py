"""What a user writes beside `module_path` in `secondary_tiers`, and the namespace it gives."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvstore.adapters.opaque import StoreAddress
from kvstore.adapters.vllm.identity import weights_digest
from kvstore.client.config import ClientConfig
from kvstore.core.errors import BadInput
from kvstore.core.names import BlockName, Namespace, NamespaceKind

_NUMBERS: Final = ("call_ms", "transfer_ms", "pause_ms", "threads")
_TEXTS: Final = ("run_dir", "weights_digest", "share_domain")
MAX_THREADS: Final = 64


@dataclass(frozen=True, slots=True)
class TierSettings:
    """Options of one tier."""

    address: StoreAddress
    weights_digest: str
    """Empty: computed from the model's directory."""
    threads: int = 4


def read_tier_settings(said: Mapping[str, Any]) -> TierSettings:
    """Return checked options; raises `BadInput` naming an unknown, missing or mistyped one."""
    for name, value in said.items():
        if name not in (*_NUMBERS, *_TEXTS):
            known = ", ".join(sorted((*_NUMBERS, *_TEXTS)))
            raise BadInput(f"secondary_tiers: unknown option {name!r}; known: {known}")
        wanted = int if name in _NUMBERS else str
        if type(value) is not wanted:
            raise BadInput(f"secondary_tiers: {name} is {value!r}, not {wanted.__name__}")
    if not said.get("run_dir"):
        raise BadInput("secondary_tiers: no run_dir: where is the cache node?")
    threads = said.get("threads", 4)
    if not 0 < threads <= MAX_THREADS:
        raise BadInput(f"secondary_tiers: threads is {threads}; 1 to {MAX_THREADS} allowed")
    deadlines = {name: said[name] for name in ("call_ms", "transfer_ms") if name in said}
    address = StoreAddress(
        where=said["run_dir"],
        share_domain=said.get("share_domain", ""),
        name="vllm-tier",
        pause_ms=said.get("pause_ms", 1_000),
        client=ClientConfig(**deadlines),
    )
    return TierSettings(address, said.get("weights_digest", ""), threads)


def tier_namespace(config: Any, settings: TierSettings, row_bytes: int) -> Namespace:
    """Return the namespace of an engine's chunks: whatever vLLM's keys omit.

    `config` is vLLM's `OffloadingConfig`. Layouts that it calls independent of parallelism are
    shared between topologies, as vLLM's own tiers share them.
    """
    parallel = config.parallel
    portable = parallel.is_parallelism_agnostic or config.replicated_layout
    facts = {
        "model": config.model.name,
        "tokens_per_hash": config.cache.tokens_per_hash,
        "blocks_per_chunk": config.cache.blocks_per_chunk,
        "groups": [[one.tokens_per_block, *one.layer_names] for one in config.groups],
        "topology": None if portable else [
            parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size,
        ],
        "layout": config.kv_cache_layout,
        "canonical": config.canonical_layout,
        "replicated": config.replicated_layout,
        "row_bytes": row_bytes,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Namespace(
        weights_digest=settings.weights_digest or weights_digest(config.model.name),
        kv_dtype=str(config.model.dtype),
        layers=1,
        kv_heads=1,
        head_dim=1,
        kind=NamespaceKind.OPAQUE,
        attention=f"engine=vllm-tier|facts={digest}",
    )


def tier_name(key: bytes) -> BlockName:
    """Return the name of an `OffloadKey`: a block hash and a group, of whatever length."""
    return BlockName(hashlib.sha256(b"kvstore.vllm.tier.v1" + key).digest())
