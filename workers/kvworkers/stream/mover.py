"""Copies blocks between arena memory and pages, on a thread of its own.

While one sequence's blocks come in, the others go on computing: the copies release the GIL.
Copies run in slices, so that one long load does not keep a short one waiting for ever, and
a copy that was begun is always awaited to its end: nobody may reuse its places before.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, TypeVar

import torch
from kvkernels import ops
from kvkernels.movement import Movement
from torch import Tensor

from kvworkers.stream.forms import Forms
from kvworkers.stream.gate import Gate

SLICE_BYTES: Final = 64 << 20
"""Bytes moved in one go (DESIGN D2)."""

_T = TypeVar("_T")


def unheard() -> None:
    """Stand in for whoever wants to know when a load's copies are queued."""


class Mover:
    """Moves whole blocks; `pool` is uint8 [pages, block_bytes of `forms.pages`]."""

    def __init__(self, pool: Tensor, forms: Forms) -> None:
        self.forms = forms
        self._pool = pool
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mover")
        self._met_bytes = 0

    async def load(
        self,
        arena: memoryview,
        offsets: Sequence[int],
        pages: Sequence[int],
        *,
        alone: bool = False,
        raw: bool = False,
        queued: Callable[[], object] = unheard,
    ) -> None:
        """Copy arena blocks at `offsets` (bytes) into `pages`, decoding where forms differ.

        `alone`: no other request computes meanwhile, so the copy may take what it needs. `raw`:
        the arena has pages as they are, as `store` puts them there with it. `queued` is called
        once every load that is asked for from then on is copied behind this one.
        """
        for at, rows in self._slices(offsets, pages, raw=raw):
            await self._do(partial(self._load, arena, at, rows, raw))
        queued()

    async def load_groups(
        self, arena: memoryview, offsets: Sequence[int], pages: Sequence[int], gate: Gate
    ) -> None:
        """As `load`, group after group of layers; opens `gate` for each, ends it in any case."""
        try:
            movement = await self._do(partial(self._movement, arena, offsets, pages))
            for layers in gate.groups:
                for part in movement.slices(layers):
                    await self._do(partial(ops.load_layers, movement, layers, blocks=part))
                gate.come()
        finally:
            gate.end()

    async def store(
        self,
        pages: Sequence[int],
        arena: memoryview,
        offsets: Sequence[int],
        *,
        raw: bool = False,
    ) -> None:
        """Copy `pages` to the arena blocks at `offsets` (bytes), encoding where forms differ.

        `raw`: as they are, whatever the form of stored blocks is.
        """
        for at, rows in self._slices(offsets, pages, raw=raw):
            await self._do(partial(self._store, arena, at, rows, raw))

    @property
    def follows(self) -> bool:
        """Whether `load_groups` brings layers one after the other, so that a step may follow it."""
        return True

    @property
    def sees_all(self) -> bool:
        """Whether `finite` looks at all that a page holds: not at what other ranks have of it."""
        return True

    async def finite(self, pages: Sequence[int]) -> bool:
        """Say whether every element of `pages` is a number."""
        return await self._do(partial(self._finite, pages))

    @property
    def reachable_bytes(self) -> int:
        """Bytes of the arena met last that copies can use now."""
        return self._met_bytes

    def meet(self, arena: memoryview, descriptor: Callable[[], int] | None = None) -> None:
        """Make ready for a mapping that copies will use: what takes long begins now.

        `descriptor` gives that of the memory, for movers of several processes.
        """
        self._met_bytes = arena.nbytes

    def reachable(self, arena: memoryview, offsets: Sequence[int], *, raw: bool = False) -> int:
        """Return how many blocks, from the first on, lie where copies can go now: here all."""
        return len(offsets)

    def forget(self) -> None:
        """Let go of the arena's mapping: it is about to end, and no copy is running."""

    def close(self) -> None:
        """Let the copy in progress end and take no more."""
        self._thread.shutdown(wait=True)

    def _block_bytes(self, *, raw: bool) -> int:
        """Return the size of a block in the arena."""
        return (self.forms.pages if raw else self.forms.stored).block_bytes

    def _slices(
        self, offsets: Sequence[int], pages: Sequence[int], *, raw: bool
    ) -> list[tuple[Sequence[int], Sequence[int]]]:
        assert len(offsets) == len(pages)
        step = max(1, SLICE_BYTES // self._block_bytes(raw=raw))
        return [
            (offsets[at : at + step], pages[at : at + step]) for at in range(0, len(pages), step)
        ]

    def _movement(
        self, arena: memoryview, offsets: Sequence[int], pages: Sequence[int]
    ) -> Movement:
        return ops.plan_movement(
            torch.frombuffer(arena, dtype=torch.uint8),
            self.forms.stored,
            torch.tensor(offsets, dtype=torch.int64),
            self._pool,
            self.forms.pages,
            torch.tensor(pages, dtype=torch.int64),
            element=self.forms.element,
        )

    def _load(
        self, arena: memoryview, offsets: Sequence[int], pages: Sequence[int], raw: bool
    ) -> None:
        if self.forms.transcodes and not raw:
            ops.load_layers(self._movement(arena, offsets, pages))
            return
        memory = torch.frombuffer(arena, dtype=torch.uint8)
        ops.load_blocks(memory, torch.tensor(offsets), self._pool, torch.tensor(pages))

    def _store(
        self, arena: memoryview, offsets: Sequence[int], pages: Sequence[int], raw: bool
    ) -> None:
        if self.forms.transcodes and not raw:
            ops.store_layers(self._movement(arena, offsets, pages))
            return
        memory = torch.frombuffer(arena, dtype=torch.uint8)
        ops.store_blocks(self._pool, torch.tensor(pages), memory, torch.tensor(offsets))

    def _finite(self, pages: Sequence[int]) -> bool:
        size = self.forms.pages.payload_bytes  # what follows pads the block: nobody wrote it
        good = [self._pool[page, :size].view(self.forms.element).isfinite().all() for page in pages]
        return not good or bool(torch.stack(good).all())

    async def _do(self, work: Callable[[], _T]) -> _T:
        loop = asyncio.get_running_loop()
        return await to_the_end(loop.run_in_executor(self._thread, work))


async def to_the_end(job: "asyncio.Future[_T]") -> _T:
    """Await `job` even when cancelled: its thread is writing memory that others would get."""
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        if not job.done():
            await asyncio.wait([job])
        raise
