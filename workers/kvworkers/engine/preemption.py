"""Who makes way when pages run out, and what of it has to be copied. Pure.

A victim's pages go to private slots of the arena and come back later, bit for bit. What the store
holds already is not copied again: it is found in the pages' cache or loaded from the store.
Where there is no place to copy to, the victim is computed anew from its tokens.

Victims are chosen by what their return will cost, in milliseconds, for each page that helps now.
The one with the smallest turn is never one: it gets what it needs from all others, and ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from kvstore.core.limits import BLOCK_TOKENS
from kvworkers.engine.rates import Rates
from kvworkers.engine.sequence import Sequence as Run

AHEAD_PAGES: Final = 2
"""Pages that a running request will want within its next 32 tokens: a victim that frees them too
is worth more than one that is followed by another at once."""


@dataclass(frozen=True, slots=True)
class Prices:
    """What bringing a victim back costs on this worker now."""

    rates: Rates = field(default_factory=Rates)
    """Measured times of computing; not measured yet, tokens stand for milliseconds."""
    block_ms: float | None = None
    """Of copying one block one way; None where victims cannot be swapped."""
    exact: bool = True
    """Whether the store gives blocks back as they were."""

    def of(self, run: Run) -> float:
        """Return what one victim costs; more each time that it was one before."""
        blocks = -(-run.computed // BLOCK_TOKENS)
        if self.block_ms is None:
            cost = self.rates.prefill_ms(run.computed, 0) or float(run.computed)
        else:
            settled = settled_blocks(run, exact=self.exact)
            # A settled block comes back over the same link, and does not go out.
            cost = self.block_ms * (2 * (blocks - settled) + settled)
        return cost * (1 + run.preemptions)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One that may make way."""

    turn: int
    """Its place in the order of arrival."""
    frees: int
    """Pages that nobody else holds."""
    cost_ms: float


def settled_blocks(run: Run, *, exact: bool) -> int:
    """Return how many leading blocks of a run need no copy: the store has them, or will soon.

    None of a request that is to read nothing, and none where the store keeps blocks less exactly.
    """
    if not exact or run.request.no_read:
        return 0
    return min(run.stored, run.full_blocks)


def choose(candidates: Sequence[Candidate], *, short: int, wanted: int) -> list[int]:
    """Return the turns of those who make way so that `short` pages become free, cheapest first.

    `wanted` is how many would be of use soon. Fewer come free where all candidates have no more.
    """
    assert 0 < short <= wanted
    left = [candidate for candidate in candidates if candidate.frees > 0]
    chosen: list[int] = []
    freed = 0
    while left and freed < short:
        useful = wanted - freed

        def price(candidate: Candidate, useful: int = useful) -> tuple[float, int]:
            # Equal costs: who came last goes first.
            return candidate.cost_ms / min(candidate.frees, useful), -candidate.turn

        best = min(left, key=price)
        left.remove(best)
        chosen.append(best.turn)
        freed += best.frees
    return chosen
