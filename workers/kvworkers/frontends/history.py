"""What a frontend served in the last hour, in steps: a ring of small sums."""

from collections import deque
from dataclasses import dataclass
from typing import Final

from kvstore.directory.events import TierKind
from kvworkers.frontends.ledger import Ledger

STEP_S: Final = 5.0
STEPS: Final = 720
"""One hour, about 200 kB."""


@dataclass(frozen=True, slots=True)
class Step:
    """What happened between two looks."""

    at_s: float
    """End of the step, in seconds since the epoch."""
    ended: int
    prompt_tokens: int
    by_tier: tuple[int, ...]
    """Cached tokens, in the order of `TierKind`."""
    ttft_ms: float | None
    """Mean of first tokens; None without any."""
    running: int
    waiting: int


class History:
    """Differences of a ledger's totals. Call `note` every `STEP_S`."""

    def __init__(self, ledger: Ledger, *, steps: int = STEPS) -> None:
        self._ledger = ledger
        self._steps: deque[Step] = deque(maxlen=steps)
        self._last = _sums(ledger)

    def note(self, at_s: float, *, running: int, waiting: int) -> None:
        """End a step now."""
        now, before = _sums(self._ledger), self._last
        self._last = now
        ended, prompt, ttft_ms, firsts, *tiers = (
            new - old for new, old in zip(now, before, strict=True)
        )
        self._steps.append(
            Step(
                at_s=at_s,
                ended=int(ended),
                prompt_tokens=int(prompt),
                by_tier=tuple(map(int, tiers)),
                ttft_ms=ttft_ms / firsts if firsts else None,
                running=running,
                waiting=waiting,
            )
        )

    def steps(self) -> list[Step]:
        """Return what is remembered, oldest first."""
        return list(self._steps)


def _sums(ledger: Ledger) -> tuple[float, ...]:
    totals = ledger.totals
    tiers = (totals.by_tier[tier] for tier in TierKind)
    return (totals.ended, totals.prompt_tokens, totals.ttft_ms, totals.first_tokens, *tiers)
