"""The class that SGLang loads: docs/engines/sglang.md has the command line.

Pages are moved in place (`interface_v1`), so the calls with flat tensors are refused: they would
cost a copy more, and SGLang makes them only where `interface_v1` is off.
"""

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import (  # pyright: ignore[reportMissingImports]
    HiCacheStorage,
    PoolTransferResult,
)

from kvstore.adapters.sglang.identity import KV, page_tokens
from kvstore.adapters.sglang.store import SglangStore
from kvstore.core.errors import BadInput, Unsupported


class KvStoreBackend(HiCacheStorage):  # type: ignore[misc]  # untyped where it is not installed
    """HiCache's third tier in a kvstore node of this host."""

    def __init__(self, storage_config: Any, kwargs: Any = None) -> None:
        """SGLang passes its configuration and a dict of further arguments, of which none is read.

        Raises `BadInput` naming a setting at fault.
        """
        extra = storage_config.extra_config or {}
        if not extra.get("interface_v1"):
            raise BadInput("interface_v1 has to be 1 in the storage backend's extra config")
        if getattr(storage_config, "should_split_heads", False):
            raise Unsupported("pages split by heads (tp_lcm_size) are not stored")
        self._store = SglangStore(storage_config)

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Learn of the KV pool; see `SglangStore.register`."""
        super().register_mem_pool_host(mem_pool_host)
        self._register(mem_pool_host, KV)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Learn of a pool beside it, or of the KV pool again."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._register(host_pool, str(host_pool_name))

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """Return the number of leading pages that are here."""
        return self._store.exists(keys)

    def batch_get_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        """Load pages into the KV pool."""
        return self._store.get(KV, keys, host_indices)

    def batch_set_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        """Store pages of the KV pool."""
        return self._store.set(KV, keys, host_indices)

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: Sequence[Any] | None = None, extra_info: Any = None
    ) -> Any:
        """Return which lengths every pool can restore."""
        hit = self._store.hit(keys, pool_transfers or ())
        return PoolTransferResult(hit.pages, hit.by_pool, hit.restorable)

    def batch_get_v2(
        self, transfers: Sequence[Any], extra_info: Any = None
    ) -> dict[str, list[bool]]:
        """Load pages of several pools."""
        return {
            one.name: self._store.get(one.name, one.keys or (), one.host_indices)
            for one in transfers
        }

    def batch_set_v2(
        self, transfers: Sequence[Any], extra_info: Any = None
    ) -> dict[str, list[bool]]:
        """Store pages of several pools."""
        return {
            one.name: self._store.set(one.name, one.keys or (), one.host_indices)
            for one in transfers
        }

    def exists(self, key: str) -> bool:
        """Say whether a page is here."""
        return self._store.exists([key]) == 1

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> None:
        """Find nothing: only `interface_v1` is served."""
        return None

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> Any:
        """Find nothing: only `interface_v1` is served."""
        return [None] * len(keys)

    def set(
        self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool:
        """Store nothing: only `interface_v1` is served."""
        return False

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:  # fmt: skip
        """Store nothing: only `interface_v1` is served."""
        return False

    def close(self) -> None:
        """End the sessions with the node."""
        self._store.close()

    def _register(self, pool: Any, name: str) -> None:
        # The engine of its own accord passes indices as tensors, so its pools expect one.
        self._store.register(pool, name, torch.arange(page_tokens(pool)))
