"""Slot words over all values and over random lives."""

from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.slots import (
    MAX_GENERATION,
    MAX_SESSION,
    TRANSITIONS,
    SlotState,
    SlotWord,
    unpack,
)

WORDS = st.builds(
    SlotWord,
    generation=st.integers(0, MAX_GENERATION),
    state=st.sampled_from(SlotState),
    session=st.integers(0, MAX_SESSION),
)


@given(WORDS)
def test_pack_and_unpack_are_inverse(word: SlotWord) -> None:
    assert 0 <= word.pack() < 1 << 64
    assert unpack(word.pack()) == word


@given(WORDS, WORDS)
def test_packing_is_injective_and_ordered_by_generation(one: SlotWord, other: SlotWord) -> None:
    assert (one.pack() == other.pack()) == (one == other)
    if one.generation < other.generation:
        assert one.pack() < other.pack()


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, MAX_SESSION))
def test_a_generation_never_serves_two_reservations(choices: list[int], session: int) -> None:
    word = SlotWord(0, SlotState.FREE, 0)
    reserved_at: list[int] = []
    for choice in choices:
        options = sorted(TRANSITIONS[word.state])
        state = options[choice % len(options)]
        word = word.to(state, session=session if state is SlotState.RESERVED else 0)
        if state is SlotState.RESERVED:
            reserved_at.append(word.generation)
    assert reserved_at == sorted(set(reserved_at))
