"""Our policy: what it learns, whom it gives up, and what it costs in memory."""

import random
import sys
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvstore.directory import value_density as module
from kvstore.directory.policy import BlockKey, Prompt
from kvstore.directory.reuse import BINS, EDGES_MS, UNKNOWN, ReuseModel, bin_of, gittins
from kvstore.directory.value_density import ValueDensity
from kvstore.testing.policy_contract import blocks, prompt

SECOND = 1000.0


def store(policy: ValueDensity, keys: Sequence[int], now_ms: float) -> None:
    """Ask for a prompt and hold all of it."""
    policy.request(prompt(keys, now_ms))
    held = next((i for i, key in enumerate(keys) if key not in policy), len(keys))
    parent = BlockKey(keys[held - 1]) if held else None
    if held < len(keys):
        policy.insert(blocks(keys[held:]), parent=parent, now_ms=now_ms)


def victims(policy: ValueDensity, count: int, now_ms: float, **more: Any) -> list[BlockKey]:
    return policy.victims(count, now_ms=now_ms, may_evict=lambda _: True, **more)


# -- the model ---------------------------------------------------------------------------------


def test_bins_are_half_octaves() -> None:
    assert bin_of(0.0) == 0
    assert bin_of(EDGES_MS[0]) == 1
    assert bin_of(1e18) == BINS - 1
    assert EDGES_MS[2] == 2 * EDGES_MS[0]


def test_what_nothing_is_known_of_is_worth_less_the_older_it_is() -> None:
    index = ReuseModel().index[UNKNOWN]
    assert len(index) == BINS
    assert index[1:] == sorted(index[1:], reverse=True)


def test_the_index_is_the_best_ratio_of_use_to_time() -> None:
    """A use is certain in bin 8: waiting for it is worth it, and more so the nearer it is."""
    hazards = np.full((1, BINS), 1e-9)
    hazards[0, 8] = 0.99
    index = gittins(hazards)[0]
    assert index[9] < 1e-6 * index[8]
    assert index[:9].tolist() == sorted(index[:9])
    middle = (EDGES_MS[8] - EDGES_MS[7]) * (1 - 0.99 / 2)
    assert index[8] == pytest.approx(0.99 / middle, rel=1e-6)
    assert index[0] == pytest.approx(0.99 / (EDGES_MS[7] + middle), rel=1e-6)


def test_a_class_without_history_leans_on_its_parent() -> None:
    model = ReuseModel()
    known = model.number(("a",))
    for _ in range(400):
        model.enter(known, 0, 1.0)
        model.reuse(known, 0, 0.5)
    finer = model.number(("a", "b"))
    other = model.number(("z",))
    assert model.index[finer] == model.index[known], "before anything was counted"
    assert model.index[other] == model.index[UNKNOWN]
    model.refresh()
    assert model.index[finer][0] == pytest.approx(model.index[known][0], rel=0.01)
    assert model.index[known][0] > 2 * model.index[other][0] * 0.5


def test_an_index_that_is_asked_for_late_is_the_one_that_was_asked_for_all_along() -> None:
    draw = random.Random(7)
    always, late = ReuseModel(), ReuseModel()
    for step in range(600):
        evidence = tuple(draw.randrange(3) for _ in range(draw.randrange(5)))
        reached, reused = draw.randrange(BINS), draw.random() < 0.5
        for model in (always, late):
            number = model.number(evidence)
            model.enter(number, 0, 1.0)
            if reused:
                model.reuse(number, reached, 1.0)
            if step % 50 == 0:
                model.refresh()
        assert len(always.index) == len(always)
    assert late.index == always.index


def test_surprise_halves_the_past_and_so_does_age() -> None:
    model = ReuseModel()
    number = model.number(("a",))
    for _ in range(500):
        model.enter(number, 0, 1.0)
        model.reuse(number, 0, 0.5)
    model.refresh()
    before = model.index[number][0]
    for _ in range(500):  # nothing comes back any more
        model.enter(number, 0, 1.0)
    model.refresh()
    assert model.index[number][0] < 0.6 * before
    model.enter(number, 0, 60_000.0)
    model.refresh()
    kept = sum(row[0] for row in model._entered)
    assert kept < 31_000


# -- what is kept ------------------------------------------------------------------------------


def test_without_evidence_it_is_lru() -> None:
    policy = ValueDensity()
    for number in range(6):
        store(policy, [10 * number, 10 * number + 1], number * 60 * SECOND)
    order = victims(policy, 12, 400 * SECOND)
    assert order == [1, 0, 11, 10, 21, 20, 31, 30, 41, 40, 51, 50]


