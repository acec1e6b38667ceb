"""Blocks that lie side by side are found without the index, and nothing else is found by that."""

import pytest

from kvstore.core.outcomes import MissReason
from kvstore.service.resident import held
from kvstore.service.roots import key_column
from tests.arena_fixture import SmallStore, names, small_store

COUNT = 100


def _held(small: SmallStore, prompt: list[bytes]) -> tuple[int, ...]:
    """Hold a prompt, sealed; returns its slots."""
    session = small.store.sessions.by_number(1)
    session, info = small.session(1) if session is None else (session, small.table.roots.at(0))
    small.put(session, info, prompt, 0.0)
    slots = tuple(slot for slot, _ in small.store.to_seal)
    small.table.seal(slots, [bytes(16)] * len(slots))
    small.store.to_seal.clear()
    return slots


def _found(small: SmallStore, prompt: list[bytes]) -> tuple[list[int], MissReason]:
    session = small.store.sessions.by_number(1)
    assert session is not None
    answer = small.store.acquire(
        session, small.table.roots.at(0), b"".join(prompt), reserve=0, first_block=0, now_ms=1.0
    )
    small.store.release(session, [answer.lease])
    return answer.slots, answer.reason


def test_a_prompt_is_found_wherever_its_blocks_lie() -> None:
    with small_store(blocks=512, quota_blocks=512, max_slots=512) as small:
        prompt = names(COUNT)
        tail, other = prompt[60:], names(30, seed=1)
        first = _held(small, prompt[:60])
        between = _held(small, other)
        second = _held(small, tail)
        assert second[0] != first[-1] + 1, "not in one row"
        assert _found(small, prompt) == ([*first, *second], MissReason.NONE)
        assert _found(small, tail + other) == ([*second, *between], MissReason.NONE)


@pytest.mark.parametrize("at", [0, 1, 63, COUNT - 1])
def test_a_row_ends_at_what_is_gone_or_another_s(at: int) -> None:
    with small_store(blocks=512, quota_blocks=512, max_slots=512) as small:
        prompt = names(COUNT)
        slots = _held(small, prompt)
        assert _found(small, prompt) == ([*slots], MissReason.NONE)
        forged = [*prompt[:at], prompt[at][:8] + bytes(24), *prompt[at + 1 :]]
        assert _found(small, forged)[0] == [*slots[:at]], "its key is the same, its name is not"
        small.table.servable[slots[at]] = 0
        assert _found(small, prompt) == ([*slots[:at]], MissReason.LATE)
        small.table.servable[slots[at]] = 1
        small.table.root_number[slots[at]] = 1
        assert _found(small, prompt)[0] == [*slots[:at]]
        small.table.root_number[slots[at]] = 0
        small.table.evict([slots[at]], reason="room")
        assert _found(small, prompt) == ([*slots[:at]], MissReason.ABSENT)


def test_a_block_that_moved_is_found_where_it_is_now() -> None:
    """The record of a freed slot still names it: that slot must not stand in for the new one."""
    with small_store(blocks=512, quota_blocks=512, max_slots=512) as small:
        prompt = names(COUNT)
        slots = _held(small, prompt)
        filler = _held(small, names(20, seed=1))
        small.table.evict([slots[70]], reason="room")
        small.table.evict(filler[:3], reason="room")
        again = _held(small, prompt[70:71])
        assert again != slots[70:71]
        assert small.arena.name(slots[70]) == prompt[70]
        assert _found(small, prompt)[0] == [*slots[:70], *again, *slots[71:]]


def test_a_row_ends_with_the_table() -> None:
    with small_store(blocks=COUNT, quota_blocks=COUNT, max_slots=COUNT) as small:
        prompt = names(COUNT)
        slots = _held(small, prompt)
        assert _found(small, [*prompt, *names(2, seed=1)]) == ([*slots], MissReason.ABSENT)


@pytest.mark.parametrize("length", [1, 20, COUNT])
def test_each_name_is_looked_up_for_itself(length: int) -> None:
    """Holes anywhere, a forged name, a block being verified and another root's are not here."""
    with small_store(blocks=512, quota_blocks=512, max_slots=512) as small:
        table = small.table

        def here(asked: list[bytes]) -> list[bool]:
            packed, info = b"".join(asked), table.roots.at(0)
            return [bool(one) for one in held(table, info, packed, key_column(info, packed))]

        prompt = names(COUNT)
        slots = _held(small, prompt)
        asked = prompt[:length]
        assert here(asked) == [True] * length
        absent = names(length, seed=1)
        assert here(absent) == [False] * length
        mixed = [name for pair in zip(absent, asked, strict=True) for name in pair]
        assert here(mixed) == [False, True] * length
        forged = [asked[0][:8] + bytes(24), *asked[1:]]
        assert here(forged) == [False, *[True] * (length - 1)], "same key, another name"
        table.servable[slots[length - 1]] = 0
        assert here(asked) == [True] * (length - 1) + [False]
        table.servable[slots[length - 1]] = 1
        table.root_number[slots[length // 2]] = 1
        assert here(asked) == [at != length // 2 for at in range(length)]
        assert here([]) == []
