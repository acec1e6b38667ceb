import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.limits import GRANULE_BYTES
from kvstore.tiers.arena_space import ArenaSpace, Extent, ExtentAllocator

MIB = 1 << 20


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=60))
def test_extents_never_overlap_and_merge_when_freed(steps: list[tuple[bool, int]]) -> None:
    allocator = ExtentAllocator(32)
    held: list[Extent] = []
    for take, number in steps:
        if take:
            extent = allocator.allocate(number)
            if extent is None:
                assert allocator.largest() < number
            else:
                assert all(e.stop <= extent.start or extent.stop <= e.start for e in held)
                held.append(extent)
        elif held:
            allocator.give_back(held.pop(number % len(held)))
        assert allocator.free_bytes == 32 - sum(e.length for e in held)
    for extent in held:
        allocator.give_back(extent)
    assert allocator.allocate(32) == Extent(0, 32)
    assert allocator.largest() == 0


def test_an_extent_cannot_be_freed_twice_or_claimed_when_taken() -> None:
    allocator = ExtentAllocator(8)
    allocator.claim(Extent(2, 4))
    with pytest.raises(AssertionError, match="is not free"):
        allocator.claim(Extent(3, 5))
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.give_back(Extent(5, 6))
    allocator.give_back(Extent(2, 4))
    assert allocator.allocate(8) == Extent(0, 8)


@pytest.mark.parametrize("block_kib", [4, 180, 720, 1024, 2048, 2560, 5120, 20480])
def test_chunks_of_a_big_arena_waste_at_most_one_percent(block_kib: int) -> None:
    space = ArenaSpace(4 << 30, 1 << 18)
    block = block_kib << 10
    length = space.chunk_bytes(block)
    assert length % (2 * MIB) == 0
    assert length >= 64 * MIB
    assert length % block <= length / 100


def test_a_dissolved_chunk_changes_class() -> None:
    space = ArenaSpace(MIB, 512)
    small: list[int] = []
    while space.take(GRANULE_BYTES) is not None or space.grow(GRANULE_BYTES) is not None:
        pass
    small = [slot for chunk in space.chunks() for slot in chunk.slots]
    assert len(small) == MIB // GRANULE_BYTES
    assert space.grow(8 * GRANULE_BYTES) is None
    busy = set(small[16:])
    found = space.victim_chunk(8 * GRANULE_BYTES, lambda slot: slot not in busy)
    assert found is not None
    chunk, used = found
    assert sorted(used) == sorted(chunk.slots) == small[:16]
    for slot in used:
        space.give(slot)
    space.dissolve(chunk)
    fresh = space.grow(8 * GRANULE_BYTES)
    assert fresh is not None
    assert fresh.extent == chunk.extent
    with pytest.raises(AssertionError, match="is in no chunk"):
        space.give(used[0])  # not the new chunk's, though that lies where its own did
    assert space.below_fair_share(8 * GRANULE_BYTES)
    assert not space.below_fair_share(GRANULE_BYTES)
    assert space.victim_chunk(GRANULE_BYTES, lambda slot: False) == (fresh, [])


def test_bugs_assert() -> None:
    space = ArenaSpace(MIB, 32)
    chunk = space.grow(GRANULE_BYTES)
    assert chunk is not None
    with pytest.raises(AssertionError, match="freed twice"):
        space.give(chunk.slots[0])
    with pytest.raises(AssertionError, match="in no chunk"):
        space.give(31)
    space.take(GRANULE_BYTES)
    with pytest.raises(AssertionError, match="cannot change class"):
        space.dissolve(chunk)


def test_slot_ids_may_run_out_before_bytes() -> None:
    space = ArenaSpace(MIB, 3)
    chunk = space.grow(GRANULE_BYTES)
    assert chunk is not None
    assert len(chunk.slots) == 3
    assert chunk.extent.length == 3 * GRANULE_BYTES
    assert space.grow(GRANULE_BYTES) is None


def test_free_bytes_are_in_extents_or_in_slots_of_one_size() -> None:
    space = ArenaSpace(64 * MIB, 1_000)
    assert space.largest_free_bytes == space.free_bytes == 64 * MIB and not space.free_slot_bytes
    chunk = space.grow(1 * MIB)
    assert chunk is not None
    taken = [space.take(1 * MIB) for _ in range(len(chunk.slots))]
    assert space.free_slot_bytes == 0
    space.give(chunk.slots[0])
    assert space.free_slot_bytes == MIB and None not in taken
    other = space.grow(1 * MIB)
    assert other is not None
    for slot in chunk.slots[1:]:
        space.give(slot)
    space.dissolve(chunk)
    assert space.largest_free_bytes < space.free_bytes, "two free extents around a chunk"
