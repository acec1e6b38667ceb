"""The contract suite of eviction policies; see `kvstore.testing.contracts` for its use."""

import random
from array import array
from collections.abc import Sequence
from typing import Final

from kvstore.directory.policy import BlockKey, Policy, Prompt

_STEPS: Final = 300
_PATHS: Final = 6
_DEPTH: Final = 8


def prompt(
    keys: Sequence[int], now_ms: float, *, first_block: int = 0, partial: bool = False
) -> Prompt:
    """Return what a request for `keys` tells a policy."""
    return Prompt(
        keys=array("Q", keys),
        now_ms=now_ms,
        first_block=first_block,
        block_bytes=1 << 20,
        partial=partial,
    )


def blocks(keys: Sequence[int]) -> list[BlockKey]:
    """Return keys as the type that policies take."""
    return [BlockKey(key) for key in keys]


def _anything(_: BlockKey) -> bool:
    return True


class PolicyContract:
    """What every policy keeps, whatever it thinks of a block."""

    def make(self) -> Policy:
        """Return an empty policy."""
        raise NotImplementedError

    def _filled(self, count: int) -> Policy:
        """Return a policy that holds `count` prompts of one block each, the first the oldest."""
        policy = self.make()
        for number in range(count):
            policy.request(prompt([number], 1000.0 * number))
            policy.insert(blocks([number]), parent=None, now_ms=1000.0 * number)
        return policy

    def test_it_holds_what_was_inserted_and_not_removed(self) -> None:
        policy = self._filled(3)
        policy.remove(BlockKey(1))
        assert len(policy) == 2
        assert [BlockKey(n) in policy for n in range(4)] == [True, False, True, False]
        assert policy.name

    def test_a_ring_of_parents_ends(self) -> None:
        """Names come from callers: nothing but good manners keeps A from following B and back."""
        policy = self.make()
        one, other, third = blocks([1, 2, 3])
        policy.insert([one], parent=other, now_ms=0.0)
        policy.insert([other], parent=one, now_ms=1.0)
        policy.insert([third], parent=one, now_ms=2.0)
        assert len(policy) == 3
        gone = policy.victims(3, now_ms=3.0, may_evict=_anything)
        assert sorted(gone) == [1, 2, 3]

    def test_unknown_blocks_are_ignored(self) -> None:
        policy = self._filled(2)
        policy.request(prompt([9, 10], 5000.0))
        policy.request(prompt([], 5000.0))
        policy.remove(BlockKey(9))
        assert BlockKey(9) not in policy
        assert len(policy) == 2

    def test_blocks_need_not_have_been_asked_for(self) -> None:
        policy = self.make()
        policy.insert(blocks([1, 2]), parent=None, now_ms=0.0)
        policy.insert(blocks([3]), parent=BlockKey(2), now_ms=0.0)
        policy.insert(blocks([9]), parent=BlockKey(77), now_ms=0.0)
        assert len(policy) == 4
        policy.request(prompt([1, 2, 3, 9], 1.0))
        found = policy.victims(4, now_ms=2.0, may_evict=_anything)
        assert sorted(found) == [1, 2, 3, 9]

    def test_victims_are_held_distinct_and_allowed(self) -> None:
        policy = self._filled(20)
        victims = policy.victims(8, now_ms=30e3, may_evict=lambda block: block % 2 == 0)
        assert len(victims) == len(set(victims)) == 8
        assert all(victim in policy and victim % 2 == 0 for victim in victims)

    def test_victims_stay_until_they_are_removed(self) -> None:
        policy = self._filled(5)
        first = policy.victims(2, now_ms=9e3, may_evict=_anything)
        assert len(policy) == 5
        assert policy.victims(2, now_ms=9e3, may_evict=_anything) == first
        for victim in first:
            policy.remove(victim)
        assert not set(policy.victims(5, now_ms=9e3, may_evict=_anything)) & set(first)

    def test_nothing_is_spared_for_ever(self) -> None:
        policy = self._filled(7)
        everything = policy.victims(100, now_ms=9e3, may_evict=_anything)
        assert sorted(everything) == list(range(7))

    def test_there_may_be_no_victim(self) -> None:
        assert self.make().victims(3, now_ms=0.0, may_evict=_anything) == []
        policy = self._filled(3)
        assert policy.victims(0, now_ms=9e3, may_evict=_anything) == []
        assert policy.victims(3, now_ms=9e3, may_evict=lambda _: False) == []

    def test_what_has_to_go_goes_though_its_suffix_stays(self) -> None:
        policy = self.make()
        policy.request(prompt(range(4), 0.0))
        policy.insert(blocks(range(4)), parent=None, now_ms=0.0)
        assert policy.victims(2, now_ms=1.0, may_evict=lambda block: block < 1) == [0]

    def test_asking_for_newcomers_changes_nothing(self) -> None:
        asked, silent = self._filled(4), self._filled(4)
        for policy in (asked, silent):
            policy.request(prompt([50, 51], 9e3))
        found = asked.victims(2, now_ms=9e3, may_evict=_anything, newcomers=blocks([50, 51]))
        assert len(found) <= 2
        assert BlockKey(50) not in asked
        assert len(asked) == 4
        order = [p.victims(4, now_ms=9e3, may_evict=_anything) for p in (asked, silent)]
        assert order[0] == order[1]

    def test_a_prefix_outlives_its_suffix(self) -> None:
        """One prompt, inserted in two parts after it was asked for: the end goes first."""
        policy = self.make()
        policy.request(prompt(range(6), 1.0))
        policy.insert(blocks(range(3)), parent=None, now_ms=1.0)
        policy.request(prompt(range(6), 2.0))
        policy.insert(blocks(range(3, 6)), parent=BlockKey(2), now_ms=2.0)
        order = policy.victims(6, now_ms=3.0, may_evict=_anything)
        assert order == sorted(order, reverse=True)

    def test_equal_histories_have_equal_victims(self) -> None:
        """Replay and simulation depend on it: no clock, no dice, no order of hashing."""
        assert self._random_life(7) == self._random_life(7)

    def test_a_random_life_keeps_the_books(self) -> None:
        for seed in range(5):
            self._random_life(seed)

    def _random_life(self, seed: int) -> list[list[BlockKey]]:
        """Serve prompts of a small tree from a small tier, as an owner does."""
        dice = random.Random(seed)
        policy, held, chosen = self.make(), set[BlockKey](), list[list[BlockKey]]()
        for step in range(_STEPS):
            now_ms = 100.0 * step
            keys = _path(dice)
            first = dice.choice([0, 0, 0, dice.randrange(len(keys))])
            policy.request(prompt(keys[first:], now_ms, first_block=first))
            new = [BlockKey(key) for key in keys[first:] if key not in held]
            room = 20 - len(held)
            if len(new) > room:
                wanted = new[max(room, 0) :]
                pinned = set(keys)
                victims = policy.victims(
                    len(wanted), now_ms=now_ms, may_evict=lambda b: b not in pinned,  # noqa: B023
                    newcomers=wanted,
                )  # fmt: skip
                chosen.append(victims)
                self._evict(policy, held, pinned, victims, len(wanted))
                new = new[: max(room, 0) + len(victims)]
            for key in new:
                index = keys.index(key)
                parent = BlockKey(keys[index - 1]) if index else None
                policy.insert([key], parent=parent, now_ms=now_ms)
            held.update(new)
            if held and dice.random() < 0.2:  # gone for another reason
                lost = dice.choice(sorted(held))
                policy.remove(lost)
                held.discard(lost)
            assert len(policy) == len(held)
            assert all(block in policy for block in held)
        assert sorted(policy.victims(99, now_ms=1e6, may_evict=_anything)) == sorted(held)
        return chosen

    def _evict(
        self,
        policy: Policy,
        held: set[BlockKey],
        pinned: set[int],
        victims: list[BlockKey],
        count: int,
    ) -> None:
        assert len(set(victims)) == len(victims) <= count
        assert set(victims) <= held
        assert not set(victims) & pinned
        for victim in victims:
            policy.remove(victim)
            held.discard(victim)


def _path(dice: random.Random) -> list[int]:
    """Return a prompt: a stem that others share, and a branch."""
    stem, branch = dice.randrange(2), dice.randrange(_PATHS)
    cut = dice.randrange(1, _DEPTH)
    keys = [1000 * (stem + 1) + depth for depth in range(cut)]
    keys += [
        1000 * (stem + 1) + 100 * (branch + 1) + 10 * cut + d for d in range(dice.randrange(4))
    ]
    return keys
