"""The policy contract over our policies, and over liars to see that it bites."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kvstore.core.errors import BadInput
from kvstore.directory.arc import Arc
from kvstore.directory.lru import Lru
from kvstore.directory.lru_k import Lru2
from kvstore.directory.policies import POLICIES, make_policy
from kvstore.directory.policy import BlockKey, Policy, Prompt
from kvstore.directory.s3fifo import S3Fifo
from kvstore.directory.ttl import Ttl
from kvstore.directory.value_density import ValueDensity
from kvstore.testing.policy_contract import PolicyContract


class TestLru(PolicyContract):
    def make(self) -> Policy:
        return Lru()


class TestTtl(PolicyContract):
    def make(self) -> Policy:
        return Ttl(ttl_ms=500.0)


class TestArc(PolicyContract):
    def make(self) -> Policy:
        return Arc()


class TestS3Fifo(PolicyContract):
    def make(self) -> Policy:
        return S3Fifo()


class TestLru2(PolicyContract):
    def make(self) -> Policy:
        return Lru2()


class TestOurs(PolicyContract):
    def make(self) -> Policy:
        return ValueDensity()


class TestOursByDepth(PolicyContract):
    def make(self) -> Policy:
        return ValueDensity(depth_cost=0.01, max_ghosts=12)


class TestOursWithoutBypass(PolicyContract):
    def make(self) -> Policy:
        return ValueDensity(bypass=False)


def test_every_policy_is_made_by_its_name() -> None:
    for name in POLICIES:
        policy = make_policy(name)
        assert policy.name == name
        assert len(policy) == 0
    with pytest.raises(BadInput, match=r"'fifo'.*ours, lru"):
        make_policy("fifo")


class _Forgetful(Lru):
    """Drops victims by itself."""

    def victims(
        self,
        count: int,
        *,
        now_ms: float,
        may_evict: Callable[[BlockKey], bool],
        newcomers: Sequence[BlockKey] = (),
    ) -> list[BlockKey]:
        found = super().victims(count, now_ms=now_ms, may_evict=may_evict)
        for block in found:
            self.remove(block)
        return found


class _Ruthless(Lru):
    """Evicts what may not go."""

    def victims(
        self,
        count: int,
        *,
        now_ms: float,
        may_evict: Callable[[BlockKey], bool],
        newcomers: Sequence[BlockKey] = (),
    ) -> list[BlockKey]:
        return super().victims(count, now_ms=now_ms, may_evict=lambda _: True)


class _Greedy(Lru):
    """Takes a question for an order."""

    def victims(
        self,
        count: int,
        *,
        now_ms: float,
        may_evict: Callable[[BlockKey], bool],
        newcomers: Sequence[BlockKey] = (),
    ) -> list[BlockKey]:
        for block in newcomers:
            self.insert([block], parent=None, now_ms=now_ms)
        return super().victims(count, now_ms=now_ms, may_evict=may_evict)


class _Doubled(Lru):
    """Names a victim twice."""

    def victims(
        self,
        count: int,
        *,
        now_ms: float,
        may_evict: Callable[[BlockKey], bool],
        newcomers: Sequence[BlockKey] = (),
    ) -> list[BlockKey]:
        found = super().victims(count, now_ms=now_ms, may_evict=may_evict)
        return [*found[:-1], found[0]] if found else []


class _Backwards(Lru):
    """Drops the prefix before the suffix."""

    def victims(
        self,
        count: int,
        *,
        now_ms: float,
        may_evict: Callable[[BlockKey], bool],
        newcomers: Sequence[BlockKey] = (),
    ) -> list[BlockKey]:
        found = super().victims(len(self), now_ms=now_ms, may_evict=may_evict)
        return found[::-1][:count]


class _Ghostly(Lru):
    """Takes for held what was only asked for."""

    def request(self, prompt: Prompt) -> None:
        for key in prompt.keys:
            if BlockKey(key) not in self:
                self.insert([BlockKey(key)], parent=None, now_ms=prompt.now_ms)


@pytest.mark.parametrize(
    ("liar", "broken"),
    [
        (_Forgetful, "test_victims_stay_until_they_are_removed"),
        (_Ruthless, "test_victims_are_held_distinct_and_allowed"),
        (_Ruthless, "test_what_has_to_go_goes_though_its_suffix_stays"),
        (_Greedy, "test_asking_for_newcomers_changes_nothing"),
        (_Doubled, "test_victims_are_held_distinct_and_allowed"),
        (_Backwards, "test_a_prefix_outlives_its_suffix"),
        (_Ghostly, "test_unknown_blocks_are_ignored"),
    ],
)
def test_the_suite_catches(liar: Callable[[], Policy], broken: str) -> None:
    class Suite(PolicyContract):
        def make(self) -> Policy:
            return liar()

    test: Any = getattr(Suite(), broken)
    with pytest.raises(AssertionError):
        test()
