"""A circuit breaker: stops asking a device that fails, and tries it again now and then. Pure.

    closed --`threshold` failures in a row--> open --after a pause--> half open
    half open --success--> closed          half open --failure--> open, with twice the pause

The pattern is Nygard's ("Release It!", 2007). Time is passed in.
"""

from dataclasses import dataclass, field
from enum import IntEnum


class BreakerState(IntEnum):
    """What a breaker lets through. The numbers are what the metric shows."""

    CLOSED = 0
    """Everything."""
    HALF_OPEN = 1
    """One operation at a time, as a probe."""
    OPEN = 2
    """Nothing."""


@dataclass(slots=True)
class Breaker:
    """One breaker; ask `enter` before an operation, and tell `succeeded` or `failed` after it."""

    threshold: int = 3
    pause_ms: float = 1_000.0
    pause_max_ms: float = 30_000.0
    opened: int = 0
    """How often it opened."""
    _failures: int = 0
    _until_ms: float = 0.0
    _pause_ms: float = field(default=0.0)
    _probing: bool = False

    def state(self, now_ms: float) -> BreakerState:
        """Return the state at this moment."""
        if self._failures < self.threshold:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if now_ms >= self._until_ms else BreakerState.OPEN

    def would_enter(self, now_ms: float) -> bool:
        """Say whether `enter` would be granted, without taking the probe."""
        state = self.state(now_ms)
        return state is BreakerState.CLOSED or (
            state is BreakerState.HALF_OPEN and not self._probing
        )

    def enter(self, now_ms: float) -> bool:
        """Say whether an operation may start now; half open, the first one becomes the probe."""
        if not self.would_enter(now_ms):
            return False
        self._probing = self.state(now_ms) is BreakerState.HALF_OPEN
        return True

    def succeeded(self) -> None:
        """Note an operation that worked."""
        self._failures = 0
        self._pause_ms = 0.0
        self._probing = False

    def failed(self, now_ms: float) -> None:
        """Note an operation that failed or was late."""
        before = self.state(now_ms)
        self._failures += 1
        self._probing = False
        if self.state(now_ms) is BreakerState.CLOSED or before is BreakerState.OPEN:
            return  # not yet, or the late end of what started before it opened
        self.opened += 1
        self._pause_ms = min(max(2 * self._pause_ms, self.pause_ms), self.pause_max_ms)
        self._until_ms = now_ms + self._pause_ms

    def abandoned(self) -> None:
        """Note an operation that ended without saying anything about the device."""
        self._probing = False
