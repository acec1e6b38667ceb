from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvworkers.frontends.text import MAX_WINDOW, REPLACEMENT, Detokeniser, StopMatcher


def decode_bytes(tokens: Sequence[int]) -> str:
    """Decode as byte-level tokenizers do: a token is a byte, 256 and above are special."""
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


def decode_words(tokens: Sequence[int]) -> str:
    """Decode as word pieces do: the text's first space is dropped, so context matters."""
    return "".join(f" w{token}" for token in tokens)[1:]


def decode_fallback(tokens: Sequence[int]) -> str:
    """Decode as byte fallback does: a run of bytes that is no text shows one mark for each."""
    raw = bytes(token for token in tokens if token < 256)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return REPLACEMENT * len(raw)


def pieces(
    decode: Callable[[Sequence[int]], str], tokens: Sequence[int], cuts: Sequence[int]
) -> list[str]:
    detokeniser, given_out, at = Detokeniser(decode), [], 0
    for cut in [*cuts, len(tokens)]:
        step = max(1, cut)
        if at < len(tokens):
            given_out.append(detokeniser.push(tokens[at : at + step]))
            at += step
    while at < len(tokens):
        given_out.append(detokeniser.push(tokens[at : at + 1]))
        at += 1
    return [*given_out, detokeniser.finish()]


CUTS = st.lists(st.integers(1, 5), max_size=40)


@given(text=st.text(max_size=60), cuts=CUTS)
def test_valid_text_comes_in_whole_characters(text: str, cuts: list[int]) -> None:
    found = pieces(decode_bytes, list(text.encode()), cuts)
    assert "".join(found) == text
    assert all(piece.count(REPLACEMENT) <= text.count(REPLACEMENT) for piece in found)


@given(tokens=st.lists(st.integers(0, 260), max_size=120), cuts=CUTS)
def test_any_bytes_add_up_to_the_whole(tokens: list[int], cuts: list[int]) -> None:
    assert "".join(pieces(decode_bytes, tokens, cuts)) == decode_bytes(tokens)


@given(tokens=st.lists(st.integers(0, 99), max_size=40), cuts=CUTS)
def test_decoders_that_treat_the_first_token_specially_add_up(
    tokens: list[int], cuts: list[int]
) -> None:
    assert "".join(pieces(decode_words, tokens, cuts)) == decode_words(tokens)


@given(text=st.text(max_size=30))
def test_byte_fallback_shows_no_half_character(text: str) -> None:
    found = pieces(decode_fallback, list(text.encode()), [1] * 200)
    assert "".join(found) == text


def test_half_a_character_is_held_back() -> None:
    detokeniser = Detokeniser(decode_bytes)
    globe = "🌍".encode()
    assert [detokeniser.push([byte]) for byte in globe] == ["", "", "", "🌍"]
    assert detokeniser.push(list(globe[:2])) == ""
    assert detokeniser.finish() == REPLACEMENT
    assert detokeniser.finish() == ""


def test_endless_rubbish_is_given_out_and_the_window_stays_short() -> None:
    detokeniser = Detokeniser(decode_bytes)
    given_out = "".join(detokeniser.push([0xC3]) for _ in range(3 * MAX_WINDOW))
    assert len(detokeniser._window) <= 2 * MAX_WINDOW + 2
    assert given_out + detokeniser.finish() == REPLACEMENT * 3 * MAX_WINDOW


def matched(stops: Sequence[str], parts: Sequence[str]) -> tuple[str, bool]:
    matcher, shown = StopMatcher(stops), ""
    for part in parts:
        text, found = matcher.push(part)
        shown += text
        if found:
            return shown, True
    return shown + matcher.finish(), False


@pytest.mark.parametrize(
    ("stops", "parts", "expected"),
    [
        (["END"], ["a E", "N", "D b"], ("a ", True)),
        (["END"], ["a E", "N", "x"], ("a ENx", False)),
        (["aab"], ["a", "a", "a", "b"], ("a", True)),
        (["xy", "y"], ["ax", "y"], ("a", True)),
        (["b", "abc"], ["a", "b", "c"], ("a", True)),
        ([], ["a"], ("a", False)),
    ],
)
def test_stop_strings(stops: list[str], parts: list[str], expected: tuple[str, bool]) -> None:
    assert matched(stops, parts) == expected


@given(
    text=st.text(alphabet="abc", max_size=40),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    cuts=CUTS,
)
def test_no_stop_string_is_ever_shown(text: str, stops: list[str], cuts: list[int]) -> None:
    parts, at = [], 0
    for cut in [*cuts, len(text)]:
        parts.append(text[at : at + cut])
        at += cut
    shown, found = matched(stops, parts)
    assert found == any(stop in text for stop in stops)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if not found:
        assert shown == text
