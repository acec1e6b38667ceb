"""When will blocks like this be asked for again? Hazards learned online, and their index. Pure.

Time since the last use is cut in bins, two an octave. For each class of evidence two numbers a bin
are counted: how much reached the bin unused (`entered`) and how much was used again inside it
(`reused`). Their quotient estimates the hazard, and what was never used again counts in full (the
actuarial estimator); evicted blocks are watched on as ghosts, so eviction censors nothing.

A class with little history leans on its coarser parent, that one on its own parent, and the root on
a hazard that is equal in every bin: time to reuse uniform in its logarithm, under which the index
below falls with age from the first edge on. A policy that knows nothing is therefore LRU.

The index of a block of some age is Gittins' (J. R. Stat. Soc. B, 1979): the best ratio over all
stopping times of the chance of a use to the time a place is occupied until then,

    G(a) = max over d of  P(used within d | unused for a) / E[min(time to use, d) | unused for a]

the value per second of a place. With places rented out by the second to whoever offers most, the
lowest index held is what a second is worth: the tier's pressure needs no constant of its own.
"""

from bisect import bisect_right
from collections.abc import Hashable
from typing import Final

import numpy as np
from numpy.typing import NDArray

BINS: Final = 44
FIRST_EDGE_MS: Final = 125.0
EDGES_MS: Final = [FIRST_EDGE_MS * 2 ** (i / 2) for i in range(BINS - 1)]
"""Upper edges; the last bin, from 3 days on, has none."""

_WIDTHS: Final[NDArray[np.float64]] = np.diff(
    np.array([0.0, *EDGES_MS, EDGES_MS[-1] * 2**0.5], dtype=np.float64)
)
_PRIOR_HAZARD: Final = 0.05
"""Of the root, in every bin: one in twenty a half-octave, three quarters within an hour."""
_PRIOR_WEIGHT: Final = 200.0
"""Observations at which the root counts as much as its prior: ten uses at the prior's hazard."""
_LEAN_WEIGHT: Final = 10.0
"""Observations at which a class counts as much as its parent: with a hazard of 10 % the first use
is expected then."""
_MEMORY_WEIGHT: Final = 50_000.0
"""Observations after which the past is halved: days of a busy server, and thousands of uses per
class, enough for 3 % of error."""
_SURPRISE: Final = 4.0
"""Uses seen against expected, either way, at which the past is halved at once."""
_MAX_HAZARD: Final = 0.99
UNKNOWN: Final = 0
"""Class of what was inserted and never asked for; it follows the root."""

Evidence = tuple[Hashable, ...]
"""Coarse first: each prefix of it is a class that the longer ones lean on."""


def bin_of(age_ms: float) -> int:
    """Return the bin of an age."""
    return bisect_right(EDGES_MS, age_ms)


def bin_seen(bin_number: int, shift: int) -> int:
    """Return where an age stands for what is `shift` bins slower than its class (`rhythm`).

    Bins are equal on a logarithmic scale, so a slower pace is a shift along them.
    """
    return min(max(bin_number - shift, 0), BINS - 1)


