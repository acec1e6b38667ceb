"""How a device fares: breakers for reads and writes, and what is counted of its operations."""

import errno
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence

from kvstore.core.outcomes import Outcome
from kvstore.observe.metrics import TierMetrics
from kvstore.tiers.breaker import Breaker

_log = logging.getLogger(__name__)


class DeviceHealth:
    """Breakers and counts of one tier. Operations are `read` and `write`."""

    def __init__(self, tier: str, metrics: TierMetrics, now_ms: Callable[[], float]) -> None:
        self._tier = tier
        self._metrics = metrics
        self._now_ms = now_ms
        self._breakers = {"read": Breaker(), "write": Breaker()}
        for operation in self._breakers:  # from the start: alerts watch it
            metrics.device_errors.labels(tier, operation, os.strerror(errno.EIO))
        self.reads: Counter[int] = Counter()
        """Blocks read so far, by the number of their outcome."""

    def would_enter(self, operation: str) -> bool:
        """Say whether an operation would be let through now."""
        return self._breakers[operation].would_enter(self._now_ms())

    def enter(self, operation: str) -> bool:
        """Say whether an operation may start."""
        return self._breakers[operation].enter(self._now_ms())

    def succeeded(self, operation: str) -> None:
        """Note an operation that worked, in time."""
        self._breakers[operation].succeeded()

    def abandoned(self, operation: str) -> None:
        """Note one that was taken back before the device had it."""
        self._breakers[operation].abandoned()

    def stalled(self, operation: str) -> None:
        """Note a wait in which nothing moved."""
        self._breakers[operation].failed(self._now_ms())

    def failed(self, operation: str, error: BaseException) -> None:
        """Note and count an operation that the device failed."""
        if not isinstance(error, OSError):
            _log.error("%s %s: unexpected %r", self._tier, operation, error)
        kind = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "other"
        self._metrics.device_errors.labels(self._tier, operation, kind).inc()
        breaker = self._breakers[operation]
        opened = breaker.opened
        breaker.failed(self._now_ms())
        if breaker.opened > opened:
            # Its text: a record that is kept would keep the frames, and the buffers in them.
            _log.warning("%s %s breaker open: %s", self._tier, operation, str(error))

    def count(self, operation: str, outcomes: Sequence[Outcome], sizes: Sequence[int]) -> None:
        """Count a batch of blocks of these sizes by how they ended."""
        numbers = Counter(map(int, outcomes))
        if operation == "read":
            self.reads.update(numbers)
        for number, blocks in numbers.items():
            name = Outcome(number).name.lower()
            self._metrics.operations.labels(self._tier, operation, name).inc(blocks)
        moved = sum(size for size, one in zip(sizes, outcomes, strict=True) if one is Outcome.HIT)
        self._metrics.moved_bytes.labels(self._tier, operation).inc(moved)

    def measure(self, in_device: int, queued: int) -> None:
        """Set the gauges."""
        metrics = self._metrics
        metrics.in_device.labels(self._tier).set(in_device)
        metrics.queued.labels(self._tier).set(queued)
        for operation, breaker in self._breakers.items():
            metrics.breaker.labels(self._tier, operation).set(breaker.state(self._now_ms()))
