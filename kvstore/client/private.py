"""Slots that hold no block: room of the arena for the caller's own use.

    reserve ─▶ write in place … read back ─▶ `holds`? ─▶ settle(abort)

Nobody finds what is written there and nothing evicts it. It outlives the cache node, since the
slots stay reserved while this session's keeper lives; with the keeper it is gone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

from kvstore.client import checks
from kvstore.client.link import Link
from kvstore.client.replies import SlotRef, private_from
from kvstore.core.limits import MAX_BLOCK_BYTES, MAX_NAMES_PER_CALL
from kvstore.core.outcomes import MissReason
from kvstore.rpc.v1 import cache_pb2


@dataclass(frozen=True, slots=True)
class PrivateReserved:
    """The answer to `PrivateSlots.reserve`."""

    slots: list[SlotRef]
    reason: MissReason
    """Why there are fewer than were asked for; NONE when there are as many."""


class PrivateSlots:
    """The private slots of one client's session."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def reserve(
        self, count: int, *, block_bytes: int, deadline_ms: int | None = None
    ) -> PrivateReserved:
        """Reserve up to `count` slots of `block_bytes`, a multiple of 4096.

        As large as those that are held. Each has to be given back by `settle(abort=...)` and can
        never be committed. `view` knows the size of the session's blocks, not of these: they lie in
        `arena` from `offset` on.
        """
        checks.bounded("count", count, MAX_NAMES_PER_CALL)
        checks.bounded("block_bytes", block_bytes, MAX_BLOCK_BYTES)
        deadline = checks.deadline(deadline_ms, self._link.config.call_ms)
        session = self._link.session
        request = cache_pb2.ReservePrivateRequest(
            root=session.root, block_bytes=block_bytes, count=count
        )
        reply = await self._link.reserving(session, "ReservePrivate", request, deadline)
        slots = checks.read(private_from, reply, session.arena.number)
        self._link.hold(session, slots)
        return PrivateReserved(slots, MissReason(reply.reason))

    def holds(self, slots: Sequence[SlotRef]) -> bool:
        """Say whether all of these are still ours, and so their bytes what we wrote."""
        session = self._link.session
        number = session.grant.session
        return all(map(session.arena.reserved_for, slots, repeat(number)))
