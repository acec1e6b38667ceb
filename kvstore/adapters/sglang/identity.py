"""What has to match before two SGLang ranks may exchange a page: everything its keys omit.

SGLang's key of a page is SHA-256 over its tokens, behind the page before it. Its configuration
for backends has neither dtype nor layout nor a digest of the weights, so they come from the
host pool and from our own part of the extra config.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, Final

from kvstore.adapters.opaque import StoreAddress
from kvstore.client.config import ClientConfig
from kvstore.core.errors import BadInput
from kvstore.core.limits import BLOCK_TOKENS, NAME_BYTES
from kvstore.core.names import BlockName, Namespace, NamespaceKind

KV: Final = "kv"
_SHARDED_BESIDE_MLA: Final = "mamba"
"""State that every rank holds its own part of, also where the KV of a model is replicated."""

_OURS: Final = {
    "run_dir", "weights_digest", "share_domain", "call_ms", "transfer_ms", "pause_ms",
}  # fmt: skip
_SGLANGS: Final = {"backend_name", "module_path", "class_name", "interface_v1"}


@dataclass(frozen=True, slots=True)
class Settings:
    """Our part of what SGLang is told about its storage backend or linker."""

    address: StoreAddress
    weights_digest: str


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where a rank stands. A group whose pages are equal on all TP ranks is `replicated`."""

    tp: str
    pp: str
    cp: str
    dcp: str
    replicated: bool


def settings_of(extra: Mapping[str, Any] | None, more: Set[str] = frozenset()) -> Settings:
    """Read the extra config; raises `BadInput` naming what is missing, unknown or malformed.

    `more` are settings that the caller reads itself.
    """
    given = dict(extra or {})
    if unknown := sorted(set(given) - _OURS - _SGLANGS - more):
        known = ", ".join(sorted(_OURS | more))
        raise BadInput(f"unknown settings {', '.join(unknown)}; known: {known}")
    for key in ("run_dir", "weights_digest"):
        if not isinstance(given.get(key), str) or not given[key]:
            raise BadInput(f"{key} is missing in the extra config")
    for key in ("call_ms", "transfer_ms", "pause_ms"):
        if key in given and type(given[key]) is not int:
            raise BadInput(f"{key} is {given[key]!r}, not a number of milliseconds")
    deadlines = {key: given[key] for key in ("call_ms", "transfer_ms") if key in given}
    address = StoreAddress(
        where=given["run_dir"],
        share_domain=str(given.get("share_domain", "")),
        name="sglang",
        pause_ms=given.get("pause_ms", 1_000),
        client=ClientConfig(**deadlines),
    )
    return Settings(address, given["weights_digest"])


def namespace_of(
    settings: Settings, config: Any, pool: Any, pool_name: str, pieces: tuple[int, ...]
) -> Namespace:
    """Return the namespace of one host pool of one rank.

    `config` is a `HiCacheStorageConfig`, `pool` a host pool, `pieces` the sizes of the runs that
    one of its pages is made of. Ranks that hold equal bytes get equal namespaces: those of a
    replicated MLA pool, and replicas of one model (`dp_rank` is left out).
    """
    replicated = config.is_mla_model and pool_name != _SHARDED_BESIDE_MLA
    page = page_tokens(pool)
    facts = {
        "engine": "sglang",
        "pool": pool_name,
        "model": config.model_name or "",
        "page": page,
        "layout": getattr(pool, "layout", ""),
        "pieces": "+".join(map(str, pieces)),
        "tp": "replicated" if replicated else f"{config.tp_rank}/{config.tp_size}",
        "pp": f"{config.pp_rank}/{config.pp_size}",
        "cp": f"{config.attn_cp_rank}/{config.attn_cp_size}",
        "dcp": f"{getattr(config, 'dcp_rank', 0)}/{getattr(config, 'dcp_size', 1)}",
        "layers": getattr(pool, "layer_num", ""),
        "start": getattr(pool, "start_layer", ""),
        "heads": getattr(pool, "head_num", ""),
        "dim": getattr(pool, "head_dim", ""),
    }
    return _opaque(settings, str(getattr(pool, "dtype", "unknown")), page, facts)


def device_namespace_of(
    settings: Settings, ranks: Ranks, *, model: str, pool: str, page: int, dtype: str, form: str
) -> Namespace:
    """Return the namespace of one device pool of one rank.

    `form` says which bytes of which layers make a page, in their order. Device pages lie layer by
    layer where host pages do not, so neither kind is ever taken for the other.
    """
    replicated = ranks.replicated and pool != _SHARDED_BESIDE_MLA
    facts = {
        "engine": "sglang device",
        "pool": pool,
        "model": model,
        "page": page,
        "form": form,
        "tp": "replicated" if replicated else ranks.tp,
        "pp": ranks.pp,
        "cp": ranks.cp,
        "dcp": ranks.dcp,
    }
    return _opaque(settings, dtype, page, facts)


def page_tokens(pool: Any) -> int:
    """Return how many rows of a pool one key stands for."""
    return int(getattr(pool, "logical_page_size", 0) or getattr(pool, "page_size", 1) or 1)


def name_of(key: str) -> BlockName:
    """Return the name of a page: SGLang's key is a SHA-256 digest already, in hex."""
    try:
        name = bytes.fromhex(key)
    except ValueError:
        name = b""
    if len(name) != NAME_BYTES:
        raise BadInput(f"page key {key[:80]!r} is not a SHA-256 digest in hex")
    return BlockName(name)


def _opaque(settings: Settings, dtype: str, page: int, facts: Mapping[str, object]) -> Namespace:
    return Namespace(
        weights_digest=settings.weights_digest,
        kv_dtype=dtype.removeprefix("torch."),
        layers=1,
        kv_heads=1,
        head_dim=1,
        kind=NamespaceKind.OPAQUE,
        block_tokens=page if page % BLOCK_TOKENS == 0 else BLOCK_TOKENS,
        attention="|".join(f"{key}={_framed(value)}" for key, value in facts.items()),
    )


def _framed(value: object) -> str:
    """Return text with its length before it, so that no two sets of facts read the same."""
    text = str(value)
    return f"{len(text)}:{text}"
