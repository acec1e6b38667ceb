"""The worker's way to its cache node: loads before a prefill, stores after it.

    load:   Acquire ─▶ copy ready slots into pages ─▶ still the same? ─▶ wait for pending …
    store:  copy full pages into reserved slots ─▶ ONE Settle (commit, release)     background

A cache never fails a request that could be recomputed: every fault here is counted and turned
into a miss. A call that fails opens the circuit: for `circuit_ms` the store is not asked, so that
a dead node costs one deadline and not one per request.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from kvstore.client import AsyncClient, SlotRef
from kvstore.core.errors import BadInput, KvStoreError, Refused, SessionLost, Unreachable
from kvstore.core.names import BlockName
from kvstore.core.outcomes import MissReason
from kvstore.observe.metrics import WorkerMetrics
from kvworkers.engine.loader import Ask, Loader, LoadResult
from kvworkers.engine.swap import SwapSpace
from kvworkers.stream.gate import Follower
from kvworkers.stream.mover import Mover

_log = logging.getLogger(__name__)

MAX_OWED: Final = 8_192
"""Reserved slots that still have to be given back; more is a node that is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """How long the worker waits for its cache node, in milliseconds."""

    call_ms: int = 250
    """`Acquire` and `Settle`: answered from memory."""
    pending_ms: int = 1_000
    """Blocks on their way from below: how long they may take at most before recomputing."""
    circuit_ms: int = 1_000
    """How long the store is left alone after a call failed."""
    max_jobs: int = 64
    """Stores waiting in the background; each holds its pages. More are dropped."""
    grouped_bytes: int = 16 << 20
    """Loads of so many bytes and more come in groups of layers, and a step may follow them."""
    swap_bytes: int | None = None
    """Bytes of the arena that requests which made way may take; None: as the node allows."""

    def __post_init__(self) -> None:
        for name in ("call_ms", "pending_ms", "circuit_ms", "max_jobs", "grouped_bytes"):
            if getattr(self, name) <= 0:
                raise BadInput(f"store {name} must be positive, got {getattr(self, name)}")
        if self.swap_bytes is not None and self.swap_bytes < 0:
            raise BadInput(f"store swap_bytes must not be negative, got {self.swap_bytes}")


@dataclass(frozen=True, slots=True)
class StoreJob:
    """Work for the background: write pages into slots and settle.

    `done` is called on the event loop exactly once, when `pages` are not read any more.
    """

    done: Callable[[], None]
    writes: Sequence[tuple[int, SlotRef]] = ()
    """(page, reserved slot)."""
    aborts: Sequence[SlotRef] = ()
    leases: Sequence[int] = ()
    kept: Sequence[SlotRef] = ()
    names: Sequence[BlockName] = ()
    """Blocks without slots yet: an Acquire reserves some; `pages[i]` holds `names[i]`."""
    pages: Sequence[int] = ()
    first_block: int = 0
    checked: bool = False
    """Whether to look for what is no number first: of pages whose step chose no token."""


