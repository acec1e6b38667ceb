"""What this router has sent out and not yet heard back about. Pure; time comes in as argument.

A booking does two things until it is completed or expires: it counts as queue at its worker
until the worker's own load report can include it, and its names count as hits-to-be there, so that
requests which share a prefix follow the one that is computing it. Both are kept as running sums and
one tree (`kvstore.router.coming`): a decision walks no bookings.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from kvstore.core.names import BlockName, Root
from kvstore.router.coming import Coming, Node
from kvstore.router.learning import Expected
from kvstore.router.score import NO_WORK, Work

MAX_BOOKINGS: Final = 8_192
"""Bookings in flight in one router; the oldest give way. A lost booking costs one worse guess."""

MAX_NAMES_PER_WORKER: Final = 262_144
"""Names remembered per worker as hits-to-be: 128 prompts of 32 k tokens, about 20 MB at most."""

REPORT_DELAY_MS: Final = 25.0
"""How long a request takes to reach a worker's load report and that to come back. Longer, and it
is counted twice; shorter, and not at all for a moment."""


@dataclass(slots=True)
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
    loading: Mapping[str, int]
    """Tokens it loads, by the device they come from, which others may share."""
    expected: Expected | None = None
    """What else was predicted; None when nobody will ask."""
    prefilling: bool = True
    """Whether its first token is still to come."""
    queued: bool = True
    """Whether it is in the sums of its worker's queue."""
    last: Node | None = None
    """Where its names end in the tree of what is coming."""

    @property
    def work(self) -> Work:
        """The prefill that was predicted."""
        return Work.of(self.uncached_tokens, self.hit_tokens)


class _AtWorker:
    """Bookings of one worker in order of time, and the sums of those its report cannot include."""

    __slots__ = ("all", "names", "since", "token_depths", "tokens", "waiting")

    def __init__(self) -> None:
        self.all: OrderedDict[int, Booking] = OrderedDict()
        self.names = 0
        self.waiting: OrderedDict[int, Booking] = OrderedDict()
        self.since = -math.inf
        self.tokens = 0.0
        self.token_depths = 0.0

    def add(self, booking: Booking) -> None:
        self.all[booking.number] = booking
        self.names += len(booking.names)
        self._enqueue(booking)

    def dequeue(self, booking: Booking) -> None:
        """Take a booking out of the sums; done twice it changes nothing."""
        if not booking.queued:
            return
        booking.queued = False
        del self.waiting[booking.number]
        work = booking.work
        self.tokens -= work.tokens
        self.token_depths = self.token_depths - work.token_depths if self.tokens else 0.0

    def queue_since(self, since: float) -> Work:
        """Return the work of bookings made at `since` or later. Amortised O(1) while time grows."""
        if since < self.since:  # only the first report of a restarted worker goes back
            self._recount()
        self.since = since
        while self.waiting:
            first = next(iter(self.waiting.values()))
            if first.made_ms >= since:
                break
            self.dequeue(first)
        return Work(self.tokens, self.token_depths)

    def _enqueue(self, booking: Booking) -> None:
        booking.queued = True
        self.waiting[booking.number] = booking
        work = booking.work
        self.tokens += work.tokens
        self.token_depths += work.token_depths

    def _recount(self) -> None:
        self.waiting.clear()
        self.tokens, self.token_depths = 0.0, 0.0
        for booking in self.all.values():
            booking.queued = False
            if booking.prefilling:
                self._enqueue(booking)


class Bookings:
    """Bookings in flight, by number and by worker."""

    def __init__(self, *, lifetime_ms: float) -> None:
        assert lifetime_ms > 0
        self._lifetime_ms = lifetime_ms
        self._by_number: OrderedDict[int, Booking] = OrderedDict()
        self._by_worker: dict[str, _AtWorker] = {}
        self._coming: dict[Root, Coming] = {}
        self._loading: dict[str, int] = {}
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
        loading: Mapping[str, int] = MappingProxyType({}),
        expected: Expected | None = None,
    ) -> Booking:
        """Note a request sent to `worker`. Over a bound the oldest bookings are forgotten."""
        self.expire(now_ms)
        booking = Booking(
            self._next, worker, root, names, hit_tokens, uncached_tokens, now_ms,
            now_ms + self._lifetime_ms, loading, expected,
        )  # fmt: skip
        self._next += 1
        self._by_number[booking.number] = booking
        mine = self._by_worker.setdefault(worker, _AtWorker())
        mine.add(booking)
        if names:
            booking.last = self._coming.setdefault(root, Coming()).add(worker, names)
        for device, tokens in loading.items():
            self._loading[device] = self._loading.get(device, 0) + tokens
        while len(mine.all) > 1 and mine.names > MAX_NAMES_PER_WORKER:
            self.complete(next(iter(mine.all)))
        while len(self._by_number) > MAX_BOOKINGS:
            self.complete(next(iter(self._by_number)))
        return booking

    def get(self, number: int) -> Booking | None:
        """Return a booking in flight; None when it is unknown or has expired."""
        return self._by_number.get(number)

    def prefilled(self, booking: Booking) -> None:
        """Note that a booking's first token has come: it queues and loads no longer."""
        if not booking.prefilling:
            return
        booking.prefilling = False
        self._by_worker[booking.worker].dequeue(booking)
        for device, tokens in booking.loading.items():
            left = self._loading.get(device, 0) - tokens
            if left > 0:
                self._loading[device] = left
            else:
                self._loading.pop(device, None)

    def complete(self, number: int) -> Booking | None:
        """Forget a booking and return it; None when it is unknown or has expired."""
        booking = self._by_number.pop(number, None)
        if booking is None:
            return None
        self.prefilled(booking)
        mine = self._by_worker[booking.worker]
        del mine.all[number]
        mine.names -= len(booking.names)
        if not mine.all:
            del self._by_worker[booking.worker]
        if booking.last is not None:
            coming = self._coming[booking.root]
            coming.remove(booking.worker, booking.last)
            if not coming:
                del self._coming[booking.root]
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

    def queued(self, worker: str, *, load_ms: float) -> tuple[Work, int]:
        """Return the prefill sent to a worker that its report of `load_ms` cannot include.

        And of how many requests it is.
        """
        mine = self._by_worker.get(worker)
        if mine is None:
            return NO_WORK, 0
        work = mine.queue_since(load_ms - REPORT_DELAY_MS)
        return work, len(mine.waiting)

    def in_flight(self, worker: str) -> int:
        """Return the number of bookings at a worker."""
        mine = self._by_worker.get(worker)
        return len(mine.all) if mine is not None else 0

    def loading(self, device: str) -> int:
        """Return the tokens that bookings before their first token load from a device."""
        return self._loading.get(device, 0)

    def coming_blocks(self, root: Root, names: Sequence[BlockName]) -> dict[str, int]:
        """Return, by worker, how many leading blocks a booking in flight is computing there.

        Exact: names are a chain, so equal names at one index mean equal prefixes up to it.
        """
        coming = self._coming.get(root)
        return coming.blocks(names) if coming is not None else {}
