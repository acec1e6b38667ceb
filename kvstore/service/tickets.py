"""Tickets of the bulk port: 32 random bytes that move certain blocks once.

A ticket is bound to an operation, a session, a host and a time. The book keeps keyed digests, not
tokens: a lookup compares what nobody outside can choose, so its time tells nothing of a token.
"""

import hashlib
import secrets
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from kvstore.core.errors import BadInput, Refused
from kvstore.transport.bulk_server import Passage
from kvstore.transport.bulk_wire import MAX_BLOCKS, TOKEN_BYTES, Operation

MAX_TICKETS: Final = 4_096
"""Outstanding at once; each holds the blocks it names."""


@dataclass(frozen=True, slots=True)
class _Entry:
    operation: Operation
    session: int
    host: str
    expires_ms: float
    passage: Passage


class TicketBook:
    """Tickets handed out and not redeemed. Used on one event loop; time is passed in.

    The book calls `done` of a passage whose ticket ends unused.
    """

    def __init__(self, *, ttl_ms: int = 10_000, limit: int = MAX_TICKETS) -> None:
        assert ttl_ms > 0
        assert limit > 0
        self.ttl_ms = ttl_ms
        self._limit = limit
        self._key = secrets.token_bytes(32)
        # All live equally long, so they expire in the order in which they were issued.
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def issue(
        self, operation: Operation, passage: Passage, *, session: int, host: str, now_ms: float
    ) -> bytes:
        """Return a new token.

        Raises `Refused` when too many are out, `BadInput` for too many blocks.
        """
        if not 0 < len(passage.lengths) <= MAX_BLOCKS:
            raise BadInput(
                f"{len(passage.lengths)} blocks on one ticket; 1 to {MAX_BLOCKS} allowed"
            )
        self.expire(now_ms)
        if len(self._entries) >= self._limit:
            raise Refused(f"{self._limit} tickets are out", retry_after_ms=100)
        token = secrets.token_bytes(TOKEN_BYTES)
        expires_ms = now_ms + self.ttl_ms
        self._entries[self._digest(token)] = _Entry(operation, session, host, expires_ms, passage)
        return token

    def redeem(
        self, token: bytes, operation: Operation, host: str, *, now_ms: float
    ) -> Passage | None:
        """Return what the ticket allows, once; the caller calls `done` of it.

        A ticket shown in a wrong way is used up too: only a thief or a bug does that.
        """
        entry = self._entries.pop(self._digest(token), None)
        if entry is None:
            return None
        if entry.operation is operation and entry.host == host and now_ms < entry.expires_ms:
            return entry.passage
        entry.passage.done()
        return None

    def expire(self, now_ms: float) -> int:
        """End tickets whose time is over; returns how many."""
        ended = 0
        while self._entries:
            digest, entry = next(iter(self._entries.items()))
            if now_ms < entry.expires_ms:
                break
            del self._entries[digest]
            entry.passage.done()
            ended += 1
        return ended

    def close(self, session: int) -> int:
        """End the tickets of a session; returns how many."""
        mine = [digest for digest, entry in self._entries.items() if entry.session == session]
        for digest in mine:
            self._entries.pop(digest).passage.done()
        return len(mine)

    def _digest(self, token: bytes) -> bytes:
        return hashlib.blake2b(token, key=self._key, digest_size=32).digest()
