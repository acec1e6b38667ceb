"""How many tokens replies will have, learned from those that ended. Pure.

A prompt's `max_tokens` says what a reply may become, which is mostly far more than it becomes.
Admission counts on what is expected: the mean of remembered replies that were longer than this
one is already. A mean, since errors of many requests cancel in their sum; what still goes
wrong is put right by preemption.

A reply that `max_tokens` cut says only that it would have been longer: it counts as the mean of
those that ended by themselves beyond that, and as what it has where none did.
"""

from bisect import bisect_right, insort
from collections import deque
from itertools import accumulate
from typing import Final

_REMEMBERED: Final = 256
"""Replies: a few minutes of a busy worker, so that the forecast follows what is asked for."""
_UNKNOWN: Final = 256
"""Tokens of a reply while none has ended: a page of text."""


class Forecast:
    """Learns lengths of replies and predicts those that are running."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, bool]] = deque()
        """Lengths, and whether that was where each ended by itself."""
        self._whole: list[int] = []
        """Those that did, sorted."""
        self._sorted: list[int] = []
        self._sums: list[int] = []
        """Sum of all from an index of `_sorted` on; empty when it has to be made anew."""

    def ended(self, tokens: int, *, cut: bool = False) -> None:
        """Take in the length of a reply that came to its end by itself, or was `cut` there."""
        assert tokens >= 0
        if len(self._recent) == _REMEMBERED:
            oldest, whole = self._recent.popleft()
            self._sorted.remove(oldest)
            if whole:
                self._whole.remove(oldest)
        if cut:
            tokens = self._beyond(tokens)
        else:
            insort(self._whole, tokens)
        self._recent.append((tokens, not cut))
        insort(self._sorted, tokens)
        self._sums = []

    def _beyond(self, tokens: int) -> int:
        longer = self._whole[bisect_right(self._whole, tokens) :]
        return -(-sum(longer) // len(longer)) if longer else tokens

    def tokens(self, generated: int, most: int) -> int:
        """Return how many tokens a reply will have that has `generated` of at most `most`.

        More than it has, unless that is all. Longer than every one remembered: as much again.
        """
        assert 0 <= generated <= most
        first = bisect_right(self._sorted, generated)
        count = len(self._sorted) - first
        if not count:
            return min(most, max(_UNKNOWN, 2 * generated))
        if not self._sums:
            self._sums = list(accumulate(reversed(self._sorted)))[::-1]
        mean = -(-self._sums[first] // count)
        return min(most, max(generated + 1, mean))
