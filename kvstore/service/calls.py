"""What every group of `CacheNode` calls shares: the node's parts, who calls, how it is counted."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from prometheus_client import Histogram

from kvstore.core.errors import Forbidden, KvStoreError, SessionLost, WrongRoot
from kvstore.observe.metrics import NodeMetrics
from kvstore.rpc.convert import root_from_wire
from kvstore.rpc.gate import identify, identify_by, metadata_of
from kvstore.rpc.identity import Identity, Principal, Role
from kvstore.service.below import BelowDram
from kvstore.service.bulk_port import BulkPort
from kvstore.service.hashing import Hasher
from kvstore.service.recorder import Recorders
from kvstore.service.remote_sessions import RemoteSessions
from kvstore.service.requests import Context, now_ms
from kvstore.service.roots import RootInfo
from kvstore.service.sessions import Session
from kvstore.service.store import ArenaStore

SESSION_KEY: Final = "kvstore-session-bin"


@dataclass(frozen=True, slots=True)
class ServiceParts:
    """What the service stands on."""

    name: str
    cluster_key: bytes
    store: ArenaStore
    hasher: Hasher
    below: BelowDram
    metrics: NodeMetrics
    identity: Identity
    recorders: Recorders
    bulk: BulkPort
    remote: RemoteSessions
    catch_up: Callable[[], None]
    """Takes in what the keeper has said so far about sessions."""
    started_s: float


class Calls:
    """Helpers of handlers; one instance per node, on one event loop."""

    def __init__(self, parts: ServiceParts) -> None:
        self._parts = parts
        self._store = parts.store
        self._hasher = parts.hasher
        self._below = parts.below
        self._seconds: dict[str, Histogram] = {}
        """By method: finding a histogram by its label costs more than observing."""

    @property
    def _incarnation(self) -> int:
        return self._store.table.publisher.incarnation

    def _principal(self, context: Context) -> Principal:
        return identify(self._parts.identity, context)

    def _session(self, context: Context) -> Session:
        """Return the caller's session; raises `SessionLost` for a token unknown here."""
        return self._session_of(metadata_of(context))

    def _session_of(self, metadata: Mapping[str, str | bytes]) -> Session:
        token = metadata.get(SESSION_KEY, b"")
        token = token.encode() if isinstance(token, str) else token
        session = self._store.sessions.by_token(token)
        if session is None:
            # The keeper told us before it told the client: the message is in our socket.
            self._parts.catch_up()
            session = self._store.sessions.by_token(token)
        if session is None:
            raise SessionLost("no such session here: open one")
        self._parts.remote.heard(session, now_ms())
        return session

    def _rooted(self, context: Context, root: bytes) -> tuple[Session, RootInfo]:
        metadata = metadata_of(context)
        session = self._session_of(metadata)
        info = session.root(root_from_wire(root))
        if info.domain != identify_by(self._parts.identity, context, metadata).share_domain:
            # A session's token in another tenant's hands opens nothing; said as for any root.
            raise WrongRoot("this root was not opened by this session")
        return session, info

    def _needs(self, context: Context, role: Role, what: str) -> Principal:
        """Return the caller when it has a role; raises `Forbidden` saying what needs it."""
        principal = self._principal(context)
        if role not in principal.roles:
            raise Forbidden(f"{what} needs the {role.value} role")
        return principal

    def _measured(self, method: str) -> "Measured":
        seconds = self._seconds.get(method)
        if seconds is None:
            seconds = self._seconds[method] = self._parts.metrics.rpc_seconds.labels(method)
        return Measured(self._parts.metrics, method, seconds)


class Measured:
    """One call: how long it took, and the error that ended it.

    Not a generator: making one costs more than all that is done here.
    """

    __slots__ = ("_method", "_metrics", "_seconds", "_started_s")

    def __init__(self, metrics: NodeMetrics, method: str, seconds: Histogram) -> None:
        self._metrics = metrics
        self._method = method
        self._seconds = seconds

    def __enter__(self) -> None:
        self._started_s = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception):  # one that is not ours is a bug: INTERNAL, and logged
            name = type(error).__name__ if isinstance(error, KvStoreError) else "Internal"
            self._metrics.rpc_errors.labels(self._method, name).inc()
        self._seconds.observe(time.perf_counter() - self._started_s)
