"""What this router has sent out and not yet heard back about. Pure; time comes in as argument.

A booking does two things until it is completed or expires: it counts as queue at its worker
until the worker's own load report can include it, and its names count as hits-to-be there, so that
requests which share a prefix follow the one that is computing it.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from kvstore.core.names import BlockName, Root
from kvstore.directory.places import longest_prefix

MAX_BOOKINGS: Final = 8_192
"""Bookings in flight in one router; the oldest give way. A lost booking costs one worse guess."""

MAX_NAMES_PER_WORKER: Final = 262_144
"""Names remembered per worker as hits-to-be: 128 prompts of 32 k tokens, about 20 MB at most."""

REPORT_DELAY_MS: Final = 100.0
"""How long a request takes to reach a worker's load report, so that it is not counted twice."""


@dataclass(frozen=True, slots=True)
class Booking:
    """One request sent to one worker."""

    number: int
    worker: str
    root: Root
    names: Sequence[BlockName]
    hit_tokens: int
    """What the router predicted."""
    uncached_tokens: int
    made_ms: float
    expires_ms: float


class Bookings:
    """Bookings in flight, by number and by worker."""

    def __init__(self, *, lifetime_ms: float) -> None:
        assert lifetime_ms > 0
        self._lifetime_ms = lifetime_ms
        self._by_number: OrderedDict[int, Booking] = OrderedDict()
        self._by_worker: dict[str, OrderedDict[int, Booking]] = {}
        self._names_held: dict[str, int] = {}
        self._next = 1

    def __len__(self) -> int:
        """Return the number of bookings in flight."""
        return len(self._by_number)

    def book(
        self,
        worker: str,
        root: Root,
        names: Sequence[BlockName],
        *,
        hit_tokens: int,
        uncached_tokens: int,
        now_ms: float,
    ) -> Booking:
        """Note a request sent to `worker`. Over a bound the oldest bookings are forgotten."""
        self.expire(now_ms)
        booking = Booking(
            self._next, worker, root, names, hit_tokens, uncached_tokens, now_ms,
            now_ms + self._lifetime_ms,
        )  # fmt: skip
        self._next += 1
        self._by_number[booking.number] = booking
        mine = self._by_worker.setdefault(worker, OrderedDict())
        mine[booking.number] = booking
        self._names_held[worker] = self._names_held.get(worker, 0) + len(names)
        while len(mine) > 1 and self._names_held[worker] > MAX_NAMES_PER_WORKER:
            self.complete(next(iter(mine)))
        while len(self._by_number) > MAX_BOOKINGS:
            self.complete(next(iter(self._by_number)))
        return booking

    def complete(self, number: int) -> Booking | None:
        """Forget a booking and return it; None when it is unknown or has expired."""
        booking = self._by_number.pop(number, None)
        if booking is None:
            return None
        mine = self._by_worker[booking.worker]
        del mine[number]
        self._names_held[booking.worker] -= len(booking.names)
        if not mine:
            del self._by_worker[booking.worker], self._names_held[booking.worker]
        return booking

    def expire(self, now_ms: float) -> int:
        """Forget bookings past their lifetime and return how many: they are in order of time."""
        expired = 0
        while self._by_number:
            first = next(iter(self._by_number.values()))
            if first.expires_ms > now_ms:
                break
            self.complete(first.number)
            expired += 1
        return expired

    def queued_tokens(self, worker: str, *, load_ms: float) -> int:
        """Return the prompt tokens sent to a worker that its report of `load_ms` cannot include."""
        since = load_ms - REPORT_DELAY_MS
        return sum(b.uncached_tokens for b in self._at(worker) if b.made_ms >= since)

    def _at(self, worker: str) -> Iterable[Booking]:
        mine = self._by_worker.get(worker)
        return mine.values() if mine is not None else ()

    def in_flight(self, worker: str) -> int:
        """Return the number of bookings at a worker."""
        return len(self._by_worker.get(worker, ()))

    def coming_blocks(self, worker: str, root: Root, names: Sequence[BlockName]) -> int:
        """Return how many leading blocks a booking in flight at `worker` is computing.

        Exact: names are a chain, so equal names at one index mean equal prefixes up to it.
        """
        best = 0
        for booking in self._at(worker):
            if booking.root == root:
                best = max(best, _shared(booking.names, names, best))
        return best


def _shared(theirs: Sequence[BlockName], ours: Sequence[BlockName], floor: int) -> int:
    """Return the length of the common prefix of two chains; 0 unless it exceeds `floor`."""
    length = min(len(theirs), len(ours))
    if length <= floor or theirs[floor] != ours[floor]:
        return 0
    return longest_prefix(lambda index: theirs[index] == ours[index], length)
