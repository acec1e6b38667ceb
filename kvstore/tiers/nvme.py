"""The NVMe tier: blocks on a local disk, found again after a restart, verified at every read.

    read    index → slot → [header | block] in one operation → name, own sum, block sum → HIT
    write   room → [erase row] [header | block] [row] → index
    full    the policy says who goes, and whether what comes is worth it

All state belongs to one event loop; threads do nothing but device calls and sums. A device that
fails, hangs or fills up opens a breaker (one for reads, one for writes) and costs its callers one
stall deadline. The index lives in memory; what stands on disk is described in `block_rows`.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from kvstore.core.errors import KvStoreError
from kvstore.core.names import BlockName, Root
from kvstore.core.outcomes import Outcome
from kvstore.directory.policy import Policy, Prompt, block_key
from kvstore.observe.metrics import TierMetrics
from kvstore.tiers.base import BlockHeader, Held, Listener, ReadItem, Terms, WriteItem, reached
from kvstore.tiers.block_rows import HEADER_BYTES
from kvstore.tiers.device_flights import Flight, judge, outcomes_of, see_through
from kvstore.tiers.device_health import DeviceHealth
from kvstore.tiers.device_threads import DeviceThreads
from kvstore.tiers.nvme_config import NvmeConfig
from kvstore.tiers.nvme_device import Device, DiskDevice
from kvstore.tiers.nvme_files import NvmeFiles
from kvstore.tiers.nvme_room import NvmeRoom
from kvstore.tiers.nvme_space import NvmeSpace

_CLOSE_S: Final = 2.0
_log = logging.getLogger(__name__)


class NvmeTier:
    """A `Tier` on a disk. Made by `start`."""

    name = "nvme"

    def __init__(
        self,
        config: NvmeConfig,
        policy: Policy,
        metrics: TierMetrics,
        *,
        device: Device,
        listener: Listener | None,
        terms: Terms | None,
    ) -> None:
        """For `start`: use that."""
        self._config = config
        loop = asyncio.get_running_loop()
        self._health = DeviceHealth(self.name, metrics, lambda: loop.time() * 1_000)
        self._threads = DeviceThreads(config.threads, config.writers)
        self._files = NvmeFiles(config.directory, device)
        self._space = NvmeSpace(config.capacity_bytes, segment_bytes=config.segment_bytes)
        self._room = NvmeRoom(
            self._space,
            self._files,
            self._threads,
            policy,
            metrics,
            listener=listener,
            failed=partial(self._health.failed, "write"),
            terms=terms,
        )
        self._writing: dict[int, Root] = {}
        """Keys under way to the disk, and their roots."""
        self._unwanted: set[int] = set()
        """Those of them that were forgotten meanwhile."""
        self._lock_fd = -1
        self._looked = asyncio.Event()
        """What an earlier run left was read, or cannot be."""
        self._loaded = asyncio.Event()
        self._introduced = asyncio.Event()
        self._closed = False
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(
        cls,
        config: NvmeConfig,
        policy: Policy,
        metrics: TierMetrics,
        *,
        device: Device | None = None,
        listener: Listener | None = None,
        terms: Terms | None = None,
    ) -> "NvmeTier":
        """Take the directory and begin to read its index; until that is read, the tier refuses.

        Raises `BadInput` when the directory cannot be used, `Refused` when another node goes
        on using it.
        """
        device = device or DiskDevice()
        tier = cls(config, policy, metrics, device=device, listener=listener, terms=terms)
        try:
            tier._lock_fd = await asyncio.to_thread(tier._files.lock, within_ms=config.lock_ms)
        except KvStoreError:
            tier._threads.close()
            raise
        tier._tasks = [
            asyncio.create_task(tier._load(), name="nvme-load"),
            asyncio.create_task(tier._keep_synced(), name="nvme-sync"),
        ]
        return tier

    async def loaded(self, deadline_s: float = 60.0) -> None:
        """Return when the index of an earlier run has been read.

        Raises `Unreachable` at the deadline: the disk is slow, or the log says why it is no use.
        """
        await reached(self._loaded, deadline_s, f"NVMe directory {self._config.directory}")

    async def introduced(self, deadline_s: float = 60.0) -> None:
        """Return when policy and listener know of everything that an earlier run left.

        Raises `Unreachable` at the deadline.
        """
        await reached(self._introduced, deadline_s, f"NVMe directory {self._config.directory}")

    @property
    def in_device(self) -> int:
        """Operations inside the device now."""
        return self._threads.running

    def holds(self, root: Root, name: BlockName) -> bool:
        """Say whether a read would probably hit; False while the breaker lets no read through."""
        return (
            block_key(root, name) in self._space.index
            and not self._closed
            and self._health.would_enter("read")
        )

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots that hold blocks."""
        return self._space.used_bytes

    @property
    def capacity_bytes(self) -> int:
        """Bytes that all slots together may take."""
        return self._space.capacity_bytes

    @property
    def hits(self) -> int:
        """Blocks read and verified, since the start."""
        return self._health.reads[Outcome.HIT]

    @property
    def misses(self) -> int:
        """Blocks asked for and not got, for whatever reason."""
        return self._health.reads.total() - self.hits

    @property
    def corrupt(self) -> int:
        """Blocks that failed their sums."""
        return self._health.reads[Outcome.CORRUPT]

    @property
    def evictions(self) -> int:
        """Blocks dropped to make room."""
        return self._room.evictions

    def __len__(self) -> int:
        return len(self._space)

    def request(self, prompt: Prompt) -> None:
        """Tell the tier's policy what a request asks for."""
        self._room.policy.request(prompt)

    def scan(self, cursor: int, limit: int) -> tuple[list[Held], int | None]:
        """Return what the next slots hold, as the listener knows it: a slice of a snapshot."""
        return self._room.scan(cursor, limit)

    def measure(self) -> None:
        """Set the gauges."""
        self._health.measure(self.in_device, self._threads.queued)

    # -- reading ---------------------------------------------------------------------------

    async def read(self, batch: Sequence[ReadItem], *, deadline_ms: int) -> list[Outcome]:
        """Fill each item's buffer; see `kvstore.tiers.base`."""
        started = [self._start_read(item) for item in batch]
        flights = [one for one in started if isinstance(one, Flight)]
        await see_through(self._health, flights, deadline_ms, "read")
        outcomes = outcomes_of(started)
        self._health.count("read", outcomes, [len(item.into) for item in batch])
        return outcomes

    def _start_read(self, item: ReadItem) -> Flight | Outcome:
        refusal = self._may_read(item)
        if isinstance(refusal, Outcome):
            item.drained.set()
            return refusal
        place = refusal
        self._space.use(place)
        files, slot = self._room.files_at(place)
        call = partial(self._files.read, files, slot, item)
        flight = Flight(self._threads.submit(call, write=False), place)
        flight.operation.future.add_done_callback(partial(self._read_ended, flight, item))
        return flight

    def _may_read(self, item: ReadItem) -> "int | Outcome":
        """Return the place to read from, or why there is none."""
        if self._closed or not self._loaded.is_set():
            return Outcome.REFUSED
        place = self._space.find(item.root, item.name)
        if place is None or self._space.at(place).slot_bytes != HEADER_BYTES + len(item.into):
            return Outcome.MISS
        if not self._health.enter("read"):
            return Outcome.REFUSED
        return place

    def _read_ended(self, flight: Flight, item: ReadItem, future: "asyncio.Future[Any]") -> None:
        outcome = judge(self._health, "read", flight, future)
        useless = outcome in (Outcome.MISS, Outcome.CORRUPT) or (
            outcome is Outcome.REFUSED and not future.cancelled()
        )
        # Gone before anyone can ask again: stale, spoilt, or where the disk cannot be read.
        if useless and self._space.find(item.root, item.name) == flight.place:
            self._room.erase([flight.place], outcome.name.lower())
        self._space.release(flight.place)
        flight.outcome = outcome
        item.drained.set()

    # -- writing ---------------------------------------------------------------------------

    async def write(self, batch: Sequence[WriteItem], *, deadline_ms: int) -> list[Outcome]:
        """Store each item, where it is worth its room; see `kvstore.tiers.base`.

        Waits for the index of an earlier run: nobody offers a block twice.
        """
        started: list[Flight | Outcome] = [Outcome.REFUSED] * len(batch)
        try:
            deadline_ms = await self._looked_up(deadline_ms)
            for at, item in enumerate(batch):
                newcomers = [one.header for one in batch[at:]]
                started[at] = await self._start_write(item, newcomers)
        finally:
            for item, one in zip(batch, started, strict=True):
                if isinstance(one, Outcome):
                    item.drained.set()
        flights = [one for one in started if isinstance(one, Flight)]
        await see_through(self._health, flights, deadline_ms, "write")
        outcomes = outcomes_of(started)
        self._health.count("write", outcomes, [len(item.source) for item in batch])
        return outcomes

    async def _looked_up(self, deadline_ms: int) -> int:
        """Wait until the index was read or is no use; return the milliseconds left, at least 1."""
        began_s = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_ms / 1_000):
                await self._looked.wait()
        return max(1, deadline_ms - round((time.monotonic() - began_s) * 1_000))

    async def _start_write(
        self, item: WriteItem, newcomers: Sequence[BlockHeader]
    ) -> Flight | Outcome:
        header = item.header
        key = block_key(header.root, header.name)
        if self._closed or not self._loaded.is_set() or key in self._writing:
            return Outcome.REFUSED  # a block that is being written is not there yet
        if key in self._space.index:
            there = self._space.find(header.root, header.name) is not None
            return Outcome.HIT if there else Outcome.REFUSED
        if not self._health.would_enter("write"):
            return Outcome.REFUSED
        self._writing[key] = header.root
        try:
            place = await self._room.take(newcomers)
            if place is None:
                self._not_writing(key)
                return Outcome.REFUSED
            if self._closed or not self._health.enter("write"):
                self._room.give_back(place, header)
                self._not_writing(key)
                return Outcome.REFUSED
        except BaseException:
            self._not_writing(key)
            raise
        files, slot = self._room.files_at(place)
        call = partial(self._files.write, files, slot, header, item.source)
        flight = Flight(self._threads.submit(call, write=True), place)
        flight.operation.future.add_done_callback(partial(self._write_ended, flight, item))
        return flight

    def _write_ended(self, flight: Flight, item: WriteItem, future: "asyncio.Future[Any]") -> None:
        header = item.header
        outcome = judge(self._health, "write", flight, future)
        wanted = self._not_writing(block_key(header.root, header.name))
        if outcome is Outcome.HIT:
            self._room.hold(flight.place, header)
            if not wanted:
                self._room.erase([flight.place], "removed")
                outcome = Outcome.REFUSED
            self._space.release(flight.place)
        else:
            self._room.give_back(flight.place, header)
        flight.outcome = outcome
        item.drained.set()

    # -- forgetting and the end ------------------------------------------------------------

    async def remove(self, blocks: Sequence[tuple[Root, BlockName]]) -> None:
        """Forget blocks, also after a restart; unknown ones are ignored."""
        self._unwanted |= self._writing.keys() & {block_key(*block) for block in blocks}
        places = [self._space.find(root, name) for root, name in dict.fromkeys(blocks)]
        await self._forget([place for place in places if place is not None], "removed")

    async def clear(self, root: Root | None) -> int:
        """Forget every block under a root (None: all), also after a restart; returns how many.

        What is being written at this moment is forgotten too, and so are rows left behind.
        """
        self._unwanted |= {key for key, its in self._writing.items() if root in (None, its)}
        cleared = 0
        for number in list(self._space.segments):
            if number not in self._space.segments:  # its class has changed meanwhile
                continue
            left = self._room.erase_left(number, root)
            places = self._space.places_of(self._space.segments[number], root)
            await self._forget(places, "cleared")
            cleared += len(places)
            if left is not None:
                with contextlib.suppress(OSError, asyncio.CancelledError):
                    await left.future
        return cleared

    def _not_writing(self, key: int) -> bool:
        """Note that a write has ended; returns whether its block is still wanted."""
        del self._writing[key]
        wanted = key not in self._unwanted
        self._unwanted.discard(key)
        return wanted

    async def _forget(self, places: Sequence[int], reason: str) -> None:
        for operation in self._room.erase(places, reason):
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await operation.future

    async def close(self) -> None:
        """Stop; rows are put on the medium, as far as the device answers in time."""
        if self._closed:
            return
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(TimeoutError, asyncio.CancelledError):
            async with asyncio.timeout(_CLOSE_S):
                await self._room.sync()
        self._room.closed = True
        self._threads.close()
        if await self._threads.drained(_CLOSE_S):
            self._room.close_files()
            os.close(self._lock_fd)
        # Else both stay until the process ends: a call that hangs may still write there.

    async def _load(self) -> None:
        try:
            found = await self._room.load()
        except Exception as error:  # task boundary: without its disk the node goes on
            self._health.failed("read", error)
            _log.error("NVMe directory %s cannot be read: %r", self._config.directory, error)
            return
        finally:
            self._looked.set()
        self._loaded.set()
        if found:
            _log.info("NVMe: %d blocks found", found)
        await self._room.introduce()
        self._introduced.set()

    async def _keep_synced(self) -> None:
        while True:
            await asyncio.sleep(self._config.sync_ms / 1_000)
            await self._room.sync()
