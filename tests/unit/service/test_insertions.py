"""What the policy hears of committed slots: when, and by whose integers."""

from collections.abc import Sequence
from typing import Any

import pytest

from kvstore.core.outcomes import SettleOutcome
from kvstore.directory.lru import Lru
from kvstore.directory.policies import make_policy
from kvstore.directory.policy import BlockKey
from kvstore.directory.value_density import ValueDensity
from kvstore.service.roots import keys_of
from tests.arena_fixture import names, small_store


@pytest.mark.parametrize("told_first", [False, True], ids=["unnamed", "asked for"])
@pytest.mark.parametrize("count", [8, 64], ids=["one by one", "at once"])
def test_the_policy_indexes_by_the_integers_of_the_table(count: int, told_first: bool) -> None:
    """Else each block takes 32 bytes more: two integers of one value."""
    with small_store(blocks=128, quota_blocks=128, max_slots=128) as small:
        policy = small.table.policy = make_policy("ours")
        assert isinstance(policy, ValueDensity)
        session, info = small.session(1)
        wanted = names(count)
        for part in (wanted[: count // 2], wanted):  # the second behind what is held of the first
            asked = b"".join(part)
            if told_first:
                small.store.acquire(session, info, asked, reserve=0, first_block=0, now_ms=0.0)
                small.store.flush_requests()
            fresh = small.store.acquire(
                session, info, asked, reserve=count, first_block=0, now_ms=0.0
            )
            refs = [(slot, small.table.generation[slot]) for slot in fresh.reserved_slots]
            outcomes = small.store.commit(session, info, refs, 0.0)
            assert outcomes == [SettleOutcome.DONE] * (count // 2)
            small.store.flush_requests()
        held = {key: id(key) for key in policy._tree.held_keys()}
        assert len(held) == count
        assert held == {key: id(key) for key in small.table.index}


def test_the_policy_hears_of_many_when_it_is_next_looked_at() -> None:
    with small_store(blocks=64, quota_blocks=64) as small:
        heard: list[int] = []

        class Hearing(Lru):
            def insert(self, blocks: Sequence[BlockKey], **about: Any) -> None:
                super().insert(blocks, **about)
                heard.extend(blocks)

        small.table.policy = Hearing()
        session, info = small.session(1)
        small.put(session, info, names(40), 0.0)
        assert heard == [], "the writer waits for this"
        slots = [slot for slot, _ in small.store.to_seal]
        small.table.seal(slots, [bytes(16)] * 40)
        small.table.evict(slots[:1], reason="room")
        assert heard == keys_of(info, b"".join(names(40))), "before one of them is gone"
        assert len(small.table.policy) == 39
        small.put(session, info, names(1), 1.0)
        small.store.flush_requests()
        assert len(heard) == 41
