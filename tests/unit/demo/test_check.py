"""The demonstration's judge: which passes it needs, and that it tells wrong replies from right."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvworkers.demo.check import NEAR_TIE, PlainModel, passes
from kvworkers.demo.talk import Answer, Exchange

VOCABULARY = 8
STOP = 7


class Scripted(PlainModel):
    """The judge with a model whose next token is (last + 1) mod 8, and its rivals far or near."""

    def __init__(self, gap: float = 1.0) -> None:
        self._stops = {STOP}
        self._gap = gap

    def _logits(self, tokens: Any, places: Any) -> Any:
        rows = torch.zeros(len(places), VOCABULARY)
        for row, place in zip(rows, places, strict=True):
            row[(tokens[place] + 1) % VOCABULARY] = 5.0
            row[(tokens[place] + 2) % VOCABULARY] = 5.0 - self._gap
        return rows


def exchange(request: int, prompt: int, reply: list[int], finish: str = "length") -> Exchange:
    answer = Answer(
        text="",
        tokens=tuple(reply),
        finish_reason=finish,
        prompt_tokens=prompt,
        cached={},
        ttft_ms=1.0,
        total_ms=1.0,
        worker="",
        places="",
        retries=0,
    )
    return Exchange(request=request, client=0, turn=0, messages=[], answer=answer)


def test_one_pass_judges_two_turns() -> None:
    longest = [0, 1, 2, 3, 4, 5]
    verdicts = Scripted().judge(longest, [exchange(1, 4, [4, 5]), exchange(0, 2, [2, 3])])
    assert [(v.request, v.equal, v.near_ties) for v in verdicts] == [(1, True, 0), (0, True, 0)]


@pytest.mark.parametrize("place", [0, 1])
def test_a_wrong_token_is_seen_at_its_place(place: int) -> None:
    reply = [2, 3]
    reply[place] = 6
    verdict = Scripted().judge([0, 1, *reply], [exchange(0, 2, reply)])[0]
    assert not verdict.equal
    assert verdict.detail == f"differs at token {place}"


def test_a_near_tie_ends_the_comparison_and_is_counted() -> None:
    verdict = Scripted(gap=NEAR_TIE / 2).judge([0, 1, 3, 0], [exchange(0, 2, [3, 0])])[0]
    assert (verdict.equal, verdict.near_ties) == (True, 1)


def test_a_reply_must_stop_where_the_model_stops() -> None:
    right = Scripted().judge([4, 5, 6], [exchange(0, 2, [6], "stop")])[0]
    early = Scripted().judge([3, 4, 5], [exchange(0, 2, [5], "stop")])[0]
    assert right.equal
    assert not early.equal


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=8).map(
        lambda found: dict(enumerate(found))
    )
)
def test_every_sequence_is_in_exactly_one_pass_that_begins_with_it(
    sequences: dict[int, list[int]],
) -> None:
    groups = passes(sequences)
    assert sorted(key for _, keys in groups for key in keys) == sorted(sequences)
    for longest, keys in groups:
        assert all(longest[: len(sequences[key])] == sequences[key] for key in keys)
