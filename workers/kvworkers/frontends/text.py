"""From tokens to text as they come: whole characters, and no part of a stop string. Pure."""

from collections.abc import Callable, Sequence
from typing import Final

REPLACEMENT: Final = "\ufffd"
"""What a decoder shows for bytes that are no character, or not yet."""

MAX_UNFINISHED: Final = 8
"""Replacement characters held back at the end: a character has at most 4 bytes, so beyond these
the earlier ones are no beginnings but rubbish that the model really produced."""

MAX_WINDOW: Final = 256
"""Tokens that may wait for the end of a character: more are rubbish, and each step decodes them."""

Decode = Callable[[Sequence[int]], str]


class Detokeniser:
    """Turns a growing sequence of token ids into text, a piece at a time.

    The pieces add up to `decode` of the whole sequence. Each step decodes a short window: some
    tokens of context (a decoder may treat the first token of a text specially) and what is new. A
    window that ends in the middle of a character is held back.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._context = 0
        """Tokens at the window's start whose text was given out completely before."""
        self._given = 0
        """Characters of the window's text that were given out."""

    def push(self, tokens: Sequence[int]) -> str:
        """Return the text that these tokens complete; may be empty."""
        self._window.extend(tokens)
        text = self._decode(self._window)
        whole = text.rstrip(REPLACEMENT)
        unfinished = len(text) - len(whole)
        if unfinished > MAX_UNFINISHED:
            whole = text[: len(text) - MAX_UNFINISHED // 2]
        piece = whole[self._given :]
        self._given = max(self._given, len(whole))
        if len(self._window) - self._context > MAX_WINDOW:
            piece += self.finish()
            unfinished = 0
        if not unfinished:
            self._slide()
        return piece

    def finish(self) -> str:
        """Return what is left at the end, unfinished characters shown as replacements."""
        text = self._decode(self._window)
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        return piece

    def _slide(self) -> None:
        """Drop the old context; what came since the last slide is the context of what follows."""
        del self._window[: self._context]
        self._context = len(self._window)
        self._given = len(self._decode(self._window))


class StopMatcher:
    """Finds stop strings in a text that comes in pieces, and never lets a part of one through."""

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string matches everywhere"
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Return the text that is safe to show, and whether a stop string was found.

        The stop string itself and what follows it are not shown. After a find, push nothing more.
        """
        if not self._stops:
            return piece, False
        text = self._held + piece
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max(beginning(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """Return what was held back: the beginning of a stop string that never came."""
        held, self._held = self._held, ""
        return held


def beginning(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that could begin `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
