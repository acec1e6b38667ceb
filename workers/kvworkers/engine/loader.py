"""One load: ask the node, copy what is ready, wait for what is on its way, copy that.

    head:  Acquire ─▶ copy whole blocks ──┐ queued
    rest:             Acquire ─▶ plan ────┴▶ copy, in groups of layers where a step follows ─▶ …

Asking for a long prefix takes milliseconds, in which the link to the device would stand idle: a
load that nothing else hides asks for its first blocks alone, and for the others while those come.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from kvstore.client import Acquired, AsyncClient, SlotRef
from kvstore.core.errors import KvStoreError
from kvstore.core.names import BlockName
from kvstore.core.outcomes import MissReason
from kvstore.directory.events import TierKind
from kvstore.observe.metrics import WorkerMetrics
from kvworkers.stream.gate import Follower, Gate
from kvworkers.stream.mover import Mover, unheard

HEAD_BYTES: Final = 256 << 20
"""Bytes asked for first: copying them takes as long as asking for thousands of blocks more."""
_HEADS: Final = 4
"""Prefixes of so many heads are asked for in two calls; for shorter ones it saves nothing."""


@dataclass(slots=True)
class LoadResult:
    """What the store gave for one prompt."""

    tiers: dict[TierKind, int] = field(default_factory=dict)
    """Blocks loaded, by where they came from."""
    reason: MissReason = MissReason.ABSENT
    """Why there were no more."""
    found: int = 0
    """Leading blocks that the store holds, loaded or not: they need no storing."""
    leases: list[int] = field(default_factory=list)
    """To be released with the settling."""
    kept: list[SlotRef] = field(default_factory=list)
    """Slots that were loaded: the worker lists these blocks now."""
    reserved: dict[int, SlotRef] = field(default_factory=dict)
    """Block of the prompt → slot to be written with it."""

    @property
    def blocks(self) -> int:
        """Blocks loaded."""
        return sum(self.tiers.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a prompt wants of the store."""

    names: Sequence[BlockName]
    pages: Sequence[int]
    """Where its blocks go; as many as `names`."""
    usable: int
    """Blocks that may be loaded at most."""
    first_block: int
    """The position of `names[0]` in its prompt."""
    reserve: int
    """Slots wanted for what is not there."""
    recompute_ms: float = 0.0
    """What computing the usable blocks is predicted to take; 0: unknown."""
    kind: str = ""
    depth_cost: float = 0.0


