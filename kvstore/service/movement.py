"""Moves blocks between the arena and the tiers below it: up for those who ask, down once sealed.

    up      Acquire/Prefetch ─ Load ─▶ lanes ─▶ tier.read into the reserved slot ─▶ commit, seal
    down    sealed ─ Dirty ─▶ lanes ─▶ tier.write from the pinned slot, once

A slot that a device may still write into stays pinned until the tier says that it has drained,
however long that takes; nobody waits for it. Blocks are written below as soon as they have a sum
and the device has time, so that an eviction finds the copy below made already.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

from kvstore.core.limits import GRANULE_BYTES
from kvstore.core.names import BlockName, Root
from kvstore.core.outcomes import Outcome
from kvstore.core.slots import READABLE, SlotState
from kvstore.directory.events import TierKind
from kvstore.observe.metrics import NodeMetrics
from kvstore.service.hashing import Hasher
from kvstore.service.promotion import Load, Promoter
from kvstore.service.store import ArenaStore
from kvstore.tiers.base import BlockHeader, ReadItem, Tier, WriteItem
from kvstore.transfer.lanes import BATCH_BYTES, Lane, LaneLimits, Lanes
from kvstore.transfer.rate import Rate

_log = logging.getLogger(__name__)
_BATCHES: Final = 8
"""Batches inside one tier: the queue depth at which NVMe reaches its rate."""
_LANES: Final = {
    Lane.LOAD: LaneLimits(batches=_BATCHES),
    Lane.PREFETCH: LaneLimits(batches=_BATCHES // 2),
    Lane.WRITE_BACK: LaneLimits(batches=_BATCHES // 2),
}
_ASSUMED_BYTES_PER_S: Final = 1e9
"""Of a tier that was never measured: a slow NVMe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MovementLimits:
    """Times of movement, in milliseconds."""

    load_stall_ms: int = 1_000
    """A load in which nothing moved for so long is given up."""
    write_stall_ms: int = 10_000


@dataclass(frozen=True, slots=True)
class Lower:
    """A tier below DRAM."""

    kind: TierKind
    tier: Tier
    own: bool = True
    """Whether other nodes are lent what it holds: not what they can reach themselves."""
    keeps: bool = True
    """Whether sealed blocks are written to it."""
    batch_bytes: int = BATCH_BYTES
    """What makes one operation of small blocks worth while."""


class Dirty(NamedTuple):
    """A sealed slot to be written below."""

    slot: int
    generation: int
    block_bytes: int


Move = Load | Dirty


