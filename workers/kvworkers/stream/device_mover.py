"""The mover of a CUDA device: asynchronous copies on streams of their own.

Loads and stores have a stream and threads each: the link carries both directions at once, and
a store never stands before a load. A copy counts as done when its event has completed, so whoever
awaits it may commit slots, check generations or let a step read the pages.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch
from torch import Tensor

from kvstore.core.errors import BadInput
from kvworkers.stream.mover import SLICE_BYTES, Mover
from kvworkers.stream.registration import Registration

_IN_FLIGHT: Final = 2
"""Slices of one job at a time: the next one is queued before the link falls idle."""

_Copy = Callable[[Tensor, Tensor], object]
"""(block of the arena, page)."""


class DeviceMover(Mover):
    """Moves whole blocks between a registered arena and `pool`, uint8 [pages, block_bytes]."""

    def __init__(self, pool: Tensor) -> None:
        super().__init__(pool)
        self._registration: Registration | None = None
        self._load = _Lane(pool, "load")
        self._store = _Lane(pool, "store")

    def reachable(self, arena: memoryview, offsets: Sequence[int]) -> int:
        """Return how many blocks, from the first on, lie in registered memory.

        The first call for a mapping begins its registration.
        """
        known = self._known(arena)
        ends = known.registered_bytes - self._block_bytes
        return next((at for at, offset in enumerate(offsets) if offset > ends), len(offsets))

    def registered(self, arena: memoryview, *, deadline_s: float) -> bool:
        """Wait until all of `arena` can be used; False when it cannot be at the deadline."""
        return self._known(arena).wait(deadline_s=deadline_s)

    async def load(self, arena: memoryview, offsets: Sequence[int], pages: Sequence[int]) -> None:
        """Copy arena blocks at `offsets` (bytes) into `pages`; `BadInput` for places outside."""
        self._check(arena, offsets, pages)
        await self._load.run(_copy_in, arena, offsets, pages)

    async def store(self, pages: Sequence[int], arena: memoryview, offsets: Sequence[int]) -> None:
        """Copy `pages` to the arena blocks at `offsets` (bytes); errors as `load`."""
        self._check(arena, offsets, pages)
        await self._store.run(_copy_out, arena, offsets, pages)

    def forget(self) -> None:
        """Unregister the arena: its mapping is about to end, and no copy is running."""
        if self._registration is not None:
            self._registration.close()
            self._registration = None

    def close(self) -> None:
        """Let the copies in progress end, take no more, and unregister."""
        self._load.close()
        self._store.close()
        self.forget()
        super().close()

    def _known(self, arena: memoryview) -> Registration:
        if self._registration is None or not self._registration.is_of(arena):
            # A new mapping: the keeper was replaced, and the old one's memory is gone or going.
            self.forget()
            self._registration = Registration(arena)
        return self._registration

    def _check(self, arena: memoryview, offsets: Sequence[int], pages: Sequence[int]) -> None:
        if len(offsets) != len(pages):
            raise BadInput(f"{len(offsets)} offsets for {len(pages)} pages")
        for name, values, last in (
            ("offsets", offsets, arena.nbytes - self._block_bytes),
            ("pages", pages, self._pool.shape[0] - 1),
        ):
            if values and not (min(values) >= 0 and max(values) <= last):
                raise BadInput(
                    f"{name} reach from {min(values)} to {max(values)}; [0, {last}] allowed"
                )


class _Lane:
    """One direction: a stream, and threads that queue slices on it and wait for their ends."""

    def __init__(self, pool: Tensor, name: str) -> None:
        self._pool = pool
        self._stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
        self._threads = ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix=f"mover-{name}")

    async def run(
        self, copy: _Copy, arena: memoryview, offsets: Sequence[int], pages: Sequence[int]
    ) -> None:
        """Copy slice by slice; when cancelled, what was begun is awaited to its end."""
        loop = asyncio.get_running_loop()
        step = max(1, SLICE_BYTES // self._pool.shape[1])
        jobs: deque[asyncio.Future[None]] = deque()
        try:
            for start in range(0, len(pages), step):
                if len(jobs) == _IN_FLIGHT:
                    await asyncio.shield(jobs[0])
                    jobs.popleft()
                at, rows = offsets[start : start + step], pages[start : start + step]
                jobs.append(loop.run_in_executor(self._threads, self._slice, copy, arena, at, rows))
            while jobs:
                await asyncio.shield(jobs[0])
                jobs.popleft()
        finally:
            if jobs:
                await asyncio.wait(jobs)

    def close(self) -> None:
        self._threads.shutdown(wait=True)

    def _slice(
        self, copy: _Copy, arena: memoryview, offsets: Sequence[int], pages: Sequence[int]
    ) -> None:
        memory, size = torch.frombuffer(arena, dtype=torch.uint8), self._pool.shape[1]
        with torch.cuda.device(self._pool.device), torch.cuda.stream(self._stream):
            for offset, page in zip(offsets, pages, strict=True):
                copy(memory[offset : offset + size], self._pool[page])
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record()
        done.synchronize()


def _copy_in(block: Tensor, page: Tensor) -> object:
    return page.copy_(block, non_blocking=True)


def _copy_out(block: Tensor, page: Tensor) -> object:
    return block.copy_(page, non_blocking=True)


def make_mover(pool: Tensor) -> Mover:
    """Return the mover for the device that holds `pool`."""
    return DeviceMover(pool) if pool.device.type == "cuda" else Mover(pool)
