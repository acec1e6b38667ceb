"""Private slots: their quota, whom they displace, and that nobody can find them."""

import pytest

from kvstore.core.errors import BadInput
from kvstore.core.limits import GRANULE_BYTES
from kvstore.core.outcomes import MissReason
from kvstore.core.slots import SlotState
from kvstore.service.adopt import adopt
from kvstore.service.private import private_root
from tests.arena_fixture import SmallStore, names, small_store


def seal_all(small: SmallStore) -> None:
    slots = [slot for slot, _ in small.store.to_seal]
    small.table.seal(slots, [bytes(16)] * len(slots))


def test_the_quota_is_one_of_their_own_for_all_sessions_together() -> None:
    with small_store(quota_blocks=4, private_blocks=5) as small:
        one, info = small.session(1)
        other, _ = small.session(2)
        first = small.store.private.reserve(one, GRANULE_BYTES, 3, 0.0)
        assert (len(first.slots), first.reason) == (3, MissReason.NONE)
        second = small.store.private.reserve(other, GRANULE_BYTES, 3, 0.0)
        assert (len(second.slots), second.reason) == (2, MissReason.QUOTA)
        # What a session may reserve for blocks is as much as before.
        blocks = small.store.acquire(
            one, info, b"".join(names(4)), reserve=4, first_block=0, now_ms=0.0
        )
        assert len(blocks.reserved_slots) == 4


def test_blocks_of_the_cache_make_room_and_held_ones_do_not() -> None:
    with small_store(blocks=4, private_blocks=4) as small:
        session, info = small.session(1)
        small.put(session, info, names(4), 0.0)
        seal_all(small)
        held = small.store.acquire(
            session, info, b"".join(names(2)), reserve=0, first_block=0, now_ms=1.0
        )
        assert held.ready == 2
        got = small.store.private.reserve(session, GRANULE_BYTES, 3, 2.0)
        assert (len(got.slots), got.reason) == (2, MissReason.REFUSED)
        assert small.table.evicted_blocks == 2


def test_slots_may_be_larger_than_the_sessions_blocks() -> None:
    with small_store(private_blocks=8) as small:
        session, _ = small.session(1)
        got = small.store.private.reserve(session, 3 * GRANULE_BYTES, 9, 0.0)
        assert len(got.slots) == 2, "six of eight granules; a third would be nine"
        for size in (0, 100, GRANULE_BYTES + 1):
            with pytest.raises(BadInput, match="bytes"):
                small.store.private.reserve(session, size, 1, 0.0)


def test_a_session_holds_slots_of_one_size() -> None:
    """Each size takes a chunk of the arena of its own, however few slots of it there are."""
    with small_store(private_blocks=8) as small:
        session, _ = small.session(1)
        other, _ = small.session(2)
        got = small.store.private.reserve(session, GRANULE_BYTES, 1, 0.0)
        with pytest.raises(BadInput, match=f"block_bytes {2 * GRANULE_BYTES}"):
            small.store.private.reserve(session, 2 * GRANULE_BYTES, 1, 0.0)
        assert small.store.private.reserve(other, 2 * GRANULE_BYTES, 1, 0.0).slots
        info = next(iter(session.roots.values()))
        refs = [(slot, small.table.generation[slot]) for slot in got.slots]
        small.store.abort(session, info, refs)
        assert small.store.private.reserve(session, 2 * GRANULE_BYTES, 1, 0.0).slots


def test_a_new_incarnation_leaves_them_to_sessions_that_live() -> None:
    with small_store() as small:
        session, _ = small.session(1)
        gone, _ = small.session(2)
        [kept] = small.store.private.reserve(session, GRANULE_BYTES, 1, 0.0).slots
        [lost] = small.store.private.reserve(gone, GRANULE_BYTES, 1, 0.0).slots
        later = small.again()
        living, info = later.session(1)
        assert adopt(later.store, 1.0).reserved == 1
        assert living.private == {kept} and not living.reserved
        assert later.store.private.used_bytes == GRANULE_BYTES
        assert later.arena.word(lost).state is SlotState.FREE
        # Names that it gives now are others than before.
        later.store.private.reserve(living, GRANULE_BYTES, 1, 1.0)
        assert len({later.arena.name(slot) for slot in living.private}) == 2
        refs = [(slot, later.table.generation[slot]) for slot in living.private]
        later.store.abort(living, info, refs)
        assert not living.private and later.store.private.used_bytes == 0


def test_no_session_can_open_their_root() -> None:
    roots = {private_root(size * GRANULE_BYTES) for size in range(1, 4)}
    assert len(roots) == 3
    with small_store() as small:
        session, _ = small.session(1)
        small.store.private.reserve(session, GRANULE_BYTES, 1, 0.0)
        assert not roots & set(session.roots)
