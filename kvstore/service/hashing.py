"""Hashes blocks off the event loop: seals committed ones and verifies adopted ones.

One thread (xxhash lets go of the interpreter while it reads), fed from four queues by urgency:
verifications that an Acquire waits for, fresh commits, adopted blocks that nobody asked for
yet, and blocks to be scrubbed. A job is at most `JOB_BYTES`, so an urgent one waits a few
milliseconds. Slots of a job are pinned: nothing is sealed or dropped on old evidence.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from kvstore.core.limits import GRANULE_BYTES
from kvstore.core.slots import SlotState
from kvstore.observe.metrics import NodeMetrics
from kvstore.service.store import ArenaStore
from kvstore.tiers.sums import block_sum
from kvstore.transport.arena import ArenaMapping

JOB_BYTES: Final = 64 << 20
"""Bytes of one job: 2 to 10 ms of hashing."""
_SCRUB_LOOK_S: Final = 1.0
MAX_URGENT: Final = 256
"""Calls whose blocks are verified first; more take what is ready, for their turn is far."""


@dataclass(slots=True)
class _Urgent:
    """Slots that an Acquire wants verified, and who waits."""

    slots: deque[int]
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Hasher:
    """Runs the hashing of one arena until cancelled."""

    def __init__(self, store: ArenaStore, metrics: NodeMetrics) -> None:
        self._store = store
        self._metrics = metrics
        self._urgent: deque[_Urgent] = deque()
        self._idle: deque[int] = deque()
        self._scrub: deque[int] = deque()
        self._work = asyncio.Event()
        self._progress = asyncio.Event()
        self.unverified = 0
        """Adopted blocks to be verified; drops to 0 when the last one is, not one by one."""
        self.corrupt_blocks = 0
        self.corrupt: dict[int, None] = {}
        """Keys of blocks that failed their sums, latest last; bounded. Why an Acquire ended."""
        self.on_sealed: Callable[[int], None] | None = None
        """Told of every slot whose block now has a sum and may be copied to tiers below."""

    def wake(self) -> None:
        """Say that `store.to_seal` has work."""
        self._work.set()

    def adopt(self, slots: Iterable[int]) -> None:
        """Verify these sealed slots when nothing more urgent is to be done."""
        self._idle.extend(slots)
        self.unverified = len(self._idle)
        self._work.set()

    async def verify(self, slots: Iterable[int], *, deadline_s: float) -> None:
        """Verify slots before others; returns when done, at the deadline, or if too many ask."""
        urgent = _Urgent(deque(dict.fromkeys(slots)))
        if not urgent.slots or len(self._urgent) >= MAX_URGENT:
            return
        self._urgent.append(urgent)
        self._work.set()
        try:
            async with asyncio.timeout(deadline_s):
                await urgent.done.wait()
        except TimeoutError:
            return  # the rest goes on being verified; the caller answers with what is ready

    async def scrub(self, slots: Iterable[int]) -> None:
        """Reread these blocks when nothing else is to be done; returns when all were."""
        self._scrub.extend(slots)
        self._work.set()
        while self._scrub:
            # Looked at again: blocks that are gone before their turn announce nothing.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SCRUB_LOOK_S):
                    await self.progress()

    async def progress(self) -> None:
        """Return at the next change of what is readable."""
        await self._progress.wait()

    async def sealed(self, deadline_s: float) -> bool:
        """Wait until nothing that was committed lacks its sum; False at the deadline."""
        try:
            async with asyncio.timeout(deadline_s):
                while self._store.table.counts[SlotState.COMMITTED]:
                    await self.progress()
        except TimeoutError:
            return False
        return True

    def announce(self) -> None:
        """Wake everyone in `progress`: blocks turned readable, or a reservation ended."""
        self._progress.set()
        self._progress = asyncio.Event()

    async def run(self) -> None:
        """Work until cancelled. Failures of hashing itself are bugs and end the node."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="kvstore-hash") as pool:
            while True:
                job = self._next_job()
                if not job:
                    self._work.clear()
                    await self._work.wait()
                    continue
                arena = self._store.table.arena
                places = [self._place(slot) for slot, _ in job]
                hashing = loop.run_in_executor(pool, _hash_all, arena, places)
                try:
                    sums = await asyncio.shield(hashing)
                except asyncio.CancelledError:
                    await asyncio.wait([hashing])  # the thread still reads the mapping
                    raise
                self._apply(job, sums)

    def _place(self, slot: int) -> tuple[int, int, int]:
        """Return (offset, payload bytes, shares) of a slot, for the thread."""
        table = self._store.table
        shape = table.root_of(slot).shape
        return table.granules[slot] * GRANULE_BYTES, shape.payload_bytes, shape.shares

    def _next_job(self) -> list[tuple[int, int]]:
        """Return pinned (slot, generation) pairs of the most urgent kind, at most `JOB_BYTES`."""
        table = self._store.table
        job: list[tuple[int, int]] = []
        size = 0
        while size < JOB_BYTES and (found := self._next_slot(size == 0)) is not None:
            slot, generation = found
            job.append((slot, generation))
            size += table.root_of(slot).shape.payload_bytes
        table.pin([slot for slot, _ in job])
        return job

    def _next_slot(self, first: bool) -> tuple[int, int] | None:
        table = self._store.table
        while self._urgent:
            urgent = self._urgent[0]
            while urgent.slots:
                slot = urgent.slots.popleft()
                if self._needs_verifying(slot):
                    return slot, table.generation[slot]
            if not first:
                return None  # its last slots are in this job: it is done when the job is
            urgent.done.set()
            self._urgent.popleft()
        while self._store.to_seal:
            slot, generation = self._store.to_seal.popleft()
            current = table.generation[slot] == generation
            if current and table.state[slot] == SlotState.COMMITTED:
                return slot, generation
        while self._idle:
            slot = self._idle.popleft()
            if self._needs_verifying(slot):
                return slot, table.generation[slot]
        if first:  # the jobs before are done too
            self.unverified = 0
        while self._scrub:
            slot = self._scrub.popleft()
            if table.state[slot] == SlotState.SEALED and table.servable[slot]:
                return slot, table.generation[slot]
        return None

    def _needs_verifying(self, slot: int) -> bool:
        table = self._store.table
        return table.state[slot] == SlotState.SEALED and not table.servable[slot]

    def _apply(self, job: list[tuple[int, int]], sums: list[bytes]) -> None:
        table = self._store.table
        table.unpin([slot for slot, _ in job])
        sealed: list[int] = []
        sealed_sums: list[bytes] = []
        for (slot, generation), found in zip(job, sums, strict=True):
            assert table.generation[slot] == generation, "a pinned slot was given away"
            if table.state[slot] == SlotState.COMMITTED:
                sealed.append(slot)
                sealed_sums.append(found)
            elif table.state[slot] == SlotState.SEALED:  # and was not dropped meanwhile
                self._judge(slot, found)
        self._seal(sealed, sealed_sums)
        self.announce()

    def seal_summed(self) -> None:
        """Seal what was committed with sums that were verified on arrival: no second hashing."""
        summed, self._store.summed = self._store.summed, []
        if summed:
            self._seal([slot for slot, _ in summed], [block_sum for _, block_sum in summed])
            self.announce()

    def _seal(self, slots: list[int], sums: list[bytes]) -> None:
        table = self._store.table
        table.seal(slots, sums)
        self._metrics.sealed_bytes.inc(sum(table.root_of(s).shape.payload_bytes for s in slots))
        for slot in slots:
            self._tell_sealed(slot)

    def _judge(self, slot: int, found: bytes) -> None:
        """Serve an adopted block whose bytes have their sum; forget any that has another."""
        table = self._store.table
        block_bytes = table.root_of(slot).shape.payload_bytes
        if table.arena.sum(slot) != found:
            self.note_corrupt("dram", table.key[slot])
            table.drop(slot, reason="corrupt")  # a lease on it is void at once
        elif table.servable[slot]:
            self._metrics.scrubbed_bytes.inc(block_bytes)
        else:
            table.servable[slot] = 1
            self._tell_sealed(slot)

    def note_corrupt(self, tier: str, key: int) -> None:
        """Count a block that failed its sum, and remember it for the Acquire that misses it."""
        self._metrics.corrupt.labels(tier).inc()
        self.corrupt_blocks += tier == "dram"
        self.corrupt[key] = None
        if len(self.corrupt) > 1_024:
            del self.corrupt[next(iter(self.corrupt))]

    def _tell_sealed(self, slot: int) -> None:
        if self.on_sealed is not None:
            self.on_sealed(slot)


def _hash_all(arena: ArenaMapping, places: list[tuple[int, int, int]]) -> list[bytes]:
    """Return the sums of payloads, (offset, bytes, shares) each; runs in the thread."""
    data = arena.data
    return [block_sum(data[start : start + size], shares) for start, size, shares in places]
