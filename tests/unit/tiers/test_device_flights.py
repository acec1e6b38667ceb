"""What becomes of a block under way when its waiter leaves, its device fails, or all is well."""

import asyncio
import errno
import threading

from prometheus_client import CollectorRegistry

from kvstore.core.outcomes import Outcome
from kvstore.observe.metrics import TierMetrics
from kvstore.tiers.device_flights import Flight, judge, outcomes_of, see_through
from kvstore.tiers.device_health import DeviceHealth
from kvstore.tiers.device_threads import DeviceThreads


async def test_a_stall_takes_back_what_has_not_begun_and_leaves_the_rest() -> None:
    threads = DeviceThreads(1, 1)
    health = DeviceHealth("t", TierMetrics(CollectorRegistry()), lambda: 0.0)
    go = threading.Event()
    flights = [
        Flight(threads.submit(go.wait, write=False)),
        Flight(threads.submit(lambda: None, write=False)),
    ]
    await see_through(health, flights, 30, "read")
    assert all(flight.late for flight in flights)
    assert outcomes_of([*flights, Outcome.MISS]) == [Outcome.LATE, Outcome.LATE, Outcome.MISS]
    begun, waiting = (flight.operation.future for flight in flights)
    assert waiting.cancelled()
    assert not begun.done(), "the device has it still"
    assert judge(health, "read", flights[1], waiting) is Outcome.LATE
    go.set()
    await begun
    threads.close()


async def test_a_failure_is_refused_and_told_to_the_breaker() -> None:
    health = DeviceHealth("t", TierMetrics(CollectorRegistry()), lambda: 0.0)
    threads = DeviceThreads(1, 1)

    def fail() -> None:
        raise OSError(errno.EIO, "bad")

    for _ in range(3):
        flight = Flight(threads.submit(fail, write=True))
        await asyncio.wait([flight.operation.future])
        assert judge(health, "write", flight, flight.operation.future) is Outcome.REFUSED
    assert not health.would_enter("write")
    good = Flight(threads.submit(lambda: Outcome.CORRUPT, write=False))
    await good.operation.future
    assert judge(health, "read", good, good.operation.future) is Outcome.CORRUPT
    threads.close()
