"""Tells a worker when the blocks of a prompt are in the store, for whoever goes on elsewhere.

chunk ends ─▶ began ─▶ copy, Settle ─▶ ended        … for every chunk
run ends   ─▶ ended                                  all ended: settled
"""

import asyncio


class HandOver:
    """What is still to be stored of one run. One event loop's."""

    def __init__(self) -> None:
        self._open = 1  # the run itself: until it ends, more may come
        self._settled = asyncio.Event()

    def began(self) -> None:
        """Take note of blocks that are on their way into the store."""
        assert self._open, "it has ended"
        self._open += 1

    def ended(self) -> None:
        """Take note that blocks have come there, or will not; or that the run has ended."""
        assert self._open, "it has ended"
        self._open -= 1
        if not self._open:
            self._settled.set()

    async def settled(self, *, deadline_ms: float) -> bool:
        """Wait until nothing is on its way any more; False at the deadline."""
        try:
            async with asyncio.timeout(deadline_ms / 1_000):
                await self._settled.wait()
        except TimeoutError:
            return False
        return True
