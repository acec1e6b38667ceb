"""Room on the disk: places for blocks, whom to drop for them, and what an earlier run left.

Owns the segments and the index, and keeps three in step with them: the policy, the listener (who
tells others what is held here) and the rows on disk. One event loop's; every device call goes
through the threads.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import compress
from typing import Any, Final

import numpy as np

from kvstore.core.names import Root
from kvstore.directory.policy import BlockKey, Policy, block_key
from kvstore.observe.metrics import TierMetrics
from kvstore.tiers.base import BlockHeader, Held, Listener, Terms
from kvstore.tiers.block_rows import slot_bytes
from kvstore.tiers.device_threads import DeviceThreads, Operation
from kvstore.tiers.nvme_files import NvmeFiles, SegmentFiles
from kvstore.tiers.nvme_restart import FoundRows, chains, read_rows
from kvstore.tiers.nvme_space import NvmeSpace
from kvstore.tiers.quotas import Quotas

_SLICE: Final = 4_096
"""Blocks told to policy and listener at once after a restart: a few milliseconds of the loop."""
_ROOM_TRIES: Final = 3
_FULL_PAUSE_MS: Final = 10_000.0
"""How long a disk that had no room for a segment is not asked for another."""
_TIER: Final = "nvme"
_log = logging.getLogger(__name__)


class NvmeRoom:
    """Places of one tier. `failed` is told of every error of the device."""

    def __init__(
        self,
        space: NvmeSpace,
        files: NvmeFiles,
        threads: DeviceThreads,
        policy: Policy,
        metrics: TierMetrics,
        *,
        listener: Listener | None,
        failed: Callable[[BaseException], None],
        terms: Terms | None = None,
    ) -> None:
        terms = terms or Terms()
        self._book = terms.book or Quotas().book(_TIER)
        self._pinned = terms.pinned
        self.space = space
        self.policy = policy
        self.closed = False
        self.evictions = 0
        self._files = files
        self._threads = threads
        self._metrics = metrics
        self._listener = listener
        self._failed = failed
        self._segments: dict[int, SegmentFiles] = {}
        self._dirty: set[int] = set()
        self._full_until_ms = 0.0
        self._found: list[tuple[Sequence[int], Sequence[int]]] = []
        """Keys and parents of blocks of an earlier run, segment by segment, for `introduce`."""
        self._untold: dict[int, bytearray] = {}
        """By segment, 1 for each slot whose block policy and listener do not know yet."""
        self._changing = asyncio.Lock()
        self._loop = asyncio.get_running_loop()

    def files_at(self, place: int) -> tuple[SegmentFiles, int]:
        """Return the open files and the slot of a place."""
        segment, slot = self.space.split(place)
        return self._segments[segment.number], slot

    # -- taking ----------------------------------------------------------------------------

    async def take(self, newcomers: Sequence[BlockHeader]) -> int | None:
        """Return a place for the first of `newcomers`, busy, where it is worth its room.

        `newcomers` are the blocks of a batch that still come, in prefix order. The place is charged
        to its root: `hold` or `give_back` follows.
        """
        space = self.space
        root = newcomers[0].root
        wanted_bytes = slot_bytes(newcomers[0].payload_bytes)
        for _ in range(_ROOM_TRIES):
            if not self._keep_quota(root, wanted_bytes):
                return None
            place = space.take(wanted_bytes)
            if place is not None:
                self._book.add(root, wanted_bytes)
                return place
            if await self._grow(wanted_bytes):
                continue
            if space.below_fair_share(wanted_bytes) and await self._change_class(wanted_bytes):
                continue
            wanted = [
                key
                for one in newcomers
                if slot_bytes(one.payload_bytes) == wanted_bytes
                and (key := block_key(one.root, one.name)) not in space.index
            ]
            victims = self.policy.victims(
                len(wanted),
                now_ms=self._now_ms(),
                may_evict=lambda key: self._evictable(key, wanted_bytes),
                newcomers=wanted,
            )
            if not victims:
                return None
            self.drop([space.index[key] for key in victims], "evicted")
            self.evictions += len(victims)
        return None

    def hold(self, place: int, header: BlockHeader) -> None:
        """List a block whose bytes and row are on disk."""
        key = BlockKey(self.space.hold(place, header.root, header.name))
        parent = BlockKey(header.parent) if header.parent else None
        self.policy.insert([key], parent=parent, now_ms=self._now_ms())
        self._tell([self.space.at(place)], deleted=False)
        self._dirty.add(self.space.split(place)[0].number)

    def give_back(self, place: int, header: BlockHeader) -> None:
        """End a taken place that nothing was written to."""
        self._book.add(header.root, -slot_bytes(header.payload_bytes))
        self.space.release(place)

    def _keep_quota(self, root: Root, wanted_bytes: int) -> bool:
        """Drop a root's or its share domain's own blocks until one more is within their quotas."""
        while (claim := self._book.claim(root, wanted_bytes)) is not None:

            def may_evict(key: BlockKey, may_go: Callable[[Root], bool] = claim.may_go) -> bool:
                place = self.space.index[key]
                return self._idle(place) and may_go(self.space.at(place).root)

            count = -(-claim.excess_bytes // wanted_bytes) if claim.possible else 0
            victims = self.policy.victims(count, now_ms=self._now_ms(), may_evict=may_evict)
            if not victims:
                self._book.refusals += 1
                return False
            self.drop([self.space.index[key] for key in victims], "quota")
            self.evictions += len(victims)
        return True

    def _evictable(self, key: BlockKey, wanted_bytes: int) -> bool:
        place = self.space.index[key]
        return self._idle(place) and self.space.at(place).slot_bytes == wanted_bytes

    def _idle(self, place: int) -> bool:
        return self.space.is_idle(place) and not self._pinned(BlockKey(self.space.key_at(place)))

    async def _grow(self, wanted_bytes: int) -> bool:
        """Add a segment of the class; False where none fits, or the disk has no room for it."""
        async with self._changing:
            if self.space.has_free(wanted_bytes):
                return True  # another made it while this one waited for its turn
            number = self.space.new_number(wanted_bytes)
            if number is None or self.closed or self._now_ms() < self._full_until_ms:
                return False
            slots = self.space.slots_of(wanted_bytes)
            try:
                self._segments[number] = await self._blocking(
                    self._files.open, number, wanted_bytes, slots
                )
            except OSError as error:
                # Full before its bytes are used up: what is there already goes on serving.
                self._failed(error)
                self._full_until_ms = self._now_ms() + _FULL_PAUSE_MS
                return False
            self.space.add(number, wanted_bytes)
            return True

    async def _change_class(self, wanted_bytes: int) -> bool:
        """Empty the segment of another class that loses least; its bytes are free then."""
        async with self._changing:
            found = self.space.victim_segment(wanted_bytes, self._idle)
            if found is None or self.closed:
                return False
            segment, places = found
            self.drop(places, "class")
            self.space.discard(segment.number)
            self._untold.pop(segment.number, None)
            files = self._segments.pop(segment.number)
            try:
                await self._blocking(self._files.discard, segment.number, segment.slot_bytes, files)
            except OSError as error:
                self._failed(error)
        return await self._grow(wanted_bytes)

    # -- forgetting ------------------------------------------------------------------------

    def drop(self, places: Sequence[int], reason: str) -> None:
        """Forget what lies at `places`; the rows stay until the slots are written anew."""
        gone: list[Held] = []
        for place in places:
            key = self.space.key_at(place)
            held = self.space.drop(place)
            self._book.add(held.root, -held.slot_bytes)
            if not self._take_untold(place):
                self.policy.remove(BlockKey(key))
                gone.append(held)
        self._metrics.dropped.labels(_TIER, reason).inc(len(places))
        self._tell(gone, deleted=True)

    def erase(self, places: Sequence[int], reason: str) -> list[Operation]:
        """Forget blocks and their rows, also for a restart after a power failure."""
        by_segment: dict[int, list[int]] = {}
        for place in places:
            self.space.use(place)  # not given away before the row is gone
            by_segment.setdefault(self.space.split(place)[0].number, []).append(place)
        self.drop(places, reason)
        return [self._erase_rows(number, those) for number, those in by_segment.items()]

    def erase_left(self, number: int, root: Root | None) -> Operation | None:
        """Erase rows of blocks dropped before, which a restart would find; None: there are none."""
        places = self.space.take_left(self.space.segments[number], root)
        return self._erase_rows(number, places) if places else None

    def _erase_rows(self, number: int, places: Sequence[int]) -> Operation:
        files = self._segments[number]
        slots = [self.space.split(place)[1] for place in places]
        operation = self._threads.submit(partial(self._files.erase, files, slots), write=True)

        def erased(future: "asyncio.Future[Any]") -> None:
            for place in places:
                self.space.release(place)
            if not future.cancelled() and (error := future.exception()) is not None:
                self._failed(error)

        operation.future.add_done_callback(erased)
        return operation

    # -- restart and end -------------------------------------------------------------------

    async def load(self) -> int:
        """Read the row files of an earlier run; returns how many blocks they hold.

        The index is usable when this returns; policy and listener follow in `introduce`.
        """
        found: list[tuple[int, int]] = await self._blocking(lambda: list(self._files.found()))
        fitting: dict[int, int] = {}
        for number, size in found:
            fits = number < self.space.segments_max and size <= self.space.segment_bytes
            if not fits or number in fitting or number in self.space.segments:
                await self._blocking(self._files.discard, number, size)
            else:
                fitting[number] = size
        # Several at a time: a segment takes less time than handing it to a thread and back.
        while fitting:
            for number, size, files, rows in await self._blocking(self._read, dict(fitting)):
                del fitting[number]
                self._segments[number] = files
                self._restore(number, size, rows)
                await asyncio.sleep(0)
        return len(self.space)

    def _read(self, fitting: Mapping[int, int]) -> list[tuple[int, int, SegmentFiles, FoundRows]]:
        """Open the first of these segments (number → slot bytes) and read their rows; blocking."""
        read: list[tuple[int, int, SegmentFiles, FoundRows]] = []
        with contextlib.ExitStack() as opened:
            for number, size in fitting.items():
                slots = self.space.slots_of(size)
                files = self._files.open(number, size, slots)
                opened.callback(self._files.close, files)
                rows = read_rows(self._files.read_rows(files, slots), size)
                read.append((number, size, files, rows))
                if sum(len(rows.slots) for _, _, _, rows in read) >= _SLICE:
                    break
            opened.pop_all()
        return read

    def _restore(self, number: int, size: int, rows: FoundRows) -> None:
        segment = self.space.add(number, size)
        twice = self.space.restore(
            segment, rows.slots, rows.keys, rows.names, rows.roots, rows.root_of
        )
        charged = Counter(rows.root_of)
        if twice:
            again = set(twice)
            pairs = zip(rows.slots, rows.root_of, strict=True)
            charged.subtract(at for slot, at in pairs if slot in again)
        for at, count in charged.items():
            self._book.add(rows.roots[at], count * size)
        if twice:  # else a later `clear` would erase one row and a restart find the other
            self._erase_rows(number, self.space.take_slots(segment, twice))
        self._found.append((rows.keys, rows.parents))
        untold = self._untold[number] = bytearray(segment.slots)
        np.frombuffer(untold, np.uint8)[rows.slots] = 1
        np.frombuffer(untold, np.uint8)[twice] = 0
        if rows.torn:
            self._metrics.dropped.labels(_TIER, "torn").inc(rows.torn)

    async def introduce(self) -> None:
        """Tell policy and listener what `load` found, in slices; serving goes on meanwhile."""
        found, self._found = self._found, []
        keys = [key for some, _ in found for key in some]
        parents = [parent for _, some in found for parent in some]
        runs = await self._blocking(lambda: list(chains(keys, parents)))
        told = 0
        for parent, run in runs:
            fresh = [BlockKey(key) for key in run if self._take_untold(self.space.index.get(key))]
            whole = len(fresh) == len(run)
            # Where some are gone or came again meanwhile, each stands for itself.
            for part in [fresh] if whole else [[key] for key in fresh]:
                known = BlockKey(parent) if whole and parent else None
                self.policy.insert(part, parent=known, now_ms=self._now_ms())
            self._tell([self.space.at(self.space.index[key]) for key in fresh], deleted=False)
            told += len(run)
            if told >= _SLICE:
                told = 0
                await asyncio.sleep(0)
        self._untold.clear()

    def _is_untold(self, place: int | None) -> bool:
        """Say whether policy and listener do not know of a place's block."""
        if place is None or not self._untold:
            return False
        segment, slot = self.space.split(place)
        untold = self._untold.get(segment.number)
        return untold is not None and bool(untold[slot])

    def _take_untold(self, place: int | None) -> bool:
        """Say so, and that they know of it from now on."""
        if place is None or not self._is_untold(place):
            return False
        segment, slot = self.space.split(place)
        self._untold[segment.number][slot] = 0
        return True

    def scan(self, cursor: int, limit: int) -> tuple[list[Held], int | None]:
        """Return what the listener was told of, in slices: see `NvmeSpace.scan`."""
        found, following = self.space.scan(cursor, limit)
        if self._untold:
            places = (self.space.index[block_key(one.root, one.name)] for one in found)
            told = [not self._is_untold(place) for place in places]
            found = list(compress(found, told))
        return found, following

    async def sync(self) -> None:
        """Put the rows written since the last time on the medium."""
        dirty, self._dirty = self._dirty, set()
        for number in dirty & self._segments.keys():
            try:
                await self._blocking(self._files.sync_rows, self._segments[number])
            except OSError as error:
                self._failed(error)

    def close_files(self) -> None:
        """Close every descriptor; nothing may be inside the device."""
        for files in self._segments.values():
            with contextlib.suppress(OSError):
                self._files.close(files)
        self._segments.clear()

    async def _blocking(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return await self._threads.submit(partial(call, *arguments), write=True).future

    def _tell(self, blocks: Sequence[Held], *, deleted: bool) -> None:
        if self._listener is not None and blocks:
            self._listener(blocks, deleted)

    def _now_ms(self) -> float:
        return self._loop.time() * 1_000
