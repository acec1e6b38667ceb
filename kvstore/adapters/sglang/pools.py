"""Which lengths of a prefix can be restored, given what each pool holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvstore.adapters.opaque import leading

Policy = Literal["all_pages", "trailing_pages", "block_groups"]


@dataclass(frozen=True, slots=True)
class SidePool:
    """A pool beside KV, and which pages of it are here."""

    name: str
    policy: Policy
    held: Sequence[bool]
    """For each page of the prefix; for `block_groups`, for each key of the transfer."""
    trailing: int = 1
    """Pages that have to be there before a restored length's end (`trailing_pages`)."""
    block_pages: int = 0
    group_pages: int = 0


@dataclass(frozen=True, slots=True)
class Hit:
    """What a hit query answers."""

    pages: int
    """The longest length that every pool allows."""
    by_pool: dict[str, int]
    """How far each pool reaches by itself."""
    restorable: list[int]
    """Every length that all pools allow, ascending: 5 can be legal where 4 is not."""


def hit_of(kv_pages: int, side_pools: Sequence[SidePool]) -> Hit:
    """Fold the pools' verdicts; `kv_pages` is the leading run of KV pages."""
    by_pool = {"kv": kv_pages} if kv_pages else {}
    restorable = list(range(1, kv_pages + 1))
    for pool in side_pools:
        if pool.policy == "block_groups":  # a second form of the pages: never gates them
            by_pool[pool.name] = _grouped(pool)
            continue
        legal = _legal(pool, kv_pages)
        if legal:
            by_pool[pool.name] = max(legal)
        restorable = [length for length in restorable if length in legal]
    return Hit(restorable[-1] if restorable else 0, by_pool, restorable)


def _legal(pool: SidePool, pages: int) -> set[int]:
    held = pool.held[:pages]
    if pool.policy == "all_pages":
        return set(range(1, leading(held) + 1))
    legal, run = set[int](), 0
    for at, here in enumerate(held):
        run = run + 1 if here else 0
        # A prefix shorter than the window needs all of itself.
        if run >= min(max(1, pool.trailing), at + 1):
            legal.add(at + 1)
    return legal


def _grouped(pool: SidePool) -> int:
    """Return the pages that the leading complete groups of keys cover."""
    if pool.group_pages <= 0:
        return 0
    return leading(pool.held) // pool.group_pages * pool.block_pages
