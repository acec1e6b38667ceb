"""An event loop whose clock jumps to the next timer as soon as nothing else is to be done.

Threads and sockets stay real: while one of them works (`busy`), time stands still.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple

_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")
_LOOK_S = 0.05
"""Real seconds that a thread is given before it is asked again whether it works still."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """Hours in seconds. `busy` says that something outside the loop will call back soon."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.busy: Callable[[], bool] = lambda: False
        self.executing = 0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        """Return the simulated clock."""
        return self.now_s

    def run_in_executor(
        self,
        executor: Executor | None,
        func: Callable[[*_Arguments], _Result],
        *args: *_Arguments,
    ) -> "asyncio.Future[_Result]":
        """Run in a thread; the clock waits for it."""
        self.executing += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._executed)
        return future

    def _executed(self, future: "asyncio.Future[Any]") -> None:
        self.executing -= 1


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready; where nothing is and nobody works, the time has passed."""
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None or self._loop.executing or self._loop.busy():
            return super().select(_LOOK_S)
        self._loop.now_s += max(timeout, 1e-6)
        return []


def run_virtually(work: Callable[[VirtualLoop], Coroutine[Any, Any, _Result]]) -> _Result:
    """Run `work(loop)` on a loop of its own."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(work(loop))
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
