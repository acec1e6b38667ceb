"""Edges of Acquire and Settle that the state machine's model does not name."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kvstore.core.errors import BadInput, Refused, SessionLost, TooLarge, WrongRoot
from kvstore.core.names import Root
from kvstore.core.outcomes import MissReason, Outcome, SettleOutcome
from kvstore.core.slots import SlotState
from kvstore.directory.lru import Lru
from kvstore.directory.policy import BlockKey, Prompt
from kvstore.service import store as module
from kvstore.service.reserver import Hints
from kvstore.service.roots import BlockShape, Roots, keys_of
from tests.arena_fixture import ROOT, SHAPE, SmallStore, names, small_store


def test_a_claimed_name_is_computing_until_the_claim_is_old() -> None:
    with small_store() as small:
        writer, info = small.session(1)
        other, _ = small.session(2)
        packed = b"".join(names(2))
        ask: dict[str, Any] = {"reserve": 2, "first_block": 0}
        mine = small.store.acquire(writer, info, packed, now_ms=0.0, **ask)
        assert mine.reserved_names == [0, 1]
        early = small.store.acquire(other, info, packed, now_ms=299.0, **ask)
        assert (early.reason, early.reserve_reason) == (MissReason.COMPUTING,) * 2
        assert early.reserved_slots == []
        late = small.store.acquire(other, info, packed, now_ms=300.0, **ask)
        assert late.reason is MissReason.ABSENT
        assert late.reserved_names == [0, 1]
        assert not set(late.reserved_slots) & set(mine.reserved_slots)
        refs = [(slot, small.table.generation[slot]) for slot in late.reserved_slots]
        assert small.store.commit(other, info, refs, 301.0) == [SettleOutcome.DONE] * 2
        stalled = [(slot, small.table.generation[slot]) for slot in mine.reserved_slots]
        outcomes = small.store.commit(writer, info, stalled, 302.0)
        assert outcomes == [SettleOutcome.DUPLICATE] * 2
        assert writer.reserved_bytes == 0


def test_the_quota_bounds_what_one_session_reserves() -> None:
    with small_store(quota_blocks=3) as small:
        session, info = small.session(1)
        answer = small.store.acquire(
            session, info, b"".join(names(5)), reserve=5, first_block=0, now_ms=0.0
        )
        assert len(answer.reserved_slots) == 3
        assert answer.reserve_reason is MissReason.REFUSED


def test_a_full_arena_of_leased_blocks_refuses_and_evicts_once_released() -> None:
    with small_store(blocks=4) as small:
        session, info = small.session(1)
        small.put(session, info, names(4), 0.0)
        for slot, _ in small.store.to_seal:
            small.table.seal([slot], [bytes(16)])
        held = small.store.acquire(
            session, info, b"".join(names(4)), reserve=0, first_block=0, now_ms=1.0
        )
        wanted = b"".join(names(1, seed=9))
        full = small.store.acquire(session, info, wanted, reserve=1, first_block=0, now_ms=2.0)
        assert (full.reserved_slots, full.reserve_reason) == ([], MissReason.REFUSED)
        assert small.store.release(session, [held.lease]) == [SettleOutcome.DONE]
        room = small.store.acquire(session, info, wanted, reserve=1, first_block=0, now_ms=3.0)
        assert len(room.reserved_slots) == 1
        # The suffix went first.
        found = [
            small.store.outcome(info, keys_of(info, name)[0], name) is Outcome.HIT
            for name in names(4)
        ]
        assert found == [True, True, True, False]


class Unwilling(Lru):
    """Thinks that what is held is always worth more."""

    def victims(
        self,
        count: int,
        *,
        now_ms: float,
        may_evict: Callable[[BlockKey], bool],
        newcomers: Sequence[BlockKey] = (),
    ) -> list[BlockKey]:
        worst = super().victims(count, now_ms=now_ms, may_evict=may_evict)
        return [] if newcomers else worst


def test_a_newcomer_worth_less_than_what_is_held_is_told_so() -> None:
    with small_store(blocks=4) as small:
        small.table.policy = Unwilling()
        session, info = small.session(1)
        small.put(session, info, names(4), 0.0)
        for slot, _ in small.store.to_seal:
            small.table.seal([slot], [bytes(16)])
        wanted = b"".join(names(1, seed=9))
        answer = small.store.acquire(session, info, wanted, reserve=1, first_block=0, now_ms=1.0)
        assert (answer.reserved_slots, answer.reserve_reason) == ([], MissReason.OUTWEIGHED)


def test_what_the_caller_tells_of_a_request_reaches_the_policy() -> None:
    with small_store() as small:
        heard: list[Prompt] = []
        small.store.on_request = heard.append
        session, info = small.session(1)
        small.store.acquire(
            session, info, names(1)[0], reserve=0, first_block=0, now_ms=0.0,
            hints=Hints("tool", 0.25),
        )  # fmt: skip
        small.store.flush_requests()
        assert [(it.kind, it.depth_cost, it.share_domain) for it in heard] == [
            ("tool", 0.25, info.domain)
        ]


def test_a_key_is_only_a_hint() -> None:
    """Two names with equal first 8 bytes: the second is never served the first's block."""
    with small_store() as small:
        session, info = small.session(1)
        [real] = names(1)
        small.put(session, info, [real], 0.0)
        forged = real[:8] + bytes(24)
        assert keys_of(info, forged) == keys_of(info, real)
        answer = small.store.acquire(session, info, forged, reserve=1, first_block=0, now_ms=1.0)
        assert (answer.slots, answer.reserved_slots) == ([], [])
        assert answer.reason is MissReason.ABSENT
        both = small.store.acquire(
            session, info, real + forged, reserve=0, first_block=0, now_ms=1.0
        )
        assert len(both.slots) == 1
        assert small.store.outcome(info, keys_of(info, forged)[0], forged) is Outcome.MISS