class Loader:
    """Carries out loads over one client and one mover."""

    def __init__(
        self,
        client: AsyncClient,
        mover: Mover,
        metrics: WorkerMetrics,
        *,
        call_ms: int,
        pending_ms: int,
        grouped_bytes: int,
        failed: Callable[[str, KvStoreError], MissReason],
    ) -> None:
        """`failed` counts a call that failed and says what to call the miss."""
        self._client = client
        self._mover = mover
        self._metrics = metrics
        self._call_ms = call_ms
        self._pending_ms = pending_ms
        self._grouped_bytes = grouped_bytes
        self._failed = failed
        self._loop = asyncio.get_running_loop()

    async def load(self, ask: Ask, follower: Follower | None) -> LoadResult:
        """Copy the longest cached prefix of `ask.names` into its pages.

        Blocks below DRAM that would take longer to come than computing them stay there. Never
        raises for a fault of the store. `follower` is told of a load that a step may follow: the
        answer may still say that fewer blocks are good.
        """
        result = LoadResult()
        head: Sequence[SlotRef] = ()
        head_blocks = HEAD_BYTES // self._mover.forms.stored.block_bytes
        if follower is not None and min(len(ask.names), ask.usable) >= _HEADS * head_blocks:
            got = await self._acquire(ask, 0, head_blocks, 0, result)
            if got is None:
                return result
            head = got.ready
        queued = asyncio.Event()
        copying = asyncio.ensure_future(
            self._take(head, ask.pages, 0, None, alone=True, queued=queued.set)
        )
        copying.add_done_callback(lambda _: queued.set())
        try:
            got = await self._acquire(ask, len(head), len(ask.names), ask.reserve, result)
            await queued.wait()
            await self._copy(ask, result, head, copying, got, follower)
        finally:
            await asyncio.wait([copying])
        result.tiers = dict(Counter(ref.tier for ref in result.kept))
        if result.reason in (MissReason.LATE, MissReason.UNREACHABLE):
            result.found = result.blocks
        return result

    async def _acquire(
        self, ask: Ask, first: int, end: int, reserve: int, result: LoadResult
    ) -> Acquired | None:
        """Ask for `ask.names[first:end]` and note what there is; None where that failed."""
        try:
            got = await self._client.acquire(
                ask.names[first:end],
                reserve=min(reserve, end - first),
                deadline_ms=self._call_ms,
                pending_ms=self._patience_ms(ask),
                first_block=ask.first_block + first,
                kind=ask.kind,
                depth_cost=ask.depth_cost,
            )
        except KvStoreError as error:
            result.reason = self._failed("acquire", error)
            return None
        if got.lease:
            result.leases.append(got.lease)
        result.reason = got.reason
        result.found = first + len(got.ready) + len(got.pending)
        result.reserved = {
            ask.first_block + first + entry.index: entry.slot for entry in got.reserved
        }
        return got

    async def _copy(
        self,
        ask: Ask,
        result: LoadResult,
        head: Sequence[SlotRef],
        copying: "asyncio.Future[int]",
        got: Acquired | None,
        follower: Follower | None,
    ) -> None:
        """Take in what was found behind `head`, whose copy is queued; notes it in `result`."""
        try:
            first = len(head)
            ready = [] if got is None else got.ready[: ask.usable - first]
            wanted = [] if got is None else got.pending[: max(0, ask.usable - first - len(ready))]
            more = await self._take(ready, ask.pages, first, None if wanted else follower)
            await asyncio.wait([copying])
            good = copying.result()
            result.kept = [*head[:good], *ready[:more]] if good == first else list(head[:good])
            if len(result.kept) < first + len(ready):
                result.reason = MissReason.LATE
            elif wanted:
                await self._copy_pending(ask, result, wanted, follower)
        except KvStoreError as error:  # the arena went away under us: nothing copied counts
            result.kept = []
            result.reason = self._failed("load", error)

    async def _copy_pending(
        self, ask: Ask, result: LoadResult, wanted: Sequence[SlotRef], follower: Follower | None
    ) -> None:
        patience_ms = self._patience_ms(ask)
        arrived = await self._client.wait_ready(wanted, deadline_ms=patience_ms)
        more = await self._take(wanted[:arrived], ask.pages, len(result.kept), follower)
        result.kept += wanted[:more]
        if more < len(wanted):
            result.reason = MissReason.LATE

    def _patience_ms(self, ask: Ask) -> int:
        """Return how long blocks from below may take: no longer than computing them would."""
        longest = self._pending_ms
        return max(1, min(longest, int(ask.recompute_ms))) if ask.recompute_ms > 0 else longest

    async def _take(
        self,
        refs: Sequence[SlotRef],
        pages: Sequence[int],
        before: int,
        follower: Follower | None,
        *,
        alone: bool = False,
        queued: Callable[[], object] = unheard,
    ) -> int:
        """Copy slots into `pages[before:]`; return how many, from the first, surely are good."""
        if not refs:
            return 0
        self._client.view(refs[0])  # raises for a slot of an earlier arena
        arena = self._client.arena
        refs = refs[: self._mover.reachable(arena, [ref.offset for ref in refs])]
        if not refs:
            return 0
        began = self._loop.time()
        places = arena, [ref.offset for ref in refs], pages[before : before + len(refs)]
        block_bytes = self._mover.forms.stored.block_bytes
        small = len(refs) * block_bytes < self._grouped_bytes
        if follower is None or small or not self._mover.follows:
            await self._mover.load(*places, alone=alone or follower is not None, queued=queued)
        else:
            moved = partial(self._loop.call_soon_threadsafe, follower.moved)
            gate = Gate(self._mover.forms.pages.layers, changed=moved)
            follower.begun(before + len(refs), gate)
            follower.moved()
            await self._mover.load_groups(*places, gate)
        self._metrics.move_seconds.labels("load").observe(self._loop.time() - began)
        # Only now: a slot that was given to another name meanwhile has another generation.
        good = next((i for i, ref in enumerate(refs) if not self._client.still(ref)), len(refs))
        self._metrics.moved_bytes.labels("load").inc(good * block_bytes)
        self._metrics.void_blocks.inc(len(refs) - good)
        return good
