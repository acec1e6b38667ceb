"""The NVMe tier: blocks on a local disk, found again after a restart, verified at every read.

    read    index → slot → [header | block] in one operation → name, own sum, block sum → HIT
    write   room → [erase row] [header | block] [row] → index
    full    the policy says who goes, and whether what comes is worth it

All state belongs to one event loop; threads do nothing but device calls and sums. A device that
fails, hangs or fills up opens a breaker (one for reads, one for writes) and costs its callers one
stall deadline. The index lives in memory; what stands on disk is described in `nvme_format`.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from kvstore.core.errors import BadInput
from kvstore.core.names import BlockName, Root
from kvstore.core.outcomes import Outcome
from kvstore.directory.policy import Policy, Prompt, block_key
from kvstore.observe.metrics import TierMetrics
from kvstore.tiers.base import BlockHeader, ReadItem, WriteItem
from kvstore.tiers.breaker import Breaker
from kvstore.tiers.nvme_device import Device, DiskDevice
from kvstore.tiers.nvme_files import NvmeFiles
from kvstore.tiers.nvme_format import HEADER_BYTES
from kvstore.tiers.nvme_room import Listener, NvmeRoom
from kvstore.tiers.nvme_space import SEGMENT_BYTES, Held, NvmeSpace
from kvstore.tiers.nvme_threads import DeviceThreads, Operation, until_stalled

_CLOSE_S: Final = 2.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmeConfig:
    """One directory on one disk."""

    directory: Path
    capacity_bytes: int
    segment_bytes: int = SEGMENT_BYTES
    threads: int = 8
    """Operations inside the device at once: the queue depth at which NVMe reaches its rate."""
    writers: int = 4
    """How many of them may be writes, so that reads always find a thread."""
    sync_ms: int = 5_000
    """How long rows may lie in the page cache: what a power failure may cost in index, not in
    correctness."""

    def __post_init__(self) -> None:
        if self.capacity_bytes < 16 * 2 * HEADER_BYTES:
            raise BadInput(f"an NVMe tier of {self.capacity_bytes} bytes holds nothing")


@dataclass(slots=True, eq=False)
class _Flight:
    """One block between memory and disk."""

    place: int
    operation: Operation
    outcome: Outcome | None = None
    late: bool = False
    """Nobody waits for it any more; its end says nothing about the device of now."""


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
    ) -> None:
        """For `start`: use that."""
        self._config = config
        self._metrics = metrics
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
            failed=lambda error: self._failed("write", error),
        )
        self._breakers = {"read": Breaker(), "write": Breaker()}
        self._writing: set[int] = set()
        self._loop = asyncio.get_running_loop()
        self._lock_fd = -1
        self.hits = 0
        self.misses = 0
        self.corrupt = 0
        self._loaded = asyncio.Event()
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
    ) -> "NvmeTier":
        """Take the directory and begin to read its index; until that is read, the tier refuses.

        Raises `BadInput` when the directory cannot be used, `Refused` when another node uses it.
        """
        tier = cls(config, policy, metrics, device=device or DiskDevice(), listener=listener)
        tier._lock_fd = tier._files.lock()
        tier._tasks = [
            asyncio.create_task(tier._load(), name="nvme-load"),
            asyncio.create_task(tier._keep_synced(), name="nvme-sync"),
        ]
        return tier

    async def loaded(self) -> None:
        """Return when the index of an earlier run has been read."""
        await self._loaded.wait()

    @property
    def in_device(self) -> int:
        """Operations inside the device now."""
        return self._threads.running

    @property
    def queued(self) -> int:
        """Operations that wait for a thread."""
        return self._threads.queued

    def holds(self, root: Root, name: BlockName) -> bool:
        """Say whether a read would probably hit; False while the breaker lets no read through."""
        return (
            block_key(root, name) in self._space.index
            and not self._closed
            and self._breakers["read"].would_enter(self._now_ms())
        )

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots that hold blocks."""
        return self._space.used_bytes

    @property
    def capacity_bytes(self) -> int:
        """Bytes that all slots together may take."""
        return self._space.capacity_bytes

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
        metrics, now_ms = self._metrics, self._now_ms()
        metrics.in_device.labels(self.name).set(self.in_device)
        metrics.queued.labels(self.name).set(self.queued)
        for operation, breaker in self._breakers.items():
            metrics.breaker.labels(self.name, operation).set(breaker.state(now_ms))

    # -- reading ---------------------------------------------------------------------------

    async def read(self, batch: Sequence[ReadItem], *, deadline_ms: int) -> list[Outcome]:
        """Fill each item's buffer; see `kvstore.tiers.base`."""
        started = [self._start_read(item) for item in batch]
        flights = [one for one in started if isinstance(one, _Flight)]
        await self._see_through(flights, deadline_ms, "read")
        outcomes = [one.outcome or Outcome.LATE if isinstance(one, _Flight) else one
                    for one in started]  # fmt: skip
        self._count("read", outcomes, [len(item.into) for item in batch])
        return outcomes

    def _start_read(self, item: ReadItem) -> "_Flight | Outcome":
        refusal = self._may_read(item)
        if isinstance(refusal, Outcome):
            item.drained.set()
            return refusal
        place = refusal
        self._space.use(place)
        files, slot = self._room.files_at(place)
        call = partial(self._files.read, files, slot, item.root, item.name, item.into)
        flight = _Flight(place, self._threads.submit(call, write=False))
        flight.operation.future.add_done_callback(partial(self._read_ended, flight, item))
        return flight

    def _may_read(self, item: ReadItem) -> "int | Outcome":
        """Return the place to read from, or why there is none."""
        if self._closed or not self._loaded.is_set():
            return Outcome.REFUSED
        place = self._space.find(item.root, item.name)
        if place is None or self._space.at(place).slot_bytes != HEADER_BYTES + len(item.into):
            return Outcome.MISS
        if not self._breakers["read"].enter(self._now_ms()):
            return Outcome.REFUSED
        return place

    def _read_ended(self, flight: _Flight, item: ReadItem, future: "asyncio.Future[Any]") -> None:
        outcome = self._judge("read", flight, future)
        useless = outcome in (Outcome.MISS, Outcome.CORRUPT) or (
            outcome is Outcome.REFUSED and not future.cancelled()
        )
        # Gone before anyone can ask again: stale, spoilt, or where the disk cannot be read.
        if useless and self._space.find(item.root, item.name) == flight.place:
            self._room.erase(flight.place, outcome.name.lower())
        self._space.release(flight.place)
        flight.outcome = outcome
        item.drained.set()

    # -- writing ---------------------------------------------------------------------------

    async def write(self, batch: Sequence[WriteItem], *, deadline_ms: int) -> list[Outcome]:
        """Store each item, where it is worth its room; see `kvstore.tiers.base`."""
        started: list[_Flight | Outcome] = [Outcome.REFUSED] * len(batch)
        try:
            for at, item in enumerate(batch):
                newcomers = [one.header for one in batch[at:]]
                started[at] = await self._start_write(item, newcomers)
        finally:
            for item, one in zip(batch, started, strict=True):
                if isinstance(one, Outcome):
                    item.drained.set()
        flights = [one for one in started if isinstance(one, _Flight)]
        await self._see_through(flights, deadline_ms, "write")
        outcomes = [one.outcome or Outcome.LATE if isinstance(one, _Flight) else one
                    for one in started]  # fmt: skip
        self._count("write", outcomes, [len(item.source) for item in batch])
        return outcomes

    async def _start_write(
        self, item: WriteItem, newcomers: Sequence[BlockHeader]
    ) -> "_Flight | Outcome":
        header = item.header
        key = block_key(header.root, header.name)
        if self._closed or not self._loaded.is_set() or key in self._writing:
            return Outcome.REFUSED  # a block that is being written is not there yet
        if key in self._space.index:
            there = self._space.find(header.root, header.name) is not None
            return Outcome.HIT if there else Outcome.REFUSED
        if not self._breakers["write"].would_enter(self._now_ms()):
            return Outcome.REFUSED
        self._writing.add(key)
        try:
            place = await self._room.take(newcomers)
            if place is None:
                self._writing.discard(key)
                return Outcome.REFUSED
            if self._closed or not self._breakers["write"].enter(self._now_ms()):
                self._space.release(place)
                self._writing.discard(key)
                return Outcome.REFUSED
        except BaseException:
            self._writing.discard(key)
            raise
        files, slot = self._room.files_at(place)
        call = partial(self._files.write, files, slot, header, item.source)
        flight = _Flight(place, self._threads.submit(call, write=True))
        flight.operation.future.add_done_callback(partial(self._write_ended, flight, item))
        return flight

    def _write_ended(self, flight: _Flight, item: WriteItem, future: "asyncio.Future[Any]") -> None:
        header = item.header
        outcome = self._judge("write", flight, future)
        if outcome is Outcome.HIT:
            self._room.hold(flight.place, header)
        self._space.release(flight.place)
        self._writing.discard(block_key(header.root, header.name))
        flight.outcome = outcome
        item.drained.set()

    # -- forgetting and the end ------------------------------------------------------------

    async def remove(self, blocks: Sequence[tuple[Root, BlockName]]) -> None:
        """Forget blocks, also after a restart; unknown ones are ignored."""
        places = [self._space.find(root, name) for root, name in dict.fromkeys(blocks)]
        erasing = [self._room.erase(place, "removed") for place in places if place is not None]
        for operation in erasing:
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
        if await self._threads.drained(_CLOSE_S):  # else the descriptors stay with hung calls
            self._room.close_files()
        os.close(self._lock_fd)

    async def _load(self) -> None:
        try:
            found = await self._room.load()
        except OSError as error:
            self._failed("read", error)
            _log.error("NVMe directory %s cannot be read: %s", self._config.directory, error)
            return
        self._loaded.set()
        if found:
            _log.info("NVMe: %d blocks found", found)
        await self._room.introduce()

    async def _keep_synced(self) -> None:
        while True:
            await asyncio.sleep(self._config.sync_ms / 1_000)
            await self._room.sync()

    # -- the device ------------------------------------------------------------------------

    async def _see_through(
        self, flights: Sequence[_Flight], deadline_ms: int, operation: str
    ) -> None:
        """Wait for flights; at a stall take back what has not begun and leave the rest."""
        futures = [flight.operation.future for flight in flights]
        try:
            await until_stalled(futures, deadline_ms / 1_000)
            if any(flight.outcome is None for flight in flights):
                self._breakers[operation].failed(self._now_ms())
        finally:
            for flight in flights:
                if flight.outcome is None:
                    flight.late = True
                    flight.operation.take_back()

    def _judge(self, operation: str, flight: _Flight, future: "asyncio.Future[Any]") -> Outcome:
        """Return what a flight came to, and tell the breaker."""
        breaker = self._breakers[operation]
        if future.cancelled():
            breaker.abandoned()
            return Outcome.LATE if flight.late else Outcome.REFUSED
        error = future.exception()
        if error is not None:
            self._failed(operation, error)
            return Outcome.REFUSED
        if not flight.late:
            breaker.succeeded()
        return Outcome.HIT if operation == "write" else future.result()

    def _failed(self, operation: str, error: BaseException | None) -> None:
        if not isinstance(error, OSError):
            _log.error("NVMe %s: unexpected %r", operation, error)
        kind = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "other"
        self._metrics.device_errors.labels(self.name, operation, kind).inc()
        breaker = self._breakers[operation]
        opened = breaker.opened
        breaker.failed(self._now_ms())
        if breaker.opened > opened:
            # Its text: a record that is kept would keep the frames, and the buffers in them.
            _log.warning("NVMe %s breaker open: %s", operation, str(error))

    @property
    def evictions(self) -> int:
        """Blocks dropped to make room, since the start."""
        return self._room.evictions

    def _count(self, operation: str, outcomes: Sequence[Outcome], sizes: Sequence[int]) -> None:
        if operation == "read":
            self.hits += outcomes.count(Outcome.HIT)
            self.corrupt += outcomes.count(Outcome.CORRUPT)
            self.misses += len(outcomes) - outcomes.count(Outcome.HIT)
        for outcome in set(outcomes):
            self._metrics.operations.labels(self.name, operation, outcome.name.lower()).inc(
                outcomes.count(outcome)
            )
        moved = sum(size for size, one in zip(sizes, outcomes, strict=True) if one is Outcome.HIT)
        self._metrics.moved_bytes.labels(self.name, operation).inc(moved)

    def _now_ms(self) -> float:
        return self._loop.time() * 1_000
