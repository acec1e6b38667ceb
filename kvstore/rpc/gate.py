"""The door of every server: who calls, whether that role may, how often, and what is written down.

    call ──▶ identify ──▶ role for the method ──▶ rate of the domain ──▶ handler
              │ UNAUTHENTICATED  │ PERMISSION_DENIED   │ RESOURCE_EXHAUSTED

A method that the table does not name is refused: a new one has to be thought about.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry

from kvstore.core.errors import Forbidden, KvStoreError, Refused, Unauthenticated
from kvstore.core.limits import MAX_ID_BYTES
from kvstore.observe.audit import AuditLog
from kvstore.observe.metrics import AccessMetrics
from kvstore.rpc.identity import Identity, Principal, Role
from kvstore.rpc.rate import RateLimiter
from kvstore.rpc.security import SecurityConfig
from kvstore.rpc.tokens import identity_of

if TYPE_CHECKING:  # generic in the type stubs only
    import grpc.aio

    Context = grpc.aio.ServicerContext[Any, Any]

_PACKAGE: Final = "/kvstore.rpc.v1."
OPEN_PREFIX: Final = "/grpc.health.v1.Health/"
"""Probes come without credentials and learn only that a server lives."""

_CALLS: Final[Mapping[Role, Mapping[str, str]]] = {
    Role.CLIENT: {
        "CacheNode": "OpenSession CloseSession Acquire Settle Wait Lookup Pin Prefetch"
        " Ticket Get Put ReservePrivate",
        "Inference": "Generate ListModels",
    },
    Role.FRONTEND: {"Router": "Route Complete Explain", "Worker": "Describe Run"},
    Role.WATCH: {"CacheNode": "Stats Watch", "Worker": "Watch", "Cluster": "Status"},
    Role.PEER: {"CacheNode": "Lend"},
    Role.ADMIN: {
        "CacheNode": "Clear",
        "Recorder": "Record",
        "Inspector": "Inspect",
        "Cluster": "Drain Scale Restart",
    },
}

REQUIRED: Final[Mapping[str, Role]] = {
    f"{_PACKAGE}{service}/{method}": role
    for role, services in _CALLS.items()
    for service, methods in services.items()
    for method in methods.split()
} | {"/envoy.service.ext_proc.v3.ExternalProcessor/Process": Role.FRONTEND}
"""The role that each method needs. Envoy's name for its own call cannot be ours."""

_UNLIMITED: Final = frozenset({Role.FRONTEND, Role.WATCH, Role.PEER, Role.ARENA})
"""The cluster's own parts act for every domain: tenants are limited where they come in."""
_NOTHING_HELD: Final = nullcontext()


class Gate:
    """Admits calls to one server."""

    def __init__(
        self,
        identity: Identity,
        *,
        limiter: RateLimiter,
        audit: AuditLog,
        metrics: AccessMetrics,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.identity = identity
        self._limiter = limiter
        self._audit = audit
        self._metrics = metrics
        self._clock_s = clock_s

    def admitted(
        self, method: str, context: "Context", request_bytes: int
    ) -> AbstractContextManager[None]:
        """Let a gRPC call in and hold it; raises `Unauthenticated`, `Forbidden` or `Refused`.

        Nothing has to be held of a call that is not audited: most are, and they are short.
        """
        role = REQUIRED.get(method)
        if role is Role.ADMIN:
            return self._admitted_audited(role, method, context, request_bytes)
        if not method.startswith(OPEN_PREFIX):
            caller = self.admit(role, lambda: identify(self.identity, context))
            self.charge(caller, request_bytes)
        return _NOTHING_HELD

    @contextmanager
    def _admitted_audited(
        self, role: Role, method: str, context: "Context", request_bytes: int
    ) -> Iterator[None]:
        with self.audited(role, method, context.peer()) as note:
            caller = self.admit(role, lambda: note(identify(self.identity, context)))
            self.charge(caller, request_bytes)
            yield

    def admit(self, role: Role | None, who: Callable[[], Principal]) -> Principal:
        """Return the caller when it has `role` and its domain has calls left.

        `who` finds the principal. None as a role: nobody has it.
        """
        try:
            caller = who()
            if role is None or role not in caller.roles:
                raise Forbidden(f"{caller.name} lacks the role {role or 'for this'}")
            if not caller.roles & _UNLIMITED:
                self._limiter.admit(caller.share_domain, self._clock_s())
        except (Unauthenticated, Forbidden, Refused) as error:
            self._metrics.denied.labels(type(error).__name__).inc()
            raise
        return caller

    def charge(self, caller: Principal, request_bytes: int) -> None:
        """Count a request's bytes against its domain."""
        if not caller.roles & _UNLIMITED:
            self._limiter.charge(caller.share_domain, request_bytes, self._clock_s())

    @contextmanager
    def audited(
        self, role: Role | None, method: str, peer: str
    ) -> Iterator[Callable[[Principal], Principal]]:
        """Write a line about a call that needs the admin role, however it ends.

        Yields what has to be told the caller as soon as it is known, and gives it back.
        """
        caller = Principal("", "")
        if role is not Role.ADMIN:
            yield lambda principal: principal
            return

        def note(principal: Principal) -> Principal:
            nonlocal caller
            caller = principal
            return principal

        outcome = "cancelled"
        try:
            yield note
            outcome = "ok"
        except KvStoreError as error:
            outcome = type(error).__name__
            raise
        except Exception:
            outcome = "failed"
            raise
        finally:
            self._metrics.admin_calls.labels(outcome).inc()
            self._audit.write(
                principal=caller.name, share_domain=caller.share_domain, peer=peer,
                method=method, outcome=outcome,
            )  # fmt: skip


def gate_of(
    security: SecurityConfig, registry: CollectorRegistry, *, local_sockets: bool = False
) -> Gate:
    """Return the door that a configuration describes."""
    by_domain = {
        entry.share_domain: entry.rate for entry in security.identities if entry.rate is not None
    }
    return Gate(
        identity_of(security, local_sockets=local_sockets),
        limiter=RateLimiter(security.limits, by_domain),
        audit=AuditLog(security.audit_log),
        metrics=AccessMetrics(registry),
    )


def identify(identity: Identity, context: "Context") -> Principal:
    """Return who makes a gRPC call."""
    return identify_by(identity, context, metadata_of(context))


def metadata_of(context: "Context") -> dict[str, str | bytes]:
    """Return a call's metadata, keys of a sensible length only."""
    return {
        key: value for key, value in context.invocation_metadata() or () if len(key) <= MAX_ID_BYTES
    }


def identify_by(
    identity: Identity, context: "Context", metadata: Mapping[str, str | bytes]
) -> Principal:
    """Return who makes a gRPC call whose metadata was read already."""
    peer = context.peer()
    # Local calls are on the serving path, and their transport knows no certificates.
    names = () if peer.startswith("unix:") else _certificate_names(context)
    return identity.identify(metadata, peer, names)


def _certificate_names(context: "Context") -> list[str]:
    """Return the names in the client's certificate, which the handshake has verified."""
    properties = context.auth_context()
    return [
        raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)
        for key in ("x509_subject_alternative_name", "x509_common_name")
        for raw in properties.get(key, ())
    ]
