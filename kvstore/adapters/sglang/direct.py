"""The calls of SGLang's direct linker over the store, without a package of SGLang's.

    lookup   Acquire ─▶ restorable lengths; what was found stays leased for the request
    start    ─▶ loader: layer 0 of every page, told; … layer n-1; still the same blocks? told
    offload  ─▶ writer: wait for the forward, gather pages, store; its result in the order asked

`lookup` is the scheduler's and the only one that waits for the node; the rest is done by two
threads. Ranks have to stay in step, so what is said depends on the arguments alone: a
load or an offload that cannot be done ends as a failure, in its turn.
"""

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, NamedTuple, Protocol, TypeVar

from kvstore.adapters.held import Held
from kvstore.adapters.opaque import PART_BYTES, Block, OpaqueBlocks, adapter_metrics
from kvstore.adapters.sglang.layers import LayerCounter
from kvstore.adapters.sglang.pools import SidePool, hit_of
from kvstore.core.errors import Unreachable
from kvstore.core.limits import MAX_NAMES_PER_CALL
from kvstore.core.names import BlockName

MAX_HELD: Final = 256
"""Requests whose finds stay leased; the oldest is let go for one more."""
MAX_OFFLOADS: Final = 1_024
"""Offloads that wait; each keeps its pages from being evicted. Later ones fail in their turn."""
WINDOW_TRIES: Final = 4
"""Lengths that are tried before a request counts as not found."""

_LOG: Final = logging.getLogger(__name__)
_Value = TypeVar("_Value")
_Holds = dict[str, tuple[Sequence[BlockName], Held]]
"""By pool: the names that were asked for, and what of them is leased."""


class Part(NamedTuple):
    """What one pool has to do for a request."""

    pool: str
    names: Sequence[BlockName]
    rows: Sequence[int] = ()
    """The pages' first rows; none for a lookup."""
    trailing: bool = False
    """The pool needs only the last pages before a length's end, as many as there are names."""


class Pages(Protocol):
    """What is done with a device pool; `device.DevicePages` is one."""

    page_bytes: int

    def scatter(
        self, layer: int, rows: Sequence[int], fetch: Callable[[int, int, int, int], None]
    ) -> None:
        """Bring one layer of pages in."""

    def gather(self, rows: Sequence[int]) -> tuple[object, list[Block]]:
        """Copy pages out; the first is kept as long as the blocks are read."""
        ...


class Pool(NamedTuple):
    """A device pool and its blocks in the store."""

    pages: Pages
    blocks: OpaqueBlocks


@dataclass(slots=True)
class _Queued:
    parts: Sequence[Part]
    held: _Holds = field(default_factory=dict)


