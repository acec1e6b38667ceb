"""Corners of the tree of prompts that random lives seldom reach; see `tests/property` for those."""

from array import array

import pytest

from kvstore.directory import prefix_tree as module
from kvstore.directory.prefix_tree import PrefixTree, Run


@pytest.fixture
def tree() -> PrefixTree:
    return PrefixTree(lambda run: None, lambda head, tail: None, lambda run: None)


def _keys(run: Run | None) -> list[int]:
    assert run is not None
    return list(run.keys)


def test_a_block_whose_run_was_cut_in_front_of_others_is_still_found(tree: PrefixTree) -> None:
    """What was asked for is indexed by the run that it stood in then."""
    tree.walk(array("Q", [1, 2, 3]), 0, partial=False)
    tree.walk(array("Q", [2, 3]), 1, partial=False)  # from a tier that was asked from block 1 on
    assert _keys(tree.find(1)) == [1]
    assert _keys(tree.find(3)) == [2, 3]


def test_blocks_asked_for_are_found_for_a_bounded_while(
    tree: PrefixTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ASKED_MAX", 4)
    for prompt in range(3):
        tree.walk(array("Q", [10 * prompt + block for block in range(3)]), 0, partial=False)
    assert _keys(tree.find(22)) == [20, 21, 22]
    assert len(tree._asked) <= 2 * 3, "a prompt more than the bound at most"
    tree.walk(array("Q", [90]), 0, partial=False)
    assert tree.find(0) is None
    tree.hold([0, 1, 2], None)  # found by its place instead
    assert tree.blocks == 10
    assert len(tree) == 3
