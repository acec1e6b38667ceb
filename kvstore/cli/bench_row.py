"""What every benchmark prints: a value, a limit measured beside it, and the ratio of both.

Ratios are the median over interleaved pairs (ours, other, ours, other …) of one run, above 1 where
ours is better: a machine that slows down for a moment slows both.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Final

Run = Callable[[], object]

PAIRS: Final = 25
"""Interleaved pairs of a whole benchmark."""

QUICK_PAIRS: Final = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case. Absent things are None; `unit` says what `value`, `limit` and `peer` are in."""

    bench: str
    case: str
    value: float
    unit: str
    limit: float | None = None
    limit_name: str | None = None
    ratio_to_limit: float | None = None
    peer: float | None = None
    peer_name: str | None = None
    ratio_to_peer: float | None = None
    runs: int

    def to_json(self) -> str:
        """Return the row as one line."""
        numbers = {
            name: float(f"{value:.4g}") if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }
        return json.dumps(numbers)

    def __str__(self) -> str:
        """Return the row for people."""
        beside = ""
        if self.limit is not None and self.ratio_to_limit is not None:
            beside = f"; {self.limit_name}: {self.limit:.4g}, ratio {self.ratio_to_limit:.3g}"
        return f"{self.case}: {self.value:.4g} {self.unit}{beside}"


def seconds(run: Run) -> float:
    """Return how long one run takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def pairs(ours: Run, other: Run, *, runs: int) -> tuple[float, float, float]:
    """Return median seconds of both, and the median of other/ours over interleaved pairs."""
    for warm in (ours, other):
        warm()
    times = [(seconds(ours), seconds(other)) for _ in range(runs)]
    return (
        median(mine for mine, _ in times),
        median(theirs for _, theirs in times),
        median(theirs / mine for mine, theirs in times),
    )
