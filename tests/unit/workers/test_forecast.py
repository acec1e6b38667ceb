import random

import pytest
from kvworkers.engine.forecast import Forecast


def test_while_nothing_has_ended_a_reply_is_a_page_of_text_or_as_much_again() -> None:
    forecast = Forecast()
    assert forecast.tokens(0, 10_000) == 256
    assert forecast.tokens(200, 10_000) == 400
    assert forecast.tokens(3, 20) == 20, "never more than it may become"


def test_what_is_expected_is_the_mean_of_those_that_were_longer() -> None:
    forecast = Forecast()
    for tokens in (10, 20, 60):
        forecast.ended(tokens)
    assert forecast.tokens(0, 1_000) == 30
    assert forecast.tokens(10, 1_000) == 40, "of 20 and 60: it has outlived the first"
    assert forecast.tokens(59, 1_000) == 60
    assert forecast.tokens(60, 1_000) == 256, "longer than all of them"
    assert forecast.tokens(300, 1_000) == 600
    assert forecast.tokens(0, 25) == 25


@pytest.mark.parametrize("seed", range(5))
def test_old_replies_are_forgotten_and_a_running_one_always_has_more_to_come(seed: int) -> None:
    draw = random.Random(seed)
    forecast = Forecast()
    ended = [draw.randrange(500) for _ in range(1_000)]
    for tokens in ended:
        forecast.ended(tokens)
        generated = draw.randrange(500)
        assert generated < forecast.tokens(generated, 501) <= 501
    recent = ended[-256:]
    for generated in (0, 100, 400):
        longer = [tokens for tokens in recent if tokens > generated]
        assert abs(forecast.tokens(generated, 10_000) - sum(longer) / len(longer)) <= 1


def test_a_reply_that_was_cut_is_no_length() -> None:
    forecast = Forecast()
    for tokens in (100, 200, 400):
        forecast.ended(tokens)
    for _ in range(50):
        forecast.ended(16, cut=True)
    # Each counts as the mean of the longer ones: 234, and not as 16.
    assert forecast.tokens(0, 1_000) == 234
    forecast.ended(250, cut=True)
    assert forecast.tokens(300, 1_000) == 400, "as the one that is longer than 250"


def test_where_none_was_longer_a_cut_reply_counts_as_what_it_has() -> None:
    forecast = Forecast()
    forecast.ended(5)
    forecast.ended(8, cut=True)
    assert forecast.tokens(0, 1_000) == 7
    assert forecast.tokens(6, 1_000) == 8


def test_cut_replies_are_forgotten_as_others_are() -> None:
    forecast = Forecast()
    for tokens in range(300):
        forecast.ended(tokens)
        forecast.ended(tokens // 2, cut=True)
    for _ in range(256):
        forecast.ended(40)
    assert forecast.tokens(0, 1_000) == 40
