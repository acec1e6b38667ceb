"""The worker's way to its cache node: loads before a prefill, stores after it.

    load:   Acquire ─▶ copy ready slots into pages ─▶ still the same? ─▶ wait for pending …
    store:  copy full pages into reserved slots ─▶ ONE Settle (commit, release)     background

A cache never fails a request that could be recomputed: every fault here is counted and turned
into a miss. A call that fails opens the circuit: for `circuit_ms` the store is not asked, so that
a dead node costs one deadline and not one per request.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvstore.client import AsyncClient, SlotRef
from kvstore.core.errors import BadInput, KvStoreError, Refused, SessionLost, Unreachable
from kvstore.core.names import BlockName
from kvstore.core.outcomes import MissReason
from kvstore.directory.events import TierKind
from kvstore.observe.metrics import WorkerMetrics
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

    def __post_init__(self) -> None:
        for name in ("call_ms", "pending_ms", "circuit_ms", "max_jobs"):
            if getattr(self, name) <= 0:
                raise BadInput(f"store {name} must be positive, got {getattr(self, name)}")


@dataclass(slots=True)
class LoadResult:
    """What the store gave for one prompt."""

    tiers: dict[TierKind, int] = field(default_factory=dict)
    """Blocks loaded, by where they came from."""
    reason: MissReason = MissReason.ABSENT
    """Why there were no more."""
    found: int = 0
    """Leading blocks that the store holds, loaded or not: they need no storing."""
    lease: int = 0
    """To be released with the settling; 0: none."""
    kept: list[SlotRef] = field(default_factory=list)
    """Slots that were loaded: the worker lists these blocks now."""
    reserved: dict[int, SlotRef] = field(default_factory=dict)
    """Block of the prompt → slot to be written with it."""

    @property
    def blocks(self) -> int:
        """Blocks loaded."""
        return sum(self.tiers.values())


@dataclass(frozen=True, slots=True)
class StoreJob:
    """Work for the background: write pages into slots and settle.

    `done` is called on the event loop exactly once, when `pages` are not read any more.
    """

    done: Callable[[], None]
    writes: Sequence[tuple[int, SlotRef]] = ()
    """(page, reserved slot)."""
    aborts: Sequence[SlotRef] = ()
    lease: int = 0
    kept: Sequence[SlotRef] = ()
    names: Sequence[BlockName] = ()
    """Blocks without slots yet: an Acquire reserves some; `pages[i]` holds `names[i]`."""
    pages: Sequence[int] = ()
    first_block: int = 0


class StoreLink:
    """One worker's use of one client. All methods belong to one event loop."""

    def __init__(
        self,
        client: AsyncClient,
        mover: Mover,
        metrics: WorkerMetrics,
        *,
        block_bytes: int,
        config: StoreConfig,
    ) -> None:
        self._client = client
        self._mover = mover
        self._metrics = metrics
        self._block_bytes = block_bytes
        self._config = config
        self._open_until = 0.0
        self._owed: list[SlotRef] = []
        self._jobs: asyncio.Queue[StoreJob] = asyncio.Queue(config.max_jobs)
        self._loop = asyncio.get_running_loop()
        self._worker = self._loop.create_task(self._work(), name="store-jobs")

    @property
    def usable(self) -> bool:
        """Whether asking makes sense at this moment."""
        return self._loop.time() >= self._open_until

    async def load(
        self, names: Sequence[BlockName], pages: Sequence[int], *, usable: int, first_block: int,
        reserve: int, recompute_ms: float = 0.0, kind: str = "", depth_cost: float = 0.0,
    ) -> LoadResult:  # fmt: skip
        """Copy the longest cached prefix of `names` into `pages`, at most `usable` blocks.

        `recompute_ms` is what computing them is predicted to take (0: unknown): blocks below DRAM
        that would take longer to come stay there. Never raises for a fault of the store; blocks
        beyond the answer's `blocks` are rubbish.
        """
        result = LoadResult()
        patience_ms = self._patience_ms(recompute_ms)
        try:
            got = await self._client.acquire(
                names,
                reserve=reserve,
                deadline_ms=self._config.call_ms,
                pending_ms=patience_ms,
                first_block=first_block,
                kind=kind,
                depth_cost=depth_cost,
            )
        except KvStoreError as error:
            result.reason = self._failed("acquire", error)
            return result
        result.lease, result.reason = got.lease, got.reason
        result.found = len(got.ready) + len(got.pending)
        result.reserved = {first_block + entry.index: entry.slot for entry in got.reserved}
        try:
            good = await self._take(got.ready[:usable], pages)
            result.kept = list(got.ready[:good])
            wanted = got.pending[: max(0, usable - len(got.ready))]
            if good == len(got.ready) and wanted:
                arrived = await self._client.wait_ready(wanted, deadline_ms=patience_ms)
                more = await self._take(wanted[:arrived], pages[good:])
                result.kept += wanted[:more]
                if more < len(wanted):
                    result.reason = MissReason.LATE
            elif good < len(got.ready[:usable]):
                result.reason = MissReason.LATE
        except KvStoreError as error:  # the arena went away under us: nothing copied counts
            result.kept = []
            result.reason = self._failed("load", error)
        result.tiers = dict(Counter(ref.tier for ref in result.kept))
        if result.reason in (MissReason.LATE, MissReason.UNREACHABLE):
            result.found = result.blocks
        return result

    def _patience_ms(self, recompute_ms: float) -> int:
        """Return how long blocks from below may take: no longer than computing them would."""
        longest = self._config.pending_ms
        return max(1, min(longest, int(recompute_ms))) if recompute_ms > 0 else longest

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
        await asyncio.gather(self._worker, return_exceptions=True)
        while not self._jobs.empty():
            self._jobs.get_nowait().done()

    async def _take(self, refs: Sequence[SlotRef], pages: Sequence[int]) -> int:
        """Copy slots into pages; return how many, from the first, surely hold their blocks."""
        if not refs:
            return 0
        arena = self._arena(refs[0])
        refs = refs[: self._mover.reachable(arena, [ref.offset for ref in refs])]
        if not refs:
            return 0
        began = self._loop.time()
        await self._mover.load(arena, [ref.offset for ref in refs], pages[: len(refs)])
        self._metrics.move_seconds.labels("load").observe(self._loop.time() - began)
        # Only now: a slot that was given to another name meanwhile has another generation.
        good = next((i for i, ref in enumerate(refs) if not self._client.still(ref)), len(refs))
        self._metrics.moved_bytes.labels("load").inc(good * self._block_bytes)
        self._metrics.void_blocks.inc(len(refs) - good)
        return good

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
        writes, lease = list(job.writes), job.lease
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
                lease = got.lease
                writes += [(job.pages[entry.index], entry.slot) for entry in got.reserved]
                reserved += [entry.slot for entry in got.reserved]
            kept, left = self._reached(writes)
            await self._write(kept)
        except BaseException:
            self._owe(reserved)
            raise
        await self._settle(kept, [*job.aborts, *left], lease, job.kept)

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
        lease: int,
        kept: Sequence[SlotRef],
    ) -> None:
        owed, self._owed = self._owed, []
        if not (writes or aborts or lease or kept or owed):
            return
        # After a failure the client gives unsettled slots back by itself.
        await self._client.settle(
            commit=[slot for _, slot in writes],
            abort=[*aborts, *owed],
            release=[lease] if lease else [],
            kept_in_hbm=kept,
            deadline_ms=self._config.call_ms,
        )

    def _owe(self, slots: Sequence[SlotRef]) -> None:
        """Remember slots to abort with the next settling that works."""
        room = MAX_OWED - len(self._owed)
        self._owed.extend(slots[:room])
        if len(slots) > room:
            self._metrics.store_failures.labels("settle", "owed_dropped").inc(len(slots) - room)

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
