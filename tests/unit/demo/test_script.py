"""The demonstration's conversations: shared openings, parting questions, honest documents."""

import pytest
from kvworkers.demo.script import MAX_CLIENTS, MAX_TURNS, QUESTIONS, conversations, document

from kvstore.core.errors import BadInput


def test_clients_share_the_system_prompt_and_one_pair_shares_a_document() -> None:
    parts = conversations(4, 3)
    assert len({part.system for part in parts}) == 1
    assert parts[0].document == parts[1].document
    assert len({part.document for part in parts}) == 3
    assert parts[0].questions != parts[1].questions
    opening = parts[0].opening()
    assert [message["role"] for message in opening] == ["system", "user"]
    assert parts[0].document in opening[1]["content"]


def test_a_turn_keeps_everything_before_it() -> None:
    part = conversations(1, 2)[0]
    opening = part.opening()
    second = part.after(opening, "Because.", turn=1)
    assert second[: len(opening)] == opening
    assert second[-2:] == [
        {"role": "assistant", "content": "Because."},
        {"role": "user", "content": part.questions[1]},
    ]


def test_the_largest_demonstration_repeats_no_question_within_a_conversation() -> None:
    for part in conversations(MAX_CLIENTS, MAX_TURNS):
        assert len(set(part.questions)) == MAX_TURNS


@pytest.mark.parametrize(
    ("clients", "turns", "flag"),
    [(0, 3, "--clients"), (MAX_CLIENTS + 1, 3, "--clients"), (4, 0, "--turns"), (4, 7, "--turns")],
)
def test_what_cannot_be_asked_is_refused(clients: int, turns: int, flag: str) -> None:
    with pytest.raises(BadInput, match=flag):
        conversations(clients, turns)


def test_every_document_is_packaged_and_long_enough_to_be_worth_caching() -> None:
    for name in ("handbook", *QUESTIONS):
        text = document(name)
        assert text.startswith("# ")
        assert len(text.split()) > 450
