"""The mover of a CUDA device: asynchronous copies on streams of their own.

Loads and stores have a stream and a thread each: the link carries both directions at once, and
a store never stands before a load. A copy counts as done when its event has completed, so whoever
awaits it may commit slots, check generations or let a step read the pages.

Whole blocks of one form go by the copy engine where nobody else computes. Parts of blocks, blocks
that change on the way, and loads beside other requests go by kernels that read and write the
arena in place (DESIGN D2).
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

import torch
from kvkernels import ops
from kvkernels.movement import Movement
from torch import Tensor

from kvstore.core.errors import BadInput
from kvworkers.stream.forms import STORE_PROGRAMS, Forms
from kvworkers.stream.gate import Gate
from kvworkers.stream.mover import Mover, to_the_end, unheard
from kvworkers.stream.registration import Registration

_IN_FLIGHT: Final = 2
"""Slices of one job at a time: the next one is queued before the link falls idle."""

_FOLLOWED_BYTES: Final = 256 << 20
"""Bytes of a launch that brings layers for a lone request: 5 ms of the bus. *Measured* on an H100,
32k tokens: with launches of 64 MiB the first token came 2 ms later for fp8, 3 for int4, since each
waits for processors that the step is using."""

_LOADS_FIRST: Final = -1
"""Priority of the loads' stream: their kernels are few programs, and a step may be waiting."""

_T = TypeVar("_T")

_Slice = Callable[[], object]
"""Queues a part of a job on the current stream."""
_Queued = Callable[[Any], object]
"""Told the event behind a slice once it is queued."""


def _nobody(event: object) -> None:
    """Stand in for whoever wants to know that a slice was queued."""


