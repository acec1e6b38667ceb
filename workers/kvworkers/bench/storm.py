"""More requests than there are pages for: what making way costs."""

import asyncio
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from kvstore.core.errors import Corrupt, Unreachable
from kvstore.core.limits import BLOCK_TOKENS
from kvworkers.bench.rig import Rig

SHORT: Final = 8
"""Tokens of the replies before, from which the worker expects short ones."""
_LEARNED_FROM: Final = 4
_ROOM: Final = 0.6
"""Pages, as a share of what all requests become."""


@dataclass(frozen=True, slots=True)
class Storm:
    """What a number of requests at once got."""

    tokens_per_s: float
    tpot_ms: float
    """Median over replies of the time per token after the first, waits included."""
    preemptions: int
    recomputed: int
    """Those of them that had nowhere to be copied to."""
    swapped_bytes: float
    """Copied out."""


async def storm(rig: Rig, prompts: Sequence[list[int]], *, out: int) -> tuple[Storm, Storm]:
    """Run the prompts at once with too few pages, and with enough; nothing of them is kept.

    Raises `Corrupt` when a reply is cut short, or when nobody had to make way.
    """
    needed = [-(-(len(prompt) + out - 1) // BLOCK_TOKENS) for prompt in prompts]
    if sum(needed) > rig.pool.available:
        raise Corrupt(f"{sum(needed)} pages are to be enough; {rig.pool.available} are there")
    for _ in range(_LEARNED_FROM):
        await rig.ask([1] * 17, out=SHORT, no_read=True, no_store=True)
    with _few_pages(rig, max(*needed, int(_ROOM * sum(needed)))):
        busy = await _at_once(rig, prompts, out)
    if not busy.preemptions:
        raise Corrupt("nobody had to make way")
    # Afterwards: it would expect long replies, and let fewer run at once.
    return busy, await _at_once(rig, prompts, out)


@contextmanager
def _few_pages(rig: Rig, pages: int) -> Iterator[None]:
    """Hold all pages but so many."""
    held = rig.pool.allocate(rig.pool.available - pages, now_ms=time.monotonic() * 1000)
    if held is None:
        raise Unreachable("pages went away while they were counted")
    try:
        yield
    finally:
        rig.pool.release(held, now_ms=time.monotonic() * 1000)


async def _at_once(rig: Rig, prompts: Sequence[list[int]], out: int) -> Storm:
    before = _counts(rig)
    began = time.monotonic()
    tpots = await asyncio.gather(*(_tpot_ms(rig, prompt, out) for prompt in prompts))
    seconds = time.monotonic() - began
    await rig.stored()
    swaps, recomputed, swapped = (b - a for a, b in zip(before, _counts(rig), strict=True))
    return Storm(
        tokens_per_s=len(prompts) * out / seconds,
        tpot_ms=statistics.median(tpots),
        preemptions=int(swaps + recomputed),
        recomputed=int(recomputed),
        swapped_bytes=swapped,
    )


async def _tpot_ms(rig: Rig, prompt: list[int], out: int) -> float:
    got, first, last = 0, 0.0, 0.0
    async with rig.stream(prompt, out=out, no_read=True, no_store=True) as outputs:
        async for output in outputs:
            got += len(output.tokens)
            last = time.monotonic()
            first = first or last
    if got != out:
        raise Corrupt(f"a reply has {got} tokens, {out} were asked for")
    return (last - first) / max(1, out - 1) * 1e3


def _counts(rig: Rig) -> tuple[float, float, float]:
    made = "kvstore_worker_preemptions_total"
    return (
        rig.metric(made, kind="swap"),
        rig.metric(made, kind="recompute"),
        rig.metric("kvstore_worker_moved_bytes_total", direction="swap_out"),
    )
