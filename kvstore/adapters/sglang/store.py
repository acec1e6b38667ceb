"""HiCache's storage calls over the store, without a package of SGLang's.

SGLang calls from its prefetch, backup and hit-query threads at once. Nothing here raises for
what a cache does: a rank that raised where others did not would wait for them for ever.
"""

import logging
from collections.abc import Sequence
from typing import Any, Final

from kvstore.adapters.opaque import Block, OpaqueBlocks, Piece
from kvstore.adapters.sglang.identity import (
    KV,
    name_of,
    namespace_of,
    page_tokens,
    settings_of,
)
from kvstore.adapters.sglang.pools import Hit, SidePool, hit_of
from kvstore.core.errors import BadInput
from kvstore.core.limits import MAX_NAMES_PER_CALL

_LOG: Final = logging.getLogger(__name__)


class HostPool:
    """One host pool of one rank, and its blocks."""

    def __init__(self, pool: Any, blocks: OpaqueBlocks) -> None:
        self.pool = pool
        self.blocks = blocks
        self.page = page_tokens(pool)

    def pages(self, host_indices: Any, count: int) -> list[Block] | None:
        """Return where `count` pages lie; None where the indices are not of so many."""
        if host_indices is None or len(host_indices) != count * self.page:
            return None
        return pages_of(self.pool, host_indices, count)


class SglangStore:
    """The pages of one scheduler rank."""

    def __init__(self, config: Any) -> None:
        """`config` is a `HiCacheStorageConfig`; raises `BadInput` for settings that are none."""
        self._config = config
        self._settings = settings_of(config.extra_config)
        self._pools: dict[str, HostPool] = {}

    def register(self, pool: Any, name: str, one_page: Any) -> None:
        """Learn of a host pool; `one_page` are the indices of some page of it.

        Raises `BadInput` where its layout has no addresses or a page is no block: the attach
        fails, and the engine says why.
        """
        name = str(name)
        if name in self._pools and self._pools[name].pool is pool:
            return
        try:
            sizes = tuple(piece.size for piece in pages_of(pool, one_page, 1)[0])
        except (AttributeError, ValueError, NotImplementedError) as error:
            raise BadInput(f"pool {name} has no addresses of pages: {error}") from error
        namespace = namespace_of(self._settings, self._config, pool, name, sizes)
        blocks = OpaqueBlocks(self._settings.address, namespace, sum(sizes))
        blocks.connect()
        self._pools[name] = HostPool(pool, blocks)

    def exists(self, keys: Sequence[str]) -> int:
        """Return how many leading pages are here: one round trip."""
        return self._prefix(KV, keys)

    def get(self, name: str, keys: Sequence[str], host_indices: Any) -> list[bool]:
        """Load pages to host indices; say for each whether its bytes are whole."""
        return self._moved(name, keys, host_indices, store=False)

    def set(self, name: str, keys: Sequence[str], host_indices: Any) -> list[bool]:
        """Store pages from host indices; say for each whether it is here now."""
        return self._moved(name, keys, host_indices, store=True)

    def hit(self, keys: Sequence[str], transfers: Sequence[Any]) -> Hit:
        """Answer a hit query over several pools: one round trip for each pool."""
        kv_pages = self._prefix(KV, keys)
        sides = [self._side(keys[:kv_pages], one) for one in transfers] if kv_pages else []
        return hit_of(kv_pages, sides)

    def close(self) -> None:
        """End every session."""
        for pool in self._pools.values():
            pool.blocks.close()

    def _side(self, keys: Sequence[str], transfer: Any) -> SidePool:
        policy = str(getattr(transfer.hit_policy, "value", transfer.hit_policy))
        if policy not in ("all_pages", "trailing_pages", "block_groups"):
            raise BadInput(f"pool hit policy {policy!r} is unknown")
        name = str(getattr(transfer.name, "value", transfer.name))
        asked = list(transfer.keys or ()) if policy == "block_groups" else keys
        held = [False] * len(asked)
        if (pool := self._pools.get(name)) is not None:
            held = pool.blocks.held([name_of(key) for key in asked])
        return SidePool(
            name, policy, held,  # type: ignore[arg-type]  # checked above
            trailing=len(transfer.keys or ()) or 1,
            block_pages=getattr(transfer, "block_pages", 0),
            group_pages=getattr(transfer, "group_pages", 0),
        )  # fmt: skip

    def _prefix(self, name: str, keys: Sequence[str]) -> int:
        pool = self._pools.get(name)
        if pool is None:
            return 0
        return pool.blocks.prefix([name_of(key) for key in keys[:MAX_NAMES_PER_CALL]])

    def _moved(
        self, name: str, keys: Sequence[str], host_indices: Any, *, store: bool
    ) -> list[bool]:
        pool = self._pools.get(str(name))
        blocks = pool.pages(host_indices, len(keys)) if pool is not None else None
        if pool is None or blocks is None:
            _LOG.error("pool %s: %d keys do not fit their host indices", name, len(keys))
            return [False] * len(keys)
        names = [name_of(key) for key in keys]
        return pool.blocks.store(names, blocks) if store else pool.blocks.load(names, blocks)


def pages_of(pool: Any, host_indices: Any, count: int) -> list[Block]:
    """Return the runs of memory of each page: K then V, or as many as its layout has."""
    addresses, sizes = pool.get_page_buffer_meta(host_indices)
    each, rest = divmod(len(addresses), count)
    if rest or not each or len(sizes) != len(addresses):
        raise ValueError(f"{len(addresses)} runs of memory for {count} pages")
    runs = list(map(Piece, addresses, sizes))
    return [runs[at * each : (at + 1) * each] for at in range(count)]
