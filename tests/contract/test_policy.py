"""The policy contract over our policies, and over liars to see that it bites."""

from collections.abc import Callable
from typing import Any

import pytest

from kvstore.directory.lru import Lru
from kvstore.directory.policy import Access, BlockKey, Policy
from kvstore.testing.policy_contract import PolicyContract


class TestLru(PolicyContract):
    def make(self) -> Policy:
        return Lru()


class _Forgetful(Lru):
    """Drops victims by itself."""

    def victims(
        self, count: int, *, now_ms: float, may_evict: Callable[[BlockKey], bool]
    ) -> list[BlockKey]:
        found = super().victims(count, now_ms=now_ms, may_evict=may_evict)
        for block in found:
            self.remove(block)
        return found


class _Ruthless(Lru):
    """Evicts what may not go."""

    def victims(
        self, count: int, *, now_ms: float, may_evict: Callable[[BlockKey], bool]
    ) -> list[BlockKey]:
        return super().victims(count, now_ms=now_ms, may_evict=lambda _: True)


class _Greedy(Lru):
    """Takes a question for an order."""

    def admit(self, block: BlockKey, access: Access) -> bool:
        self.insert(block, access)
        return True


class _Doubled(Lru):
    """Names a victim twice."""

    def victims(
        self, count: int, *, now_ms: float, may_evict: Callable[[BlockKey], bool]
    ) -> list[BlockKey]:
        found = super().victims(count, now_ms=now_ms, may_evict=may_evict)
        return [*found[:-1], found[0]] if found else []


class _Backwards(Lru):
    """Drops the prefix before the suffix."""

    def victims(
        self, count: int, *, now_ms: float, may_evict: Callable[[BlockKey], bool]
    ) -> list[BlockKey]:
        found = super().victims(len(self), now_ms=now_ms, may_evict=may_evict)
        return found[::-1][:count]


@pytest.mark.parametrize(
    ("liar", "broken"),
    [
        (_Forgetful, "test_victims_stay_until_they_are_removed"),
        (_Ruthless, "test_victims_are_held_distinct_and_allowed"),
        (_Greedy, "test_asking_for_admission_changes_nothing"),
        (_Doubled, "test_victims_are_held_distinct_and_allowed"),
        (_Backwards, "test_a_prefix_outlives_its_suffix"),
    ],
)
def test_the_suite_catches(liar: Callable[[], Policy], broken: str) -> None:
    class Suite(PolicyContract):
        def make(self) -> Policy:
            return liar()

    test: Any = getattr(Suite(), broken)
    with pytest.raises(AssertionError):
        test()
