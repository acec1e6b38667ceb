"""How much of a load's time other requests compute through."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from time import monotonic

from kvstore.core.errors import Corrupt
from kvworkers.bench.rig import Rig
from kvworkers.engine.output import FirstTokens

_WINDOW_S = {"cuda": 0.3, "cpu": 3.0}
"""One look at the others: a whole load and its step fit into it."""
_STEPS_PER_S = {"cuda": 250, "cpu": 60}
"""More than any decode of such models makes: so long the others' replies have to be."""
_BEGUN_S = 60.0
"""For the others' first tokens: one that failed would be waited for without an end."""


@dataclass(frozen=True, slots=True)
class Window:
    """What the others got beside one request."""

    seconds: float
    tokens: int
    pace: float
    """Tokens a second that they get alone."""

    @property
    def lost_s(self) -> float:
        """Return how much of their time they lost."""
        return self.seconds - self.tokens / self.pace


def hidden(loads: Sequence[Window], hits: Sequence[Window], loading_s: float) -> float:
    """Return the share of `loading_s` that cost the others nothing that hits do not cost. Pure."""
    lost = sum(window.lost_s for window in loads) - sum(window.lost_s for window in hits)
    return 1 - lost / loading_s


async def hidden_share(
    rig: Rig, prefix: list[int], fresh: Callable[[int], list[int]], *, others: int, runs: int
) -> float:
    """Return the share of a load of `prefix` that did not hold up `others` that decode meanwhile.

    Rounds of three equal windows: the others alone, beside a request that loads `prefix`, beside
    one that finds it in HBM. What they lose in the second more than in the third, in seconds
    of their own pace, is what of the load was not hidden.
    """
    loads, hits, loading_s = list[Window](), list[Window](), 0.0
    kind = rig.model.device.type
    window = _WINDOW_S[kind]
    steps = int((3 * runs + 2) * window * _STEPS_PER_S[kind])
    async with _decoding(rig, fresh, others, out=steps) as tokens:
        for _ in range(runs):
            pace = await _window(tokens, window) / window
            await rig.empty_pages(others=others)
            if not pace:
                raise Corrupt("the others got no token while they were alone")
            seen, first = await _beside(rig, prefix + fresh(256), tokens, pace, window)
            if not first.cache.loaded_tokens:
                raise Corrupt(f"a prompt was to come from the arena: {first.cache}")
            loads.append(seen)
            loading_s += first.load_ms / 1000
            seen, first = await _beside(rig, prefix + fresh(256), tokens, pace, window)
            if first.cache.hbm_tokens < len(prefix):
                raise Corrupt(f"a prompt was to come from HBM: {first.cache}")
            hits.append(seen)
    return hidden(loads, hits, loading_s)


@contextlib.asynccontextmanager
async def _decoding(
    rig: Rig, fresh: Callable[[int], list[int]], others: int, *, out: int
) -> AsyncIterator[Callable[[], int]]:
    """Keep `others` requests decoding `out` tokens; yields what counts their tokens so far."""
    counts, first = [0] * others, [asyncio.Event() for _ in range(others)]

    async def one(index: int) -> None:
        async with rig.stream(fresh(256), out=out) as outputs:
            async for output in outputs:
                counts[index] += len(output.tokens)
                first[index].set()

    tasks = [asyncio.create_task(one(index)) for index in range(others)]
    try:
        async with asyncio.timeout(_BEGUN_S):
            await asyncio.gather(*(event.wait() for event in first))
        yield lambda: sum(counts)
        if any(task.done() for task in tasks):
            raise Corrupt("the others ended before the last window")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _window(tokens: Callable[[], int], seconds: float) -> int:
    before = tokens()
    await asyncio.sleep(seconds)
    return tokens() - before


async def _beside(
    rig: Rig, prompt: list[int], tokens: Callable[[], int], pace: float, window: float
) -> tuple[Window, FirstTokens]:
    """Return what the others got beside `prompt`, and how it was served."""
    began, before = monotonic(), tokens()
    reply = await rig.ask(prompt)
    await asyncio.sleep(max(0.0, window - (monotonic() - began)))
    return Window(monotonic() - began, tokens() - before, pace), reply.first