class ReuseModel:
    """Counts per class and bin, and the index that follows from them."""

    def __init__(self) -> None:
        self._numbers: dict[Evidence, int] = {}
        self._entered: list[list[float]] = []
        self._reused: list[list[float]] = []
        self._expected = np.zeros((0, BINS))
        """Hazards at the last refresh."""
        self._seen = (np.zeros((0, BINS)), np.zeros((0, BINS)))
        """Counts (entered, reused) at the last refresh."""
        self._index: list[list[float]] | None = None
        """What was last asked for; None since the refresh."""
        self._since: list[int] = []
        """Of each class numbered since the last refresh, the known one that it stood nearest to."""
        self.number(())
        self.refresh()

    def __len__(self) -> int:
        """Return the number of classes."""
        return len(self._numbers)

    @property
    def index(self) -> list[list[float]]:
        """By class and bin; classes numbered since the last refresh stand where their parent does.

        Worked out when it is asked for: while there is room for everything nobody asks, and a new
        node learns after every few requests.
        """
        index = self._index
        if index is None:
            found: list[list[float]] = gittins(self._expected).tolist()
            for parent in self._since:
                found.append(found[parent])
            index = self._index = found
        return index

    def number(self, evidence: Evidence) -> int:
        """Return the number of a class, given where it is new."""
        found = self._numbers.get(evidence)
        if found is None:
            found = self._numbers[evidence] = len(self._numbers)
            self._entered.append([0.0] * BINS)
            self._reused.append([0.0] * BINS)
            if found:
                parent = self._nearest(evidence)
                self._since.append(parent)
                if self._index is not None:
                    self._index.append(self._index[parent])
        return found

    def _nearest(self, evidence: Evidence) -> int:
        """Return the longest known class that `evidence` begins with; the root at least."""
        for depth in range(len(evidence) - 1, 0, -1):
            if evidence[:depth] in self._numbers:
                return self._numbers[evidence[:depth]]
        return UNKNOWN

    def enter(self, number: int, bin_number: int, weight: float) -> None:
        """Count something that reached a bin unused."""
        self._entered[number][bin_number] += weight

    def reuse(self, number: int, bin_number: int, weight: float) -> None:
        """Count something that was used again in a bin it had reached."""
        self._reused[number][bin_number] += weight

    def refresh(self) -> None:
        """Estimate hazards and index anew from the counts."""
        entered, reused = np.array(self._entered), np.array(self._reused)
        if self._is_surprised(entered, reused) or entered[:, 0].sum() > _MEMORY_WEIGHT:
            entered, reused = entered / 2, reused / 2
            self._entered, self._reused = entered.tolist(), reused.tolist()
        hazards = self._hazards(entered, reused)
        self._index, self._since = None, []
        self._expected, self._seen = hazards, (entered, reused)

    def _is_surprised(self, entered: NDArray[np.float64], reused: NDArray[np.float64]) -> bool:
        """Say whether uses since the last refresh are far from what was expected then.

        Three standard errors of a Poisson count, so that few observations decide nothing.
        """
        known = len(self._expected)
        before_entered, before_reused = self._seen
        new = (entered[:known] - before_entered).clip(0) * self._expected
        expected = float(new.sum())
        seen = float((reused[:known] - before_reused).sum())
        apart = not expected / _SURPRISE <= seen <= expected * _SURPRISE
        return apart and abs(seen - expected) > 3 * max(expected, seen, 1.0) ** 0.5

    def _hazards(
        self, entered: NDArray[np.float64], reused: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return the hazard of every class and bin, leaning on coarser classes."""
        entered, reused = _smooth(entered), _smooth(reused)
        totals: dict[Evidence, tuple[NDArray[np.float64], NDArray[np.float64], int]] = {}
        for evidence, number in self._numbers.items():
            for depth in range(len(evidence) + 1):
                part = evidence[:depth]
                more, used, classes = totals.get(part, (0.0, 0.0, 0))
                totals[part] = (more + entered[number], used + reused[number], classes + 1)
        more, used, _ = totals[()]
        found: dict[Evidence, NDArray[np.float64]] = {
            (): (used + _PRIOR_HAZARD * _PRIOR_WEIGHT) / (more + _PRIOR_WEIGHT)
        }
        for part in sorted(totals, key=len)[1:]:
            more, used, classes = totals[part]
            above = found[part[:-1]]
            if classes == totals[part[:-1]][2]:  # all of the parent: nothing new to learn
                found[part] = above
                continue
            found[part] = np.minimum(
                _MAX_HAZARD, (used + _LEAN_WEIGHT * above) / (more + _LEAN_WEIGHT)
            )
        return np.array([found[evidence] for evidence in self._numbers])


def _smooth(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spread counts over neighbouring bins, 1:2:1.

    The index takes the best of many noisy ratios, so noise alone makes a class look good.
    """
    padded = np.pad(counts, ((0, 0), (1, 1)), mode="edge")
    return (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4


def gittins(hazards: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the index at the start of every bin, in uses per millisecond.

    hazards [classes, BINS]: chance of a use inside a bin for what reached it. A use counts as
    happening halfway through its bin.
    """
    index = np.empty_like(hazards)
    for first in range(BINS):
        part = hazards[:, first:]
        unused = np.ones_like(part)
        np.cumprod(1 - part[:, :-1], axis=1, out=unused[:, 1:])
        used = np.cumsum(unused * part, axis=1)
        time = np.cumsum(unused * _WIDTHS[first:] * (1 - part / 2), axis=1)
        index[:, first] = (used / time).max(axis=1)
    return index
