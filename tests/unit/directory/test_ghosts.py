"""What our policy remembers of evicted blocks takes a bounded amount of memory, measured."""

import gc
import tracemalloc
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

import kvstore.directory.value_density as module
from kvstore.directory import ghost_tree
from kvstore.directory.ghosts import Ghosts
from kvstore.directory.policy import BlockKey, Prompt
from kvstore.directory.prefix_tree import Run
from kvstore.directory.value_density import (
    _ARRAY_BYTES,
    _KEY_BYTES,
    _PACKED_BYTES,
    _RUN_BYTES,
    GHOST_BYTES,
    ValueDensity,
)

_SHARED = 3
"""Blocks that all prompts of the second shape begin with."""
_FIXED = 128 << 10
"""The hazards of a few classes, and 64 held blocks with a run each: about 115 kB."""
_Shape = Callable[[int], list[int]]


@pytest.fixture
def traced() -> Iterator[Callable[[], int]]:
    """Give what counts the bytes that the policy and its tree allocated since and still hold."""
    own = tracemalloc.Filter(True, str(Path(module.__file__).parent / "*"))

    def count() -> int:
        gc.collect()
        parts = tracemalloc.take_snapshot().filter_traces([own]).statistics("filename")
        return sum(part.size for part in parts)

    tracemalloc.start()
    try:
        yield count
    finally:
        tracemalloc.stop()


def _key(number: int) -> int:
    return (number * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)


def _lone(number: int) -> list[int]:
    """One block, like no other prompt's: the most memory for a block."""
    return [_key(number)]


def _forked(number: int) -> list[int]:
    """A shared start and one block of its own."""
    return [*map(_key, range(_SHARED)), _key(number + _SHARED)]


def _growing(number: int, *, blocks: int = 1) -> list[int]:
    """A prompt that grows by a few blocks sixteen times: a chain of runs of so many."""
    chat, turn = divmod(number, 16)
    return [_key((chat << 20) + block) for block in range(blocks * (turn + 1))]


def _pair(number: int) -> list[int]:
    return [_key(2 * number + block) for block in range(2)]


def _talking(number: int) -> list[int]:
    """Four blocks more each turn, and one at its end that is like no other turn's."""
    chat, turn = divmod(number, 8)
    said = [_key((chat << 20) + block) for block in range(4 * (turn + 1))]
    return [*said, _key((1 << 50) + number)]


def _chat(number: int) -> list[int]:
    return [_key(64 * number + block) for block in range(32)]


def _lived(policy: ValueDensity, shape: _Shape, prompts: range, *, held: bool = True) -> None:
    """Serve prompts through a tier of 64 blocks, or through one that lets nothing in."""
    for number in prompts:
        keys, now_ms = shape(number), 1000.0 * number
        policy.request(Prompt(keys=array("Q", keys), now_ms=now_ms, block_bytes=1))
        new = [BlockKey(key) for key in keys if key not in policy] if held else []
        if new:
            first = keys.index(new[0])
            parent = BlockKey(keys[first - 1]) if first else None
            policy.insert(new, parent=parent, now_ms=now_ms)
        gone = policy.victims(max(0, len(policy) - 64), now_ms=now_ms, may_evict=lambda _: True)
        for victim in gone:
            policy.remove(victim)
    policy._tree._asked.clear()  # bounded by itself


def _remembered(policy: ValueDensity) -> int:
    return policy._tree.blocks - len(policy._tree)


def _bytes_of_one(policy: ValueDensity, shape: _Shape, traced: Callable[[], int]) -> float:
    """Return what one ghost more takes, containers included."""
    _lived(policy, shape, range(300))
    before, ghosts = traced(), _remembered(policy)
    _lived(policy, shape, range(300, 1_100))
    more = _remembered(policy) - ghosts
    assert more >= 790
    return (traced() - before) / more


@pytest.mark.parametrize(
    "shape",
    [_lone, _forked, _growing, _pair, _talking],
    ids=["lone blocks", "forks of one block", "chains of one block", "pairs", "growing chats"],
)
def test_a_ghost_keeps_within_its_bound_however_short_its_run(
    shape: _Shape, traced: Callable[[], int]
) -> None:
    policy = ValueDensity()
    assert 20 < _bytes_of_one(policy, shape, traced) <= GHOST_BYTES
    assert len(policy._tree.ghosts) == policy._tree.ghost_runs, "all are packed"


