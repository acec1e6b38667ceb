"""The tier of shared files: one file for each block, for everyone who mounts the directory.

    read    index → file → name, own sum, block sum → HIT
    write   room → temporary file → rename → index
    others  directories are listed again and again, one after the other: what is new is known
            within a round, what is gone is forgotten

No coordinator and no lock: a file appears whole by its rename, two that write the same block write
the same file, and whoever reads verifies. A mount that fails or hangs opens a breaker and costs its
callers one stall deadline; the threads are daemons, because no call on a dead mount ever returns.
"""

import asyncio
import contextlib
import errno
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from kvstore.core.errors import BadInput
from kvstore.core.names import BlockName, Root
from kvstore.core.outcomes import Outcome
from kvstore.directory.policy import BlockKey, Policy, Prompt, block_key
from kvstore.observe.metrics import TierMetrics
from kvstore.tiers.base import NO_TERMS, Held, Listener, ReadItem, Terms, WriteItem, reached
from kvstore.tiers.block_rows import HEADER_BYTES
from kvstore.tiers.device_flights import Flight, judge, outcomes_of, see_through
from kvstore.tiers.device_health import DeviceHealth
from kvstore.tiers.device_threads import DeviceThreads
from kvstore.tiers.files_config import FilesConfig
from kvstore.tiers.files_device import LEAVES, BlockFiles, PlainFiles, SharedFiles
from kvstore.tiers.files_index import FilesIndex, keys_of
from kvstore.tiers.quotas import Quotas

_FULL_PAUSE_MS: Final = 10_000.0
"""How long a directory that had no room is not asked for any."""
_AT_ONCE: Final = 64
"""Directories listed in one go at the start."""
_TICK_S: Final = 0.02
"""Least time between two listings of a round."""
_START_S: Final = 10.0
_CLOSE_S: Final = 2.0
_log = logging.getLogger(__name__)