def test_it_learns_that_one_kind_comes_back() -> None:
    """Prompts of kind `tool` return after ten seconds, those of kind `batch` never do."""
    policy, now_ms = ValueDensity(), 0.0
    for number in range(200):
        now_ms += 20 * SECOND
        tool, batch = [1000 * number + 1], [1000 * number + 2]
        policy.request(_kind(batch, now_ms, "batch"))
        policy.request(_kind(tool, now_ms, "tool"))
        policy.request(_kind(tool, now_ms + 10 * SECOND, "tool"))
    now_ms += 20 * SECOND
    policy.request(_kind([7], now_ms, "tool"))
    policy.insert(blocks([7]), parent=None, now_ms=now_ms)
    policy.request(_kind([8], now_ms + SECOND, "batch"))
    policy.insert(blocks([8]), parent=None, now_ms=now_ms + SECOND)
    assert victims(policy, 1, now_ms + 2 * SECOND) == [8], "though it is the younger one"
    policy.request(_kind([9], now_ms + 2 * SECOND, "batch"))
    policy.remove(BlockKey(8))
    found = victims(policy, 1, now_ms + 2 * SECOND, newcomers=blocks([9]))
    assert found == [], "what never comes back is not worth one that does"
    assert victims(policy, 1, now_ms + 2 * SECOND) == [7]


def _kind(keys: Sequence[int], now_ms: float, kind: str) -> Prompt:
    return Prompt(keys=array("Q", keys), now_ms=now_ms, block_bytes=1, kind=kind)


def test_without_bypass_every_newcomer_gets_in() -> None:
    policy = ValueDensity(bypass=False)
    store(policy, [1], 0.0)
    policy.request(prompt([2], 0.0))
    assert victims(policy, 1, 0.0, newcomers=blocks([2])) == [1]


def test_a_newcomer_nobody_asked_for_gets_in() -> None:
    policy = ValueDensity()
    store(policy, [1, 2, 3], 0.0)
    assert victims(policy, 2, 0.0, newcomers=blocks([8, 9])) == [3, 2]


def test_deep_blocks_are_worth_more_where_depth_costs() -> None:
    policy = ValueDensity(depth_cost=0.05)
    store(policy, [1], 0.0)
    policy.insert(blocks(range(100, 180)), parent=None, now_ms=0.0)
    policy.request(prompt(range(100, 180), 0.0))
    store(policy, [1], 0.0)
    assert victims(policy, 1, SECOND) == [1]


def test_what_a_caller_measured_of_depth_counts_as_well() -> None:
    policy = ValueDensity()
    store(policy, [1], 0.0)
    policy.insert(blocks(range(100, 180)), parent=None, now_ms=0.0)
    policy.request(replace(prompt(range(100, 180), 0.0), depth_cost=0.05))
    store(policy, [1], 0.0)
    assert victims(policy, 1, SECOND) == [1]


def test_a_long_newcomer_is_worth_what_its_blocks_are_on_average() -> None:
    """Its first blocks alone would be outweighed by the end of any prompt that is held."""
    policy = ValueDensity(depth_cost=1.0)
    store(policy, range(100, 120), 0.0)
    store(policy, range(200, 220), 0.0)
    policy.request(prompt(range(300, 364), SECOND))
    found = victims(policy, 64, SECOND, newcomers=blocks(range(300, 364)))
    assert found[:20] == list(range(119, 99, -1))
    assert len(found) == 40


def test_in_front_of_what_has_to_stay_goes_no_more_than_asked_for() -> None:
    policy = ValueDensity()
    store(policy, range(4), 0.0)
    found = policy.victims(1, now_ms=SECOND, may_evict=lambda block: block < 2)
    assert len(found) == 1 and found[0] < 2


def test_suffixes_go_before_prefixes_across_branches() -> None:
    policy = ValueDensity()
    store(policy, [1, 2, 3, 4], 0.0)
    store(policy, [1, 2, 30, 40], 60 * SECOND)
    order = victims(policy, 6, 120 * SECOND)
    place = {key: order.index(BlockKey(key)) for key in (1, 2, 3, 4, 30, 40)}
    assert place[4] < place[3] < place[2] < place[1]
    assert place[40] < place[30] < place[2]


def test_callers_cannot_open_classes_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_CLASSES", 200)
    policy = ValueDensity()
    for number in range(500):
        policy.request(_kind([number], float(number), f"kind {number}"))
    assert 200 <= len(policy._model.index) < 220


# -- memory ------------------------------------------------------------------------------------


def test_ghosts_are_bounded_and_small() -> None:
    policy = ValueDensity(max_ghosts=20_000)
    for number in range(4_000):
        now_ms = number * SECOND
        store(policy, range(100 * number, 100 * number + 16), now_ms)
        for victim in victims(policy, max(0, len(policy) - 160), now_ms):
            policy.remove(victim)
    tree = policy._tree
    ghosts = tree.blocks - len(tree)
    assert 10_000 < ghosts <= 20_000
    runs = [run for run in policy._ages.runs if run is not None]
    used = sum(
        sys.getsizeof(run) + sys.getsizeof(run.keys) + sys.getsizeof(run.kids or 0) for run in runs
    )
    assert used / ghosts < 128


def test_a_forgotten_prefix_may_come_back() -> None:
    policy = ValueDensity(max_ghosts=10)
    for number in range(50):
        policy.request(prompt([number, 1000 + number], number * SECOND))
    store(policy, [0, 1000], 60 * SECOND)
    assert victims(policy, 2, 61 * SECOND) == [1000, 0]
