"""How far the gaps between the uses of one thing tell its next gap. Learned online, pure.

Some things come back at a pace of their own (a tool loop each second, a reader each minute),
others at any time whatever came before. Let a gap be its bin on the logarithmic scale of `reuse`.
With gaps spread by `w` around a thing's own middle, and middles spread by `b` around that of all
things used as often, the best linear guess of the next gap after n gaps of mean `m` is

    all's middle + slope · (m - all's middle),   slope = b² / (b² + w² / n)

the shrinkage of empirical Bayes (Robbins 1956; James and Stein 1961). The slope is also that of the
regression of the next gap on the mean before, so it is counted and not assumed: where gaps tell
nothing it is 0, and this module changes nothing.
"""

from typing import Final

_LEAN_WEIGHT: Final = 10.0
"""Observations at which the slope counts half: ten pairs tell a slope to within a third."""
_MEMORY_WEIGHT: Final = 50_000.0
"""As in `reuse`: after so many observations the past is halved."""
_FLAT: Final = 1e-9
"""Below it means do not differ, and no slope can be told."""


class Rhythm:
    """Pairs (mean of the gaps so far, next gap), by how often the thing was used."""

    def __init__(self, classes: int) -> None:
        assert classes > 0
        self._sums = [[0.0] * 5 for _ in range(classes)]
        """By class: weight, and weighted mean, next gap, mean · mean, mean · next."""

    def learn(self, number: int, mean: float, gap: float, weight: float) -> None:
        """Count a thing of class `number` that came back after `gap`; all in bins."""
        sums = self._sums[number]
        for place, value in enumerate((1.0, mean, gap, mean * mean, mean * gap)):
            sums[place] += weight * value
        if sums[0] > _MEMORY_WEIGHT:
            self._sums[number] = [value / 2 for value in sums]

    def shift(self, number: int, mean: float) -> int:
        """Return by how many bins a thing with this mean is slower than others of its class."""
        weight, means, gaps, squares, products = self._sums[number]
        if not weight:
            return 0
        middle = means / weight
        variance = squares / weight - middle * middle
        if variance < _FLAT:
            return 0
        slope = (products / weight - middle * gaps / weight) / variance
        slope = min(1.0, max(0.0, slope)) * weight / (weight + _LEAN_WEIGHT)
        return round(slope * (mean - middle))