class FilesTier:
    """A `StoredTier` in a shared directory. Made by `start`."""

    name = "files"

    def __init__(
        self,
        config: FilesConfig,
        policy: Policy,
        metrics: TierMetrics,
        *,
        system: SharedFiles,
        listener: Listener | None,
        terms: Terms,
    ) -> None:
        """For `start`: use that."""
        self._config = config
        self._policy = policy
        self._metrics = metrics
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._health = DeviceHealth(self.name, metrics, self._now_ms)
        self._threads = DeviceThreads(config.threads, config.writers)
        self._files = BlockFiles(config.directory, system)
        self._pinned = terms.pinned
        self._book = terms.book or Quotas().book(self.name)
        self._index = FilesIndex(self._book)
        self._writing: dict[BlockKey, Held] = {}
        self._writing_bytes = 0
        self._unwanted: set[BlockKey] = set()
        self._full_until_ms = 0.0
        self._loaded = asyncio.Event()
        self._closed = False
        self._tasks: list[asyncio.Task[None]] = []
        self.evictions = 0

    @classmethod
    async def start(
        cls,
        config: FilesConfig,
        policy: Policy,
        metrics: TierMetrics,
        *,
        system: SharedFiles | None = None,
        listener: Listener | None = None,
        terms: Terms = NO_TERMS,
    ) -> "FilesTier":
        """Open the directory and begin to list it.

        Raises `BadInput` when it cannot be used. One that answers nothing is waited for in the
        background: the node goes on without it.
        """
        system = system or PlainFiles()
        tier = cls(config, policy, metrics, system=system, listener=listener, terms=terms)
        try:
            async with asyncio.timeout(_START_S):
                await tier._threads.submit(tier._files.prepare, write=True).future
        except OSError as error:
            if not isinstance(error, TimeoutError):
                tier._threads.close()
                raise BadInput(f"--files {config.directory} cannot be used: {error}") from error
            tier._health.stalled("read")
        tier._tasks = [asyncio.create_task(tier._keep_listing(), name="files-list")]
        return tier

    async def loaded(self, deadline_s: float = 60.0) -> None:
        """Return when every directory was listed once; `Unreachable` at the deadline."""
        await reached(self._loaded, deadline_s, f"directory {self._config.directory}")

    # -- what is there ---------------------------------------------------------------------

    def holds(self, root: Root, name: BlockName) -> bool:
        """Say whether a read would probably hit; False while the breaker lets no read through."""
        return (
            self._index.find(root, name) is not None
            and not self._closed
            and self._health.would_enter("read")
        )

    @property
    def used_bytes(self) -> int:
        """Bytes of the files known."""
        return self._index.used_bytes

    @property
    def capacity_bytes(self) -> int:
        """Bytes that the files may take."""
        return self._config.capacity_bytes

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

    def __len__(self) -> int:
        return len(self._index)

    def request(self, prompt: Prompt) -> None:
        """Tell the tier's policy what a request asks for."""
        self._policy.request(prompt)

    def scan(self, cursor: int, limit: int) -> tuple[list[Held], int | None]:
        """Return what the next directories hold."""
        return self._index.scan(cursor, limit)

    def measure(self) -> None:
        """Set the gauges."""
        self._health.measure(self._threads.running, self._threads.queued)

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
        held = self._index.find(item.root, item.name)
        refusal: Outcome | None = None
        if held is None or held.slot_bytes != HEADER_BYTES + len(item.into):
            refusal = Outcome.REFUSED if self._closed else Outcome.MISS
        elif self._closed or not self._health.enter("read"):
            refusal = Outcome.REFUSED
        if refusal is not None:
            item.drained.set()
            return refusal
        flight = Flight(self._threads.submit(partial(self._files.read, item), write=False))
        flight.operation.future.add_done_callback(partial(self._read_ended, flight, item))
        return flight

    def _read_ended(self, flight: Flight, item: ReadItem, future: "asyncio.Future[Any]") -> None:
        outcome = judge(self._health, "read", flight, future)
        if outcome in (Outcome.MISS, Outcome.CORRUPT):
            held = self._index.find(item.root, item.name)
            if held is not None:  # gone, or spoilt: before anyone asks again
                self._forget([held], outcome.name.lower())
                if outcome is Outcome.CORRUPT:
                    self._remove([held])
        flight.outcome = outcome
        item.drained.set()

    # -- writing ---------------------------------------------------------------------------

    async def write(self, batch: Sequence[WriteItem], *, deadline_ms: int) -> list[Outcome]:
        """Store each item, where it is worth its room; see `kvstore.tiers.base`."""
        started = [self._start_write(item) for item in batch]
        for item, one in zip(batch, started, strict=True):
            if isinstance(one, Outcome):
                item.drained.set()
        flights = [one for one in started if isinstance(one, Flight)]
        await see_through(self._health, flights, deadline_ms, "write")
        outcomes = outcomes_of(started)
        self._health.count("write", outcomes, [len(item.source) for item in batch])
        return outcomes

    def _start_write(self, item: WriteItem) -> Flight | Outcome:
        header = item.header
        key = block_key(header.root, header.name)
        if self._closed or key in self._writing or self._now_ms() < self._full_until_ms:
            return Outcome.REFUSED
        if self._index.at(key) is not None:
            there = self._index.find(header.root, header.name) is not None
            return Outcome.HIT if there else Outcome.REFUSED
        held = Held(header.root, header.name, HEADER_BYTES + len(item.source))
        if not self._make_room(held) or not self._health.enter("write"):
            return Outcome.REFUSED
        self._book.add(held.root, held.slot_bytes)
        self._writing[key] = held
        self._writing_bytes += held.slot_bytes
        call = partial(self._files.write, header, item.source)
        flight = Flight(self._threads.submit(call, write=True))
        flight.operation.future.add_done_callback(partial(self._write_ended, flight, item))
        return flight

    def _write_ended(self, flight: Flight, item: WriteItem, future: "asyncio.Future[Any]") -> None:
        header = item.header
        key = block_key(header.root, header.name)
        error = None if future.cancelled() else future.exception()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            # Full before its bytes are used up: what is there already goes on serving.
            self._full_until_ms = self._now_ms() + _FULL_PAUSE_MS
        outcome = judge(self._health, "write", flight, future)
        held = self._writing.pop(key)
        self._writing_bytes -= held.slot_bytes
        self._book.add(held.root, -held.slot_bytes)  # the index charges what it lists
        if outcome is Outcome.HIT and key in self._unwanted:
            self._remove([held])
            outcome = Outcome.REFUSED
        elif outcome is Outcome.HIT:
            self._add([held], parent=BlockKey(header.parent) if header.parent else None)
        self._unwanted.discard(key)
        flight.outcome = outcome
        item.drained.set()

    def _make_room(self, held: Held) -> bool:
        """Drop blocks until this one fits; False where they are worth more than it."""
        size = held.slot_bytes
        if size > self.capacity_bytes:
            return False
        while (claim := self._book.claim(held.root, size)) is not None:
            count = -(-claim.excess_bytes // size)
            if not claim.possible or not self._evict(count, (), "quota", claim.may_go):
                self._book.refusals += 1
                return False
        wanted = keys_of([held])
        while self.used_bytes + self._writing_bytes + size > self.capacity_bytes:
            if not self._evict(1, wanted, "evicted"):
                return False
        return True

    def _evict(
        self,
        count: int,
        newcomers: Sequence[BlockKey],
        reason: str,
        may_go: Callable[[Root], bool] = lambda root: True,
    ) -> bool:
        """Drop what the policy finds worth least; False where nothing may go."""

        def may_evict(key: BlockKey) -> bool:
            held = self._index.at(key)
            return held is not None and not self._pinned(key) and may_go(held.root)

        victims = self._policy.victims(
            count, now_ms=self._now_ms(), may_evict=may_evict, newcomers=newcomers
        )
        gone = [held for key in victims if (held := self._index.at(key)) is not None]
        if gone:
            self._forget(gone, reason)
            self._remove(gone)
            self.evictions += len(gone)
        return bool(gone)

    # -- forgetting and the end ------------------------------------------------------------

    async def remove(self, blocks: Sequence[tuple[Root, BlockName]]) -> None:
        """Remove blocks, for everyone; unknown ones are ignored."""
        self._unwanted |= self._writing.keys() & {block_key(*block) for block in blocks}
        found = [self._index.find(root, name) for root, name in dict.fromkeys(blocks)]
        await self._remove_all([held for held in found if held is not None], "removed")

    async def clear(self, root: Root | None) -> int:
        """Remove every block under a root (None: all), for everyone; return how many."""
        self._unwanted |= {key for key, held in self._writing.items() if root in (None, held.root)}
        found = self._index.under(root)
        await self._remove_all(found, "cleared")
        return len(found)

    async def close(self) -> None:
        """Stop; what a thread has ends by itself, unwatched."""
        if self._closed:
            return
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._threads.close()
        await self._threads.drained(_CLOSE_S)

    async def _remove_all(self, blocks: list[Held], reason: str) -> None:
        if not blocks:
            return
        self._forget(blocks, reason)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await self._remove(blocks)

    def _remove(self, blocks: list[Held]) -> "asyncio.Future[Any]":
        """Remove files in a thread; an error is counted, and a listing finds what is left."""
        operation = self._threads.submit(partial(self._files.remove, blocks), write=True)

        def removed(future: "asyncio.Future[Any]") -> None:
            if not future.cancelled() and (error := future.exception()) is not None:
                self._health.failed("write", error)

        operation.future.add_done_callback(removed)
        return operation.future

    def _forget(self, blocks: Sequence[Held], reason: str) -> None:
        gone = [held for key in keys_of(blocks) if (held := self._index.drop(key)) is not None]
        for key in keys_of(gone):
            self._policy.remove(key)
        self._metrics.dropped.labels(self.name, reason).inc(len(gone))
        self._tell(gone, deleted=True)

    def _add(self, blocks: Sequence[Held], parent: BlockKey | None = None) -> None:
        new = [held for held in blocks if self._index.add(held)]
        for key in keys_of(new):
            self._policy.insert([key], parent=parent, now_ms=self._now_ms())
        self._tell(new, deleted=False)

    def _tell(self, blocks: Sequence[Held], *, deleted: bool) -> None:
        if self._listener is not None and blocks:
            self._listener(blocks, deleted)

    # -- what others do --------------------------------------------------------------------

    async def _keep_listing(self) -> None:
        """List every directory, as fast as it goes at first and then once in a round."""
        starts = range(0, LEAVES, _AT_ONCE)
        await asyncio.gather(*(self._list(range(at, at + _AT_ONCE)) for at in starts))
        self._loaded.set()
        if len(self):
            _log.info("shared files: %d blocks found", len(self))
        while True:
            await self._tidy()
            step = math.ceil(LEAVES * _TICK_S / self._config.round_s)
            for leaf in range(0, LEAVES, step):
                await asyncio.sleep(self._config.round_s * step / LEAVES)
                await self._list(range(leaf, min(leaf + step, LEAVES)))

    async def _list(self, leaves: Sequence[int]) -> None:
        """List directories in one call of a thread, and learn what others did there."""
        changes = [self._index.changes(leaf) for leaf in leaves]

        def call() -> list[list[Held]]:
            return [self._files.list(leaf) for leaf in leaves]

        try:
            listed: list[list[Held]] = await self._threads.submit(call, write=False).future
        except OSError as error:
            self._health.failed("read", error)
            return
        for leaf, blocks, change in zip(leaves, listed, changes, strict=True):
            new, gone = self._index.compare(leaf, blocks, change)
            writing = self._writing.keys()
            self._add([held for held in new if block_key(held.root, held.name) not in writing])
            self._forget(gone, "gone")

    async def _tidy(self) -> None:
        try:
            left = await self._threads.submit(self._files.tidy, write=True).future
        except OSError as error:
            self._health.failed("write", error)
            return
        if left:
            _log.info("shared files: %d unfinished files removed", left)

    def _now_ms(self) -> float:
        return self._loop.time() * 1_000
