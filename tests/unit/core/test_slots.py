"""Slot words: the stored form and the one table of legal changes."""

import pytest

from kvstore.core.slots import (
    MAX_GENERATION,
    MAX_SESSION,
    READABLE,
    TRANSITIONS,
    SlotState,
    SlotWord,
    readable_at,
    reserved_slots,
    unpack,
)


def test_the_stored_form_is_fixed() -> None:
    """Other processes of another version read these words: the bits must not move."""
    word = SlotWord(generation=0x123456789A, state=SlotState.RESERVED, session=0xBCDEF)
    assert word.pack() == 0x123456789ABCDEF1
    assert unpack(0x123456789ABCDEF1) == word
    assert [state.value for state in SlotState] == [0, 1, 2, 3, 5]


def test_an_empty_table_is_a_table_of_free_slots() -> None:
    assert unpack(0) == SlotWord(0, SlotState.FREE, 0)


def test_extremes_fit() -> None:
    word = SlotWord(MAX_GENERATION, SlotState.DRAINING, MAX_SESSION)
    assert word.pack() < 1 << 64
    assert unpack(word.pack()) == word


@pytest.mark.parametrize("state", range(6, 16))
def test_unknown_states_are_refused(state: int) -> None:
    with pytest.raises(ValueError, match=str(state)):
        unpack(state)


@pytest.mark.parametrize(
    "word",
    [
        SlotWord(MAX_GENERATION + 1, SlotState.FREE, 0),
        SlotWord(-1, SlotState.FREE, 0),
        SlotWord(0, SlotState.RESERVED, MAX_SESSION + 1),
        SlotWord(0, SlotState.RESERVED, -1),
    ],
)
def test_overflow_never_spills_into_a_neighbour(word: SlotWord) -> None:
    with pytest.raises(AssertionError):
        word.pack()


def test_every_state_has_a_row_and_a_way_back_to_free() -> None:
    assert set(TRANSITIONS) == set(SlotState)
    for start in SlotState:
        reached = {start}
        while more := {t for s in reached for t in TRANSITIONS[s]} - reached:
            reached |= more
        assert SlotState.FREE in reached
        assert reached == set(SlotState), "no state is a trap"


@pytest.mark.parametrize("start", SlotState)
@pytest.mark.parametrize("end", SlotState)
def test_only_legal_changes_pass(start: SlotState, end: SlotState) -> None:
    word = SlotWord(7, start, 3 if start is SlotState.RESERVED else 0)
    session = 9 if end is SlotState.RESERVED else 0
    if end not in TRANSITIONS[start]:
        with pytest.raises(AssertionError, match=f"{start.name} -> {end.name}"):
            word.to(end, session=session)
        return
    after = word.to(end, session=session)
    assert (after.state, after.session) == (end, session)
    assert after.generation == (8 if end is SlotState.RESERVED else 7)


def test_only_reservations_carry_a_session() -> None:
    free = SlotWord(0, SlotState.FREE, 0)
    with pytest.raises(AssertionError, match="session"):
        free.to(SlotState.RESERVED)
    with pytest.raises(AssertionError, match="session"):
        free.to(SlotState.RESERVED, session=4).to(SlotState.COMMITTED, session=4)


def test_what_is_readable() -> None:
    assert {SlotState.COMMITTED, SlotState.SEALED} == READABLE
    for state in READABLE:
        assert SlotState.RESERVED not in TRANSITIONS[state], "rewriting needs a pass through FREE"


@pytest.mark.parametrize("state", SlotState)
def test_raw_checks_agree_with_the_decoded_word(state: SlotState) -> None:
    session = 9 if state is SlotState.RESERVED else 0
    raw = SlotWord(5, state, session).pack()
    assert readable_at(raw, 5) == (state in READABLE)
    assert not readable_at(raw, 4)
    assert not readable_at(raw, 6)
    expected = {1: 5} if state is SlotState.RESERVED else {}
    assert reserved_slots([0, raw], 9) == expected
    assert reserved_slots([0, raw], 8) == {}