def test_unreleased_leases_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LEASES_PER_SESSION", 2)
    with small_store() as small:
        session, info = small.session(1)
        small.put(session, info, names(1), 0.0)
        ask: dict[str, Any] = {"reserve": 0, "first_block": 0, "now_ms": 1.0}
        packed = b"".join(names(1))
        reasons = [small.store.acquire(session, info, packed, **ask).reason for _ in range(3)]
        assert reasons == [MissReason.NONE, MissReason.NONE, MissReason.REFUSED]


def test_many_touches_are_told_before_they_pile_up() -> None:
    with small_store() as small:
        session, info = small.session(1)
        small.put(session, info, names(2), 0.0)
        for _ in range(200):
            answer = small.store.acquire(
                session, info, names(2)[0], reserve=0, first_block=0, now_ms=1.0
            )
            small.store.release(session, [answer.lease])
        small.store.flush_requests()
        first, second = (keys_of(info, name)[0] for name in names(2))
        order = small.table.policy.victims(2, now_ms=2.0, may_evict=lambda key: True)
        assert order == [second, first]


def test_roots_are_what_a_session_opened() -> None:
    with small_store() as small:
        session, info = small.session(1)
        assert session.root(ROOT) is info
        with pytest.raises(WrongRoot):
            session.root(Root(bytes(32)))
        session.roots.clear()
        with pytest.raises(SessionLost):
            session.root(ROOT)


def test_a_root_has_one_shape_and_roots_are_bounded() -> None:
    roots = Roots(max_roots=1)
    roots.open(ROOT, SHAPE)
    assert roots.open(ROOT, SHAPE, domain="d").domain == "d"
    assert roots.open(ROOT, SHAPE).domain == "d"
    with pytest.raises(BadInput, match="blocks under this root"):
        roots.open(ROOT, BlockShape(8192, 8000, 2))
    with pytest.raises(Refused):
        roots.open(Root(bytes(32)), SHAPE)
    assert len(roots) == 1


@pytest.mark.parametrize(
    ("shape", "error"),
    [
        (BlockShape(4096, 4000, 0), BadInput),
        (BlockShape(4096, 4000, 1025), BadInput),
        (BlockShape(4096, 4001, 2), BadInput),
        (BlockShape(4096, 0, 1), BadInput),
        (BlockShape(8192, 4000, 2), BadInput),
        (BlockShape(128 << 20, 128 << 20, 1), TooLarge),
        (BlockShape(64 << 20, 64 << 20, 1), TooLarge),
    ],
)
def test_shapes_that_cannot_be_are_named(shape: BlockShape, error: type[Exception]) -> None:
    with pytest.raises(error):
        shape.check(32 << 20)


def test_all_that_was_asked_for_needs_no_reason() -> None:
    with small_store() as small:
        writer, info = small.session(1)
        other, _ = small.session(2)
        packed = b"".join(names(3))
        ask: dict[str, Any] = {"first_block": 0, "now_ms": 0.0}
        small.store.acquire(writer, info, packed[:32], reserve=1, **ask)
        answer = small.store.acquire(other, info, packed, reserve=2, **ask)
        assert answer.reason is MissReason.COMPUTING
        assert answer.reserved_names == [1, 2]
        assert answer.reserve_reason is MissReason.NONE


