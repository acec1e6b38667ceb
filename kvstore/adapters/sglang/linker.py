"""The class that SGLang loads as a direct linker: docs/engines/sglang.md has the command line.

Thin on purpose: it turns SGLang's pools, transfers and events into plain ones for `direct`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from sglang.srt.mem_cache.hicache_storage import (  # pyright: ignore[reportMissingImports]
    PoolHitPolicy,
    PoolName,
)
from sglang.srt.mem_cache.hybrid_cache.linker_pool_assembler import (  # pyright: ignore[reportMissingImports]
    DevicePoolEntry,
    DevicePoolGroup,
    resolve_hybrid_device_pool_group,
)
from sglang.srt.mem_cache.memory_pool import (  # pyright: ignore[reportMissingImports]
    MHATokenToKVPool,
    MLATokenToKVPool,
)
from sglang.srt.mem_cache.unified_cache.component_type import (  # pyright: ignore[reportMissingImports]
    ComponentType,
)
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (  # pyright: ignore[reportMissingImports]
    UnifiedCacheLinker,
)

from kvstore.adapters.opaque import OpaqueBlocks
from kvstore.adapters.sglang.device import DevicePages
from kvstore.adapters.sglang.direct import DirectStore, Part, Pool
from kvstore.adapters.sglang.identity import Ranks, device_namespace_of, name_of, settings_of
from kvstore.core.errors import BadInput, Unsupported

_NUMBERS: Final = {"wait_ms": 20, "stall_ms": 5_000}
"""Ours alone: how long a lookup waits for what is below DRAM, and a forward for a layer."""


class KvStoreLinker(UnifiedCacheLinker):  # type: ignore[misc]  # untyped where it is not installed
    """A kvstore node of this host directly behind the device pools of one rank."""

    def __init__(
        self, server_args: Any, params: Any, *, components: set[Any],
        extra_config: dict[str, Any] | None = None, forward_stream: Any = None,
    ) -> None:  # fmt: skip
        """SGLang makes one for each rank. Raises `BadInput` or `Unsupported`, naming what."""
        extra = dict(extra_config or {})
        numbers = {name: extra.pop(name, default) for name, default in _NUMBERS.items()}
        for name, value in numbers.items():
            if type(value) is not int or value < (1 if name == "stall_ms" else 0):
                raise BadInput(f"{name} is {value!r}, not a number of milliseconds")
        settings = settings_of(extra)
        self.forward_stream = forward_stream
        self._group = pool_group(server_args, params, components)
        self.pools = self._group.entry_map
        rank, size = _tp_of(params)
        ranks = Ranks(
            tp=f"{rank}/{size}", pp=f"{params.pp_rank}/{params.pp_size}",
            cp=f"{params.attn_cp_rank}/{params.attn_cp_size}", dcp="0/1",
            replicated=self._group.rank_replicated,
        )  # fmt: skip
        self._pages = {str(one.name.value): DevicePages(one) for one in self._group.entries}
        pools = {}
        for name, pages in self._pages.items():
            namespace = device_namespace_of(
                settings, ranks, model=str(server_args.model_path), pool=name,
                page=pages.page, dtype=pages.dtype, form=pages.form,
            )  # fmt: skip
            blocks = OpaqueBlocks(settings.address, namespace, pages.page_bytes)
            blocks.connect()
            pools[name] = Pool(pages, blocks)
        self._store = DirectStore(
            pools, layers=self._group.num_layers,
            writes=not self._group.rank_replicated or rank == 0, **numbers,
        )  # fmt: skip
        self.layer_done_counter = self._store.counter
        if PoolName.MAMBA in self.pools:
            params.req_to_token_pool.register_layer_transfer_counter(self.layer_done_counter)

    def lookup(self, rid: str, transfers: list[Any]) -> list[int]:
        """Return every restorable length of the tail, in pages."""
        return self._store.lookup(rid, self._parts(self._group.resolve_transfers(transfers)))

    def load(self, rid: str, transfers: list[Any]) -> bool:
        """Queue a load into device pages."""
        resolved = self._group.resolve_transfers(
            transfers, allow_partial=True, allow_missing_kv=True
        )
        return self._store.queue(rid, self._parts(resolved))

    def start_layer_wise_loading(self) -> int:
        """Begin the queued loads behind what the current stream was given; return their number."""
        return self._store.start(_after(self._pages.values()))

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """Wait until a load writes no more; say whether all of it is there."""
        return self._store.finish(counter_index)

    def cancel_queued_load(self, rid: str) -> bool:
        """Forget a load that was not started."""
        return self._store.cancel(rid)

    def offload(self, transfers: list[Any], session_id: str | None = None) -> bool:
        """Begin to store pages once the forward wrote them."""
        resolved = self._group.resolve_transfers(transfers, allow_partial=True)
        if not resolved:
            return False
        events = self.record_offload_ready() if _on_gpu(self._pages.values()) else []
        return self._store.offload(self._parts(resolved), lambda: _wait_for(events))

    def num_completed_offloads(self) -> int:
        """Return how many offloads, from the oldest, have ended."""
        return self._store.completed()

    def pop_completed_offload(self) -> bool:
        """Return whether the oldest ended offload stored all of its pages."""
        return self._store.pop()

    def reset(self) -> None:
        """End all transfers and forget them."""
        self._store.reset()

    def close(self) -> None:
        """End the transfers and the sessions with the node."""
        self._store.close()

    def _parts(self, transfers: Sequence[Any]) -> list[Part]:
        parts = []
        for one in transfers:
            name = str(one.name.value)
            # SGLang resolves indices to physical ones where a lookup has none.
            rows = [] if one.host_indices is None else self._pages[name].rows_of(one.host_indices)
            names = [name_of(key) for key in one.keys]
            if one.host_indices is not None and len(rows) != len(names):
                raise BadInput(f"{len(rows)} pages of pool {name} for {len(names)} keys")
            trailing = one.hit_policy == PoolHitPolicy.TRAILING_PAGES
            parts.append(Part(name, names, rows, trailing))
        return parts


def pool_group(server_args: Any, params: Any, components: set[Any]) -> Any:
    """Return the device pools of a model: SGLang's own group, or one for plain attention.

    SGLang groups hybrid and sparse pools for linkers, not those of plain MHA and MLA models.
    Raises `Unsupported` where neither knows the pool.
    """
    kvcache = params.token_to_kv_pool_allocator.get_kvcache()
    page = params.page_size
    if components != {ComponentType.FULL} or type(kvcache) not in (
        MHATokenToKVPool, MLATokenToKVPool,
    ):  # fmt: skip
        try:
            return resolve_hybrid_device_pool_group(
                kvcache=kvcache, page_size=page, params=params, components=components
            )
        except (AssertionError, ValueError) as error:
            raise Unsupported(f"pool {type(kvcache).__name__}: {error}") from error
    drafts = (*params.mtp_draft_device_pools, *params.sidecar_draft_device_pools)
    if drafts or getattr(server_args, "dcp_size", 1) > 1:
        raise Unsupported("draft pools and DCP are not served with plain attention")
    replicated = type(kvcache) is MLATokenToKVPool
    layers = kvcache.layer_num
    mapping: dict[int, Any] = {at: at for at in range(layers)}
    if replicated:
        buffers = list(kvcache.kv_buffer)
    else:
        if kvcache.k_scale_buffer is not None:
            raise Unsupported("KV caches with scales are not served")
        buffers = [*kvcache.k_buffer, *kvcache.v_buffer]
        mapping = {at: (at, layers + at) for at in range(layers)}
    if any(len(buffer) != kvcache.size + page or buffer.dim() != 3 for buffer in buffers):
        raise Unsupported(f"layout of {tuple(buffers[0].shape)}: one row a token is served")
    entry = DevicePoolEntry(
        name=PoolName.KV, indices_from_pool=PoolName.KV, device_pool=kvcache,
        components=[buffers], layer_mapping=mapping, page_size=page, rows_are_pages=False,
    )  # fmt: skip
    return DevicePoolGroup([entry], layers, page, rank_replicated=replicated)


def _tp_of(params: Any) -> tuple[int, int]:
    """Return this rank's place among those that split the heads."""
    group = params.attn_tp_cache_group or params.tp_cache_group
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    return 0, 1


def _on_gpu(pages: Any) -> bool:
    return any(one.on_gpu for one in pages)


def _after(pages: Any) -> Callable[[], None]:
    """Return what waits for the work that the current stream was given up to now."""
    if not _on_gpu(pages):
        return lambda: None
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return lambda: _wait_for([event])


def _wait_for(events: Sequence[Any]) -> None:
    for event in events:
        event.synchronize()
