"""How fast a tier has been lately, measured while it was busy. Pure; time is passed in."""

from dataclasses import dataclass
from typing import Final

_WINDOW_S: Final = 0.05
"""Shortest stretch of work that makes a sample: a single block says little."""
_WEIGHT: Final = 0.3
"""Of the newest sample: ten times slower than yesterday is noticed after a handful."""


@dataclass(slots=True)
class Rate:
    """Bytes per second over the time in which anything was under way."""

    bytes_per_s: float
    """What is assumed before anything was measured."""
    measured: bool = False
    _in_flight: int = 0
    _since_s: float = 0.0
    _bytes: int = 0
    _sampled: bool = False

    def began(self, now_s: float) -> None:
        """Note that a transfer has started."""
        if not self._in_flight:
            self._since_s = now_s
            self._bytes = 0
            self._sampled = False
        self._in_flight += 1

    def ended(self, moved_bytes: int, now_s: float) -> None:
        """Note that a transfer has ended, having moved so much (0: it failed)."""
        assert self._in_flight
        self._in_flight -= 1
        self._bytes += moved_bytes
        spent_s = now_s - self._since_s
        # A short busy period makes one sample; the short rest of a long one makes none.
        if spent_s < _WINDOW_S and (self._in_flight or self._sampled):
            return
        self._sampled = True
        if self._bytes and spent_s > 0:
            self._take(self._bytes / spent_s)
        self._since_s = now_s
        self._bytes = 0

    def bytes_within(self, seconds: float, waiting_bytes: int) -> int:
        """Return how many bytes more would be done in time behind those that wait."""
        return max(0, int(self.bytes_per_s * seconds) - waiting_bytes)

    def _take(self, sample: float) -> None:
        weight = _WEIGHT if self.measured else 1.0
        self.bytes_per_s += weight * (sample - self.bytes_per_s)
        self.measured = True