def test_no_more_is_taken_than_is_reckoned(
    traced: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = _PACKED_BYTES + _KEY_BYTES
    assert packed <= GHOST_BYTES, "or the bound by bytes would forget what the other may remember"
    assert 0.8 * packed < _bytes_of_one(ValueDensity(), _growing, traced) < packed
    pair = (_PACKED_BYTES + _ARRAY_BYTES) / 2 + _KEY_BYTES
    assert 0.8 * pair < _bytes_of_one(ValueDensity(), _pair, traced) < 1.02 * pair
    monkeypatch.setattr(ghost_tree, "PACKED_MAX", 0)
    whole = _RUN_BYTES + _KEY_BYTES
    assert 0.8 * whole < _bytes_of_one(ValueDensity(), _growing, traced) < 1.05 * whole


def test_a_block_of_an_ordinary_prompt_takes_little(traced: Callable[[], int]) -> None:
    policy = ValueDensity()
    _lived(policy, _chat, range(100))
    assert traced() / _remembered(policy) < 0.5 * GHOST_BYTES


@pytest.mark.parametrize("shape", [_lone, _growing], ids=["lone blocks", "chains of one block"])
@pytest.mark.parametrize("held", [True, False], ids=["evicted", "never let in"])
def test_all_together_take_no_more_than_they_may(
    shape: _Shape, held: bool, traced: Callable[[], int]
) -> None:
    """The worst that callers can send: every prompt ends in a run of one block. What was asked for
    lately and is not held stays an object, so less of it is remembered."""
    policy = ValueDensity(max_ghosts=1_500)
    _lived(policy, shape, range(1_700), held=held)
    assert traced() < 1_500 * GHOST_BYTES + _FIXED
    fewest = 1_500 if held else 1_500 * GHOST_BYTES / (_RUN_BYTES + _KEY_BYTES)
    assert 0.85 * fewest < _remembered(policy) <= 1_500, "but no less either"


# -- the table ---------------------------------------------------------------------------------


def _run(keys: list[int], parent: Run) -> Run:
    run = Run(array("Q", keys), parent, 3)
    run.evidence, run.bin, run.shift, run.uses, run.ends = 70_000, 43, -43, 9, True
    run.last_ms, run.gap, run.block_bytes, run.depth_cost = 1e12, 0.1, 1 << 40, 0.3
    return run


@pytest.mark.parametrize("keys", [[(1 << 64) - 1], [5, 6, 7]], ids=["one block", "three"])
def test_a_packed_run_comes_back_as_it_was(keys: list[int]) -> None:
    ghosts, parent = Ghosts(), Run(array("Q"), None, 0)
    packed = _run(keys, parent)
    ghosts.put(50, packed, above=7, kids=2)
    assert ghosts.find(7, keys[0]) == 50
    assert (ghosts.length(50), list(ghosts.keys(50))) == (len(keys), keys)
    back = ghosts.run(50, parent)
    for name in Run.__slots__:
        assert getattr(back, name) == getattr(packed, name), name
    ghosts.drop(50)
    assert (len(ghosts), ghosts.longer, ghosts.find(7, keys[0])) == (0, 0, 0)


def test_the_table_finds_what_a_dictionary_does_in_few_steps() -> None:
    random, ghosts, parent = Random(1), Ghosts(), Run(array("Q"), None, 0)
    known: dict[tuple[int, int], int] = {}
    rows = list(range(44, 2_000))
    for _ in range(8_000):
        place = (random.randrange(30), random.randrange(100))
        assert ghosts.find(*place) == known.get(place, 0)
        if place in known and random.random() < 0.4:
            row = known.pop(place)
            ghosts.drop(row)
            rows.append(row)
        elif place not in known and rows:
            known[place] = rows.pop(random.randrange(len(rows)))
            ghosts.put(known[place], _run([place[1]], parent), above=place[0], kids=0)
        assert len(ghosts) == len(known)
    assert len(known) > 1_000
    in_bucket = [0] * len(ghosts._buckets)
    for place in known:
        in_bucket[ghosts._bucket(*place)] += 1
    assert max(in_bucket) < 12
    assert len(ghosts._buckets) >= len(known)
