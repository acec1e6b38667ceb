"""Several replies of one request, side by side: one stream of chunks, each with its number.

first   ──placed──▶ prefill ──▶ first token ──▶ …
others      └─sent to the same worker───┴─fork─▶ …     the prompt is computed once, and they share
                                                       its pages
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final

from kvworkers.frontends.generation import Chunk
from kvworkers.frontends.pipeline import Pipeline
from kvworkers.frontends.running import Running

AT_ONCE: Final = 8
"""Replies of one request that run at the same time: others' requests want room as well."""
MAX_UNREAD: Final = 64
"""Chunks that wait for whoever reads them; then their replies wait, as a single one does."""

Numbered = tuple[int, Chunk]


async def side_by_side(
    pipeline: Pipeline, groups: Sequence[Sequence[Running]]
) -> AsyncGenerator[Numbered, None]:
    """Yield the chunks of every reply, numbered through the groups in order.

    A group has the replies to one prompt. What `Pipeline.run` raises for any of them ends them all;
    closing the generator does, too. Room for all that run at the same time is taken once and at the
    beginning: a request that was let in is not refused in the middle for others that came later.
    """
    if [len(group) for group in groups] == [1]:
        async with aclosing(pipeline.run(groups[0][0])) as chunks:
            async for chunk in chunks:
                yield 0, chunk
        return
    with pipeline.places(min(AT_ONCE, sum(len(group) for group in groups))) as places:
        async with aclosing(_numbered(_Together(pipeline, places), groups)) as numbered:
            async for one in numbered:
                yield one


async def _numbered(
    together: "_Together", groups: Sequence[Sequence[Running]]
) -> AsyncGenerator[Numbered, None]:
    """Yield the chunks of several replies, within the places that are held for them."""
    tasks: list[asyncio.Task[None]] = []
    try:
        for group in groups:
            worker: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            for place, running in enumerate(group):
                one = together.one(len(tasks), running, worker, first=place == 0)
                tasks.append(asyncio.create_task(one))
        running_still = len(tasks)
        while running_still:
            # Bounded by the replies' own deadlines: each ends with a last chunk or an error.
            came = await together.unread.get()
            if isinstance(came, Exception):
                raise came
            yield came
            running_still -= bool(came[1].finish_reason)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Together:
    """What the replies of one request share."""

    def __init__(self, pipeline: Pipeline, places: int) -> None:
        self._pipeline = pipeline
        self._slots = asyncio.Semaphore(places)
        self.unread: asyncio.Queue[Numbered | Exception] = asyncio.Queue(MAX_UNREAD)

    async def one(
        self, number: int, running: Running, worker: "asyncio.Future[str]", *, first: bool
    ) -> None:
        """Run one reply; `worker` becomes known when its group's first one is placed.

        Where two workers are to do that one: with its first token, and then it is nobody's.
        """

        def placed(name: str) -> None:
            if not worker.done():
                worker.set_result(name)

        try:
            if first:
                running.on_placed = placed
            else:
                running.prefer = frozenset(filter(None, [await asyncio.shield(worker)]))
            async with self._slots, aclosing(self._pipeline.run_placed(running)) as chunks:
                async for chunk in chunks:
                    if first:
                        # One that gives first tokens only answers none of them.
                        placed("" if running.handed_at else chunk.worker)
                    await self.unread.put((number, chunk))
        except Exception as error:  # task boundary: raised where the chunks are read
            await self.unread.put(error)