class DeviceMover(Mover):
    """Moves whole blocks between a registered arena and `pool`, uint8 [pages, block_bytes]."""

    def __init__(self, pool: Tensor, forms: Forms) -> None:
        super().__init__(pool, forms)
        self._registration: Registration | None = None
        self._loads = _Lane(pool.device, "load", priority=_LOADS_FIRST)
        self._stores = _Lane(pool.device, "store", priority=0)
        self._plans = ThreadPoolExecutor(1, thread_name_prefix="mover-plan")

    @property
    def reachable_bytes(self) -> int:
        """Bytes that are registered now."""
        return 0 if self._registration is None else self._registration.registered_bytes

    def meet(self, arena: memoryview, descriptor: Callable[[], int] | None = None) -> None:
        """Begin to register: the first request is to find it done, or well under way."""
        self._known(arena)

    def reachable(self, arena: memoryview, offsets: Sequence[int], *, raw: bool = False) -> int:
        """Return how many blocks, from the first on, lie in registered memory.

        The first call for a mapping begins its registration.
        """
        known = self._known(arena)
        ends = known.registered_bytes - self._block_bytes(raw=raw)
        return next((at for at, offset in enumerate(offsets) if offset > ends), len(offsets))

    def registered(self, arena: memoryview, *, deadline_s: float) -> bool:
        """Wait until all of `arena` can be used; False when it cannot be at the deadline."""
        return self._known(arena).wait(deadline_s=deadline_s)

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
        """Copy arena blocks at `offsets` (bytes) into `pages`; `BadInput` for places outside."""
        self._check(arena, offsets, pages, raw=raw)
        forms = self.forms
        # Kernels take all blocks for stored ones: raw ones of another form go by the copy engine.
        by_engine = forms.transcodes if raw else alone and not forms.transcodes
        if by_engine:
            jobs = self._jobs(self._copy_in, arena, offsets, pages, raw=raw)
        else:
            movement = await self._planned(arena, offsets, pages)
            programs = forms.load_programs if alone else forms.beside_programs
            layers = range(forms.pages.layers)
            jobs = self._parts(movement, layers, list(movement.slices(layers)), programs)
        await self._loads.run(jobs, queued)

    async def load_groups(
        self, arena: memoryview, offsets: Sequence[int], pages: Sequence[int], gate: Gate
    ) -> None:
        """As `load`, group after group of layers; opens `gate` for each, ends it in any case."""
        try:
            self._check(arena, offsets, pages, raw=False)
            movement = await self._planned(arena, offsets, pages)
            await self._loads.run(self._grouped(movement, gate))
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
        """Copy `pages` to the arena blocks at `offsets` (bytes); errors as `load`."""
        self._check(arena, offsets, pages, raw=raw)
        queue = partial(self._store_there, raw)
        await self._stores.run(self._jobs(queue, arena, offsets, pages, raw=raw))

    async def finite(self, pages: Sequence[int]) -> bool:
        """Say whether every element of `pages` is a number."""
        return await self._do(partial(self._stores.there, partial(self._finite, pages)))

    def forget(self) -> None:
        """Unregister the arena: its mapping is about to end, and no copy is running."""
        if self._registration is not None:
            self._registration.close()
            self._registration = None

    def close(self) -> None:
        """Let the copies in progress end, take no more, and unregister."""
        self._plans.shutdown(wait=True)
        self._loads.close()
        self._stores.close()
        self.forget()
        super().close()

    def _jobs(
        self,
        queue: Callable[[memoryview, Sequence[int], Sequence[int]], None],
        arena: memoryview,
        offsets: Sequence[int],
        pages: Sequence[int],
        *,
        raw: bool,
    ) -> Iterator[tuple[_Slice, _Queued]]:
        for at, rows in self._slices(offsets, pages, raw=raw):
            yield partial(queue, arena, at, rows), _nobody

    async def _planned(
        self, arena: memoryview, offsets: Sequence[int], pages: Sequence[int]
    ) -> Movement:
        """Plan a load, which takes a millisecond or two, while the loads' thread awaits another."""
        plan = partial(self._loads.there, partial(self._movement, arena, offsets, pages))
        return await to_the_end(asyncio.get_running_loop().run_in_executor(self._plans, plan))

    def _grouped(self, movement: Movement, gate: Gate) -> Iterator[tuple[_Slice, _Queued]]:
        for layers in gate.groups:
            parts = list(movement.slices(layers, _FOLLOWED_BYTES))
            yield from self._parts(movement, layers, parts, self.forms.load_programs, gate.come)

    def _parts(
        self,
        movement: Movement,
        layers: range,
        parts: Sequence[range],
        programs: int,
        come: _Queued = _nobody,
    ) -> Iterator[tuple[_Slice, _Queued]]:
        """Yield a load of `layers`, some blocks after others; `come` is told of the last ones."""
        for part in parts:
            queue = partial(ops.load_layers, movement, layers, blocks=part, programs=programs)
            yield queue, come if part is parts[-1] else _nobody

    def _copy_in(self, arena: memoryview, offsets: Sequence[int], pages: Sequence[int]) -> None:
        for block, page in self._pairs(arena, offsets, pages):
            page.copy_(block, non_blocking=True)

    def _store_there(
        self, raw: bool, arena: memoryview, offsets: Sequence[int], pages: Sequence[int]
    ) -> None:
        if self.forms.transcodes and not raw:
            movement = self._movement(arena, offsets, pages)
            ops.store_layers(movement, programs=STORE_PROGRAMS)
            return
        for block, page in self._pairs(arena, offsets, pages):
            block.copy_(page, non_blocking=True)

    def _pairs(
        self, arena: memoryview, offsets: Sequence[int], pages: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        memory, size = torch.frombuffer(arena, dtype=torch.uint8), self._pool.shape[1]
        for offset, page in zip(offsets, pages, strict=True):
            yield memory[offset : offset + size], self._pool[page]

    def _known(self, arena: memoryview) -> Registration:
        if self._registration is None or not self._registration.is_of(arena):
            # A new mapping: the keeper was replaced, and the old one's memory is gone or going.
            self.forget()
            self._registration = Registration(arena)
        return self._registration

    def _check(
        self, arena: memoryview, offsets: Sequence[int], pages: Sequence[int], *, raw: bool
    ) -> None:
        if len(offsets) != len(pages):
            raise BadInput(f"{len(offsets)} offsets for {len(pages)} pages")
        for name, values, last in (
            ("offsets", offsets, arena.nbytes - self._block_bytes(raw=raw)),
            ("pages", pages, self._pool.shape[0] - 1),
        ):
            if values and not (min(values) >= 0 and max(values) <= last):
                raise BadInput(
                    f"{name} reach from {min(values)} to {max(values)}; [0, {last}] allowed"
                )


class _Lane:
    """One direction: a stream, and a thread that queues slices on it and waits for their ends.

    One thread, so that slices of a job are queued in their order; jobs take turns slice by slice.
    """

    def __init__(self, device: torch.device, name: str, *, priority: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"mover-{name}")

    async def run(
        self, slices: Iterable[tuple[_Slice, _Queued]], queued: Callable[[], object] = unheard
    ) -> None:
        """Queue slice by slice; when cancelled, what was begun is awaited to its end.

        `queued` is called when the thread has been given all of them: later jobs come behind.
        """
        jobs: deque[asyncio.Future[None]] = deque()
        before: list[Any] = []
        try:
            for queue, told in slices:
                if len(jobs) == _IN_FLIGHT:
                    await asyncio.shield(jobs[0])
                    jobs.popleft()
                jobs.append(self._begin(partial(self._slice, queue, told, before)))
            queued()
            while jobs:
                await asyncio.shield(jobs[0])
                jobs.popleft()
        finally:
            if jobs:
                await asyncio.wait(jobs)
            await to_the_end(self._begin(partial(_await, before)))

    def close(self) -> None:
        self._thread.submit(self._stream.synchronize)
        self._thread.shutdown(wait=True)

    def _begin(self, work: Callable[[], _T]) -> "asyncio.Future[_T]":
        return asyncio.get_running_loop().run_in_executor(self._thread, work)

    def there(self, work: Callable[[], _T]) -> _T:
        """Run `work` on the caller's thread with the stream as the current one."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            return work()

    def _slice(self, queue: _Slice, told: _Queued, before: list[Any]) -> None:
        """Queue one slice, then wait for the one before it: never more than two are under way."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            queue()
            done: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record()
        told(done)
        _await(before)
        before.append(done)


def _await(events: list[Any]) -> None:
    """Wait for the events of a job that nobody has waited for, and drop them."""
    while events:
        events.pop().synchronize()


def make_mover(pool: Tensor, forms: Forms) -> Mover:
    """Return the mover for the device that holds `pool`."""
    return DeviceMover(pool, forms) if pool.device.type == "cuda" else Mover(pool, forms)
