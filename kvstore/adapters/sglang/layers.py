"""How far a load of several layers has come: the forward waits for a layer, the loader tells.

begin ─▶ landed layer 0 ─▶ … ─▶ landed layer n-1 ─▶ ended
              └─▶ failed ──────────────────────────┘

Loads wait for each other, so what stalls is the loader and not a load: one that waits behind a
slow one is not late as long as anything lands.
"""

import threading
import time
from dataclasses import dataclass

from kvstore.core.errors import Unreachable


@dataclass(slots=True)
class _Load:
    landed: int = 0
    """Layers that are in device memory, from the first."""
    failed: bool = False
    failed_s: float = 0.0
    """When it was given up; by the monotonic clock."""
    ended: bool = False
    """Nobody writes device memory for it any more."""


class LayerCounter:
    """Loads by number, in the order of their starts. Safe to use from several threads.

    A layer that failed lets the forward go on with whatever is there: raising into it would end
    the engine. `finish` tells, before anything that was computed from it is used.
    """

    num_layers: int
    """Read by SGLang, as is `consumer_index`: before it replays a whole prefill, it waits for the
    last layer itself."""
    consumer_index: int
    """The load that `wait_until` means; -1: none."""

    def __init__(self, layers: int, *, stall_ms: int) -> None:
        """`stall_ms` without the loader telling anything is a failure of the load waited for."""
        assert layers > 0 and stall_ms > 0
        self.num_layers = layers
        self.consumer_index = -1
        self._stall_s = stall_ms / 1_000
        self._changed = threading.Condition()
        self._loads: dict[int, _Load] = {}
        self._last = -1
        self._moved_s = 0.0
        """When the loader last told anything, or got something to do."""

    def begin(self) -> int:
        """Return the number of a new load."""
        with self._changed:
            if all(load.ended for load in self._loads.values()):
                self._moved_s = time.monotonic()
            self._last += 1
            self._loads[self._last] = _Load()
            return self._last

    def set_consumer(self, index: int) -> None:
        """Let `wait_until` mean the load `index`; -1 or one that is over: nothing is waited for."""
        self.consumer_index = index

    def wait_until(self, threshold: int) -> None:
        """Return when layer `threshold` has landed or never will."""
        with self._changed:
            load = self._loads.get(self.consumer_index)
            if load is None:
                return
            while not (load.landed > threshold or load.failed or load.ended):
                self._wait(load)

    def land(self, index: int) -> bool:
        """Tell that the next layer is in device memory; False: stop, nobody wants it any more."""
        with self._changed:
            load = self._loads.get(index)
            if load is None:
                return False
            self._moved_s = time.monotonic()
            if load.failed:
                return False
            load.landed += 1
            self._changed.notify_all()
            return True

    def fail(self, index: int) -> None:
        """Let everyone who waits for a layer of this load go on."""
        with self._changed:
            if (load := self._loads.get(index)) is not None:
                self._give_up(load)

    def end(self, index: int) -> None:
        """Tell that device memory is not written any more for this load."""
        with self._changed:
            if (load := self._loads.get(index)) is not None:
                self._moved_s = time.monotonic()
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
                if not self._wait(load):
                    raise Unreachable(f"load {index} still writes device memory")
            del self._loads[index]
            return not load.failed and load.landed == self.num_layers

    def reset(self) -> None:
        """Forget all loads; whoever waits goes on."""
        with self._changed:
            for load in self._loads.values():
                self._give_up(load)
            self._loads.clear()
            self._last = self.consumer_index = -1

    def _wait(self, load: _Load) -> bool:
        """Wait for anything to change; give the load up where the loader stalls.

        False: it was given up, and the loader has told nothing for a whole deadline since.
        """
        since_s = max(self._moved_s, load.failed_s)
        left_s = since_s + self._stall_s - time.monotonic()
        if left_s > 0:
            self._changed.wait(left_s)
        elif load.failed:
            return False
        else:
            self._give_up(load)
        return True

    def _give_up(self, load: _Load) -> None:
        if not load.failed:
            load.failed, load.failed_s = True, time.monotonic()
        self._changed.notify_all()
