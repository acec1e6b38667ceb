from kvstore.directory.lru import Lru
from kvstore.directory.policy import Access, BlockKey

ACCESS = Access(now_ms=0.0, position=0, block_bytes=4096)


def lru(*keys: int) -> Lru:
    policy = Lru()
    for key in keys:
        policy.insert(BlockKey(key), ACCESS)
    return policy


def test_the_least_recently_used_goes_first() -> None:
    policy = lru(1, 2, 3)
    policy.touch(BlockKey(1), ACCESS)
    policy.touch(BlockKey(99), ACCESS)
    assert policy.victims(2, now_ms=1.0, may_evict=lambda key: True) == [2, 3]
    assert policy.victims(0, now_ms=1.0, may_evict=lambda key: True) == []
    assert policy.admit(BlockKey(7), ACCESS)


def test_what_may_not_go_is_passed_over() -> None:
    policy = lru(1, 2, 3)
    assert policy.victims(3, now_ms=1.0, may_evict=lambda key: key != 2) == [1, 3]
    assert len(policy) == 3
    policy.remove(BlockKey(1))
    policy.remove(BlockKey(1))
    assert BlockKey(1) not in policy
    assert BlockKey(2) in policy
