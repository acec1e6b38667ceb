"""Slots that hold no block: room of the arena for one session's own use. Pure.

A worker puts the pages of a request there that has to make way, and takes them back later. Such
a slot is reserved and never committed: nobody can name it, find it, evict it or send it. It
comes back by `Settle(abort)`, or when every process of its session has exited, and it stays
its session's when the node is restarted, as every reserved slot does.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from kvstore.core.errors import BadInput
from kvstore.core.names import Root
from kvstore.core.outcomes import MissReason
from kvstore.service.making_room import make_room
from kvstore.service.roots import BlockShape, RootInfo, key_column
from kvstore.service.sessions import Session
from kvstore.service.slots import SlotTable


class PrivateReserved(NamedTuple):
    """What one call reserved, and why there were no more."""

    slots: list[int]
    reason: MissReason


def private_root(block_bytes: int) -> Root:
    """Return what private slots of a size stand under: a root that no session can open."""
    digest = hashlib.sha256(b"kvstore.private.v1")
    digest.update(block_bytes.to_bytes(8, "little"))
    return Root(digest.digest())


@dataclass(slots=True)
class PrivateSlots:
    """The private slots of one table's sessions, within a quota of their own."""

    table: SlotTable
    quota_bytes: int
    """What all sessions together may hold: the rest of the arena is the cache's."""
    tell_policy: Callable[[], None]
    """Tells the policy of the requests so far: what was asked for now must not go first."""
    used_bytes: int = 0
    _made: int = field(default=0)

    def reserve(
        self, session: Session, block_bytes: int, count: int, now_ms: float
    ) -> PrivateReserved:
        """Reserve up to `count` slots of `block_bytes`, evicting what the policy gives for them.

        All that a session holds have one size: each size takes whole chunks of the arena, which the
        quota does not count. Raises `BadInput` for another one, `BadInput` or `TooLarge` for a size
        that no block can have.
        """
        shape = BlockShape(block_bytes, block_bytes, 1)
        shape.check(self.table.space.data_bytes)
        for other in islice(session.private, 1):
            if (held := self.table.root_of(other).shape.block_bytes) != block_bytes:
                raise BadInput(f"block_bytes {block_bytes}: this session holds slots of {held}")
        if self.used_bytes + block_bytes > self.quota_bytes:
            return PrivateReserved([], MissReason.QUOTA)
        info = self.table.roots.open(private_root(block_bytes), shape)
        slots: list[int] = []
        while len(slots) < count:
            if self.used_bytes + block_bytes > self.quota_bytes:
                return PrivateReserved(slots, MissReason.QUOTA)
            slot = self._reserve_one(session, info, count - len(slots), now_ms)
            if slot is None:
                return PrivateReserved(slots, MissReason.REFUSED)
            slots.append(slot)
        return PrivateReserved(slots, MissReason.NONE)

    def holds(self, session: Session, slot: int, generation: int) -> bool:
        """Say whether this is a private slot of the session, at its generation."""
        return slot in session.private and generation == self.table.generation[slot]

    def owns(self, info: RootInfo) -> bool:
        """Say whether slots under a root are private ones."""
        return info.root == private_root(info.shape.block_bytes)

    def adopt(self, session: Session, slot: int) -> None:
        """Take over a slot that an earlier incarnation reserved; its table entry is made."""
        session.private.add(slot)
        self.used_bytes += self.table.root_of(slot).shape.block_bytes

    def give_back(self, session: Session, slot: int) -> None:
        """Free one of a session's slots."""
        session.private.remove(slot)
        self.used_bytes -= self.table.root_of(slot).shape.block_bytes
        self.table.give_up(slot)

    def _reserve_one(
        self, session: Session, info: RootInfo, missing: int, now_ms: float
    ) -> int | None:
        name = self._name(session)
        key = int(key_column(info, name)[0])
        for _ in range(2):
            slot = self.table.reserve(
                info, name, key, parent=0, position=0, session=session.number, now_ms=now_ms
            )
            if slot is not None:
                session.private.add(slot)
                self.used_bytes += info.shape.block_bytes
                return slot
            self.tell_policy()
            # Not weighed against what is held: who asks stops computing until it gets room.
            room = [key] * min(missing, self._left(info))
            if not make_room(self.table, info.shape.block_bytes, room, now_ms, weighed=False):
                return None
        return None

    def _left(self, info: RootInfo) -> int:
        return (self.quota_bytes - self.used_bytes) // info.shape.block_bytes

    def _name(self, session: Session) -> bytes:
        """Return a name that was never used: like any other, but of no tokens."""
        self._made += 1
        digest = hashlib.sha256(session.token)
        for number in (self.table.publisher.incarnation, self._made):
            digest.update(number.to_bytes(8, "little"))
        return digest.digest()
