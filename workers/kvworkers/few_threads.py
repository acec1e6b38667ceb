"""Work that takes milliseconds, kept off an event loop and in few threads, however many ask."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from kvstore.core.errors import Refused

Made = TypeVar("Made")


class FewThreads:
    """Runs one kind of work. Its threads end with it."""

    def __init__(self, what: str, threads: int) -> None:
        """`what` is being done, as a refusal says it."""
        self._what = what
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=what)

    async def run(self, work: Callable[[], Made], *, within_s: float) -> Made:
        """Return what `work` makes; raises `Refused` when it is not done in time.

        What was begun goes on and keeps its thread; what was not is never begun.
        """
        try:
            async with asyncio.timeout(within_s):
                return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except TimeoutError:
            raise Refused(f"too much {self._what} at once", retry_after_ms=1_000) from None
