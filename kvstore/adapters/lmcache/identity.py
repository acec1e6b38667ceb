"""What names an LMCache object, and what has to match before two servers may exchange one.

LMCache's key has the model's name, a rank, an object group and a salt, and neither weights nor
dtype nor layout: the first comes from our settings, the others are those of the servers that
share a `weights_digest`, so servers of another dtype or chunk size have to give another `layout`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvstore.adapters.opaque import StoreAddress
from kvstore.client.config import ClientConfig
from kvstore.core.errors import BadInput
from kvstore.core.names import BlockName, Namespace, NamespaceKind

_NUMBERS: Final = ("call_ms", "transfer_ms", "pause_ms", "threads")
_KNOWN: Final = {"run_dir", "weights_digest", "layout", "share_domain", *_NUMBERS}
MAX_THREADS: Final = 64


@dataclass(frozen=True, slots=True)
class Settings:
    """`adapter_params` of the plugin."""

    address: StoreAddress
    weights_digest: str
    layout: str
    """Dtype, chunk size and whatever else the operator has to tell apart; free text."""
    threads: int


def settings_of(params: Mapping[str, Any]) -> Settings:
    """Read `adapter_params`; raises `BadInput` naming what is missing, unknown or malformed."""
    if unknown := sorted(set(params) - _KNOWN):
        raise BadInput(f"unknown settings {', '.join(unknown)}; known: {', '.join(sorted(_KNOWN))}")
    for key in ("run_dir", "weights_digest", "layout"):
        if not isinstance(params.get(key), str) or not params[key]:
            raise BadInput(f"{key} is missing in adapter_params")
    for key in _NUMBERS:
        if key in params and type(params[key]) is not int:
            raise BadInput(f"{key} is {params[key]!r}, not a whole number")
    threads = params.get("threads", 4)
    if not 0 < threads <= MAX_THREADS:
        raise BadInput(f"threads is {threads}; 1 to {MAX_THREADS} allowed")
    deadlines = {key: params[key] for key in ("call_ms", "transfer_ms") if key in params}
    address = StoreAddress(
        where=params["run_dir"],
        share_domain=str(params.get("share_domain", "")),
        name="lmcache",
        pause_ms=params.get("pause_ms", 1_000),
        client=ClientConfig(**deadlines),
    )
    return Settings(address, params["weights_digest"], params["layout"], threads)


def namespace_of(settings: Settings, payload_bytes: int) -> Namespace:
    """Return the namespace of objects of one size."""
    return Namespace(
        weights_digest=settings.weights_digest,
        kv_dtype="opaque",
        layers=1,
        kv_heads=1,
        head_dim=1,
        kind=NamespaceKind.OPAQUE,
        attention=f"engine=lmcache|bytes={payload_bytes}|layout={settings.layout}",
    )


def name_of(key: Any) -> BlockName:
    """Return the name of an `ObjectKey`: SHA-256 over its fields, each with its length."""
    state = hashlib.sha256(b"kvstore.lmcache.v1")
    for part in (
        bytes(key.chunk_hash),
        key.model_name.encode(),
        str(key.kv_rank).encode(),
        str(key.object_group_id).encode(),
        key.cache_salt.encode(),
    ):
        state.update(len(part).to_bytes(4, "little") + part)
    return BlockName(state.digest())
