import random
from functools import reduce
from operator import xor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.names import PackedNames
from kvstore.directory import places
from kvstore.directory.place import FOLD_NAMES
from kvstore.directory.places import MANY_NAMES, ROOT_BLOCKS, BlockIndex, longest_prefix
from kvstore.directory.policy import block_key

ROOT = bytes(range(32))


def name(number: int) -> bytes:
    return number.to_bytes(32, "little")


def names(count: int, start: int = 1) -> list[bytes]:
    return [name(number) for number in range(start, start + count)]


def match(index: BlockIndex, root: bytes, blocks: list[bytes], reaches: list[int]) -> list[int]:
    return index.match(root, blocks, reaches)


@given(length=st.integers(0, 300), answer=st.integers(0, 300))
def test_prefix_without_holes_is_exact_in_few_probes(length: int, answer: int) -> None:
    answer = min(answer, length)
    probes: list[int] = []

    def has(index: int) -> bool:
        assert 0 <= index < length
        probes.append(index)
        return index < answer

    assert longest_prefix(has, length) == answer
    assert len(probes) <= 2 * max(1, answer).bit_length() + 2


@given(held=st.lists(st.booleans(), max_size=200))
def test_prefix_with_holes_ends_after_something_held(held: list[bool]) -> None:
    found = longest_prefix(held.__getitem__, len(held))
    assert found == 0 or held[found - 1]


def test_match_counts_leading_blocks_in_the_union_of_places() -> None:
    index = BlockIndex(max_blocks=100)
    first, second = index.new_place(), index.new_place()
    index.add(first, ROOT, names(4))
    index.add(second, ROOT, names(8))
    assert match(index, ROOT, names(10), [first.bit, second.bit, first.bit | second.bit]) == [
        4,
        8,
        8,
    ]
    assert match(index, bytes(32), names(10), [second.bit]) == [0]
    assert match(index, ROOT, [], [second.bit]) == [0]


def test_entries_share_one_integer_per_set_of_places() -> None:
    index = BlockIndex(max_blocks=100)
    places = [index.new_place() for _ in range(70)]
    for place in places:
        index.add(place, ROOT, names(2))
    values = [value for shard in index._tables[ROOT].shards for value in shard.values()]
    assert len(values) == 2 and values[0] is values[1]


def test_no_dict_of_the_index_is_so_large_that_its_growth_stops_decisions() -> None:
    index = BlockIndex(max_blocks=100_000)
    draw = random.Random(2)
    index.add(index.new_place(), ROOT, [draw.randbytes(32) for _ in range(20_000)])
    assert len(index) == 20_000
    assert max(map(len, index._tables[ROOT].shards)) < 20_000 // 150


def test_adding_and_discarding_twice_changes_nothing() -> None:
    index = BlockIndex(max_blocks=100)
    place = index.new_place()
    index.add(place, ROOT, names(3))
    index.add(place, ROOT, names(3))
    assert place.count == 3
    index.discard(place, ROOT, names(2))
    index.discard(place, ROOT, names(2))
    assert (place.count, len(index)) == (1, 1)
    assert place.xor_keys == block_key(ROOT, name(3))


def test_discarding_from_one_place_keeps_the_others() -> None:
    index = BlockIndex(max_blocks=100)
    first, second = index.new_place(), index.new_place()
    index.add(first, ROOT, names(3))
    index.add(second, ROOT, names(3))
    index.discard(first, ROOT, names(3))
    assert match(index, ROOT, names(3), [first.bit, second.bit]) == [0, 3]


def test_sharing_starts_anew_when_there_are_too_many_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "MAX_INTERNED", 2)
    index = BlockIndex(max_blocks=100)
    held = [index.new_place() for _ in range(5)]
    for place in held:
        index.add(place, ROOT, names(2))
    assert match(index, ROOT, names(2), [place.bit for place in held]) == [2] * 5


def test_a_full_index_leaves_blocks_out_and_says_so() -> None:
    index = BlockIndex(max_blocks=3)
    place, other = index.new_place(), index.new_place()
    index.add(place, ROOT, names(5))
    assert (len(index), place.count, place.partial) == (3, 3, True)
    index.add(other, ROOT, names(3))  # known blocks find room
    assert (other.count, other.partial) == (3, False)


def test_a_retired_place_vanishes_at_once_and_its_bit_returns_after_the_sweep() -> None:
    index = BlockIndex(max_blocks=1000)
    old, kept = index.new_place(), index.new_place()
    index.add(old, ROOT, names(100))
    index.add(kept, ROOT, names(10))
    index.retire(old)
    assert match(index, ROOT, names(100), [old.bit, kept.bit]) == [0, 10]
    assert index.places_of(ROOT, name(1)) == kept.bit
    while index.sweep(7):
        index.add(kept, ROOT, names(1, start=500))  # goes on beside the sweep
        assert index.new_place().bit != old.bit or not index._retired
    assert len(index) == 11
    assert index.sweep(7) == 0


def test_a_block_that_one_of_two_places_drops_is_still_found() -> None:
    index = BlockIndex(max_blocks=100)
    first, second = index.new_place(), index.new_place()
    for place in (first, second):
        index.add(place, ROOT, names(4))
    index.discard(first, ROOT, names(2, start=3))
    assert match(index, ROOT, names(4), [first.bit, second.bit]) == [2, 4]
    assert (first.count, second.count) == (2, 4)


def test_shared_sets_are_forgotten_before_they_grow_without_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(places, "MAX_INTERNED", 1)
    index = BlockIndex(max_blocks=100)
    held = [index.new_place() for _ in range(4)]
    for at, place in enumerate(held):
        index.add(place, ROOT, names(4 - at))
    assert match(index, ROOT, names(4), [place.bit for place in held]) == [4, 3, 2, 1]


