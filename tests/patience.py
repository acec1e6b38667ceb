"""Waiting in tests for what other processes and threads do."""

import asyncio
import time
from collections.abc import Awaitable, Callable


async def until(true: Callable[[], bool | Awaitable[bool]], *, seconds: float = 10.0) -> None:
    """Return as soon as `true()` is; `TimeoutError` when that takes too long."""
    async with asyncio.timeout(seconds):
        while True:
            answer = true()
            if answer is True or (not isinstance(answer, bool) and await answer):
                return
            await asyncio.sleep(0.002)


def until_so(true: Callable[[], bool], *, seconds: float = 10.0) -> None:
    """Do the same without a loop; `TimeoutError` when that takes too long."""
    ends_s = time.monotonic() + seconds
    while not true():
        if time.monotonic() > ends_s:
            raise TimeoutError(f"not so after {seconds} s")
        time.sleep(0.01)
