"""Which prefixes deserve another copy, before the workers that hold them are full. Pure.

Every request that goes on differently from the one before adds the seconds it keeps its worker busy
to the heat of its prefixes of 1, 2, 4, 8 … blocks; heat fades. (One conversation, however busy,
goes on as it did: two copies of it would only be in each other's way.) A prefix whose requests
keep its holders busier than `TARGET` is hot: the next request may be placed as if every worker
had it already, and the one that computes it becomes a holder. Holders count as soon as a request
is on its way to compute the prefix there, so copies are made one at a time.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from heapq import nlargest
from typing import Final, NamedTuple

from kvstore.core.names import BlockName

TARGET: Final = 0.5
"""Share of a worker that one prefix may use before it gets another copy. At this load a queue holds
as much work as is being done (1 / (1 - load) = 2); beyond it waits grow fast."""

FADE_MS: Final = 10_000.0
"""Time constant of the mean: a burst of less is cheaper to queue than to copy."""

FADE_REQUESTS: Final = 10
"""The same in requests, where those take long: no single one says that a prefix needs more workers
than the one that it is on."""

MAX_PREFIXES: Final = 16_384
"""Prefixes with a heat; those asked for longest ago are forgotten first. About 3 MB."""


class _Warm(NamedTuple):
    rate: float
    """Seconds of work a second, as of `at_ms`."""
    at_ms: float
    fade_ms: float
    blocks: int
    goes_on: BlockName
    """A later block of the last prompt, to tell whether the next one parts."""


class HotPrefix(NamedTuple):
    """A prefix, by the name of its last block."""

    name: BlockName
    blocks: int
    rate: float
    """Seconds of work a second that its requests ask for."""


class Heat:
    """Seconds of work a second, by prefix."""

    def __init__(self) -> None:
        self._heat: OrderedDict[BlockName, _Warm] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of prefixes remembered."""
        return len(self._heat)

    def add(self, names: Sequence[BlockName], busy_s: float, now_ms: float) -> None:
        """Note a request that keeps its worker busy for `busy_s`."""
        fade_ms = max(FADE_MS, FADE_REQUESTS * busy_s * 1_000)
        blocks = 1
        while blocks <= len(names):
            beyond = blocks + blocks // 4  # far enough that prompts have parted there
            if beyond < len(names):
                name = names[blocks - 1]
                known = self._heat.get(name)
                rate = _faded(known, now_ms) if known is not None else 0.0
                if known is not None and known.goes_on != names[beyond]:
                    rate += busy_s * 1_000 / fade_ms
                self._heat[name] = _Warm(rate, now_ms, fade_ms, blocks, names[beyond])
                self._heat.move_to_end(name)
            blocks *= 2
        while len(self._heat) > MAX_PREFIXES:
            self._heat.popitem(last=False)

    def hot_blocks(
        self, names: Sequence[BlockName], own_blocks: Sequence[int], now_ms: float
    ) -> int:
        """Return the longest prefix that deserves another copy, in blocks; 0 when none does.

        `own_blocks` are the leading blocks in each worker's own pages or being computed there.
        """
        blocks, hot = 1, 0
        while blocks <= len(names):
            known = self._heat.get(names[blocks - 1])
            if known is not None and known.rate > TARGET:
                rate = _faded(known, now_ms)
                holders = sum([own >= blocks for own in own_blocks])
                if 0 < holders < len(own_blocks) and rate > TARGET * holders:
                    hot = blocks
            blocks *= 2
        return hot

    def hottest(self, most: int, now_ms: float) -> list[HotPrefix]:
        """Return the hottest prefixes, hottest first; of several equally hot the longest first.

        Looks at every prefix remembered: about 10 ms where there are `MAX_PREFIXES`.
        """
        every = (
            HotPrefix(name, known.blocks, _faded(known, now_ms))
            for name, known in self._heat.items()
        )
        return nlargest(most, every, key=lambda one: (round(one.rate, 6), one.blocks))


def _faded(known: _Warm, now_ms: float) -> float:
    return known.rate * math.exp((known.at_ms - now_ms) / known.fade_ms)
