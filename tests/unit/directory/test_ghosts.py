"""What our policy remembers of evicted blocks takes a bounded amount of memory, measured."""

import tracemalloc
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvstore.directory.value_density as module
from kvstore.directory.policy import BlockKey, Prompt
from kvstore.directory.value_density import _RUN_BYTES, GHOST_BYTES, ValueDensity

_SHARED = 3
"""Blocks that all prompts of the second shape begin with."""
_FIXED = 128 << 10
"""The hazards of a few classes, and 64 held blocks with a run each: about 115 kB."""


@pytest.fixture
def traced() -> Iterator[Callable[[], int]]:
    """Give what counts the bytes that the policy and its tree allocated since and still hold."""
    own = tracemalloc.Filter(True, str(Path(module.__file__).parent / "*"))
    tracemalloc.start()
    try:
        yield lambda: sum(
            part.size
            for part in tracemalloc.take_snapshot().filter_traces([own]).statistics("filename")
        )
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


def _chat(number: int) -> list[int]:
    return [_key(64 * number + block) for block in range(32)]


def _lived(policy: ValueDensity, shape: Callable[[int], list[int]], prompts: int) -> None:
    """Serve prompts through a tier of 64 blocks."""
    for number in range(prompts):
        keys, now_ms = shape(number), 1000.0 * number
        policy.request(Prompt(keys=array("Q", keys), now_ms=now_ms, block_bytes=1))
        new = [BlockKey(key) for key in keys if key not in policy]
        first = keys.index(new[0])
        parent = BlockKey(keys[first - 1]) if first else None
        policy.insert(new, parent=parent, now_ms=now_ms)
        gone = policy.victims(max(0, len(policy) - 64), now_ms=now_ms, may_evict=lambda _: True)
        for victim in gone:
            policy.remove(victim)


def _remembered(policy: ValueDensity) -> int:
    return policy._tree.blocks - len(policy._tree)


@pytest.mark.parametrize("shape", [_lone, _forked], ids=["lone blocks", "forks of one block"])
def test_a_run_takes_what_is_reckoned_for_it(
    shape: Callable[[int], list[int]], traced: Callable[[], int]
) -> None:
    policy = ValueDensity()
    _lived(policy, shape, 1_200)
    policy._tree._asked.clear()  # bounded by itself
    assert _remembered(policy) > 1_100
    taken = (traced() - _FIXED) / _remembered(policy)
    assert 0.7 * _RUN_BYTES < taken < 1.1 * _RUN_BYTES


def test_a_block_of_an_ordinary_prompt_takes_little(traced: Callable[[], int]) -> None:
    policy = ValueDensity()
    _lived(policy, _chat, 100)
    policy._tree._asked.clear()
    assert traced() / _remembered(policy) < 0.5 * GHOST_BYTES


@pytest.mark.parametrize("shape", [_lone, _forked], ids=["lone blocks", "forks of one block"])
def test_all_together_take_no_more_than_they_may(
    shape: Callable[[int], list[int]], traced: Callable[[], int]
) -> None:
    """The worst that callers can send: every prompt ends in a run of one block."""
    policy = ValueDensity(max_ghosts=1_500)
    _lived(policy, shape, 1_500)
    policy._tree._asked.clear()
    assert traced() < 1_500 * GHOST_BYTES + _FIXED
    assert _remembered(policy) > 0.8 * 1_500 * GHOST_BYTES / _RUN_BYTES, "but no less either"
