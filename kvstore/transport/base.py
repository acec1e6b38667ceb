"""The seam of bulk movement between processes that share no arena.

Contract: bytes are verified by the caller against the sums that came with the lease; a transport
moves them and says how far it got. A ticket is 32 random bytes, single use, bound to session,
slots, peer and expiry; a used, foreign or expired ticket gives REFUSED for the whole batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.core.outcomes import Outcome


@dataclass(frozen=True, slots=True)
class Ticket:
    """Permission to move the bytes of certain slots once."""

    token: bytes
    address: str
    expires_ms: int
    """Relative to when it was handed out."""


class Transport(Protocol):
    """Moves whole blocks between here and the holder of a ticket."""

    async def fetch(
        self, ticket: Ticket, into: Sequence[memoryview], *, stall_deadline_ms: int
    ) -> list[Outcome]:
        """Fill `into` in the ticket's order. HIT: all bytes arrived (not yet verified)."""
        ...

    async def send(
        self, ticket: Ticket, source: Sequence[memoryview], *, stall_deadline_ms: int
    ) -> list[Outcome]:
        """Write `source` in the ticket's order. HIT: the peer has taken all bytes."""
        ...

    async def close(self) -> None:
        """Close connections; calls in flight end with LATE."""
        ...
