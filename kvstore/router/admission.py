"""Who waits, who goes next, and who is turned away when workers have enough to do. Pure.

Higher priorities go first. Within one, domains share by weight: each has a virtual time that grows
with the tokens it had computed, over its weight, and the one that is furthest behind goes next
(start-time fair queueing), so a domain gets its share whatever others ask for, and all of it
when nobody else asks. Within a domain the earliest deadline goes first.

The room is bounded. When it is full the ticket that has the weakest claim leaves: of the lowest
priority, of the domain that holds most places for its weight, the one that came last.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Final, Generic, NamedTuple, TypeVar

MIN_RETRY_MS: Final = 100.0
MAX_RETRY_MS: Final = 60_000.0
"""What callers are told is an estimate; these keep it from being silly."""

MAX_DOMAINS: Final = 4_096
"""Domains whose virtual time is remembered; those that are owed nothing are forgotten first."""

_SMOOTH: Final = 0.1
_SLACK: Final = 64

Item = TypeVar("Item")


class Claim(NamedTuple):
    """What a request brings to the queue."""

    domain: str = ""
    priority: int = 0
    """Higher goes first."""
    deadline_ms: float = float("inf")
    """When nobody waits for it any more."""


@dataclass(slots=True, eq=False)
class Ticket(Generic[Item]):
    """One place in the room. Made and ended by the room alone."""

    number: int
    claim: Claim
    item: Item
    waiting: bool = True


class FairClock:
    """The virtual time of every domain."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        assert all(weight > 0 for weight in self._weights.values())
        self._virtual: dict[str, float] = {}
        self._now = 0.0

    def __len__(self) -> int:
        """Return how many domains are remembered."""
        return len(self._virtual)

    def weight(self, domain: str) -> float:
        """Return a domain's weight; 1 where none was given."""
        return self._weights.get(domain, 1.0)

    def start(self, domain: str) -> float:
        """Return where a domain's next request starts: nobody saves up time it did not use."""
        return max(self._now, self._virtual.get(domain, 0.0))

    def charge(self, domain: str, tokens: float) -> None:
        """Count what a domain has computed, whether it waited for it or not."""
        self._now = self.start(domain)
        self._virtual[domain] = self._now + tokens / self.weight(domain)
        if len(self._virtual) > MAX_DOMAINS:
            owed = sorted(self._virtual.items(), key=lambda pair: pair[1])
            self._virtual = dict(owed[MAX_DOMAINS // 2 :])


class WaitingRoom(Generic[Item]):
    """At most `bound` tickets. Time comes in as argument."""

    def __init__(self, *, bound: int, clock: FairClock | None = None) -> None:
        assert bound > 0
        self._bound = bound
        self._clock = FairClock() if clock is None else clock
        self._queues: dict[int, dict[str, list[tuple[float, int, Ticket[Item]]]]] = {}
        self._places: dict[tuple[int, str], int] = {}
        self._waiting = 0
        self._next = 1
        self._interval_ms = MIN_RETRY_MS
        self._granted_ms: float | None = None

    def __len__(self) -> int:
        """Return how many tickets wait."""
        return self._waiting

    def enter(self, item: Item, claim: Claim) -> tuple[Ticket[Item], Ticket[Item] | None]:
        """Take a place; also return the ticket that had to leave, which may be the new one."""
        ticket = Ticket(self._next, claim, item)
        self._next += 1
        queue = self._queues.setdefault(claim.priority, {}).setdefault(claim.domain, [])
        heappush(queue, (claim.deadline_ms, ticket.number, ticket))
        key = (claim.priority, claim.domain)
        self._places[key] = self._places.get(key, 0) + 1
        self._waiting += 1
        if self._waiting <= self._bound:
            return ticket, None
        victim = self._weakest()
        self.leave(victim)
        return ticket, victim

    def leave(self, ticket: Ticket[Item]) -> None:
        """Give a place back; done twice it changes nothing."""
        if not ticket.waiting:
            return
        ticket.waiting = False
        self._waiting -= 1
        priority, domain = key = (ticket.claim.priority, ticket.claim.domain)
        self._places[key] -= 1
        if not self._places[key]:
            del self._places[key]
            del self._queues[priority][domain]
            if not self._queues[priority]:
                del self._queues[priority]
            return
        # Tickets that left from the middle: a flood that is refused must not pile up here.
        queue = self._queues[priority][domain]
        if len(queue) > 2 * self._places[key] + _SLACK:
            queue[:] = [entry for entry in queue if entry[2].waiting]
            heapify(queue)

    def first(self) -> Ticket[Item] | None:
        """Return the ticket that goes next; it stays until it is granted or leaves."""
        if not self._waiting:
            return None
        domains = self._queues[max(self._queues)]
        domain = min(domains, key=lambda name: (self._clock.start(name), name))
        queue = domains[domain]
        while not queue[0][2].waiting:
            heappop(queue)
        return queue[0][2]

    def grant(self, ticket: Ticket[Item], tokens: float, now_ms: float) -> None:
        """Let a ticket go; `tokens` is what it makes the workers compute."""
        self.leave(ticket)
        self._clock.charge(ticket.claim.domain, tokens)
        if self._granted_ms is not None:
            passed_ms = max(0.0, now_ms - self._granted_ms)
            self._interval_ms += _SMOOTH * (passed_ms - self._interval_ms)
        self._granted_ms = now_ms if self._waiting else None

    def retry_after_ms(self) -> int:
        """Return when a place should be free: as long as those waiting take to go."""
        wait_ms = (self._waiting + 1) * self._interval_ms
        return round(min(MAX_RETRY_MS, max(MIN_RETRY_MS, wait_ms)))

    def _weakest(self) -> Ticket[Item]:
        domains = self._queues[lowest := min(self._queues)]
        domain = max(
            domains,
            key=lambda name: (self._places[lowest, name] / self._clock.weight(name), name),
        )
        tickets = (ticket for _, _, ticket in domains[domain] if ticket.waiting)
        return max(tickets, key=lambda ticket: ticket.number)
