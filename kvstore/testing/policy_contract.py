"""The contract suite of eviction policies; see `kvstore.testing.contracts` for its use."""

import random
from typing import Final

from kvstore.directory.policy import Access, BlockKey, Policy

_STEPS: Final = 400
_KEYS: Final = 40


def access(now_ms: float, position: int = 0, *, parent: BlockKey | None = None) -> Access:
    """Return the evidence of one touch at `now_ms`."""
    return Access(now_ms=now_ms, position=position, block_bytes=1 << 20, parent=parent)


def _anything(_: BlockKey) -> bool:
    return True


class PolicyContract:
    """What every policy keeps, whatever it thinks of a block."""

    def make(self) -> Policy:
        """Return an empty policy."""
        raise NotImplementedError

    def _filled(self, count: int) -> Policy:
        policy = self.make()
        for number in range(count):
            policy.insert(BlockKey(number), access(float(number), number))
        return policy

    def test_it_holds_what_was_inserted_and_not_removed(self) -> None:
        policy = self._filled(3)
        policy.remove(BlockKey(1))
        assert len(policy) == 2
        assert [BlockKey(n) in policy for n in range(4)] == [True, False, True, False]
        assert policy.name

    def test_unknown_blocks_are_ignored(self) -> None:
        policy = self._filled(2)
        policy.touch(BlockKey(9), access(5.0))
        policy.remove(BlockKey(9))
        assert BlockKey(9) not in policy
        assert len(policy) == 2

    def test_victims_are_held_distinct_and_allowed(self) -> None:
        policy = self._filled(20)
        victims = policy.victims(8, now_ms=30.0, may_evict=lambda block: block % 2 == 0)
        assert len(victims) == len(set(victims)) == 8
        assert all(victim in policy and victim % 2 == 0 for victim in victims)

    def test_victims_stay_until_they_are_removed(self) -> None:
        policy = self._filled(5)
        first = policy.victims(2, now_ms=9.0, may_evict=_anything)
        assert len(policy) == 5
        assert policy.victims(2, now_ms=9.0, may_evict=_anything) == first
        for victim in first:
            policy.remove(victim)
        assert not set(policy.victims(5, now_ms=9.0, may_evict=_anything)) & set(first)

    def test_nothing_is_spared_for_ever(self) -> None:
        policy = self._filled(7)
        everything = policy.victims(100, now_ms=9.0, may_evict=_anything)
        assert sorted(everything) == list(range(7))

    def test_there_may_be_no_victim(self) -> None:
        assert self.make().victims(3, now_ms=0.0, may_evict=_anything) == []
        policy = self._filled(3)
        assert policy.victims(0, now_ms=9.0, may_evict=_anything) == []
        assert policy.victims(3, now_ms=9.0, may_evict=lambda _: False) == []

    def test_asking_for_admission_changes_nothing(self) -> None:
        asked, silent = self._filled(4), self._filled(4)
        asked.admit(BlockKey(50), access(5.0))
        assert BlockKey(50) not in asked
        assert len(asked) == 4
        order = [p.victims(4, now_ms=9.0, may_evict=_anything) for p in (asked, silent)]
        assert order[0] == order[1]

    def test_a_prefix_outlives_its_suffix(self) -> None:
        """One prompt, touched from end to start as its owner does: the end goes first."""
        policy = self.make()
        parents = [None, *(BlockKey(n) for n in range(5))]
        for position in reversed(range(6)):
            policy.insert(BlockKey(position), access(1.0, position, parent=parents[position]))
        for position in reversed(range(6)):
            policy.touch(BlockKey(position), access(2.0, position, parent=parents[position]))
        order = policy.victims(6, now_ms=3.0, may_evict=_anything)
        assert order == sorted(order, reverse=True)

    def test_equal_histories_have_equal_victims(self) -> None:
        """Replay and simulation depend on it: no clock, no dice, no order of hashing."""
        assert self._random_life(7) == self._random_life(7)

    def test_a_random_life_keeps_the_books(self) -> None:
        for seed in range(5):
            self._random_life(seed)

    def _random_life(self, seed: int) -> list[list[BlockKey]]:
        dice = random.Random(seed)
        policy, held, chosen = self.make(), set[BlockKey](), list[list[BlockKey]]()
        for step in range(_STEPS):
            key = BlockKey(dice.randrange(_KEYS))
            seen = access(float(step), key)
            if key in held and dice.random() < 0.5:
                policy.touch(key, seen)
            elif key in held:
                policy.remove(key)
                held.discard(key)
            elif policy.admit(key, seen):
                policy.insert(key, seen)
                held.add(key)
            if dice.random() < 0.1:
                pinned = {BlockKey(dice.randrange(_KEYS)) for _ in range(5)}
                chosen.append(self._evict(policy, held, pinned, float(step)))
            assert len(policy) == len(held)
            assert all(block in policy for block in held)
        return chosen

    def _evict(
        self, policy: Policy, held: set[BlockKey], pinned: set[BlockKey], now_ms: float
    ) -> list[BlockKey]:
        victims = policy.victims(3, now_ms=now_ms, may_evict=lambda block: block not in pinned)
        assert len(set(victims)) == len(victims) <= 3
        assert set(victims) <= held - pinned
        for victim in victims:
            policy.remove(victim)
            held.discard(victim)
        return victims
