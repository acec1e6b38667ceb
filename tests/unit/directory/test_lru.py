from kvstore.directory.lru import Lru
from kvstore.directory.policy import BlockKey
from kvstore.testing.policy_contract import blocks, prompt


def lru(*keys: int) -> Lru:
    policy = Lru()
    for key in keys:
        policy.insert(blocks([key]), parent=None, now_ms=0.0)
    return policy


def test_the_least_recently_used_goes_first() -> None:
    policy = lru(1, 2, 3)
    policy.request(prompt([1, 99], 1.0))
    assert policy.victims(2, now_ms=1.0, may_evict=lambda key: True) == [2, 3]
    assert policy.victims(0, now_ms=1.0, may_evict=lambda key: True) == []


def test_what_may_not_go_is_passed_over() -> None:
    policy = lru(1, 2, 3)
    assert policy.victims(3, now_ms=1.0, may_evict=lambda key: key != 2) == [1, 3]
    assert len(policy) == 3
    policy.remove(BlockKey(1))
    policy.remove(BlockKey(1))
    assert BlockKey(1) not in policy
    assert BlockKey(2) in policy


def test_a_new_suffix_is_older_than_the_prefix_it_hangs_on() -> None:
    policy = lru(1, 2, 3)
    policy.insert(blocks([4, 5]), parent=BlockKey(1), now_ms=2.0)
    assert policy.victims(9, now_ms=3.0, may_evict=lambda key: True) == [2, 3, 5, 4, 1]
