"""Gives free slots to those who will fill them: sessions that compute, and the loader. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from kvstore.core.limits import NAME_BYTES
from kvstore.core.outcomes import MissReason
from kvstore.core.slots import SlotState
from kvstore.service.making_room import keep_quota, make_room
from kvstore.service.roots import RootInfo
from kvstore.service.sessions import Session
from kvstore.service.slots import SlotTable


class Reserved(NamedTuple):
    """What one call reserved: `slots[k]` is for name `names[k]`; why there were no more."""

    names: list[int]
    slots: list[int]
    reason: MissReason


class Hints(NamedTuple):
    """What the caller of one call tells the policy, as `kvstore.directory.policy.Prompt` has it."""

    kind: str = ""
    depth_cost: float = 0.0


NO_HINTS: Final = Hints()


@dataclass(frozen=True, slots=True)
class Wanted:
    """The names of one call, and where in their prompt they stand."""

    info: RootInfo
    packed: bytes
    keys: Sequence[int]
    first_block: int
    now_ms: float

    def name(self, index: int) -> bytes:
        """Return one name."""
        return self.packed[index * NAME_BYTES : (index + 1) * NAME_BYTES]


@dataclass(slots=True)
class Reserver:
    """Reserves slots of one table within each session's quota."""

    table: SlotTable
    quota_bytes: int
    """Bytes one session may have reserved and not settled."""
    claim_ms: int
    """How long a reservation keeps others from computing the same block."""
    tell_policy: Callable[[], None]
    """Tells the policy of the requests so far: what is asked for now must not go first."""

    def claimed(self, slot: int, now_ms: float) -> bool:
        """Say whether a reserved slot's writer may still be waited for."""
        return now_ms - self.table.claimed_ms[slot] < self.claim_ms

    def reserve(self, session: Session, wanted: Wanted, found: int, count: int) -> Reserved:
        """Reserve slots for names from `found` on that nobody holds or computes."""
        table, info = self.table, wanted.info
        answer = Reserved([], [], MissReason.NONE)
        reason = MissReason.NONE
        for index in range(found, len(wanted.keys)):
            holder = table.index.get(wanted.keys[index])
            if holder is not None and not self._may_take_over(holder, wanted, index):
                if table.state[holder] == SlotState.RESERVED:
                    reason = MissReason.COMPUTING
                continue
            if session.reserved_bytes + info.shape.block_bytes > self.quota_bytes:
                return answer._replace(reason=MissReason.REFUSED)
            missing = count - len(answer.slots)
            if not self.keeps_quota(session, wanted, index, missing):
                return answer._replace(reason=MissReason.QUOTA)
            slot = self.reserve_one(session, wanted, index, missing)
            if slot is None:
                return answer._replace(reason=table.refusal)
            answer.names.append(index)
            answer.slots.append(slot)
            if len(answer.slots) == count:
                return answer  # whatever was skipped on the way
        return answer._replace(reason=reason)

    def keeps_quota(self, session: Session, wanted: Wanted, index: int, missing: int) -> bool:
        """Say whether one block more is within its share domain's and root's quota.

        Whoever is at its quota makes room for `missing` blocks among its own, so that a call that
        needs many looks for them once.
        """
        table, info = self.table, wanted.info
        if table.book.claim(info.root, info.shape.block_bytes) is None:
            return True
        self.tell_policy()
        newcomers = self._reservable(session, info, wanted.keys[index:])[:missing]
        return keep_quota(table, info, newcomers, wanted.now_ms)

    def reserve_one(self, session: Session, wanted: Wanted, index: int, missing: int) -> int | None:
        """Reserve a slot for one name; later ones may want one in this call too."""
        table, info, keys = self.table, wanted.info, wanted.keys
        for _ in range(2):
            slot = table.reserve(
                info,
                wanted.name(index),
                keys[index],
                parent=keys[index - 1] if index else 0,
                position=wanted.first_block + index,
                session=session.number,
                now_ms=wanted.now_ms,
            )
            if slot is not None:
                session.reserved.add(slot)
                session.reserved_bytes += info.shape.block_bytes
                return slot
            self.tell_policy()
            newcomers = self._reservable(session, info, keys[index:])[:missing]
            if not make_room(table, info.shape.block_bytes, newcomers, wanted.now_ms):
                return None
        return None

    def unreserve(self, session: Session, slot: int) -> None:
        """Take a slot off a session's account."""
        session.reserved.remove(slot)
        session.reserved_bytes -= self.table.root_of(slot).shape.block_bytes

    def _may_take_over(self, holder: int, wanted: Wanted, index: int) -> bool:
        """Say whether a block that somebody claimed may be computed by another now.

        Never when the holder has another full name: two blocks of one key cannot both be indexed.
        """
        return (
            self.table.state[holder] == SlotState.RESERVED
            and not self.claimed(holder, wanted.now_ms)
            and self.table.holds(holder, wanted.info, wanted.name(index))
        )

    def _reservable(self, session: Session, info: RootInfo, keys: Sequence[int]) -> Sequence[int]:
        """Return those of `keys` that this call can reserve: room for more would cost blocks.

        What is asked for can be far more than the quota allows or than names that nobody holds.
        """
        quota = self.quota_bytes - session.reserved_bytes
        unheld = [key for key in keys if key not in self.table.index]
        return unheld[: quota // info.shape.block_bytes] or keys[:1]
