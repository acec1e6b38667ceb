"""What a new incarnation makes of a table that was left in the middle of something."""

from typing import Any

from kvstore.core.limits import GRANULE_BYTES
from kvstore.core.slots import SlotState, SlotWord
from kvstore.service.adopt import adopt
from tests.arena_fixture import names, small_store


def test_only_sealed_blocks_and_living_reservations_stay() -> None:
    with small_store() as small:
        session, info = small.session(1)
        other, _ = small.session(2)
        small.put(session, info, names(3), 0.0)
        sealed, committed = small.store.to_seal[0][0], small.store.to_seal[1][0]
        small.table.seal([sealed], [bytes(16)])
        ask: dict[str, Any] = {"reserve": 1, "first_block": 0, "now_ms": 1.0}
        [kept] = small.store.acquire(session, info, names(1, 5)[0], **ask).reserved_slots
        [gone] = small.store.acquire(other, info, names(1, 6)[0], **ask).reserved_slots
        later = small.again()
        living, _ = later.session(1)
        found = adopt(later.store, 2.0)
        assert found == (1, 1, 3, 0)
        states = {slot: later.arena.word(slot).state for slot in (sealed, committed, kept, gone)}
        assert states == {
            sealed: SlotState.SEALED,
            committed: SlotState.FREE,
            kept: SlotState.RESERVED,
            gone: SlotState.FREE,
        }
        assert living.reserved == {kept}
        assert living.reserved_bytes == GRANULE_BYTES
        assert not later.table.servable[sealed]
        assert later.table.publisher.digests()[0].count == 1


def test_rubbish_in_words_and_records_is_counted_and_dropped() -> None:
    with small_store() as small:
        session, info = small.session(1)
        small.put(session, info, names(3), 0.0)
        slots = [slot for slot, _ in small.store.to_seal]
        for slot in slots:
            small.table.seal([slot], [bytes(16)])
        words = small.arena._words
        base = (4096 + slots[0] * 128) // 8
        words[base] |= 15  # a state that does not exist
        small.arena._bytes[4096 + slots[1] * 128 + 20] ^= 0xFF  # shares that do not divide
        later = small.again()
        found = adopt(later.store, 1.0)
        assert (found.sealed, found.unreadable) == (1, 1)
        assert later.arena.word(slots[0]).state is SlotState.FREE
        assert later.arena.word(slots[1]).state is SlotState.FREE


def test_a_chunk_left_half_laid_out_is_dropped() -> None:
    with small_store() as small:
        session, info = small.session(1)
        small.put(session, info, names(1), 0.0)
        for slot, _ in small.store.to_seal:
            small.table.seal([slot], [bytes(16)])
        small.arena.lay(40, 8 * GRANULE_BYTES, 2 * GRANULE_BYTES)
        small.arena.lay(41, 10 * GRANULE_BYTES, 2 * GRANULE_BYTES)
        later = small.again()
        adopt(later.store, 1.0)
        placed = {slot for slot, _, _ in later.arena.placed()}
        assert not placed & {40, 41}
        used = sum(chunk.extent.length for chunk in later.table.space.chunks())
        assert used + later.table.space.free_bytes == 16 * GRANULE_BYTES


def test_two_sealed_copies_of_one_name_become_one() -> None:
    with small_store() as small:
        session, info = small.session(1)
        small.put(session, info, names(2), 0.0)
        slots = [slot for slot, _ in small.store.to_seal]
        for slot in slots:
            small.table.seal([slot], [bytes(16)])
        record = small.arena.record(slots[0])
        at = 4096 + slots[1] * 128
        small.arena._bytes[at + 60 : at + 92] = record.name
        later = small.again()
        assert adopt(later.store, 1.0).sealed == 1


def test_an_empty_arena_has_nothing_to_adopt() -> None:
    with small_store() as small:
        assert adopt(small.store, 0.0) == (0, 0, 0, 0)
        assert small.arena.word(0) == SlotWord(0, SlotState.FREE, 0)


def test_chunks_stay_apart_so_that_they_can_change_class_one_by_one() -> None:
    with small_store(blocks=64, quota_blocks=64) as small:
        session, info = small.session(1)
        small.put(session, info, names(32), 0.0)
        for slot, _ in small.store.to_seal:
            small.table.seal([slot], [bytes(16)])
        before = {chunk.extent: chunk.slots for chunk in small.table.space.chunks()}
        assert len(before) == 8
        later = small.again()
        assert adopt(later.store, 1.0).sealed == 32
        assert {chunk.extent: chunk.slots for chunk in later.table.space.chunks()} == before


def test_places_that_overlap_are_dropped_and_the_node_goes_on() -> None:
    """A table that somebody scribbled over must not keep every next node from starting."""
    with small_store() as small:
        session, info = small.session(1)
        small.put(session, info, names(3), 0.0)
        slots = [slot for slot, _ in small.store.to_seal]
        for slot in slots:
            small.table.seal([slot], [bytes(16)])
        table = small.arena._bytes
        first, last = (4096 + slot * 128 for slot in (slots[0], slots[-1]))
        table[last + 8 : last + 16] = table[first + 8 : first + 16]
        later = small.again()
        found = adopt(later.store, 1.0)
        assert found.sealed == 2
        used = sum(chunk.extent.length for chunk in later.table.space.chunks())
        assert used + later.table.space.free_bytes == 16 * GRANULE_BYTES
