"""What every group of `CacheNode` calls shares: the node's parts, who calls, how it is counted."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from kvstore.core.errors import Forbidden, KvStoreError, SessionLost
from kvstore.observe.metrics import NodeMetrics
from kvstore.rpc.convert import root_from_wire
from kvstore.rpc.identity import Identity, Principal, Role
from kvstore.service.below import BelowDram
from kvstore.service.bulk_port import BulkPort
from kvstore.service.hashing import Hasher
from kvstore.service.recorder import Recorders
from kvstore.service.remote_sessions import RemoteSessions
from kvstore.service.requests import Context, metadata, now_ms
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

    @property
    def _incarnation(self) -> int:
        return self._store.table.publisher.incarnation

    def _principal(self, context: Context) -> Principal:
        return self._parts.identity.identify(metadata(context), context.peer())

    def _session(self, context: Context) -> Session:
        """Return the caller's session; raises `SessionLost` for a token unknown here."""
        token = metadata(context).get(SESSION_KEY, b"")
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
        session = self._session(context)
        return session, session.root(root_from_wire(root))

    def _needs(self, context: Context, role: Role, what: str) -> Principal:
        """Return the caller when it has a role; raises `Forbidden` saying what needs it."""
        principal = self._principal(context)
        if role not in principal.roles:
            raise Forbidden(f"{what} needs the {role.value} role")
        return principal

    @contextmanager
    def _measured(self, method: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except KvStoreError as error:
            self._parts.metrics.rpc_errors.labels(method, type(error).__name__).inc()
            raise
        except Exception:  # a bug: the interceptor logs it and answers INTERNAL
            self._parts.metrics.rpc_errors.labels(method, "Internal").inc()
            raise
        finally:
            self._parts.metrics.rpc_seconds.labels(method).observe(time.perf_counter() - started)
