"""Blocks between memory and a device: waited for under a stall deadline, and judged.

A waiter that leaves takes back what has not begun; what a thread has goes on, and its end says
nothing about the device of now.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.core.outcomes import Outcome
from kvstore.tiers.device_health import DeviceHealth
from kvstore.tiers.device_threads import Operation, until_stalled


@dataclass(slots=True, eq=False)
class Flight:
    """One block under way."""

    operation: Operation
    place: int = 0
    """Where on the device, for tiers that number their places."""
    outcome: Outcome | None = None
    late: bool = False
    """Nobody waits for it any more."""


async def see_through(
    health: DeviceHealth, flights: Sequence[Flight], deadline_ms: int, operation: str
) -> None:
    """Wait for flights; at a stall take back what has not begun and leave the rest."""
    futures = [flight.operation.future for flight in flights]
    try:
        await until_stalled(futures, deadline_ms / 1_000)
        if any(flight.outcome is None for flight in flights):
            health.stalled(operation)
    finally:
        for flight in flights:
            if flight.outcome is None:
                flight.late = True
                flight.operation.take_back()


def judge(
    health: DeviceHealth, operation: str, flight: Flight, future: "asyncio.Future[Any]"
) -> Outcome:
    """Return what a flight came to, and tell the breaker. A read's future holds its outcome."""
    if future.cancelled():
        health.abandoned(operation)
        return Outcome.LATE if flight.late else Outcome.REFUSED
    error = future.exception()
    if error is not None:
        health.failed(operation, error)
        return Outcome.REFUSED
    if not flight.late:
        health.succeeded(operation)
    return Outcome.HIT if operation == "write" else Outcome(future.result())


def outcomes_of(started: Sequence[Flight | Outcome]) -> list[Outcome]:
    """Return one outcome for each item: what was decided at once, or what its flight came to."""
    return [one.outcome or Outcome.LATE if isinstance(one, Flight) else one for one in started]
