"""kvstore.client.checks: what a call's arguments may be, and what a strange answer becomes."""

import pytest

from kvstore.client import checks
from kvstore.client.replies import SlotRef
from kvstore.core.errors import BadInput, Unreachable
from kvstore.core.outcomes import SettleOutcome
from kvstore.directory.events import TierKind

DONE, STALE = SettleOutcome.DONE, SettleOutcome.STALE


def ref(arena: int) -> SlotRef:
    return SlotRef(1, 1, 0, TierKind.DRAM, arena)


def test_a_deadline_is_the_default_where_none_is_asked_for() -> None:
    assert checks.deadline(None, 250) == 250
    assert checks.deadline(7, 250) == 7
    with pytest.raises(BadInput, match="deadline_ms"):
        checks.deadline(0, 250)


def test_bounds_name_the_argument() -> None:
    checks.bounded("reserve", 0, 10)
    checks.bounded("reserve", 10, 10)
    for value in (-1, 11):
        with pytest.raises(BadInput, match="reserve"):
            checks.bounded("reserve", value, 10)


@pytest.mark.parametrize("error", [ValueError("odd"), BadInput("odd")])
def test_an_answer_that_nobody_understands_is_none(error: Exception) -> None:
    def convert(value: int) -> int:
        if value:
            raise error
        return value

    assert checks.read(convert, 0) == 0
    with pytest.raises(Unreachable, match="malformed"):
        checks.read(convert, 1)


def test_slots_that_were_not_sent_are_stale_in_their_places() -> None:
    asked = [ref(1), ref(2), ref(1), ref(2)]
    assert checks.with_stale(asked, [DONE, STALE], 2) == [STALE, DONE, STALE, STALE]
    assert checks.with_stale(asked[1::2], [DONE, DONE], 2) == [DONE, DONE]
