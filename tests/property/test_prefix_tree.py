"""The compressed tree against plain sets: what is held and known, and that nothing is twice."""

from array import array
from itertools import pairwise

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.directory.prefix_tree import PrefixTree, Run

DEPTH = 10
BRANCHES = 3


def path_of(branches: list[int]) -> list[int]:
    """Return the keys of a path: equal prefixes of branch choices have equal keys."""
    keys, node = [], 1
    for branch in branches:
        node = node * (BRANCHES + 1) + branch + 1
        keys.append(node)
    return keys


PATHS = st.lists(st.integers(0, BRANCHES - 1), min_size=1, max_size=DEPTH).map(path_of)


class Tree(RuleBasedStateMachine):
    """Asks, holds, drops and forgets at random."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: set[Run] = set()
        self.leaves: set[Run] = set()
        self.tree = PrefixTree(self._changed, self._divided, self._gone)
        self.held: set[int] = set()

    def _changed(self, run: Run) -> None:
        (self.leaves.add if run.is_leaf else self.leaves.discard)(run)

    def _divided(self, head: Run, tail: Run) -> None:
        assert head.keys[0] != tail.keys[0]
        self.runs.add(head)

    def _gone(self, run: Run) -> None:
        self.runs.discard(run)

    @rule(keys=PATHS, first=st.integers(0, DEPTH), partial=st.booleans())
    def ask(self, keys: list[int], first: int, partial: bool) -> None:
        first = min(first, len(keys) - 1)
        asked = keys[first:]
        path, known = self.tree.walk(array("Q", asked), first, partial=partial)
        assert [key for run in path for key in run.keys] == asked
        assert 0 <= known <= len(asked)
        for above, below in pairwise(path):
            assert below.parent is above
        for run in path:
            run.uses += 1
            self.runs.add(run)
            if first == 0:
                assert run.position == keys.index(run.keys[0])

    @rule(keys=PATHS, start=st.integers(0, DEPTH), told=st.booleans())
    def hold(self, keys: list[int], start: int, told: bool) -> None:
        start = min(start, len(keys) - 1)
        new = []
        for key in keys[start:]:
            if key in self.held:
                break
            new.append(key)
        if not new:
            return
        parent = keys[start - 1] if start and told else None
        self.runs.update(self.tree.hold(new, parent))
        self.held.update(new)

    @precondition(lambda self: self.held)
    @rule(number=st.integers(0, 1 << 30))
    def drop(self, number: int) -> None:
        key = sorted(self.held)[number % len(self.held)]
        self.tree.drop(key)
        self.tree.drop(999_999_999)
        self.held.discard(key)

    @rule()
    def forget(self) -> None:
        for run in list(self.runs):
            if not run.kids and run.held < len(run.keys):
                self.tree.forget(run)
                if not run.held:
                    self.runs.discard(run)
                return

    @invariant()
    def books(self) -> None:
        assert len(self.tree) == len(self.held)
        assert set(self.tree.held_keys()) == self.held
        assert all(key in self.tree for key in self.held)
        for key in self.held:
            run = self.tree.find(key)
            assert run is not None
            assert run.keys.index(key) < run.held

    @invariant()
    def runs_without_anything_held_are_counted(self) -> None:
        found, ghosts = [self.tree._root, self.tree._loose], 0
        while found:
            kids = list((found.pop().kids or {}).values())
            ghosts += sum(kid.held == 0 for kid in kids)
            found += kids
        assert self.tree.ghost_runs == ghosts

    @invariant()
    def leaves_are_what_has_nothing_held_behind(self) -> None:
        holders = {self.tree.find(key) for key in self.held}
        for run in holders:
            assert run is not None
            behind = sum(kid.held > 0 for kid in (run.kids or {}).values())
            assert run.held_kids == behind
            assert (run in self.leaves) == (behind == 0)


Tree.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
TestTree = Tree.TestCase
