"""Copies blocks between arena memory and pages, on a thread of its own.

While one sequence's blocks come in, the others go on computing: the copies release the GIL.
Copies run in slices, so that one long load does not keep a short one waiting for ever, and
a copy that was begun is always awaited to its end: nobody may reuse its places before.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch
from kvkernels import ops
from torch import Tensor

SLICE_BYTES: Final = 64 << 20
"""Bytes moved in one go (DESIGN D2)."""

Copy = Callable[[Tensor, Tensor, Tensor], None]


class Mover:
    """Moves whole blocks; `pool` is uint8 [pages, block_bytes]."""

    def __init__(self, pool: Tensor) -> None:
        self._pool = pool
        self._block_bytes = pool.shape[1]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mover")

    async def load(self, arena: memoryview, offsets: Sequence[int], pages: Sequence[int]) -> None:
        """Copy arena blocks at `offsets` (bytes) into `pages`."""

        def copy(memory: Tensor, at: Tensor, rows: Tensor) -> None:
            ops.load_blocks(memory, at, self._pool, rows)

        await self._run(copy, arena, offsets, pages)

    async def store(self, pages: Sequence[int], arena: memoryview, offsets: Sequence[int]) -> None:
        """Copy `pages` to the arena blocks at `offsets` (bytes)."""

        def copy(memory: Tensor, at: Tensor, rows: Tensor) -> None:
            ops.store_blocks(self._pool, rows, memory, at)

        await self._run(copy, arena, offsets, pages)

    def reachable(self, arena: memoryview, offsets: Sequence[int]) -> int:
        """Return how many blocks, from the first on, lie where copies can go now: here all."""
        return len(offsets)

    def forget(self) -> None:
        """Let go of the arena's mapping: it is about to end, and no copy is running."""

    def close(self) -> None:
        """Let the copy in progress end and take no more."""
        self._thread.shutdown(wait=True)

    async def _run(
        self, copy: Copy, arena: memoryview, offsets: Sequence[int], pages: Sequence[int]
    ) -> None:
        assert len(offsets) == len(pages)
        loop = asyncio.get_running_loop()
        step = max(1, SLICE_BYTES // self._block_bytes)
        for start in range(0, len(pages), step):
            at, rows = offsets[start : start + step], pages[start : start + step]
            job = loop.run_in_executor(self._thread, _copy, copy, arena, at, rows)
            await _to_the_end(job)


def _copy(copy: Copy, arena: memoryview, offsets: Sequence[int], pages: Sequence[int]) -> None:
    memory = torch.frombuffer(arena, dtype=torch.uint8)
    copy(
        memory,
        torch.tensor(offsets, dtype=torch.int64),
        torch.tensor(pages, dtype=torch.int64),
    )


async def _to_the_end(job: "asyncio.Future[None]") -> None:
    """Await `job` even when cancelled: its thread is writing memory that others would get."""
    try:
        await asyncio.shield(job)
    except asyncio.CancelledError:
        if not job.done():
            await asyncio.wait([job])
        raise
