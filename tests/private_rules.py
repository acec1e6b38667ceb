"""Rules of the store's state machine for private slots."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.core.errors import BadInput
from kvstore.core.limits import GRANULE_BYTES
from kvstore.core.outcomes import MissReason, SettleOutcome
from kvstore.core.slots import SlotState
from kvstore.service.roots import RootInfo
from kvstore.service.sessions import Session
from kvstore.service.slots import SlotTable
from kvstore.service.store import ArenaStore
from kvstore.transport.arena import ArenaMapping


class PrivateRules(RuleBasedStateMachine):
    """What sessions do with slots that hold no block; the machine has all the rest."""

    store: ArenaStore
    table: SlotTable
    arena: ArenaMapping
    now_ms: float
    reserved: dict[int, dict[int, tuple[int, int, bytes]]]

    def __init__(self) -> None:
        super().__init__()
        self.private: dict[int, dict[int, tuple[int, int]]] = {}
        """session → slot → (generation, what was written there)."""

    def session(self, draw: int) -> Session:
        raise NotImplementedError

    def info(self, session: Session, root: int) -> RootInfo:
        raise NotImplementedError

    @precondition(lambda self: self.reserved)
    @rule(who=st.integers(0, 2), granules=st.integers(1, 3), count=st.integers(1, 4))
    def reserve_private(self, who: int, granules: int, count: int) -> None:
        session = self.session(who)
        size = granules * GRANULE_BYTES
        left = self.store.limits.private_quota_bytes - self.store.private.used_bytes
        held = {self.arena.record(slot).block_bytes for slot in self.private[session.number]}
        if held - {size}:
            with pytest.raises(BadInput, match="block_bytes"):
                self.store.private.reserve(session, size, count, self.now_ms)
            return
        slots, reason = self.store.private.reserve(session, size, count, self.now_ms)
        assert len(slots) <= count and len(slots) * size <= left
        assert (reason is MissReason.NONE) == (len(slots) == count)
        assert (reason is MissReason.QUOTA) <= (left - len(slots) * size < size)
        mine = self.private[session.number]
        for slot in slots:
            assert not any(slot in held for held in self.private.values())
            assert not any(slot in held for held in self.reserved.values())
            fill = (slot + self.table.generation[slot]) % 256
            mine[slot] = self.table.generation[slot], fill
            record = self.arena.record(slot)
            assert record.block_bytes == size
            self.arena.block(record.offset, size)[:] = bytes([fill]) * size

    @precondition(lambda self: any(self.private.values()))
    @rule(root=st.integers(0, 1), which=st.integers(0, 20), others=st.booleans())
    def give_back_private(self, root: int, which: int, others: bool) -> None:
        held = [(number, slot) for number, mine in self.private.items() for slot in mine]
        number, slot = sorted(held)[which % len(held)]
        session = self.store.sessions.by_number(number)
        assert session is not None
        refs = [(slot, self.private[number][slot][0])]
        info = self.info(session, root)
        assert self.store.commit(session, info, refs, self.now_ms) == [SettleOutcome.NOT_YOURS]
        stranger = next((n for n in self.private if n != number), None)
        if others and stranger is not None:
            other = self.store.sessions.by_number(stranger)
            assert other is not None
            outcome = self.store.abort(other, self.info(other, root), refs)
            assert outcome == [SettleOutcome.NOT_YOURS]
            return
        del self.private[number][slot]
        assert self.store.abort(session, info, refs) == [SettleOutcome.DONE]
        assert self.store.abort(session, info, refs) == [SettleOutcome.ALREADY]

    @invariant()
    def private_slots_stand_and_keep_their_bytes(self) -> None:
        used = 0
        for number, mine in self.private.items():
            for slot, (generation, fill) in mine.items():
                assert self.arena.word(slot) == (generation, SlotState.RESERVED, number)
                record = self.arena.record(slot)
                size = record.block_bytes
                assert self.arena.block(record.offset, size) == bytes([fill]) * size
                used += size
        assert self.store.private.used_bytes == used <= self.store.limits.private_quota_bytes
