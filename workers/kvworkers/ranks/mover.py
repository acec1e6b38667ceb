"""The mover of a worker of several ranks: each copies its part of the same blocks."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from torch import Tensor

from kvworkers.models.loading import LoadedModel
from kvworkers.models.sharding import Part
from kvworkers.ranks.lead import Lead
from kvworkers.stream.device_mover import make_mover
from kvworkers.stream.forms import Forms
from kvworkers.stream.gate import Gate
from kvworkers.stream.mover import Mover, to_the_end, unheard


class PartMover:
    """Copies one rank's part: its bytes of each block, whose place the others know it by."""

    def __init__(self, memory: Tensor, model: LoadedModel) -> None:
        self.mover = make_mover(memory, model.part_forms)
        self._shift = shift(model.part, model.forms)
        self._raw_shift = model.part.offset(model.forms.pages)

    async def move(
        self,
        arena: memoryview,
        offsets: Sequence[int],
        pages: Sequence[int],
        *,
        store: bool,
        alone: bool,
        raw: bool = False,
    ) -> None:
        """Copy the part of blocks at `offsets` from `pages` (`store`) or into them."""
        begin = self._raw_shift if raw else self._shift
        places = [offset + begin for offset in offsets]
        if store:
            await self.mover.store(pages, arena, places, raw=raw)
        else:
            await self.mover.load(arena, places, pages, alone=alone, raw=raw)


def shift(part: Part, forms: Forms) -> int:
    """Return where a rank's part begins in a block of the store."""
    return part.offset(forms.stored)


class RanksMover(Mover):
    """Rank 0's: a copy has happened when every rank's part of it has."""

    def __init__(self, memory: Tensor, model: LoadedModel, lead: Lead) -> None:
        super().__init__(memory, model.forms)
        self._own = PartMover(memory, model)
        self._lead = lead
        self._arena: memoryview | None = None
        self._descriptor: Callable[[], int] | None = None

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
        """Copy blocks at `offsets` into `pages` of every rank; `Unreachable` when one is lost.

        `queued` is called when it is done: nothing less says that every rank's later copies are.
        """
        await self._together(arena, offsets, pages, store=False, alone=alone, raw=raw)
        queued()

    async def load_groups(
        self, arena: memoryview, offsets: Sequence[int], pages: Sequence[int], gate: Gate
    ) -> None:
        """As `load`; the gate opens when all layers are there: ranks do not follow loads."""
        try:
            await self.load(arena, offsets, pages, alone=True)
            for _ in gate.groups:
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
        """Copy every rank's `pages` to its part of the blocks at `offsets`; errors as `load`."""
        await self._together(arena, offsets, pages, store=True, alone=False, raw=raw)

    @property
    def follows(self) -> bool:
        """No: a step that is begun early would keep the compute thread for the whole load."""
        return False

    @property
    def sees_all(self) -> bool:
        """No: the other ranks' parts are not here."""
        return False

    async def finite(self, pages: Sequence[int]) -> bool:
        """Say whether every element of rank 0's part of `pages` is a number."""
        return await self._own.mover.finite(pages)

    @property
    def reachable_bytes(self) -> int:
        """Bytes of the arena that copies of all ranks can use."""
        return min(self._own.mover.reachable_bytes, self._lead.reached_bytes)

    def meet(self, arena: memoryview, descriptor: Callable[[], int] | None = None) -> None:
        """Have all ranks map the arena; `descriptor` gives that of the newest one."""
        self._descriptor = descriptor or self._descriptor
        assert self._descriptor is not None, "ranks need a descriptor to map an arena"
        self._arena = arena
        self._own.mover.meet(arena)
        self._lead.map(self._descriptor())

    def reachable(self, arena: memoryview, offsets: Sequence[int], *, raw: bool = False) -> int:
        """Return how many blocks, from the first on, all ranks can copy."""
        if arena is not self._arena:
            self.meet(arena)  # The keeper was replaced, and its memory is another one.
        ends = self._lead.reached_bytes - self._block_bytes(raw=raw)
        known = next((at for at, offset in enumerate(offsets) if offset > ends), len(offsets))
        return min(known, self._own.mover.reachable(arena, offsets, raw=raw))

    def forget(self) -> None:
        """Let go of the arena's mapping here; the other ranks' ends with them."""
        self._own.mover.forget()

    def close(self) -> None:
        """Let the copy in progress end and take no more."""
        self._own.mover.close()
        super().close()

    async def _together(
        self,
        arena: memoryview,
        offsets: Sequence[int],
        pages: Sequence[int],
        *,
        store: bool,
        alone: bool,
        raw: bool,
    ) -> None:
        job = self._lead.move(store=store, alone=alone, raw=raw, offsets=offsets, pages=pages)
        theirs = asyncio.wrap_future(job)
        mine = self._own.move(arena, offsets, pages, store=store, alone=alone, raw=raw)
        await _both(mine, theirs)


async def _both(mine: Coroutine[Any, Any, None], theirs: "asyncio.Future[None]") -> None:
    """Await both to their ends, whatever becomes of either or of who waits."""
    try:
        await mine
    finally:
        await to_the_end(theirs)
