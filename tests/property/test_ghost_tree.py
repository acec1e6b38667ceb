"""A policy that packs its ghosts decides what one that keeps them as objects does, bit for bit."""

from array import array
from random import Random

import pytest

from kvstore.directory import ghost_tree, prefix_tree, value_density
from kvstore.directory.ghost_tree import GhostTree, Kids
from kvstore.directory.policy import BlockKey, Prompt
from kvstore.directory.prefix_tree import Run
from kvstore.directory.reuse import BINS
from kvstore.directory.value_density import ValueDensity

DEPTH = 7
CAPACITY = 40
MAX_GHOSTS = 100
PACES_MS = (400.0, 3_000.0, 40_000.0)
"""Of three sorts of prompts: with one pace for all, no run would be slower than its class."""


class _Plain(GhostTree):
    """Packs nothing."""

    def pack(self, run: Run) -> None:
        assert not self.ghosts


class _Lives:
    """Two policies, one that packs and one that does not, asked the same at random."""

    def __init__(self, seed: int, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(prefix_tree, "ASKED_MAX", 30)
        patch.setattr(ghost_tree, "PACKED_MAX", 3)
        # By number alone: what ghosts take is not the same in both.
        for name in ("_RUN_BYTES", "_PACKED_BYTES", "_ARRAY_BYTES", "_KEY_BYTES"):
            patch.setattr(value_density, name, 0)
        self.random = Random(seed)
        self.packed = ValueDensity(max_ghosts=MAX_GHOSTS)
        with patch.context() as plain:
            plain.setattr(value_density, "GhostTree", _Plain)
            self.plain = ValueDensity(max_ghosts=MAX_GHOSTS)
        self.both = (self.packed, self.plain)
        self.due_ms = [(self.random.uniform(0, 9e4), number) for number in range(60)]
        self.now_ms = 0.0

    def keys(self, number: int) -> list[int]:
        """Return a prompt of one of 60 chats: some share their start, all end somewhere."""
        depth = self.random.randint(1, DEPTH)
        return [(number % 4 if block < 2 else number) * 100 + block + 1 for block in range(depth)]

    def step(self) -> None:
        """Serve the chat whose turn it is, and now and then do something else."""
        self.due_ms.sort()
        self.now_ms, number = self.due_ms[0]
        pace = PACES_MS[number % 3] * self.random.uniform(0.8, 1.25)
        self.due_ms[0] = (self.now_ms + pace, number)
        keys = self.keys(number)
        first = self.random.choice([0, 0, 0, self.random.randrange(len(keys))])
        prompt = Prompt(
            keys=array("Q", keys[first:]), now_ms=self.now_ms, first_block=first, block_bytes=7,
            partial=self.random.random() < 0.3, kind=self.random.choice(["", "tool"]),
            depth_cost=self.random.choice([0.0, 0.3]),
        )  # fmt: skip
        for policy in self.both:
            policy.request(prompt)
        self.hold(keys, first, self.random.choice([0, 1, DEPTH, DEPTH]))
        choice = self.random.random()
        if choice < 0.1:  # what nobody need have asked for
            other = self.keys(self.random.randrange(60))
            self.hold(other, self.random.randrange(len(other)), DEPTH)
        elif choice < 0.2:
            held = sorted(self.plain._tree.held_keys())
            for policy in self.both:
                policy.remove(BlockKey(held[int(choice * 1e6) % len(held)] if held else 5))
        elif choice < 0.3:
            self.compete(self.keys(self.random.randrange(60)))
        self.evict(max(0, len(self.plain) - CAPACITY), [])

    def hold(self, keys: list[int], first: int, count: int) -> None:
        missing = [index for index in range(first, len(keys)) if keys[index] not in self.plain]
        new: list[BlockKey] = []
        for index in missing[:count]:
            if new and index != missing[0] + len(new):
                break
            new.append(BlockKey(keys[index]))
        if not new:
            return
        told = missing[0] and self.random.random() < 0.8
        parent = BlockKey(keys[missing[0] - 1]) if told else None
        for policy in self.both:
            policy.insert(new, parent=parent, now_ms=self.now_ms)

    def compete(self, keys: list[int]) -> None:
        newcomers = [BlockKey(key) for key in keys if key not in self.plain]
        self.evict(len(newcomers), newcomers)

    def evict(self, count: int, newcomers: list[BlockKey]) -> None:
        chosen = [
            policy.victims(
                count, now_ms=self.now_ms, may_evict=lambda key: key % 11 != 0, newcomers=newcomers
            )
            for policy in self.both
        ]
        assert chosen[0] == chosen[1]
        for policy, gone in zip(self.both, chosen, strict=True):
            for block in gone:
                policy.remove(block)

    def check(self) -> None:
        """See that they know the same, in the same order."""
        packed, plain = self.packed, self.plain
        assert list(packed._tree.held_keys()) == list(plain._tree.held_keys())
        assert packed._tree.blocks == plain._tree.blocks
        assert packed._tree.ghost_runs == plain._tree.ghost_runs
        assert packed._model._entered == plain._model._entered
        assert packed._model._reused == plain._model._reused
        assert packed._rhythm._sums == plain._rhythm._sums
        assert _order(packed) == _order(plain)
        _check_counts(packed)


def _order(policy: ValueDensity) -> list[list[int]]:
    """Return the first keys of runs in each bin, the longest unused first."""
    ghosts, found = policy._tree.ghosts, []
    for number in range(BINS):
        keys = []
        for row in policy._ages.rows(number):
            run = policy._ages.runs[row]
            keys.append(ghosts._key[ghosts.seat[row]] if run is None else run.keys[0])
        found.append(keys)
    return found


def _check_counts(policy: ValueDensity) -> None:
    """See that every run tells how many packed ones follow it."""
    tree, ages = policy._tree, policy._ages
    rows = [row for number in range(BINS) for row in ages.rows(number)]
    packed = [row for row in rows if ages.runs[row] is None]
    assert len(tree.ghosts) == len(packed)
    behind = dict.fromkeys([*rows, ages.row(tree._root), ages.row(tree._loose)], 0)
    for row in packed:
        behind[tree.ghosts.above[tree.ghosts.seat[row]]] += 1
    for row, count in behind.items():
        run = ages.runs[row]
        if run is None:
            assert tree.ghosts.kids[tree.ghosts.seat[row]] == count
        else:
            assert (run.kids.packed if isinstance(run.kids, Kids) else 0) == count
            assert run.kids is None or len(run.kids) > 0


@pytest.mark.parametrize("seed", range(4))
def test_packing_changes_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lives = _Lives(seed, monkeypatch)
    most = 0
    for number in range(600):
        lives.step()
        if number % 20 == 0:
            lives.check()
        most = max(most, len(lives.packed._tree.ghosts))
    assert most > 30, "many were packed"
    assert not lives.plain._tree.ghosts
