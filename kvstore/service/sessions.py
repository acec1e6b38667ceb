"""Sessions and leases: who holds what, and until when. Pure; time is passed in."""

from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from kvstore.core.errors import SessionLost, WrongRoot
from kvstore.core.names import Root
from kvstore.core.slots import MAX_SESSION
from kvstore.service.roots import RootInfo

FIRST_REMOTE_SESSION: Final = MAX_SESSION - 8_192
"""Session numbers from here on are the node's own to give; the keeper's lie below."""
MAX_LEASES_PER_SESSION: Final = 16_384
"""Acquires a session may hold unreleased; a worker has one for each running request."""


class Lease(NamedTuple):
    """Slots that stay while a session reads them."""

    session: int
    slots: "array[int]"


@dataclass(slots=True)
class Session:
    """One client: a process, or a group of processes that work as one."""

    number: int
    """1 .. 2**20 - 1: what stands in the slot words of its reservations."""
    token: bytes
    client: str = ""
    roots: dict[Root, RootInfo] = field(default_factory=dict)
    leases: set[int] = field(default_factory=set)
    reserved: set[int] = field(default_factory=set)
    reserved_bytes: int = 0
    private: set[int] = field(default_factory=set)
    """Reserved slots that will never hold a block (`kvstore.service.private`)."""
    arrived: dict[int, bytes] | None = None
    """Of a remote session: reserved slots that the bulk port has filled, and the sums of their
    blocks. None: the client maps the arena and writes in place."""
    filling: set[int] = field(default_factory=set)
    """Reserved slots that stand on a ticket to be filled."""
    closed: bool = False
    """Its socket ended while a process that may still write lives: no calls, no new slots."""

    @property
    def writes(self) -> bool:
        """Whether slots stand reserved for it, that its processes may be writing to."""
        return bool(self.reserved or self.private)

    def root(self, root: Root) -> RootInfo:
        """Return a root that this session opened.

        Raises `SessionLost` when it opened none in this incarnation (then the client opens it
        again), `WrongRoot` when it opened others.
        """
        info = self.roots.get(root)
        if info is not None:
            return info
        if not self.roots:
            raise SessionLost("this session has opened no root here: the node was restarted")
        raise WrongRoot("this session has not opened that root")


class Sessions:
    """All sessions by token and by number."""

    def __init__(self) -> None:
        self._by_token: dict[bytes, Session] = {}
        self._by_number: dict[int, Session] = {}

    def open(self, number: int, token: bytes, *, client: str = "", closed: bool = False) -> Session:
        """Take note of a session that the keeper granted."""
        assert number not in self._by_number, f"session {number} is open"
        session = Session(number, token, client, closed=closed)
        self._by_number[number] = session
        if not closed:
            self._by_token[token] = session
        return session

    def by_token(self, token: bytes) -> Session | None:
        """Return the live session with this token, or None."""
        return self._by_token.get(token)

    def by_number(self, number: int) -> Session | None:
        """Return the session with this number, closed or not, or None."""
        return self._by_number.get(number)

    def close(self, session: Session) -> None:
        """Accept no more calls of the session."""
        session.closed = True
        self._by_token.pop(session.token, None)

    def forget(self, session: Session) -> None:
        """Drop a session that holds nothing any more."""
        assert not session.leases and not session.writes, "the session still holds slots"
        self.close(session)
        self._by_number.pop(session.number, None)

    def __len__(self) -> int:
        return len(self._by_token)

    def numbers(self) -> set[int]:
        """Return the numbers of all sessions, closed ones included."""
        return set(self._by_number)


class Leases:
    """All leases in the order in which they expire: every lease lives equally long."""

    def __init__(self, first: int) -> None:
        """Number leases from `first` on, above every id that any node here gave out before.

        A client that rejoined releases old leases too, and must not hit a new one by its number.
        """
        assert first > 0
        self._next = first
        self._held: dict[int, Lease] = {}
        self._expiry: deque[tuple[float, int]] = deque()

    def grant(self, session: Session, slots: list[int], expires_ms: float) -> int:
        """Return the id of a new lease on `slots`."""
        lease = self._next
        self._next += 1
        self._held[lease] = Lease(session.number, array("I", slots))
        self._expiry.append((expires_ms, lease))
        session.leases.add(lease)
        if len(self._expiry) > 64 and len(self._expiry) > 4 * len(self._held):
            self._expiry = deque(entry for entry in self._expiry if entry[1] in self._held)
        return lease

    def get(self, lease: int) -> Lease | None:
        """Return a lease that is held, or None."""
        return self._held.get(lease)

    def known(self, lease: int) -> bool:
        """Say whether this id was handed out by this incarnation or one before."""
        return 0 < lease < self._next

    def drop(self, lease: int, session: Session) -> "array[int]":
        """End a held lease and return its slots."""
        session.leases.remove(lease)
        return self._held.pop(lease).slots

    def expired(self, now_ms: float) -> list[tuple[int, int]]:
        """Return (lease, session number) of every held lease whose time is over."""
        over: list[tuple[int, int]] = []
        while self._expiry and self._expiry[0][0] <= now_ms:
            _, lease = self._expiry.popleft()
            held = self._held.get(lease)
            if held is not None:
                over.append((lease, held.session))
        return over

    def __len__(self) -> int:
        return len(self._held)
