"""The transport contract over the shortest honest transport, and over liars.

TCP bulk runs the suite in tests/unit/transport. Here it runs over a transport inside one process:
enough to show that it passes over something and fails over the rest.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvstore.core.outcomes import Outcome
from kvstore.testing.contracts import TransportContract
from kvstore.transport.base import Ticket, Transport


@dataclass
class Grants:
    """The holder's side: what each token may do, once."""

    reads: dict[bytes, Sequence[bytes]] = field(default_factory=dict)
    writes: dict[bytes, Sequence[memoryview]] = field(default_factory=dict)


class InProcess:
    """Moves bytes by copying them."""

    def __init__(self, grants: Grants) -> None:
        self.grants = grants
        self.closed = False

    async def fetch(
        self, ticket: Ticket, into: Sequence[memoryview], *, stall_deadline_ms: int
    ) -> list[Outcome]:
        blocks = self.grants.reads.pop(ticket.token, None)
        if self.closed or blocks is None or ticket.expires_ms <= 0:
            return [Outcome.REFUSED] * len(into)
        for view, data in zip(into, blocks, strict=True):
            view[:] = data
        return [Outcome.HIT] * len(into)

    async def send(
        self, ticket: Ticket, source: Sequence[memoryview], *, stall_deadline_ms: int
    ) -> list[Outcome]:
        slots = self.grants.writes.pop(ticket.token, None)
        if self.closed or slots is None or ticket.expires_ms <= 0:
            return [Outcome.REFUSED] * len(source)
        for view, data in zip(slots, source, strict=True):
            view[:] = data
        return [Outcome.HIT] * len(source)

    async def close(self) -> None:
        self.closed = True


class _Suite(TransportContract):
    def __init__(self, kind: Callable[[Grants], Transport] = InProcess) -> None:
        self.kind = kind
        self.grants = Grants()

    async def open(self) -> Transport:
        return self.kind(self.grants)

    async def offer(self, blocks: Sequence[bytes], *, expired: bool = False) -> Ticket:
        token = secrets.token_bytes(32)
        self.grants.reads[token] = blocks
        return Ticket(token, "here", 0 if expired else 1_000)

    async def want(self, sizes: Sequence[int]) -> tuple[Ticket, Sequence[memoryview]]:
        token = secrets.token_bytes(32)
        slots = [memoryview(bytearray(size)) for size in sizes]
        self.grants.writes[token] = slots
        return Ticket(token, "here", 1_000), slots


SUITE = [name for name in dir(TransportContract) if name.startswith("test_")]


@pytest.mark.parametrize("name", SUITE)
async def test_in_process(name: str) -> None:
    await getattr(_Suite(), name)()


class _Generous(InProcess):
    """Takes a ticket twice."""

    async def fetch(
        self, ticket: Ticket, into: Sequence[memoryview], *, stall_deadline_ms: int
    ) -> list[Outcome]:
        blocks = self.grants.reads.get(ticket.token)
        outcomes = await super().fetch(ticket, into, stall_deadline_ms=stall_deadline_ms)
        if blocks is not None:
            self.grants.reads[ticket.token] = blocks
        return outcomes


class _Timeless(InProcess):
    """Does not look at the clock."""

    async def fetch(
        self, ticket: Ticket, into: Sequence[memoryview], *, stall_deadline_ms: int
    ) -> list[Outcome]:
        young = Ticket(ticket.token, ticket.address, 1_000)
        return await super().fetch(young, into, stall_deadline_ms=stall_deadline_ms)


class _Empty(InProcess):
    """Says that everything arrived."""

    async def fetch(
        self, ticket: Ticket, into: Sequence[memoryview], *, stall_deadline_ms: int
    ) -> list[Outcome]:
        return [Outcome.HIT] * len(into)


class _Shuffled(InProcess):
    """Delivers in another order."""

    async def send(
        self, ticket: Ticket, source: Sequence[memoryview], *, stall_deadline_ms: int
    ) -> list[Outcome]:
        return await super().send(ticket, source[::-1], stall_deadline_ms=stall_deadline_ms)


@pytest.mark.parametrize(
    ("liar", "broken"),
    [
        (_Generous, "test_a_ticket_works_once"),
        (_Timeless, "test_foreign_and_expired_tickets_are_refused_as_a_whole"),
        (_Empty, "test_fetched_bytes_are_the_offered_ones_in_order"),
        (_Shuffled, "test_sent_bytes_arrive_in_order"),
    ],
)
async def test_the_suite_catches(liar: Callable[[Grants], Transport], broken: str) -> None:
    test: Any = getattr(_Suite(liar), broken)
    with pytest.raises(AssertionError):
        await test()
