"""The generation check: what a reader may believe about bytes in shared memory."""

import asyncio
import os
from collections.abc import Iterator

import pytest

from kvstore.client.arena import SharedArena
from kvstore.client.copies import WriteGate, _parts, copy_in, copy_out
from kvstore.client.replies import Reserved, SlotRef
from kvstore.core.errors import SessionLost
from kvstore.core.slots import SlotState, SlotWord
from kvstore.directory.events import TierKind
from kvstore.transport.arena import ArenaMapping, ArenaSize, create_arena
from tests.patience import PATIENCE_S

BLOCK = 4096


def ref(slot: int = 0, generation: int = 1, arena: int = 1) -> SlotRef:
    return SlotRef(slot, generation, slot * BLOCK, TierKind.DRAM, arena)


@pytest.fixture
def owner() -> Iterator[ArenaMapping]:
    fd = create_arena(ArenaSize(4 * BLOCK, 4))
    mapping = ArenaMapping(fd, owner=True)
    os.close(fd)
    yield mapping
    mapping.close()


@pytest.fixture
def shared(owner: ArenaMapping) -> SharedArena:
    return SharedArena(owner, number=1, block_bytes=BLOCK)


@pytest.fixture(autouse=True)
def _released(shared: SharedArena) -> Iterator[None]:
    yield
    shared.close()


def test_a_view_is_the_block_in_place(owner: ArenaMapping, shared: SharedArena) -> None:
    shared.view(ref(2))[:5] = b"block"
    assert bytes(owner.data[2 * BLOCK : 2 * BLOCK + 5]) == b"block"
    assert len(shared.view(ref(3))) == BLOCK


def test_still_follows_the_word(owner: ArenaMapping, shared: SharedArena) -> None:
    word = SlotWord(0, SlotState.FREE, 0).to(SlotState.RESERVED, session=3)
    owner.set_word(0, word)
    assert not shared.still(ref())
    assert not shared.hopeless(ref())
    word = word.to(SlotState.COMMITTED)
    owner.set_word(0, word)
    assert shared.still(ref())
    word = word.to(SlotState.SEALED)
    owner.set_word(0, word)
    assert shared.still(ref())
    word = word.to(SlotState.FREE)
    owner.set_word(0, word)
    assert not shared.still(ref())
    assert shared.hopeless(ref())
    owner.set_word(0, word.to(SlotState.RESERVED, session=4).to(SlotState.COMMITTED))
    assert not shared.still(ref()), "readable again, and another block's"


def test_slots_of_an_earlier_arena_mean_nothing_here(
    owner: ArenaMapping, shared: SharedArena
) -> None:
    owner.set_word(0, SlotWord(1, SlotState.SEALED, 0))
    assert shared.still(ref())
    assert not shared.still(ref(arena=2))
    assert shared.hopeless(ref(arena=2))
    with pytest.raises(SessionLost):
        shared.view(ref(arena=2))


async def test_waiting_ends_when_all_are_readable(owner: ArenaMapping, shared: SharedArena) -> None:
    for slot in range(3):
        owner.set_word(slot, SlotWord(1, SlotState.RESERVED, 3))
    wait = asyncio.create_task(shared.wait_ready([ref(0), ref(1), ref(2)], deadline_s=PATIENCE_S))
    for slot in range(3):
        await asyncio.sleep(0)
        owner.set_word(slot, SlotWord(1, SlotState.COMMITTED, 0))
    assert await wait == 3
    assert await shared.wait_ready([], deadline_s=1) == 0


async def test_waiting_counts_from_the_first_and_keeps_its_deadline(
    owner: ArenaMapping, shared: SharedArena
) -> None:
    owner.set_word(0, SlotWord(1, SlotState.COMMITTED, 0))
    owner.set_word(1, SlotWord(1, SlotState.RESERVED, 3))
    owner.set_word(2, SlotWord(1, SlotState.COMMITTED, 0))
    assert await shared.wait_ready([ref(0), ref(1), ref(2)], deadline_s=0.02) == 1


async def test_nobody_waits_for_what_cannot_come(owner: ArenaMapping, shared: SharedArena) -> None:
    owner.set_word(0, SlotWord(1, SlotState.COMMITTED, 0))
    owner.set_word(1, SlotWord(1, SlotState.FREE, 0))
    async with asyncio.timeout(PATIENCE_S):
        assert await shared.wait_ready([ref(0), ref(1)], deadline_s=2 * PATIENCE_S) == 1


def test_reservations_are_found_by_session(owner: ArenaMapping, shared: SharedArena) -> None:
    owner.set_word(1, SlotWord(7, SlotState.RESERVED, 3))
    owner.set_word(2, SlotWord(8, SlotState.RESERVED, 4))
    owner.set_word(3, SlotWord(9, SlotState.COMMITTED, 0))
    assert shared.reserved_by(3) == {1: 7}
    assert shared.reserved_by(5) == {}


def test_copies_end_at_the_first_block_that_was_reused(
    owner: ArenaMapping, shared: SharedArena
) -> None:
    for slot in range(4):
        owner.set_word(slot, SlotWord(1, SlotState.SEALED, 0))
        shared.view(ref(slot))[:] = bytes([slot]) * BLOCK
    refs = [ref(slot) for slot in range(4)]
    assert copy_out(shared, refs, 10, WriteGate()) == [bytes([slot]) * 10 for slot in range(4)]
    owner.set_word(2, SlotWord(2, SlotState.SEALED, 0))
    assert copy_out(shared, refs, 10, WriteGate()) == [bytes(10), b"\1" * 10]


def test_what_is_copied_in_leaves_nothing_of_an_earlier_block(
    owner: ArenaMapping, shared: SharedArena
) -> None:
    shared.view(ref(0))[:] = b"s" * BLOCK
    copy_in(shared, [Reserved(1, ref(0))], [memoryview(b"no"), memoryview(b"yes")])
    assert bytes(shared.view(ref(0))) == b"yes" + bytes(BLOCK - 3)


@pytest.mark.parametrize(
    ("blocks", "sizes"),
    [
        (0, []),
        (1, [1]),
        (8, [8]),
        (9, [1, 8]),
        (16, [8, 8]),
        (20, [8, 4, 8]),
        (64, [8, 24, 24, 8]),
        (70, [8, 24, 24, 6, 8]),
    ],
)
def test_a_batch_is_cut_with_small_ends(blocks: int, sizes: list[int]) -> None:
    """The node has nothing to hash before the first part's commit; nobody copies after the last."""
    reserved = [Reserved(index, ref(0)) for index in range(blocks)]
    parts = _parts(reserved, 2 << 20)
    assert [len(part) for part in parts] == sizes
    assert [item for part in parts for item in part] == reserved
