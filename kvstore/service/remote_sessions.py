"""Sessions of clients that do not map the arena: opened by a call, kept by calling.

A local session lives as long as its socket; a remote one as long as it is heard of. It dies with
the node: what it has reserved only the node's own bulk port writes, which is gone then too.
"""

import secrets
from typing import Final

from kvstore.core.errors import Refused
from kvstore.service.bulk_port import BulkPort
from kvstore.service.promotion import LOADER_SESSION
from kvstore.service.sessions import FIRST_REMOTE_SESSION, Session
from kvstore.service.store import ArenaStore
from kvstore.transport.session_socket import TOKEN_BYTES

SESSION_MS: Final = 30_000
MAX_REMOTE_SESSIONS: Final = 4_096


class RemoteSessions:
    """The remote sessions of one node. Time is passed in, in the node's milliseconds."""

    def __init__(
        self,
        store: ArenaStore,
        port: BulkPort,
        *,
        session_ms: int = SESSION_MS,
        limit: int = MAX_REMOTE_SESSIONS,
    ) -> None:
        assert session_ms > 0
        assert limit > 0
        self._store = store
        self._port = port
        self._session_ms = session_ms
        self._limit = limit
        self._heard_ms: dict[int, float] = {}
        """Session numbers, the one that was silent longest first."""
        self._next = FIRST_REMOTE_SESSION

    def __len__(self) -> int:
        return len(self._heard_ms)

    def open(self, client: str, now_ms: float) -> Session:
        """Return a new session. Raises `Refused` when there are too many."""
        if len(self._heard_ms) >= self._limit:
            raise Refused(f"{self._limit} remote sessions are open", retry_after_ms=1_000)
        number = self._number()
        session = self._store.sessions.open(number, secrets.token_bytes(TOKEN_BYTES), client=client)
        session.arrived = {}
        self._heard_ms[number] = now_ms
        return session

    def heard(self, session: Session, now_ms: float) -> None:
        """Take note that a session's client lives; local sessions need none of this."""
        if self._heard_ms.pop(session.number, None) is not None:
            self._heard_ms[session.number] = now_ms

    def session_ms(self, session: Session) -> int:
        """Return how long a session lives without a call; 0 where a socket holds it."""
        return self._session_ms if session.number in self._heard_ms else 0

    def end(self, session: Session) -> tuple[int, int]:
        """End a remote session; returns (leases released, reservations freed)."""
        del self._heard_ms[session.number]
        self._port.close(session)
        ended = self._store.close(session, writers_gone=True)
        self._store.sessions.forget(session)
        return ended

    def expire(self, now_ms: float) -> int:
        """End those that were silent too long; returns how many."""
        ended = 0
        while self._heard_ms:
            number, heard_ms = next(iter(self._heard_ms.items()))
            if now_ms - heard_ms < self._session_ms:
                break
            session = self._store.sessions.by_number(number)
            assert session is not None, "a remote session ended behind our back"
            self.end(session)
            ended += 1
        return ended

    def _number(self) -> int:
        """Return the number after the last one that is not in use: reused as late as possible."""
        while True:
            number = self._next
            self._next = FIRST_REMOTE_SESSION if number + 1 == LOADER_SESSION else number + 1
            if number not in self._heard_ms:
                return number
