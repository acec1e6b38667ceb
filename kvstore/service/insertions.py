"""A policy, and the committed slots that it has not heard of yet. Pure.

What a policy does with two thousand new blocks takes twice as long as committing them, and the
writer does not wait for it: the policy hears of them when it is next looked at. No change overtakes
them: whoever removes a block or asks for victims looks at the policy.
"""

from array import array
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore.directory.policy import BlockKey, Policy


class Insertions:
    """Tells one policy of what the slots of one table hold."""

    def __init__(self, policy: Policy, key: NDArray[np.object_], parent: "array[int]") -> None:
        """`key` and `parent` are the table's columns."""
        self._policy = policy
        self._key = key
        self._parent = parent
        self._untold: deque[tuple[Sequence[int], float]] = deque()

    @property
    def policy(self) -> Policy:
        """The policy, told of everything."""
        while self._untold:
            self.tell(*self._untold.popleft())
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._policy = policy

    def tell(self, slots: Sequence[int], now_ms: float) -> None:
        """Tell of committed slots, in prefix order; one call for each unbroken run."""
        at = np.asarray(slots, np.int64)
        keys: list[BlockKey] = self._key[at].tolist()
        parents: list[int] = np.frombuffer(self._parent, np.uint64)[at].tolist()
        start = 0
        for stop in range(1, len(keys) + 1):
            if stop < len(keys) and parents[stop] == keys[stop - 1]:
                continue
            parent = BlockKey(parents[start]) if parents[start] else None
            self._policy.insert(keys[start:stop], parent=parent, now_ms=now_ms)
            start = stop

    def tell_later(self, slots: Sequence[int], now_ms: float) -> None:
        """Tell of committed slots, in prefix order, when the policy is next looked at."""
        self._untold.append((slots, now_ms))
