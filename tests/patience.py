"""Waiting in tests for what other processes and threads do.

A test must not depend on how fast or how evenly its machine runs. What is expected to come is given
`PATIENCE_S`, which only a defect uses up; what is expected to run out is given a limit of its own.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from kvstore.client.config import ClientConfig

PATIENCE_S: Final = 120.0
PATIENCE_MS: Final = 120_000

PATIENT: Final = ClientConfig(call_ms=PATIENCE_MS, connect_ms=PATIENCE_MS, transfer_ms=PATIENCE_MS)
"""A client for nodes that do answer: the defaults take one that is slow for absent."""


async def until(true: Callable[[], bool | Awaitable[bool]], *, seconds: float = PATIENCE_S) -> None:
    """Return as soon as `true()` is; `TimeoutError` when that takes too long."""
    async with asyncio.timeout(seconds):
        while True:
            answer = true()
            if answer is True or (not isinstance(answer, bool) and await answer):
                return
            await asyncio.sleep(0.002)


def until_so(true: Callable[[], bool], *, seconds: float = PATIENCE_S) -> None:
    """Do the same without a loop; `TimeoutError` when that takes too long."""
    ends_s = time.monotonic() + seconds
    while not true():
        if time.monotonic() > ends_s:
            raise TimeoutError(f"not so after {seconds} s")
        time.sleep(0.01)


class Hurried:
    """asyncio for a module whose pauses follow from deadlines that are patient here."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.02))
