"""The half that lives in vLLM's worker: moves blocks between pages and the arena in the background.

    load    Acquire ─▶ copy ready slots ─▶ still the same? ─▶ wait for pending … ─▶ told as finished
    store   Acquire(reserve) ─▶ copy full pages ─▶ preempted meanwhile? ─▶ Settle

A load always ends, whole or with the blocks that are missing; vLLM computes those. Copies run in
one thread each, never cut short: a thread that still writes pages given to another would be a lie.
"""

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kvstore.adapters.vllm.layer_loads import LayerLoads
from kvstore.adapters.vllm.link import NodeLink
from kvstore.adapters.vllm.pages import EnginePages
from kvstore.adapters.vllm.plan import LoadJob, StoreJob
from kvstore.client import AsyncClient, SlotRef
from kvstore.core.errors import KvStoreError

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Queued:
    job: StoreJob
    cut_off: bool = False
    """Its pages may be overwritten: what was copied is not to be committed."""


class WorkerSide:
    """Loads and stores of one worker. Those methods that may wait say so."""

    def __init__(self, link: NodeLink, pages: EnginePages) -> None:
        self.counts: Counter[str] = Counter()
        """Since the last `take_counts`; guarded by the lock."""
        self._link = link
        self._pages = pages
        self._lock = threading.Lock()
        self._loading = 0
        self._loaded: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._ended = threading.Event()
        self._stores: deque[_Queued] = deque()
        self._storing = False
        self._owing: Counter[str] = Counter()
        self._stored_once: set[str] = set()
        self._finished: set[str] = set()
        self._saving: _Queued | None = None
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="kvstore-load")
        self._writers = ThreadPoolExecutor(1, thread_name_prefix="kvstore-store")
        self._by_layers = LayerLoads(link, pages)

    def load_by_layers(self, jobs: Sequence[LoadJob]) -> None:
        """Begin loads that the step waits for, layer by layer."""
        self._by_layers.begin(jobs)

    def wait_for_layer(self, layer: int) -> None:
        """Wait until the step's loads have filled a layer, or failed."""
        self._by_layers.wait(layer)

    def end_layers(self) -> bool:
        """Wait for the step's loads; say whether what the step computed may be stored."""
        bad = self._by_layers.finish()
        with self._lock:
            self._bad_blocks |= bad
            self.counts.update(self._by_layers.counts)
        self._by_layers.counts.clear()
        return not bad

    def drop(self, jobs: Sequence[StoreJob]) -> None:
        """Store nothing of these: they may have been computed over a load that failed."""
        with self._lock:
            self.counts["dropped_stores"] += len(jobs)
            self._stored_once.update(job.request for job in jobs)

    def load(self, job: LoadJob) -> None:
        """Begin a load; its end is told by `ended`."""
        with self._lock:
            self._loading += 1
            self._ended.clear()
        self._link.submit(self._load(job))

    def store(self, job: StoreJob) -> None:
        """Queue a store of pages that are computed now; dropped, counted, when too many wait."""
        with self._lock:
            self._stored_once.add(job.request)
            if len(self._stores) >= self._link.settings.max_store_jobs or not self._link.usable:
                self.counts["dropped_stores"] += 1
                return
            self._owing[job.request] += 1
            self._stores.append(_Queued(job))
            if self._storing:
                return
            self._storing = True
        self._link.submit(self._work())

    def preempted(self, requests: Sequence[str]) -> None:
        """Cut off stores whose pages will be overwritten: what they copied is not committed."""
        with self._lock:
            for queued in (*self._stores, *([self._saving] if self._saving else [])):
                queued.cut_off |= queued.job.request in requests

    def rest(self, seconds: float) -> None:
        """Wait up to `seconds` for a load or store to end, where there is one.

        For steps that compute nothing: without it the engine steps on and on until then, and takes
        the processor and the interpreter's lock from the copies.
        """
        if self._loading or self._storing:
            self._ended.wait(seconds)

    def ended(self, finished: set[str]) -> tuple[set[str], set[str]]:
        """Return (requests whose pages are not read any more, requests whose load has ended).

        `finished` are requests that the engine is done with; those that stored something are told
        once, now or later.
        """
        with self._lock:
            self._finished |= finished & self._stored_once
            free = {name for name in self._finished if not self._owing[name]}
            self._finished -= free
            self._stored_once -= free
            for name in free:
                del self._owing[name]
            loaded, self._loaded = self._loaded, set()
            self._ended.clear()
        return free, loaded

    def bad_blocks(self) -> set[int]:
        """Return the engine's blocks that could not be loaded, since the last time."""
        with self._lock:
            bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_counts(self) -> dict[str, int]:
        """Return what was counted since the last time."""
        with self._lock:
            counts, self.counts = self.counts, Counter()
        return dict(counts)

    def close(self) -> None:
        """End the threads; copies under way are finished first."""
        self._by_layers.close()
        self._readers.shutdown()
        self._writers.shutdown()

    async def _load(self, job: LoadJob) -> None:
        began = time.perf_counter_ns()
        good = 0
        try:
            good = await self._fetch(job)
        except KvStoreError as error:
            self._link.failed("load", error)
        except Exception:  # task boundary: the request must be told, whatever happened
            _log.exception("kvstore: a load failed unexpectedly")
            with self._lock:
                self.counts["unexpected"] += 1
        with self._lock:
            self.counts["load_ns"] += time.perf_counter_ns() - began
            self.counts["loaded_tokens"] += good * self._pages.block_tokens
            self.counts["lost_tokens"] += (len(job.blocks) - good) * self._pages.block_tokens
            self._bad_blocks.update(job.blocks[good:])
            self._loaded.add(job.request)
            self._loading -= 1
            self._ended.set()

    async def _fetch(self, job: LoadJob) -> int:
        """Return how many of the job's blocks, from the first, hold their bytes now."""
        client = self._link.client
        if client is None or not self._link.usable:
            return 0
        limit = self._link.settings
        ratio = self._pages.ratio
        got = await client.acquire(
            job.names, pending_ms=limit.load_ms, first_block=job.first * ratio
        )
        try:
            good = await self._take(client, got.ready, job.blocks, 0)
            if good == len(got.ready) and got.pending:
                arrived = await client.wait_ready(got.pending, deadline_ms=limit.load_ms)
                good += await self._take(client, got.pending[:arrived], job.blocks, good)
        finally:
            if got.lease:
                await self._release(client, got.lease)
        held = (got.ready + got.pending)[: good // ratio * ratio]
        with self._lock:
            for tier, count in Counter(ref.tier.name.lower() for ref in held).items():
                self.counts[f"loaded_blocks_{tier}"] += count
        return good // ratio

    async def _release(self, client: AsyncClient, lease: int) -> None:
        try:
            await client.settle(release=[lease])
        except KvStoreError as error:  # what was copied and checked stays good
            self._link.failed("release", error)

    async def _take(
        self, client: AsyncClient, refs: Sequence[SlotRef], blocks: Sequence[int], first: int
    ) -> int:
        """Copy slots into pages from the `first`-th part on; return how many are surely good."""
        if not refs:
            return 0
        loop = asyncio.get_running_loop()
        copying = loop.run_in_executor(self._readers, self._copy_in, client, refs, blocks, first)
        return await asyncio.shield(copying)

    def _copy_in(
        self, client: AsyncClient, refs: Sequence[SlotRef], blocks: Sequence[int], first: int
    ) -> int:
        ratio = self._pages.ratio
        for at, ref in enumerate(refs):
            place = first + at
            self._pages.load(client.view(ref), blocks[place // ratio], place % ratio)
            if not client.still(ref):  # given to another name while it was copied: a miss
                return at
        return len(refs)

    async def _work(self) -> None:
        while True:
            with self._lock:
                if not self._stores:
                    self._storing = False
                    return
                queued = self._saving = self._stores.popleft()
            began = time.perf_counter_ns()
            stored = 0
            try:
                stored = await self._save(queued)
            except KvStoreError as error:
                self._link.failed("store", error)
            except Exception:  # task boundary: later jobs must still run
                _log.exception("kvstore: a store failed unexpectedly")
                with self._lock:
                    self.counts["unexpected"] += 1
            with self._lock:
                self.counts["store_ns"] += time.perf_counter_ns() - began
                self.counts["stored_blocks"] += stored
                self._owing[queued.job.request] -= 1
                self._saving = None
                self._ended.set()

    async def _save(self, queued: _Queued) -> int:
        """Store the job's blocks that the node has not got; return how many of ours."""
        client, job = self._link.client, queued.job
        if client is None or not self._link.usable or queued.cut_off:
            return 0
        ratio = self._pages.ratio
        got = await client.acquire(job.names, reserve=len(job.names), first_block=job.first * ratio)
        slots = [item.slot for item in got.reserved]
        release = [got.lease] if got.lease else []
        loop = asyncio.get_running_loop()
        places = [(job.blocks[item.index // ratio], item.index % ratio) for item in got.reserved]
        copied = False
        try:
            if slots:
                copying = loop.run_in_executor(self._writers, self._copy_out, client, places, slots)
                await asyncio.shield(copying)
            with self._lock:
                copied = not queued.cut_off
        finally:
            if slots or release:
                await client.settle(
                    commit=slots if copied else [], abort=[] if copied else slots, release=release
                )
        return len(slots) if copied else 0

    def _copy_out(
        self,
        client: AsyncClient,
        places: Sequence[tuple[int, int]],
        slots: Sequence[SlotRef],
    ) -> None:
        for (block, part), slot in zip(places, slots, strict=True):
            self._pages.store(block, part, client.view(slot))
