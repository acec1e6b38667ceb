"""Label values that callers choose, kept few: each costs a time series for ever."""

from typing import Final

OTHER: Final = "other"
"""The label of everybody beyond the bound."""

MAX_VALUES: Final = 64


class BoundedLabels:
    """Gives the first `most` values a label of their own, and all later ones `OTHER`.

    First come, not biggest: a value keeps its label as long as the process lives, so that no
    counter ever goes down.
    """

    def __init__(self, most: int = MAX_VALUES) -> None:
        assert most > 0
        self._most = most
        self._known: set[str] = set()

    def label(self, value: str) -> str:
        """Return the label that counts `value`."""
        if value in self._known:
            return value
        if len(self._known) >= self._most:
            return OTHER
        self._known.add(value)
        return value
