"""Chooses what goes from the arena: for want of room, and for whoever is at its quota. Pure."""

from collections.abc import Callable, Sequence

from kvstore.core.names import Root
from kvstore.core.outcomes import MissReason
from kvstore.directory.policy import BlockKey
from kvstore.service.roots import RootInfo
from kvstore.service.slots import SlotTable


def make_room(
    table: SlotTable,
    block_bytes: int,
    newcomers: Sequence[int],
    now_ms: float,
    *,
    weighed: bool = True,
) -> bool:
    """Evict so that slots for at least the first of `newcomers` can be reserved.

    `newcomers` are keys in prefix order that a request asked for; `weighed` says whether they can
    be worth less than what is here. The class takes a whole chunk from another one while it holds
    less than its fair share, and otherwise drops its own least valuable blocks. False when all is
    leased, reserved or unsealed, or worth more than the newcomers.
    """
    if table.space.below_fair_share(block_bytes) and _take_chunk(table, block_bytes):
        return True
    table.refusal = MissReason.REFUSED

    def may_evict(key: BlockKey) -> bool:
        slot = table.index[key]
        if not table.idle(slot) or table.root_of(slot).shape.block_bytes != block_bytes:
            return False
        table.refusal = MissReason.OUTWEIGHED  # unless it is chosen: it is worth more
        return True

    victims = table.policy.victims(
        len(newcomers),
        now_ms=now_ms,
        may_evict=may_evict,
        newcomers=[BlockKey(key) for key in newcomers] if table.bypass and weighed else (),
    )
    if victims:
        table.evict((table.index[key] for key in victims), reason="room")
        return True
    return _take_chunk(table, block_bytes)


def _take_chunk(table: SlotTable, block_bytes: int) -> bool:
    """Empty a chunk of another size class for this one; False where none can go."""
    found = table.space.victim_chunk(block_bytes, table.idle)
    if found is None:
        return False
    chunk, used = found
    table.evict(used, reason="chunk")
    # From the end: what a crash leaves half cleared is still a prefix of the chunk.
    for slot in reversed(chunk.slots):
        table.arena.clear(slot)
    table.space.dissolve(chunk)
    return True


def keep_quota(table: SlotTable, info: RootInfo, newcomers: Sequence[int], now_ms: float) -> bool:
    """Evict a root's or its share domain's own blocks until one more is within their quotas.

    False where none of them can go, or none is worth less than the newcomers (see `make_room`).
    """
    block_bytes = info.shape.block_bytes
    while (claim := table.book.claim(info.root, block_bytes)) is not None:

        def may_evict(key: BlockKey, may_go: Callable[[Root], bool] = claim.may_go) -> bool:
            slot = table.index[key]
            return table.idle(slot) and may_go(table.root_of(slot).root)

        victims: list[BlockKey] = []
        if claim.possible:
            victims = table.policy.victims(
                len(newcomers),
                now_ms=now_ms,
                may_evict=may_evict,
                newcomers=[BlockKey(key) for key in newcomers] if table.bypass else (),
            )
        if not victims:
            table.book.refusals += 1
            return False
        table.evict((table.index[key] for key in victims), reason="quota")
    return True
