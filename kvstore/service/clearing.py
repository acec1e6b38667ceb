"""Forgets a root, or everything, in every tier of a node; a slice of the arena at a time."""

import asyncio
from collections.abc import Iterable
from typing import Final

from kvstore.core.names import Root
from kvstore.service.store import ArenaStore
from kvstore.tiers.base import StoredTier

_SLICE: Final = 4_096
"""Slots between two looks at other work: a few milliseconds."""


async def clear(store: ArenaStore, below: Iterable[StoredTier], root: Root | None) -> int:
    """Drop every block under a root (None: all); returns how many, each tier counted for itself.

    Blocks under a lease are void at once and their slots free when the lease ends; those on their
    way up or down are forgotten when they arrive. What is being computed comes after, and stays.
    """
    number: int | None = None
    cleared = 0
    if root is not None:
        info = store.table.roots.get(root)
        number = -1 if info is None else info.number
    if store.promoter is not None:
        store.promoter.forget(number)
    for first in range(0, len(store.table.state), _SLICE):
        cleared += store.clear(number, first, first + _SLICE)
        await asyncio.sleep(0)
    # Below last: what an eviction was about to write is dropped above by now.
    for tier in below:
        cleared += await tier.clear(root)
    return cleared
