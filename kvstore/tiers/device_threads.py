"""Threads for blocking device calls: reads before writes, bounded, and abandonable.

The event loop decides what runs next, so that a read that arrives now overtakes writes that wait.
The threads are daemons of our own: `concurrent.futures` joins its threads at exit, and a thread in
a call that a dead disk never answers would keep the process from ending.
"""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

_NAME: Final = "kvstore-device"


@dataclass(slots=True, eq=False)
class Operation:
    """One blocking call and the future of what it returns or raises."""

    call: Callable[[], Any]
    write: bool
    future: "asyncio.Future[Any]"
    started: bool = False
    """A thread has it: it ends when the device lets go of it, and not before."""

    def take_back(self) -> None:
        """Cancel it unless it has started."""
        if not self.started:
            self.future.cancel()


class DeviceThreads:
    """Runs calls in `threads` threads, at most `writers` of them writing. One event loop's."""

    def __init__(self, threads: int, writers: int) -> None:
        assert 0 < writers <= threads
        self._loop = asyncio.get_running_loop()
        self._threads = threads
        self._writers = writers
        self._reads: deque[Operation] = deque()
        self._writes: deque[Operation] = deque()
        self._running = 0
        self._writing = 0
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._calls: queue.SimpleQueue[Operation | None] = queue.SimpleQueue()
        for number in range(threads):
            threading.Thread(target=self._run, name=f"{_NAME}-{number}", daemon=True).start()

    @property
    def running(self) -> int:
        """Calls inside the device now."""
        return self._running

    @property
    def queued(self) -> int:
        """Calls that wait for a thread."""
        return len(self._reads) + len(self._writes)

    def submit(self, call: Callable[[], Any], *, write: bool) -> Operation:
        """Run `call` when its turn comes; cancelled at once when this is closed."""
        operation = Operation(call, write, self._loop.create_future())
        if self._closed:
            operation.future.cancel()
            return operation
        (self._writes if write else self._reads).append(operation)
        self._start_some()
        return operation

    def close(self) -> None:
        """Take back what has not started; what runs ends by itself, unwatched."""
        self._closed = True
        for waiting in (self._reads, self._writes):
            for operation in waiting:
                operation.take_back()
            waiting.clear()
        for _ in range(self._threads):
            self._calls.put(None)

    async def drained(self, deadline_s: float) -> bool:
        """Wait until nothing is inside the device; False at the deadline."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _start_some(self) -> None:
        while self._running < self._threads:
            operation = _first_wanted(self._reads)
            if operation is None and self._writing < self._writers:
                operation = _first_wanted(self._writes)
            if operation is None:
                return
            operation.started = True
            self._running += 1
            self._idle.clear()
            self._writing += operation.write
            self._calls.put(operation)

    def _run(self) -> None:
        while (operation := self._calls.get()) is not None:
            result: Any = None
            error: Exception | None = None
            try:
                result = operation.call()
            except Exception as caught:  # task boundary: handed to whoever awaits the future
                error = caught
            try:
                self._loop.call_soon_threadsafe(self._ended, operation, result, error)
            except RuntimeError:
                return  # the loop is closed: nobody is left to hear of it
            # Waiting for the next call must not keep this one's buffers.
            del operation, result, error

    def _ended(self, operation: Operation, result: Any, error: Exception | None) -> None:
        self._running -= 1
        self._writing -= operation.write
        if not self._running:
            self._idle.set()
        future = operation.future
        if not future.done():
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
        if not self._closed:
            self._start_some()


def _first_wanted(waiting: "deque[Operation]") -> Operation | None:
    while waiting:
        operation = waiting.popleft()
        if not operation.future.cancelled():
            return operation
    return None


async def until_stalled(futures: "Sequence[asyncio.Future[Any]]", stall_s: float) -> None:
    """Return when all futures are done, or when none of them ended for `stall_s`."""
    left = sum(not future.done() for future in futures)
    moved = asyncio.Event()

    def ended(_: "asyncio.Future[Any]") -> None:
        nonlocal left
        left -= 1
        moved.set()

    watched = [future for future in futures if not future.done()]
    for future in watched:
        future.add_done_callback(ended)
    try:
        while left:
            moved.clear()
            async with asyncio.timeout(stall_s):
                await moved.wait()
    except TimeoutError:
        return
    finally:
        for future in watched:
            future.remove_done_callback(ended)
