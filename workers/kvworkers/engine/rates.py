"""Measured rates of this worker, fitted online from its own steps. Pure.

Prefill seconds of n tokens from position p are modelled as
`linear * n + quadratic * n * (p + n / 2)`: the weights cost the same for every token,
attention grows with what it looks back on.

Older steps fade, so the fit follows the machine (a noisy neighbour, a clock change).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kvstore.core.limits import BLOCK_TOKENS
from kvstore.directory.events import LoadRate, TierKind

_FADE: Final = 0.98
"""Weight that a step loses with each later one: about 50 steps of memory."""
_SMOOTH: Final = 0.2
"""Weight of the newest decode step in the moving average."""


_FADE_LOAD: Final = 0.9
"""The same of a load: about ten of memory, as long as routers remember answers."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a router needs to predict; zeros until measured."""

    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    prefill_linear_s: float = 0.0
    prefill_quadratic_s: float = 0.0

    def prefill_ms(self, tokens: int, position: int) -> float:
        """Return the milliseconds to compute `tokens` from `position` on; 0 where not measured."""
        depth = position + tokens / 2
        return 1_000 * tokens * (self.prefill_linear_s + self.prefill_quadratic_s * depth)

    @property
    def depth_cost(self) -> float:
        """What a block costs more for each block before it, as a share of the first one's cost.

        0 where not measured; 2 at most, where only what is looked back on costs.
        """
        first = self.prefill_linear_s + self.prefill_quadratic_s * BLOCK_TOKENS / 2
        return BLOCK_TOKENS * self.prefill_quadratic_s / first if first > 0 else 0.0


class RateFit:
    """Weighted least squares over two features, both coefficients kept non-negative."""

    def __init__(self) -> None:
        self._xx = self._xz = self._zz = self._xy = self._zy = 0.0
        self._tokens = self._seconds = 0.0
        self._decode_tokens_per_s = 0.0

    def prefill(self, tokens: int, position: int, seconds: float) -> None:
        """Take in one step that was prefill only: `tokens` of one sequence from `position`."""
        assert tokens > 0 and position >= 0 and seconds >= 0
        x, z = float(tokens), tokens * (position + tokens / 2)
        # Relative errors: a short step must count as much as a long one.
        weight = 1.0 / (x * x)
        self._xx = self._xx * _FADE + weight * x * x
        self._xz = self._xz * _FADE + weight * x * z
        self._zz = self._zz * _FADE + weight * z * z
        self._xy = self._xy * _FADE + weight * x * seconds
        self._zy = self._zy * _FADE + weight * z * seconds
        self._tokens = self._tokens * _FADE + tokens
        self._seconds = self._seconds * _FADE + seconds

    def decode(self, sequences: int, seconds: float) -> None:
        """Take in one step that only decoded: one token for each of `sequences`."""
        assert sequences > 0
        if seconds <= 0:
            return
        rate = sequences / seconds
        old = self._decode_tokens_per_s
        self._decode_tokens_per_s = rate if old == 0 else old + _SMOOTH * (rate - old)

    def rates(self) -> Rates:
        """Return the fit as it stands."""
        linear, quadratic = self._solve()
        return Rates(
            prefill_tokens_per_s=self._tokens / self._seconds if self._seconds > 0 else 0.0,
            decode_tokens_per_s=self._decode_tokens_per_s,
            prefill_linear_s=linear,
            prefill_quadratic_s=quadratic,
        )

    def _solve(self) -> tuple[float, float]:
        if self._xx == 0:
            return 0.0, 0.0
        determinant = self._xx * self._zz - self._xz * self._xz
        if determinant > 1e-9 * self._xx * self._zz:
            linear = (self._xy * self._zz - self._zy * self._xz) / determinant
            quadratic = (self._zy * self._xx - self._xy * self._xz) / determinant
            if linear >= 0 and quadratic >= 0:
                return linear, quadratic
            if linear < 0:
                return 0.0, self._zy / self._zz
        # One feature explains everything seen so far (steps all alike), or noise made the
        # curvature negative: charge the tokens alone.
        return self._xy / self._xx, 0.0


class LoadFit:
    """Seconds a token by tier, over the last loads: long ones count for more."""

    def __init__(self) -> None:
        self._sums: dict[TierKind, tuple[float, float]] = {}

    def load(self, tokens: Mapping[TierKind, int], seconds: float) -> None:
        """Take in one prompt's load; one of several tiers tells nothing about either."""
        loaded = [tier for tier, count in tokens.items() if count > 0]
        if len(loaded) != 1 or seconds <= 0:
            return
        tier = loaded[0]
        count, spent_s = self._sums.get(tier, (0.0, 0.0))
        self._sums[tier] = count * _FADE_LOAD + tokens[tier], spent_s * _FADE_LOAD + seconds

    def rates(self) -> tuple[LoadRate, ...]:
        """Return the rates of all tiers measured, fastest tier first."""
        return tuple(
            LoadRate(tier, seconds / count) for tier, (count, seconds) in sorted(self._sums.items())
        )