def test_reaches_part_where_one_holds_what_another_lacks() -> None:
    """Against a match of each reach alone, whatever lies in between."""
    index = BlockIndex(max_blocks=100)
    blocks = [bytes([at]) * 32 for at in range(16)]
    first, second, third = (index.new_place() for _ in range(3))
    index.add(first, ROOT, blocks[:13])
    index.add(second, ROOT, blocks[:6])
    index.add(third, ROOT, blocks[10:11])
    reaches = [first.bit, second.bit, third.bit, first.bit | third.bit, 0]
    alone = [match(index, ROOT, blocks, [reach])[0] for reach in reaches]
    assert match(index, ROOT, blocks, reaches) == alone == [13, 6, 0, 13, 0]


@pytest.mark.parametrize("max_blocks", [10_000, 700])
def test_many_names_at_once_are_as_many_one_by_one(max_blocks: int) -> None:
    """Snapshots take another way through the index than events; both must end in the same."""
    many, few = BlockIndex(max_blocks=max_blocks), BlockIndex(max_blocks=max_blocks)
    pairs = [(many.new_place(), few.new_place()) for _ in range(2)]
    draw = random.Random(5)
    pool = [bytes([n % 256, n // 256, *bytes(30)]) for n in range(1_000)]
    for step in range(40):
        at, deleted = step % 2, draw.random() < 0.4
        names = draw.choices(pool, k=draw.randrange(MANY_NAMES, 400))
        for index, place in ((many, pairs[at][0]), (few, pairs[at][1])):
            change = index.discard if deleted else index.add
            if index is many:
                change(place, ROOT, PackedNames(b"".join(names)) if step % 3 else names)
            else:
                for name in names:
                    change(place, ROOT, [name])
        for ours, theirs in pairs:
            assert (ours.count, ours.xor_keys, ours.partial) == (
                theirs.count, theirs.xor_keys, theirs.partial,
            )  # fmt: skip
        assert len(many) == len(few)


def test_every_event_has_an_integer_of_its_own_to_tell_new_blocks_by() -> None:
    """Python shares small integers; with such a bit known blocks would count as new."""
    index = BlockIndex(max_blocks=100)
    for place in (index.new_place() for _ in range(12)):
        assert (place.bit ^ 0) is not place.bit


def test_known_blocks_after_an_unknown_first_one_are_not_counted_again() -> None:
    index = BlockIndex(max_blocks=1_000)
    first, second = index.new_place(), index.new_place()
    index.add(first, ROOT, names(40, start=11))
    index.add(second, ROOT, names(5, start=20))
    for place in (first, second):
        index.add(place, ROOT, PackedNames(b"".join([*names(60), *names(3)])))
        assert place.count == 60
        assert place.xor_keys == reduce(xor, [block_key(ROOT, one) for one in names(60)])
    assert len(index) == 60


@pytest.mark.parametrize("known", ["none", "one of another", "one of its own", "one twice"])
def test_new_blocks_are_counted_without_asking_every_table(known: str) -> None:
    """Only an event that tells of known blocks as well asks: 256 lengths cost a third of it."""
    index = BlockIndex(max_blocks=1_000)
    place, other = index.new_place(), index.new_place()
    index.add(place if known == "one of its own" else other, ROOT, names(1))
    told = names(40, start=100)
    if known != "none":
        told[7] = told[20] if known == "one twice" else names(1)[0]
    table, asked = index._tables[ROOT], list[int]()
    table.shards = [Asked(shard, asked) for shard in table.shards]
    index.add(place, ROOT, told)
    assert bool(asked) == (known != "none")
    assert place.count == (39 if known == "one twice" else 40)
    assert len(index) == len({*told, *names(1)})


class Asked(dict[bytes, int]):
    """A table that tells when its length is asked for."""

    def __init__(self, entries: dict[bytes, int], asked: list[int]) -> None:
        super().__init__(entries)
        self._asked = asked

    def __len__(self) -> int:
        self._asked.append(1)
        return super().__len__()


def test_equal_names_under_two_roots_are_two_blocks_and_an_empty_root_is_forgotten() -> None:
    index, other = BlockIndex(max_blocks=1_000), bytes(32)
    place = index.new_place()
    for root in (ROOT, other):
        index.add(place, root, names(20))
    assert (len(index), place.count) == (40, 40)
    index.discard(place, other, names(20))
    assert (len(index), place.count) == (20, 20)
    assert match(index, ROOT, names(20), [place.bit]) == [20]
    assert match(index, other, names(20), [place.bit]) == [0]
    assert list(index._tables) == [ROOT]
    index.retire(place)
    while index.sweep(7):
        pass
    assert (len(index), index._tables) == (0, {})


def test_roots_are_no_way_round_the_bound() -> None:
    index = BlockIndex(max_blocks=3 * ROOT_BLOCKS)
    place = index.new_place()
    for root in range(10):
        index.add(place, name(root), names(1))
    assert place.partial and len(index) == place.count == len(index._tables) == 3


def test_a_digest_is_the_same_however_many_names_wait_for_it() -> None:
    index = BlockIndex(max_blocks=10_000)
    place, total = index.new_place(), 0
    for start in range(1, FOLD_NAMES * 3, 17):
        index.add(place, ROOT, names(17, start))
        for one in names(17, start):
            total ^= block_key(ROOT, one)
        assert sum(map(len, place._unfolded)) <= FOLD_NAMES * 32
        if start // 17 % 90 == 0:  # later than they are folded by themselves
            assert place.xor_keys == total
    assert place.xor_keys == total
