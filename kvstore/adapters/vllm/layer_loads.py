"""Loads layer by layer (`layerwise`): the forward waits for each layer and for no more.

    hold every job's slots ─▶ layer 0 of all ─▶ layer 1 of all ─▶ … ─▶ still the same? ─▶ last layer
    forward:                   waits, layer 0 ─▶ waits, layer 1 ─▶ …

Requests run in the step that loads them. Where a slot is missing or was given away, the forward
goes on over rubbish and the blocks are told as bad in the same step: vLLM computes them anew and
uses nothing of what came out. So nothing of such a step may be stored either.
"""

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from kvstore.adapters.vllm.link import NodeLink
from kvstore.adapters.vllm.pages import EnginePages
from kvstore.adapters.vllm.plan import LoadJob
from kvstore.client import AsyncClient, SlotRef
from kvstore.core.errors import KvStoreError

_log = logging.getLogger(__name__)
_GRACE_S: Final = 1.0
"""Beyond a call's and a load's own deadlines: then the loop of the link itself does not run."""


@dataclass(slots=True)
class _Held:
    """What a job has got: `refs` fill its blocks in order, and are leased."""

    job: LoadJob
    client: AsyncClient | None = None
    refs: list[SlotRef] = field(default_factory=list)
    lease: int = 0
    good: int = 0
    """Slots, from the first, whose bytes were whole when the last layer was told."""


class LayerLoads:
    """One step's loads at a time. `begin`, `wait` and `finish` are called by the forward."""

    def __init__(self, link: NodeLink, pages: EnginePages) -> None:
        self.counts: Counter[str] = Counter()
        """Since the worker took them; written by the forward's thread alone."""
        self._link = link
        self._pages = pages
        self._changed = threading.Condition()
        self._layers_done = 0
        self._copying = self._ended = False
        self._unexpected = 0
        """Loads that failed by a bug of ours and are not in `counts` yet."""
        self._abandoned = True
        """No step is under way, or nobody waits for it any more: nothing may be copied."""
        self._held: list[_Held] = []
        self._began_ns = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="kvstore-load")

    def begin(self, jobs: Sequence[LoadJob]) -> None:
        """Begin the step's loads; returns at once."""
        assert not self._held, "the step before was not finished"
        if not jobs:
            return
        self._began_ns = time.perf_counter_ns()
        self._held = [_Held(job) for job in jobs]
        self._layers_done, self._copying, self._ended, self._abandoned = 0, False, False, False
        self._link.submit(self._load(self._held))

    def wait(self, layer: int) -> None:
        """Wait until `layer` is in the pages of all jobs, or will not be.

        Bounded: by the deadlines of the node while nothing is copied, by the copy from then on.
        """
        if not self._held:
            return
        limit = self._link.settings
        most_s = (limit.call_ms + limit.load_ms) / 1_000 + _GRACE_S

        def told() -> bool:
            return self._ended or self._abandoned or self._layers_done > layer

        with self._changed:
            if self._changed.wait_for(told, most_s):
                return
            if not self._copying:
                self._abandoned = True
                return
            self._changed.wait_for(told)  # memory to memory: nobody outside can hold it up

    def finish(self) -> set[int]:
        """Wait for the last layer; return the engine's blocks that do not hold their bytes."""
        held = self._held
        if not held:
            self._count_unexpected()
            return set()
        self.wait(self._pages.layout.layers - 1)
        with self._changed:
            good = [0 if self._abandoned else one.good // self._pages.ratio for one in held]
            self._held, self._abandoned = [], True
        self._count_unexpected()
        bad: set[int] = set()
        for one, count in zip(held, good, strict=True):
            bad.update(one.job.blocks[count:])
            self.counts["loaded_tokens"] += count * self._pages.block_tokens
            self.counts["lost_tokens"] += (len(one.job.blocks) - count) * self._pages.block_tokens
            for ref in one.refs[: count * self._pages.ratio]:
                self.counts[f"loaded_blocks_{ref.tier.name.lower()}"] += 1
        self.counts["load_ns"] += time.perf_counter_ns() - self._began_ns
        return bad

    def close(self) -> None:
        """End the thread; a copy under way is finished first."""
        self._reader.shutdown()

    async def _load(self, held: Sequence[_Held]) -> None:
        try:
            await asyncio.gather(*(self._hold(one) for one in held))
            loop = asyncio.get_running_loop()
            await asyncio.shield(loop.run_in_executor(self._reader, self._copy, held))
        except Exception:  # task boundary: the forward must be told, whatever happened
            _log.exception("kvstore: a load by layers failed unexpectedly")
            with self._changed:
                self._unexpected += 1
        finally:
            self._end(held)
        for one in held:
            await self._release(one)

    def _count_unexpected(self) -> None:
        with self._changed:
            unexpected, self._unexpected = self._unexpected, 0
        if unexpected:
            self.counts["unexpected"] += unexpected

    def _end(self, held: Sequence[_Held]) -> None:
        with self._changed:
            self._ended = self._ended or self._held is held
            self._changed.notify_all()

    async def _hold(self, one: _Held) -> None:
        client = self._link.client
        if client is None or not self._link.usable:
            return
        load_ms = self._link.settings.load_ms
        try:
            got = await client.acquire(
                one.job.names, pending_ms=load_ms, first_block=one.job.first * self._pages.ratio
            )
            one.client, one.refs, one.lease = client, list(got.ready), got.lease
            if got.pending:
                arrived = await client.wait_ready(got.pending, deadline_ms=load_ms)
                one.refs += got.pending[:arrived]
        except KvStoreError as error:
            self._link.failed("load", error)

    def _copy(self, held: Sequence[_Held]) -> None:
        """Copy layer after layer; what cannot be read any more counts as not there."""
        with self._changed:
            if self._abandoned or self._held is not held:
                return
            self._copying = True
        try:
            self._copy_layers(held)
        finally:
            self._end(held)  # by this thread: the loop may have been stopped

    def _copy_layers(self, held: Sequence[_Held]) -> None:
        layers = self._pages.layout.layers
        for layer in range(layers):
            for one in held:
                self._copy_layer(one, layer)
            if layer == layers - 1:
                for one in held:
                    one.good = _still_good(one)
            with self._changed:
                self._layers_done = layer + 1
                self._changed.notify_all()

    def _copy_layer(self, one: _Held, layer: int) -> None:
        ratio = self._pages.ratio
        for place, ref in enumerate(one.refs):
            assert one.client is not None
            try:
                source = one.client.view(ref)
            except KvStoreError:  # its arena is gone: a miss from here on
                del one.refs[place:]
                return
            self._pages.load_layer(source, one.job.blocks[place // ratio], place % ratio, layer)

    async def _release(self, one: _Held) -> None:
        if one.client is None or not one.lease:
            return
        try:
            await one.client.settle(release=[one.lease])
        except KvStoreError as error:  # what was copied and checked stays good
            self._link.failed("release", error)


def _still_good(one: _Held) -> int:
    """Return how many slots, from the first, were not given to another name meanwhile."""
    for at, ref in enumerate(one.refs):
        if one.client is None or not one.client.still(ref):
            return at
    return len(one.refs)
