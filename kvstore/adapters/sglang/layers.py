"""How far a load of several layers has come: the forward waits for a layer, the loader tells.

begin ─▶ landed layer 0 ─▶ … ─▶ landed layer n-1 ─▶ ended
              └─▶ failed ──────────────────────────┘
"""

import threading
from dataclasses import dataclass

from kvstore.core.errors import Unreachable


@dataclass(slots=True)
class _Load:
    landed: int = 0
    """Layers that are in device memory, from the first."""
    failed: bool = False
    ended: bool = False
    """Nobody writes device memory for it any more."""


class LayerCounter:
    """Loads by number, in the order of their starts. Safe to use from several threads.

    A layer that failed lets the forward go on with whatever is there: raising into it would end
    the engine. `finish` tells, before anything that was computed from it is used.
    """

    def __init__(self, layers: int, *, stall_ms: int) -> None:
        """`stall_ms` without any layer landing is a failure of the load."""
        assert layers > 0 and stall_ms > 0
        self.layers = layers
        self._stall_s = stall_ms / 1_000
        self._changed = threading.Condition()
        self._loads: dict[int, _Load] = {}
        self._last = -1
        self._consumer = -1

    def begin(self) -> int:
        """Return the number of a new load."""
        with self._changed:
            self._last += 1
            self._loads[self._last] = _Load()
            return self._last

    def set_consumer(self, index: int) -> None:
        """Let `wait_until` mean the load `index`; -1 or one that is over: nothing is waited for."""
        self._consumer = index

    def wait_until(self, threshold: int) -> None:
        """Return when layer `threshold` has landed or never will."""
        with self._changed:
            load = self._loads.get(self._consumer)
            if load is None:
                return
            while not (load.landed > threshold or load.failed or load.ended):
                before = load.landed
                if not self._changed.wait(self._stall_s) and load.landed == before:
                    load.failed = True

    def land(self, index: int) -> bool:
        """Tell that the next layer is in device memory; False: stop, nobody wants it any more."""
        with self._changed:
            load = self._loads.get(index)
            if load is None or load.failed:
                return False
            load.landed += 1
            self._changed.notify_all()
            return True

    def fail(self, index: int) -> None:
        """Let everyone who waits for a layer of this load go on."""
        with self._changed:
            if (load := self._loads.get(index)) is not None:
                load.failed = True
                self._changed.notify_all()

    def end(self, index: int) -> None:
        """Tell that device memory is not written any more for this load."""
        with self._changed:
            if (load := self._loads.get(index)) is not None:
                load.ended = True
                self._changed.notify_all()

    def finish(self, index: int) -> bool:
        """Wait for the end of a load and forget it; say whether every layer landed.

        Raises `Unreachable` where its writer does not come to an end: its pages must not be given
        to anyone else, so the engine has to be stopped.
        """
        with self._changed:
            load = self._loads.get(index)
            if load is None:
                return True
            while not load.ended:
                before = load.landed
                moved = self._changed.wait(self._stall_s)
                if moved or load.landed != before or load.ended:
                    continue
                if load.failed:  # it was told to stop, and a whole deadline passed since
                    raise Unreachable(f"load {index} still writes device memory")
                load.failed = True
            del self._loads[index]
            return not load.failed and load.landed == self.layers

    def reset(self) -> None:
        """Forget all loads; whoever waits goes on."""
        with self._changed:
            for load in self._loads.values():
                load.failed = True
            self._loads.clear()
            self._last = self._consumer = -1
            self._changed.notify_all()
