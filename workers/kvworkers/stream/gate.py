"""Which layers of a load have come, for a step that computes them while later ones still come.

    mover's thread:   group 0 ─▶ come ─▶ group 1 ─▶ come …            the load ends ─▶ end
    compute thread:   pass_layer(0) … layers of group 0 … pass_layer(8) …

A load moves all its blocks' first layers, then their next ones (DESIGN 2.3), so a step can follow
it group by group. A load that fails lets the step go on too: what it computes for that sequence
is thrown away then, and the other sequences' rows of the same step are right.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise, starmap
from typing import Any, Final

import torch

from kvstore.core.errors import Unreachable

GROUP_LAYERS: Final = 8
"""Layers that come together: runs long enough for a bus, short enough to hide."""
_FIRST_GROUPS: Final = (2, 2, 4)
_LAST_GROUPS: Final = (1, 1, 2, 4)
"""From the end on."""
_PATIENCE_S: Final = 30.0
"""Longer than any load: a mover that is lost must not hold the compute thread for ever."""


def layer_groups(layers: int) -> tuple[range, ...]:
    """Return the layers of a model in the groups that loads bring them in.

    Small ones first and last: computing begins behind the first group and ends behind the last.
    """
    left = layers
    first, last = list[int](), list[int]()
    for sizes, ends in ((_LAST_GROUPS, last), (_FIRST_GROUPS, first)):
        for size in sizes:
            if left >= 2 * size:
                ends.append(size)
                left -= size
    middle = [GROUP_LAYERS] * (left // GROUP_LAYERS)
    middle += [left % GROUP_LAYERS] if left % GROUP_LAYERS else []
    starts = accumulate((*first, *middle, *reversed(last)), initial=0)
    return tuple(starmap(range, pairwise(starts)))


class Gate:
    """One load's progress. The mover opens it, one step passes it; any thread may ask."""

    def __init__(self, layers: int, *, changed: Callable[[], object]) -> None:
        """`changed` is called on the mover's thread whenever more has come."""
        self.groups = layer_groups(layers)
        self._starts = {group.start: index for index, group in enumerate(self.groups)}
        self._changed = changed
        self._lock = threading.Condition()
        self._events: list[Any] = []
        self._ended = False

    @property
    def come_groups(self) -> int:
        """Groups that are in their pages, or queued to be there before their event."""
        return len(self._events)

    def come(self, event: Any = None) -> None:
        """Take note that the next group has come, or will have when the CUDA `event` happens."""
        with self._lock:
            assert self.come_groups < len(self.groups) and not self._ended
            self._events.append(event)
            self._lock.notify_all()
        self._changed()

    def end(self) -> None:
        """Take note that no more will come, because all has or because the load failed."""
        with self._lock:
            self._ended = True
            self._lock.notify_all()
        self._changed()

    def pass_layer(self, layer: int) -> None:
        """Hold a step until `layer` is there, or the load has ended without it.

        On a GPU the current stream is told to wait, the thread only until that can be said.
        Raises `Unreachable` for a load that does neither: nothing may be computed over its pages.
        """
        group = self._starts.get(layer)
        if group is None:
            return
        with self._lock:
            if not self._lock.wait_for(
                lambda: self._ended or self.come_groups > group, _PATIENCE_S
            ):
                raise Unreachable(f"a load brought nothing of layer {layer} in {_PATIENCE_S:g} s")
            event = self._events[group] if self.come_groups > group else None
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def lets_begin(self, *, alone: bool) -> bool:
        """Say whether a step should begin behind it now.

        With the device to itself it is made ready before the first group has come; beside others,
        which would be held up as well, it begins when all but the last have.
        """
        return alone or self.come_groups >= max(1, len(self.groups) - 1)


@dataclass(frozen=True, slots=True)
class Follower:
    """Who wants to compute behind a load. Both are called on the event loop."""

    begun: Callable[[int, Gate], None]
    """Told how many blocks there will be after a load that has begun, and its gate."""
    moved: Callable[[], None]
    """Told that a step may begin now that could not before."""