class StoreLink:
    """One worker's use of one client. All methods belong to one event loop."""

    def __init__(
        self,
        client: AsyncClient,
        mover: Mover,
        metrics: WorkerMetrics,
        *,
        config: StoreConfig,
    ) -> None:
        self._client = client
        self._mover = mover
        self._metrics = metrics
        self._block_bytes = mover.forms.stored.block_bytes
        self._config = config
        self._open_until = 0.0
        self._loader = Loader(
            client,
            mover,
            metrics,
            call_ms=config.call_ms,
            pending_ms=config.pending_ms,
            grouped_bytes=config.grouped_bytes,
            failed=self._failed,
        )
        self.swap = SwapSpace(
            client,
            mover,
            metrics,
            most_bytes=config.swap_bytes,
            call_ms=config.call_ms,
            failed=self._failed,
            give_up=self._give_up,
        )
        """Where pages of requests go that make way."""
        self._owed: list[SlotRef] = []
        self._sweeps: set[asyncio.Task[None]] = set()
        self._jobs: asyncio.Queue[StoreJob] = asyncio.Queue(config.max_jobs)
        self._loop = asyncio.get_running_loop()
        self._worker = self._loop.create_task(self._work(), name="store-jobs")

    @property
    def usable(self) -> bool:
        """Whether asking makes sense at this moment."""
        return self._loop.time() >= self._open_until

    @property
    def sees_all(self) -> bool:
        """Whether jobs that are to be `checked` can be: `Mover.sees_all`."""
        return self._mover.sees_all

    @property
    def exact(self) -> bool:
        """Whether blocks come back as they were given."""
        return not self._mover.forms.transcodes

    def release(self, leases: Sequence[int]) -> None:
        """End leases in the background."""
        if leases:
            self.submit(StoreJob(done=_nothing, leases=leases))

    def _give_up(self, slots: Sequence[SlotRef]) -> None:
        if slots:
            self.submit(StoreJob(done=_nothing, aborts=slots))

    async def load(self, ask: Ask, follower: Follower | None = None) -> LoadResult:
        """Load the longest cached prefix of a prompt: `Loader.load`."""
        return await self._loader.load(ask, follower)

    def count_unexpected(self, call: str) -> None:
        """Count a failure that is a bug, not the store's."""
        self._metrics.store_failures.labels(call, "unexpected").inc()

    def submit(self, job: StoreJob) -> None:
        """Do `job` in the background; when there are too many already it is dropped, counted."""
        try:
            self._jobs.put_nowait(job)
        except asyncio.QueueFull:
            self._metrics.store_failures.labels("store", "queue_full").inc()
            self._owe([*(slot for _, slot in job.writes), *job.aborts])
            job.done()

    async def drained(self, *, deadline_ms: int) -> bool:
        """Wait until no job is left; False at the deadline."""
        try:
            async with asyncio.timeout(deadline_ms / 1000):
                await self._jobs.join()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Stop the background work; jobs left are dropped and their pages given back."""
        self._worker.cancel()
        await asyncio.gather(self._worker, *self._sweeps, return_exceptions=True)
        while not self._jobs.empty():
            self._jobs.get_nowait().done()

    async def _work(self) -> None:
        while True:
            job = await self._next_job()
            try:
                await self._carry_out(job)
            except KvStoreError as error:
                self._failed("settle", error)
            except Exception:  # task boundary: later jobs must still run
                _log.exception("a store job failed")
                self.count_unexpected("store")
            finally:
                job.done()
                self._jobs.task_done()

    async def _next_job(self) -> StoreJob:
        """Return the next job; while slots are owed, an empty one once the circuit is closed."""
        if not self._owed:
            return await self._jobs.get()
        try:
            async with asyncio.timeout(self._config.circuit_ms / 1000):
                return await self._jobs.get()
        except TimeoutError:
            if self._jobs.empty():
                self._jobs.put_nowait(StoreJob(done=_nothing))
            return await self._jobs.get()

    async def _carry_out(self, job: StoreJob) -> None:
        writes, leases = list(job.writes), list(job.leases)
        reserved = [slot for _, slot in writes] + list(job.aborts)
        if not self.usable:
            self._owe(reserved)
            return
        try:
            if job.names:
                got = await self._client.acquire(
                    job.names,
                    reserve=len(job.names),
                    deadline_ms=self._config.call_ms,
                    first_block=job.first_block,
                )
                leases += [got.lease] if got.lease else []
                writes += [(job.pages[entry.index], entry.slot) for entry in got.reserved]
                reserved += [entry.slot for entry in got.reserved]
            kept, left = self._reached(writes)
            if job.checked and not await self._mover.finite([page for page, _ in kept]):
                self._metrics.store_failures.labels("store", "not_finite").inc()
                kept, left = [], [slot for _, slot in writes]
            await self._write(kept)
        except BaseException:
            self._owe(reserved)
            raise
        await self._settle(kept, [*job.aborts, *left], leases, job.kept)

    def _reached(
        self, writes: Sequence[tuple[int, SlotRef]]
    ) -> tuple[list[tuple[int, SlotRef]], list[SlotRef]]:
        """Part writes into those that the mover can do now and slots to be given back."""
        kept: list[tuple[int, SlotRef]] = []
        left: list[SlotRef] = []
        arena = self._arena(writes[0][1]) if writes else memoryview(b"")
        for page, slot in writes:
            if self._mover.reachable(arena, [slot.offset]):
                kept.append((page, slot))
            else:
                left.append(slot)
        return kept, left

    def _arena(self, ref: SlotRef) -> memoryview:
        """Return the arena's memory; raises `SessionLost` for a slot of an earlier arena."""
        self._client.view(ref)
        return self._client.arena

    async def _write(self, writes: Sequence[tuple[int, SlotRef]]) -> None:
        if not writes:
            return
        began = self._loop.time()
        await self._mover.store(
            [page for page, _ in writes],
            self._arena(writes[0][1]),
            [slot.offset for _, slot in writes],
        )
        self._metrics.move_seconds.labels("store").observe(self._loop.time() - began)
        self._metrics.moved_bytes.labels("store").inc(len(writes) * self._block_bytes)

    async def _settle(
        self,
        writes: Sequence[tuple[int, SlotRef]],
        aborts: Sequence[SlotRef],
        leases: Sequence[int],
        kept: Sequence[SlotRef],
    ) -> None:
        owed, self._owed = self._owed, []
        if not (writes or aborts or leases or kept or owed):
            return
        # After a failure the client gives unsettled slots back by itself.
        await self._client.settle(
            commit=[slot for _, slot in writes],
            abort=[*aborts, *owed],
            release=leases,
            kept_in_hbm=kept,
            deadline_ms=self._config.call_ms,
        )

    def _owe(self, slots: Sequence[SlotRef]) -> None:
        """Remember slots to abort with the next settling that works."""
        room = MAX_OWED - len(self._owed)
        self._owed.extend(slots[:room])
        if len(slots) > room:
            self._metrics.store_failures.labels("settle", "owed_dropped").inc(len(slots) - room)
            sweep = self._loop.create_task(self._leave_to_sweep(slots[room:]))
            self._sweeps.add(sweep)
            sweep.add_done_callback(self._sweeps.discard)

    async def _leave_to_sweep(self, slots: Sequence[SlotRef]) -> None:
        """Have the client let go of slots, so that the node's sweep takes those nobody knows of."""
        with suppress(KvStoreError):
            await self._client.settle(abort=slots, deadline_ms=self._config.call_ms)

    def _failed(self, call: str, error: KvStoreError) -> MissReason:
        self._metrics.store_failures.labels(call, type(error).__name__).inc()
        if isinstance(error, Refused):
            return MissReason.REFUSED
        known = isinstance(error, Unreachable | SessionLost)
        _log.log(logging.WARNING if known else logging.ERROR, "%s failed: %s", call, error)
        self._open_until = self._loop.time() + self._config.circuit_ms / 1000
        return MissReason.UNREACHABLE


def _nothing() -> None:
    """Stand in for `done` of a job without pages."""
