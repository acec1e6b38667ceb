"""How far past gaps tell the next one: the slope that is learned, and what it does to a policy."""

import random
from array import array

import pytest

from kvstore.directory.policy import BlockKey, Prompt
from kvstore.directory.reuse import BINS, bin_seen
from kvstore.directory.rhythm import Rhythm
from kvstore.directory.value_density import ValueDensity

SECOND = 1000.0


def taught(own: float, own_noise: float, *, pairs: int = 400) -> Rhythm:
    """Return what is learned from things with middles spread by `own` and gaps by `own_noise`."""
    dice, rhythm = random.Random(1), Rhythm(3)
    for _ in range(pairs):
        middle = 20 + dice.gauss(0, own)
        before, after = (middle + dice.gauss(0, own_noise) for _ in range(2))
        rhythm.learn(1, before, after, 1.0)
    return rhythm


def test_nothing_is_shifted_before_anything_was_seen() -> None:
    rhythm = Rhythm(3)
    assert rhythm.shift(1, 30.0) == 0
    rhythm.learn(1, 20.0, 20.0, 100.0)
    assert rhythm.shift(1, 30.0) == 0, "one mean alone has no slope"
    assert taught(3, 0).shift(2, 30.0) == 0, "each class learns for itself"


def test_things_with_a_pace_of_their_own_are_shifted_by_it() -> None:
    rhythm = taught(4, 0)
    assert rhythm.shift(1, 30.0) == pytest.approx(10, abs=1)
    assert rhythm.shift(1, 14.0) == pytest.approx(-6, abs=1)


def test_the_slope_is_that_of_shrinkage() -> None:
    """Half of the spread is the thing's own: a gap 10 bins off moves the guess by 5."""
    assert taught(3, 3, pairs=4000).shift(1, 30.0) == pytest.approx(5, abs=1)


def test_gaps_without_memory_shift_nothing() -> None:
    assert abs(taught(0, 4, pairs=4000).shift(1, 30.0)) <= 1


def test_few_pairs_shift_little() -> None:
    assert abs(taught(4, 0, pairs=4).shift(1, 30.0)) < abs(taught(4, 0).shift(1, 30.0)) / 2


def test_the_past_fades() -> None:
    rhythm = taught(4, 0)
    for number in range(3000):  # from now on gaps tell nothing
        rhythm.learn(1, 10.0 + number % 20, 20.0, 60.0)
    assert abs(rhythm.shift(1, 30.0)) <= 1


def test_a_shifted_age_stays_on_the_scale() -> None:
    assert bin_seen(10, 3) == 7
    assert bin_seen(2, 5) == 0
    assert bin_seen(BINS - 1, -5) == BINS - 1


def test_what_returns_fast_is_kept_for_its_next_gap_only() -> None:
    """One prompt comes each second, others each minute. Ten seconds after its last use the fast
    one is overdue, the slow one of the same age is on its way; a second after, it is the better.
    """
    policy, order = ValueDensity(), random.Random(3)
    uses = [(SECOND * (second + 0.25), 1) for second in range(1200)]
    uses += [
        (SECOND * (60 * minute + 2 * slow), 100 + slow)
        for minute in range(20)
        for slow in range(25)
    ]
    for now_ms, key in sorted(uses):
        policy.request(_one(key, now_ms + order.random()))
    end = 1200 * SECOND
    for key in (1, 100):
        policy.request(_one(key, end))
    policy.insert([BlockKey(1)], parent=None, now_ms=end)
    policy.insert([BlockKey(100)], parent=None, now_ms=end)

    def worst(now_ms: float) -> list[BlockKey]:
        return policy.victims(1, now_ms=now_ms, may_evict=lambda _: True)

    assert worst(end + 0.3 * SECOND) == [100]
    assert worst(end + 40 * SECOND) == [1]


def _one(key: int, now_ms: float) -> Prompt:
    return Prompt(keys=array("Q", [key]), now_ms=now_ms, block_bytes=1)