class Movement:
    """All movement of one node; fastest tier first in `lowers`. One event loop's."""

    def __init__(
        self,
        store: ArenaStore,
        hasher: Hasher,
        lowers: Sequence[Lower],
        metrics: NodeMetrics,
        limits: MovementLimits | None = None,
    ) -> None:
        self._store = store
        self._hasher = hasher
        self._lowers = tuple(lowers)
        self._metrics = metrics
        self._limits = limits or MovementLimits()
        self._lanes: dict[TierKind, Lanes[Move]] = {
            lower.kind: Lanes(
                partial(self._carry, lower),
                _LANES,
                batches=_BATCHES,
                batch_bytes=lower.batch_bytes,
                on_failed=self._batch_failed,
            )
            for lower in lowers
        }
        self._rates = {lower.kind: Rate(_ASSUMED_BYTES_PER_S) for lower in lowers}
        for lane in Lane:  # from the start: alerts watch it
            metrics.failed_batches.labels(lane.name.lower())
        for lower in lowers:
            for reason in ("queue", "evicted"):
                metrics.unwritten.labels(lower.kind.name.lower(), reason)
        self._draining: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self.promoter = Promoter(store.reserver, self)
        if lowers:
            store.promoter = self.promoter
            hasher.on_sealed = self._sealed

    # -- what a decision asks (kvstore.service.promotion.Below) ----------------------------

    def holder(self, root: Root, name: BlockName, *, own: bool = False) -> TierKind | None:
        """Return the fastest tier that holds a block and can be read now; `own`: of this node."""
        for lower in self._lowers:
            if (lower.own or not own) and lower.tier.holds(root, name):
                return lower.kind
        return None

    def loadable_bytes(self, tier: TierKind, within_ms: float) -> int:
        """Return how many bytes more would arrive from a tier within a time, as predicted."""
        waiting = self._lanes[tier].unfinished_bytes(Lane.LOAD)
        return self._rates[tier].bytes_within(within_ms / 1_000, waiting)

    # -- up --------------------------------------------------------------------------------

    def load(self, loads: Sequence[Load], lane: Lane = Lane.LOAD) -> int:
        """Start loads in order; returns how many. The rest will not come, and its slots end."""
        started = 0
        for kind, lanes in self._lanes.items():
            ours = [load for load in loads if load.tier is kind]
            taken = lanes.submit(lane, [(load, load.block_bytes) for load in ours])
            for load in ours[taken:]:
                self._give_up(load.slot)
            started += taken
        if started < len(loads):
            self._hasher.announce()
        return started

    def hurry(self, slots: Sequence[int]) -> None:
        """Let prefetches of these slots that still wait go with the loads: somebody waits now."""
        wanted = frozenset(slots)
        for lanes in self._lanes.values() if wanted else ():
            lanes.hurry(
                Lane.PREFETCH, Lane.LOAD, lambda m: isinstance(m, Load) and m.slot in wanted
            )

    async def _bring_up(self, lower: Lower, loads: Sequence[Load]) -> None:
        table = self._store.table
        items = [
            ReadItem(
                table.root_of(load.slot).root,
                BlockName(table.arena.name(load.slot)),
                table.arena.block(table.granules[load.slot] * GRANULE_BYTES, load.block_bytes),
            )
            for load in loads
        ]
        table.pin([load.slot for load in loads])
        rate = self._rates[lower.kind]
        began = self._loop.time()
        rate.began(began)
        outcomes = [Outcome.LATE] * len(loads)
        try:
            outcomes = await lower.tier.read(items, deadline_ms=self._limits.load_stall_ms)
        finally:
            moved = sum(
                load.block_bytes
                for load, outcome in zip(loads, outcomes, strict=True)
                if outcome is Outcome.HIT
            )
            rate.ended(moved, self._loop.time())
            self._crossed(lower.kind, TierKind.DRAM, began, moved)
            arrived = [
                load.slot
                for load, item, outcome in zip(loads, items, outcomes, strict=True)
                if self._arrived(lower, load, item, outcome)
            ]
            self._store.table.insertions.tell(arrived, self._loop.time() * 1_000)
            self._hasher.seal_summed()
            self._hasher.announce()

    def _arrived(self, lower: Lower, load: Load, item: ReadItem, outcome: Outcome) -> bool:
        """Commit a slot that was filled, or end it; returns whether it holds its block now."""
        table = self._store.table
        slot = load.slot
        assert table.generation[slot] == load.generation, "a pinned slot was given away"
        if outcome is Outcome.CORRUPT:
            self._hasher.note_corrupt(lower.kind.name.lower(), table.key[slot])
        holder = table.index.get(table.key[slot])
        twice = holder is not None and holder != slot and table.state[holder] in READABLE
        wanted = not twice and self.promoter.wants(slot)
        if outcome is not Outcome.HIT or not wanted:
            elsewhere = wanted and item.drained.is_set() and self._go_on(lower, load, item)
            if not elsewhere:
                self._give_up(slot)
            self._unpin_drained(slot, item.drained)
            return False
        table.unpin([slot])
        self.promoter.settled(slot)
        committed = table.commit(slot)
        assert committed, "somebody else holds the block, and it was looked for"
        self._store.summed.append((slot, item.sum))
        return True

    def _go_on(self, failed: Lower, load: Load, item: ReadItem) -> bool:
        """Ask the next tier that holds a block which this one did not give; False without one."""
        after = self._lowers.index(failed) + 1
        for lower in self._lowers[after:]:
            if lower.tier.holds(item.root, item.name):
                self.promoter.goes_on(load.slot, lower.kind)
                again = load._replace(tier=lower.kind)
                return bool(self._lanes[lower.kind].submit(Lane.LOAD, [(again, load.block_bytes)]))
        return False

    def _give_up(self, slot: int) -> None:
        self.promoter.settled(slot)
        self._store.table.give_up(slot)

    # -- down ------------------------------------------------------------------------------

    def _sealed(self, slot: int) -> None:
        table = self._store.table
        block_bytes = table.root_of(slot).shape.block_bytes
        dirty = Dirty(slot, table.generation[slot], block_bytes)
        for lower in self._lowers:
            if not lower.keeps or self._is_below(lower, slot):
                continue
            if not self._lanes[lower.kind].submit(Lane.WRITE_BACK, [(dirty, block_bytes)]):
                self._metrics.unwritten.labels(lower.kind.name.lower(), "queue").inc()

    async def _write_back(self, lower: Lower, batch: Sequence[Dirty]) -> None:
        table = self._store.table
        wanted = [dirty for dirty in batch if self._wants_copy(lower, dirty)]
        items: list[WriteItem] = []
        for dirty in wanted:
            record = table.arena.record(dirty.slot)
            header = BlockHeader(
                root=record.root,
                name=record.name,
                payload_bytes=record.payload_bytes,
                shares=record.shares,
                sum=record.sum,
                position=record.position,
                group=table.root_of(dirty.slot).group,
                parent=table.parent[dirty.slot],
            )
            items.append(WriteItem(header, table.arena.block(record.offset, record.block_bytes)))
        table.pin([dirty.slot for dirty in wanted])
        began, outcomes = self._loop.time(), [Outcome.LATE] * len(wanted)
        try:
            outcomes = await lower.tier.write(items, deadline_ms=self._limits.write_stall_ms)
        finally:
            written = sum(
                dirty.block_bytes
                for dirty, outcome in zip(wanted, outcomes, strict=True)
                if outcome is Outcome.HIT
            )
            self._crossed(TierKind.DRAM, lower.kind, began, written)
            for dirty, item in zip(wanted, items, strict=True):
                self._unpin_drained(dirty.slot, item.drained)

    def _wants_copy(self, lower: Lower, dirty: Dirty) -> bool:
        table = self._store.table
        if table.generation[dirty.slot] != dirty.generation or (
            table.state[dirty.slot] != SlotState.SEALED
        ):
            self._metrics.unwritten.labels(lower.kind.name.lower(), "evicted").inc()
            return False
        return not self._is_below(lower, dirty.slot)

    def _is_below(self, lower: Lower, slot: int) -> bool:
        table = self._store.table
        return lower.tier.holds(table.root_of(slot).root, BlockName(table.arena.name(slot)))

    # -- both ------------------------------------------------------------------------------

    async def flush(self, deadline_s: float) -> bool:
        """Wait until everything is written below; False at the deadline."""
        ends = self._loop.time() + deadline_s
        done = [await lanes.idle(ends - self._loop.time()) for lanes in self._lanes.values()]
        return all(done)

    async def close(self) -> None:
        """Stop moving; slots that devices still use stay pinned with this process."""
        for lanes in self._lanes.values():
            for move in await lanes.close():
                if isinstance(move, Load):
                    self._give_up(move.slot)
        for task in list(self._draining):
            task.cancel()
        await asyncio.gather(*self._draining, return_exceptions=True)

    def measure(self) -> None:
        """Set the gauges of what waits and drains."""
        queued = self._metrics.queued
        for lane in Lane:
            total = sum(lanes.waiting(lane) for lanes in self._lanes.values())
            queued.labels(lane.name.lower()).set(total)
        queued.labels("draining").set(len(self._draining))

    async def _carry(self, lower: Lower, lane: Lane, batch: list[Move]) -> None:
        if lane is Lane.WRITE_BACK:
            await self._write_back(lower, [move for move in batch if isinstance(move, Dirty)])
        else:
            await self._bring_up(lower, [move for move in batch if isinstance(move, Load)])

    def _crossed(self, source: TierKind, target: TierKind, began_s: float, moved: int) -> None:
        """Count one batch that went from tier to tier."""
        labels = source.name.lower(), target.name.lower()
        self._metrics.crossing_seconds.labels(*labels).observe(self._loop.time() - began_s)
        self._metrics.crossed_bytes.labels(*labels).inc(moved)

    def _batch_failed(self, lane: Lane) -> None:
        self._metrics.failed_batches.labels(lane.name.lower()).inc()

    def _unpin_drained(self, slot: int, drained: asyncio.Event) -> None:
        """Unpin a slot once no device uses its bytes: now, or whenever that will be."""
        if drained.is_set():
            self._store.table.unpin([slot])
            return

        async def later() -> None:
            await drained.wait()
            self._store.table.unpin([slot])

        task = asyncio.create_task(later(), name=f"drain-{slot}")
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)