@pytest.mark.parametrize("why", ["quota", "held"])
def test_no_more_is_evicted_than_can_be_reserved(why: str) -> None:
    """A long prompt must not empty the arena for slots that it is not going to get."""
    with small_store(blocks=8, quota_blocks=2) as small:
        session, info = small.session(1)
        old = names(8)
        for at in range(0, 8, 2):
            small.put(session, info, old[at : at + 2], 0.0)
        for slot, _ in small.store.to_seal:
            small.table.seal([slot], [bytes(16)])
        new = names(8, seed=9) if why == "quota" else [*names(1, seed=9), *old[1:]]
        answer = small.store.acquire(
            session, info, b"".join(new), reserve=8, first_block=0, now_ms=1.0
        )
        expected = 2 if why == "quota" else 1
        assert len(answer.reserved_slots) == small.table.evicted_blocks == expected


def test_leases_of_an_earlier_keeper_are_never_ours() -> None:
    with small_store() as small:
        session, info = small.session(1)
        small.put(session, info, names(1), 0.0)
        store = module.ArenaStore(small.table, small.limits, first_lease=1_000)
        store.sessions.open(1, session.token)
        ask: dict[str, Any] = {"reserve": 0, "first_block": 0, "now_ms": 1.0}
        held = store.acquire(session, info, names(1)[0], **ask).lease
        assert held == 1_000
        assert store.release(session, [999, held]) == [SettleOutcome.ALREADY, SettleOutcome.DONE]


@pytest.mark.parametrize("odd", ["none", "stale", "twice", "aborted", "taken over"])
def test_many_are_committed_as_one_by_one(odd: str) -> None:
    """Whatever is unusual about one of 40 slots, the others are committed all the same."""
    with small_store(64, quota_blocks=64, max_slots=128) as small:
        session, info = small.session(1)
        store, table = small.store, small.table
        prompt = names(40)
        ask: dict[str, Any] = {"reserve": 40, "first_block": 0}
        answer = store.acquire(session, info, b"".join(prompt), now_ms=0.0, **ask)
        refs = [(slot, table.generation[slot]) for slot in answer.reserved_slots]
        expected = [SettleOutcome.DONE] * 40
        if odd == "stale":
            refs[7] = (refs[7][0], refs[7][1] + 1)
            expected[7] = SettleOutcome.NOT_YOURS
        elif odd == "twice":
            refs[7] = refs[6]
            expected[7] = SettleOutcome.ALREADY
        elif odd == "aborted":
            store.abort(session, info, [refs[7]])
            expected[7] = SettleOutcome.STALE
        elif odd == "taken over":
            other, _ = small.session(2)
            small.put(other, info, prompt[:1], 1_000.0)
            expected[0] = SettleOutcome.DUPLICATE
        assert store.commit(session, info, refs, 2_000.0) == expected
        done = {
            ref[0] for ref, one in zip(refs, expected, strict=True) if one is SettleOutcome.DONE
        }
        assert all(table.state[slot] == SlotState.COMMITTED for slot in done)
        assert all(small.arena.word(slot).state is SlotState.COMMITTED for slot in done)
        left = odd in ("stale", "twice")
        assert (len(session.reserved), session.reserved_bytes) == (left, left * 4096)
        assert {slot for slot, _ in store.to_seal} >= done


def _refs(small: SmallStore, slots: Sequence[int]) -> list[tuple[int, int]]:
    return [(slot, small.table.generation[slot]) for slot in slots]


@pytest.mark.parametrize("second_commits", [True, False])
def test_many_whose_claims_were_taken_over_are_looked_at_one_by_one(second_commits: bool) -> None:
    """Committing all at once would leave two readable slots for each block."""
    with small_store(blocks=128, quota_blocks=128, max_slots=128) as small:
        (first, info), (second, _) = small.session(1), small.session(2)
        ask: dict[str, Any] = {"reserve": 40, "first_block": 0}
        packed = b"".join(names(40))
        mine = small.store.acquire(first, info, packed, now_ms=0.0, **ask).reserved_slots
        theirs = small.store.acquire(second, info, packed, now_ms=300.0, **ask).reserved_slots
        assert len(mine) == len(theirs) == 40
        settle = small.store.commit if second_commits else small.store.abort
        now = (301.0,) if second_commits else ()
        assert settle(second, info, _refs(small, theirs), *now) == [SettleOutcome.DONE] * 40
        expected = SettleOutcome.DUPLICATE if second_commits else SettleOutcome.DONE
        assert small.store.commit(first, info, _refs(small, mine), 302.0) == [expected] * 40
        kept = theirs if second_commits else mine
        assert sorted(small.table.index.values()) == sorted(kept)
        assert len(small.table.policy) == small.table.counts[SlotState.COMMITTED] == 40
