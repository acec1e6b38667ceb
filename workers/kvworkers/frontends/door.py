"""Whether a frontend takes new requests, and how many are inside: what draining one needs.

A request is inside from the moment it is let in until its last byte is sent, however it ends.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from kvstore.core.errors import Refused
from kvstore.observe.metrics import RouterMetrics

RETRY_AFTER_MS: Final = 2_000
"""What who comes too late is told: another frontend takes it at once, this one after a restart."""


class Draining(Refused):
    """This frontend is about to end; on HTTP that is a 503, so that clients ask another one."""


class Door:
    """One frontend's. Belongs to one event loop."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self.closed = False

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Count a request for the length of a block; raises `Draining` once the door is closed."""
        if self.closed:
            self._metrics.requests.labels(outcome=Draining.__name__).inc()
            raise Draining("this frontend is ending: ask another one, or later", RETRY_AFTER_MS)
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    def close(self) -> None:
        """Let nobody in any more."""
        self.closed = True

    async def emptied(self, wait_ms: float) -> bool:
        """Wait until nobody is inside, so long at most; says whether it came to that."""
        try:
            async with asyncio.timeout(wait_ms / 1_000):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True
