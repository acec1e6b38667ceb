"""What each policy decides, beyond the contract that all keep."""

from collections.abc import Sequence

from kvstore.directory.arc import Arc
from kvstore.directory.lru_k import Lru2
from kvstore.directory.policy import BlockKey, Policy
from kvstore.directory.prefix_order import Ancestry
from kvstore.directory.s3fifo import S3Fifo
from kvstore.directory.ttl import Ttl
from kvstore.testing.policy_contract import blocks, prompt


def serve(policy: Policy, key: int, now_ms: float) -> None:
    """Ask for one block and store it."""
    policy.request(prompt([key], now_ms))
    if BlockKey(key) not in policy:
        policy.insert(blocks([key]), parent=None, now_ms=now_ms)


def drop(policy: Policy, count: int, now_ms: float = 1e6) -> list[BlockKey]:
    """Evict; returns the victims."""
    victims = policy.victims(count, now_ms=now_ms, may_evict=lambda _: True)
    for victim in victims:
        policy.remove(victim)
    return victims


def filled(policy: Policy, keys: Sequence[int]) -> Policy:
    for number, key in enumerate(keys):
        serve(policy, key, float(number))
    return policy


def test_ancestors_are_those_that_are_held() -> None:
    ancestry = Ancestry()
    ancestry.add(blocks([1, 2, 3]), None)
    ancestry.add(blocks([4]), BlockKey(3))
    assert list(ancestry.above(BlockKey(4))) == [3, 2, 1]
    assert ancestry.drop(BlockKey(2))
    assert not ancestry.drop(BlockKey(2))
    assert list(ancestry.above(BlockKey(4))) == [3]


def test_ttl_keeps_newcomers_out_until_something_has_expired() -> None:
    policy = Ttl(ttl_ms=100.0)
    policy.insert(blocks([1, 2]), parent=None, now_ms=0.0)
    policy.insert(blocks([5]), parent=None, now_ms=0.0)
    policy.insert(blocks([3]), parent=BlockKey(2), now_ms=50.0)  # renews what it hangs on
    policy.request(prompt([9], 120.0))

    def victims(now_ms: float, *, newcomers: Sequence[BlockKey] = ()) -> list[BlockKey]:
        return policy.victims(1, now_ms=now_ms, may_evict=lambda _: True, newcomers=newcomers)

    assert victims(90.0, newcomers=blocks([9])) == []
    assert victims(120.0, newcomers=blocks([9])) == [5]
    assert victims(90.0) == [5], "whoever has to have room gets it"
    policy.request(prompt([5], 120.0))
    assert victims(130.0, newcomers=blocks([9])) == []


def test_arc_moves_its_target_by_hits_among_the_evicted() -> None:
    policy = Arc()
    filled(policy, [1, 2, 3, 4])
    serve(policy, 3, 10.0)
    serve(policy, 4, 11.0)
    assert drop(policy, 1) == [1], "asked for once, oldest"
    serve(policy, 1, 12.0)  # remembered: recency was too short
    assert drop(policy, 1) == [3], "the list of once is at its new target, so the other one gives"
    serve(policy, 3, 13.0)  # frequency was too short
    assert drop(policy, 1) == [2]
    policy.remove(BlockKey(99))
    assert len(policy) == 3


def test_arc_forgets_the_evicted_in_the_end() -> None:
    policy = Arc()
    filled(policy, [1, 2])
    for key in range(3, 40):
        drop(policy, 1)
        serve(policy, key, float(key))
        serve(policy, key, key + 0.5)
    assert len(policy) == 2
    assert policy._remembered() <= 2 * 2 + 1, "twice the capacity, and the newcomer"


def test_s3fifo_drops_what_is_asked_for_once_and_promotes_the_rest() -> None:
    policy = S3Fifo()
    filled(policy, [1, 2, 3, 4])
    serve(policy, 1, 10.0)
    assert drop(policy, 1) == [2]
    serve(policy, 2, 11.0)  # remembered: goes to the main queue
    assert drop(policy, 2) == [3, 4]
    assert drop(policy, 9) == [1, 2]
    policy.remove(BlockKey(1))
    assert len(policy) == 0


def test_s3fifo_spares_what_was_used_in_the_main_queue() -> None:
    policy = S3Fifo()
    filled(policy, [1, 2])
    drop(policy, 2)
    filled(policy, [1, 2])
    serve(policy, 1, 20.0)
    assert policy.victims(1, now_ms=30.0, may_evict=lambda key: key != 2) == [1]
    assert drop(policy, 2) == [2, 1]


def test_s3fifo_remembers_as_many_as_it_ever_held() -> None:
    policy = S3Fifo()
    filled(policy, [1, 2])
    for key in range(3, 9):
        drop(policy, 1)
        serve(policy, key, float(key))
    serve(policy, 3, 20.0)  # long forgotten: a newcomer again
    assert drop(policy, 1) == [7]


def test_lru2_orders_by_the_last_use_but_one() -> None:
    policy = Lru2()
    filled(policy, [1, 2, 3])
    serve(policy, 1, 10.0)
    assert drop(policy, 1) == [2]
    serve(policy, 2, 11.0)  # its earlier use is remembered: used at 1 and at 11
    assert drop(policy, 3) == [3, 1, 2]


def test_lru2_drops_deeper_blocks_of_one_age_first_and_forgets_in_the_end() -> None:
    policy = Lru2()
    policy.request(prompt([1, 2], 0.0, first_block=3))
    policy.insert(blocks([1, 2]), parent=None, now_ms=0.0)
    policy.insert(blocks([3]), parent=BlockKey(2), now_ms=0.0)
    policy.insert(blocks([9]), parent=None, now_ms=0.0)
    policy.insert(blocks([8]), parent=BlockKey(77), now_ms=0.0)
    assert drop(policy, 5) == [3, 2, 1, 8, 9]
    for key in range(100, 160):
        serve(policy, key, float(key))
        drop(policy, 1)
    serve(policy, 9, 200.0)
    serve(policy, 100, 201.0)
    assert drop(policy, 1) == [9], "its use before eviction is forgotten"


def test_lru2_sweeps_its_heap() -> None:
    policy = Lru2()
    policy.insert(blocks([1, 2]), parent=None, now_ms=0.0)
    for step in range(200):
        policy.request(prompt([1, 2], float(step + 1)))
    assert drop(policy, 2) == [2, 1]