class DirectStore:
    """The direct loads and offloads of one rank. Called by its scheduler's thread alone."""

    def __init__(
        self, pools: Mapping[str, Pool], *, layers: int, writes: bool, wait_ms: int, stall_ms: int
    ) -> None:
        """`writes` is False for a rank whose pages another stores; `wait_ms` is for what is below
        DRAM, once a request.
        """
        self.counter = LayerCounter(layers, stall_ms=stall_ms)
        self._pools = pools
        self._writes = writes
        self._wait_ms = wait_ms
        self._stall_s = stall_ms / 1_000
        self._held: OrderedDict[str, _Holds] = OrderedDict()
        self._waited: OrderedDict[str, None] = OrderedDict()
        self._queued: dict[str, _Queued] = {}
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="kvstore-load")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kvstore-store")
        self._loads: set[Future[None]] = set()
        self._offloads: deque[Future[bool]] = deque()

    def lookup(self, rid: str, parts: Sequence[Part]) -> list[int]:
        """Return every length, in pages, that all pools can restore, ascending; [] for none."""
        self._let_go(rid)
        wait_ms = 0 if rid in self._waited else self._wait_ms
        _bounded(self._waited, rid, None)
        held: _Holds = {}
        pages, names = self._prefix(parts, held, wait_ms)
        restorable = self._with_windows(parts, names[:pages], held) if pages else []
        if restorable:
            for old in _bounded(self._held, rid, held):
                _release(old)
        else:
            _release(held)
        return restorable

    def queue(self, rid: str, parts: Sequence[Part]) -> bool:
        """Note a load for the next `start`; False where the parts are none of these pools'."""
        if not parts or any(part.pool not in self._pools for part in parts):
            return False
        self.cancel(rid)
        self._queued[rid] = _Queued(parts, self._held.pop(rid, {}))
        return True

    def cancel(self, rid: str) -> bool:
        """Forget a load that was not started; say whether there was one."""
        queued = self._queued.pop(rid, None)
        if queued is not None:
            _release(queued.held)
        return queued is not None

    def start(self, ready: Callable[[], None]) -> int:
        """Begin all queued loads once `ready` returned; return their number, -1 where none is."""
        if not self._queued:
            return -1
        queued, self._queued = self._queued, {}
        index = self.counter.begin()
        loading = self._loader.submit(self._load, index, list(queued.values()), ready)
        self._loads = {one for one in self._loads if not one.done()} | {loading}
        return index

    def finish(self, index: int) -> bool:
        """Wait until a load writes no more; say whether all of it is there."""
        return self.counter.finish(index)

    def offload(self, parts: Sequence[Part], ready: Callable[[], None]) -> bool:
        """Begin to store pages once `ready` returned; its result comes in its turn."""
        if not parts:
            return False
        waiting = sum(not one.done() for one in self._offloads)
        if not self._writes or waiting >= MAX_OFFLOADS:
            done: Future[bool] = Future()
            done.set_result(not self._writes)
            if self._writes:
                adapter_metrics().refused.labels("sglang").inc()
            self._offloads.append(done)
        else:
            self._offloads.append(self._writer.submit(self._store, parts, ready))
        return True

    def completed(self) -> int:
        """Return how many offloads, from the oldest, have ended."""
        return next((at for at, one in enumerate(self._offloads) if not one.done()),
                    len(self._offloads))  # fmt: skip

    def pop(self) -> bool:
        """Return whether the oldest ended offload stored all of its pages, and forget it."""
        assert self.completed(), "no offload has ended"
        return self._offloads.popleft().result()

    def reset(self) -> None:
        """End all transfers and forget them; raises `Unreachable` where one does not end."""
        for rid in list(self._queued):
            self.cancel(rid)
        for rid in list(self._held):
            self._let_go(rid)
        self._waited.clear()
        self.counter.reset()
        for one in self._offloads:
            one.cancel()
        stuck = set(wait(self._loads, self._stall_s).not_done)
        stuck_too = wait([one for one in self._offloads if not one.cancelled()], self._stall_s)
        if stuck or stuck_too.not_done:
            raise Unreachable(f"transfers did not end within {self._stall_s} s")
        self._loads.clear()
        self._offloads.clear()

    def close(self) -> None:
        """End the transfers, the threads and the sessions."""
        try:
            self.reset()
        finally:
            self._loader.shutdown(wait=False, cancel_futures=True)
            self._writer.shutdown(wait=False, cancel_futures=True)
            for pool in self._pools.values():
                pool.blocks.close()

    def _let_go(self, rid: str) -> None:
        _release(self._held.pop(rid, {}))

    def _prefix(
        self, parts: Sequence[Part], held: _Holds, wait_ms: int
    ) -> tuple[int, Sequence[BlockName]]:
        """Lease what the pools that need every page have in common; return pages and names."""
        names: Sequence[BlockName] = ()
        pages = MAX_NAMES_PER_CALL
        for part in parts:
            if part.trailing or part.pool not in self._pools:
                continue
            names = part.names[:pages]
            found = self._pools[part.pool].blocks.hold(names, wait_ms=wait_ms)
            if found is None:
                return 0, names
            held[part.pool] = names[: found.blocks], found
            pages = found.blocks
        return (pages, names) if names else (0, names)

    def _with_windows(
        self, parts: Sequence[Part], names: Sequence[BlockName],
        held: _Holds,
    ) -> list[int]:  # fmt: skip
        """Return the legal lengths, and lease the last pages before the longest of them."""
        sides = [part for part in parts if part.trailing]
        have = [
            SidePool(part.pool, "trailing_pages", self._pools[part.pool].blocks.held(names),
                     trailing=max(1, len(part.names)))
            for part in sides
        ]  # fmt: skip
        legal = hit_of(len(names), have).restorable
        for _ in range(WINDOW_TRIES):
            if not legal or self._hold_windows(sides, names[: legal[-1]], held):
                return legal
            legal.pop()
        return []

    def _hold_windows(
        self, sides: Sequence[Part], names: Sequence[BlockName],
        held: _Holds,
    ) -> bool:  # fmt: skip
        for part in sides:
            if (old := held.pop(part.pool, None)) is not None:
                old[1].release()
            window = names[max(0, len(names) - max(1, len(part.names))) :]
            found = self._pools[part.pool].blocks.hold(window)
            if found is None:
                return False
            held[part.pool] = window, found
            if found.blocks < len(window):
                return False
        return True

    def _load(self, index: int, batch: Sequence[_Queued], ready: Callable[[], None]) -> None:
        try:
            if not self._bring(index, batch, ready):
                self.counter.fail(index)
        finally:
            # First of all: the forward and the scheduler wait for it, with a deadline.
            self.counter.end(index)
            for queued in batch:
                _release(queued.held)

    def _bring(self, index: int, batch: Sequence[_Queued], ready: Callable[[], None]) -> bool:
        """Bring a batch in; say whether all of it is there and right. Fails by saying no."""
        began, jobs = time.perf_counter(), list[tuple[Pool, Part, Held]]()
        whole = False
        try:
            ready()
            jobs = self._jobs(batch)
            whole = self._layers(index, jobs)
        except Exception:  # task boundary: the forward must be let go on, whatever happened
            _LOG.exception("a load failed")
            adapter_metrics().failures.labels("sglang", "load").inc()
        finally:
            for pool, part, _ in jobs:
                pool.blocks.count("load", [whole] * len(part.names), began)
        return whole

    def _jobs(self, batch: Sequence[_Queued]) -> list[tuple[Pool, Part, Held]]:
        """Pair every part with its leased blocks; raises `Unreachable` where some are lost."""
        jobs = []
        for queued in batch:
            for part in queued.parts:
                pool = self._pools[part.pool]
                names, held = queued.held.get(part.pool, ((), None))
                if held is None or list(names[: len(part.names)]) != list(part.names):
                    # Another rank chose another length, or the find was let go: asked again.
                    if held is not None:
                        held.release()
                    held = pool.blocks.hold(part.names, wait_ms=self._wait_ms)
                    if held is not None:
                        queued.held[part.pool] = part.names, held
                if held is None or held.blocks < len(part.names):
                    raise Unreachable(f"pages of pool {part.pool} are not there any more")
                jobs.append((pool, part, held))
        return jobs

    def _layers(self, index: int, jobs: Sequence[tuple[Pool, Part, Held]]) -> bool:
        """Bring the layers in, one after the other; say whether all are there and right."""
        for layer in range(self.counter.num_layers):
            for pool, part, held in jobs:
                pool.pages.scatter(layer, part.rows, held.copy)
            last = layer == self.counter.num_layers - 1
            if last and not all(held.whole(len(part.names)) for _, part, held in jobs):
                return False  # reused while it was copied
            if not self.counter.land(index):
                return False
        return True

    def _store(self, parts: Sequence[Part], ready: Callable[[], None]) -> bool:
        try:
            ready()
            return all(self._store_part(part) for part in parts)
        except Exception:  # task boundary: the tree pairs results with offloads by their order
            _LOG.exception("an offload failed")
            adapter_metrics().failures.labels("sglang", "store").inc()
            return False

    def _store_part(self, part: Part) -> bool:
        pool = self._pools[part.pool]
        step = max(1, PART_BYTES // pool.pages.page_bytes)
        edges = [*range(0, len(part.names), step), len(part.names)]
        for first, last in pairwise(edges):
            kept, blocks = pool.pages.gather(part.rows[first:last])
            stored = pool.blocks.store(part.names[first:last], blocks)
            del kept
            if not all(stored):
                return False
        return True


def _release(held: _Holds) -> None:
    for _, found in held.values():
        found.release()


def _bounded(kept: "OrderedDict[str, _Value]", rid: str, value: _Value) -> list[_Value]:
    """Note `rid` as the newest; return what has to go for it."""
    kept[rid] = value
    kept.move_to_end(rid)
    return [kept.popitem(last=False)[1] for _ in range(len(kept) - MAX_HELD)]
