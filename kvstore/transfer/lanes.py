"""Carries moves out: bounded, loads before prefetches before write-backs, in order inside a lane.

    submit ──▶ [load ……] [prefetch ……] [write back ……] ──batches──▶ carry(lane, items)

Each lane has a bound on what may wait and on how many batches run at once, so that a flood of
write-backs never takes the last place from a load.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, Generic, TypeVar

Item = TypeVar("Item")
_log = logging.getLogger(__name__)


class Lane(IntEnum):
    """Kinds of moves, most urgent first."""

    LOAD = 0
    """Somebody waits for it."""
    PREFETCH = 1
    """Somebody will."""
    WRITE_BACK = 2
    """Nobody does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneLimits:
    """Bounds of one lane."""

    batches: int
    """Batches under way at once."""
    waiting: int = 65_536
    """Items that may wait; more are refused."""


BATCH_BYTES: Final = 2 << 20
"""Enough for small blocks to share an operation's overhead."""
BATCH_ITEMS: Final = 32


@dataclass(slots=True)
class _Queue(Generic[Item]):
    limits: LaneLimits
    waiting: "deque[tuple[Item, int]]" = field(default_factory=deque)
    waiting_bytes: int = 0
    running: int = 0
    running_bytes: int = 0


class Lanes(Generic[Item]):
    """Moves of one tier. One event loop's."""

    def __init__(
        self,
        carry: Callable[[Lane, list[Item]], Coroutine[None, None, None]],
        limits: Mapping[Lane, LaneLimits],
        *,
        batches: int,
        batch_bytes: int = BATCH_BYTES,
        on_failed: Callable[[Lane], None] = lambda lane: None,
    ) -> None:
        """`carry` moves one batch and must not raise; `batches` run at once over all lanes.

        A batch ends with the item that reaches `batch_bytes`. Where `carry` raises all the same,
        `on_failed` is told, to count it.
        """
        self._on_failed = on_failed
        self._carry = carry
        self._batch_bytes = batch_bytes
        self._batches = batches
        self._queues: dict[Lane, _Queue[Item]] = {
            lane: _Queue(limits[lane]) for lane in sorted(limits)
        }
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    def submit(self, lane: Lane, items: Sequence[tuple[Item, int]]) -> int:
        """Queue (item, bytes) pairs; returns how many, from the first, the lane had room for."""
        queue = self._queues[lane]
        room = 0 if self._closed else queue.limits.waiting - len(queue.waiting)
        taken = items[: max(room, 0)]
        if taken:
            queue.waiting.extend(taken)
            queue.waiting_bytes += sum(size for _, size in taken)
            self._idle.clear()
            self._start_some()
        return len(taken)

    def hurry(self, source: Lane, target: Lane, wanted: Callable[[Item], bool]) -> int:
        """Move what waits in one lane and is `wanted` to another, in order; returns how many.

        As many as the other has room for.
        """
        queue = self._queues[source]
        if not queue.waiting:
            return 0
        into = self._queues[target]
        room = 0 if self._closed else into.limits.waiting - len(into.waiting)
        kept: deque[tuple[Item, int]] = deque()
        moved: list[tuple[Item, int]] = []
        for one in queue.waiting:
            (moved if len(moved) < room and wanted(one[0]) else kept).append(one)
        queue.waiting = kept
        queue.waiting_bytes -= sum(size for _, size in moved)
        return self.submit(target, moved)

    def waiting(self, lane: Lane) -> int:
        """Return how many items of a lane wait."""
        return len(self._queues[lane].waiting)

    def unfinished_bytes(self, lane: Lane) -> int:
        """Return the bytes of a lane that wait or are under way."""
        return self._queues[lane].waiting_bytes + self._queues[lane].running_bytes

    async def idle(self, deadline_s: float) -> bool:
        """Wait until nothing waits or runs; False at the deadline."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> list[Item]:
        """Stop; batches under way are cancelled. Returns what had not begun."""
        self._closed = True
        left = [item for queue in self._queues.values() for item, _ in queue.waiting]
        for queue in self._queues.values():
            queue.waiting.clear()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return left

    def _start_some(self) -> None:
        for lane, queue in self._queues.items():
            while (
                queue.waiting
                and queue.running < queue.limits.batches
                and len(self._tasks) < self._batches
            ):
                self._start(lane, queue)

    def _start(self, lane: Lane, queue: "_Queue[Item]") -> None:
        batch: list[Item] = []
        size = 0
        while queue.waiting and size < self._batch_bytes and len(batch) < BATCH_ITEMS:
            item, item_bytes = queue.waiting.popleft()
            batch.append(item)
            size += item_bytes
        queue.waiting_bytes -= size
        queue.running_bytes += size
        queue.running += 1
        task = asyncio.create_task(self._carry(lane, batch))
        self._tasks.add(task)

        def ended(task: "asyncio.Task[None]") -> None:
            self._tasks.discard(task)
            queue.running -= 1
            queue.running_bytes -= size
            if not task.cancelled() and (error := task.exception()) is not None:
                _log.error("a %s batch failed", lane.name.lower(), exc_info=error)
                self._on_failed(lane)
            if not self._closed:
                self._start_some()
            if not self._tasks and not any(one.waiting for one in self._queues.values()):
                self._idle.set()

        task.add_done_callback(ended)
