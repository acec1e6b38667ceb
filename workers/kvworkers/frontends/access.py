"""The door of the HTTP server: the same gate as gRPC's, as ASGI middleware.

Every path needs a role; one that the table does not name needs the one for watching, so a page
added later is not open by accident.
"""

import json
from collections.abc import Mapping, MutableMapping
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvstore.core.errors import KvStoreError, TooLarge
from kvstore.rpc.gate import Gate
from kvstore.rpc.identity import Principal, Role
from kvworkers.frontends.door import Door, Draining
from kvworkers.frontends.openai.errors import failure

OPEN_PATHS: Final = frozenset({"/health"})
"""Probes come without credentials and learn whether a worker is ready."""
PREFIXES: Final[tuple[tuple[str, Role], ...]] = (
    ("/v1/", Role.CLIENT),
    ("/tokenize", Role.CLIENT),
    ("/detokenize", Role.CLIENT),
    ("/admin/", Role.ADMIN),
)
MAX_HEADER_BYTES: Final = 32 << 10
PRINCIPAL: Final = "kvstore_principal"
"""Where handlers find the caller in a request's scope."""


class Access:
    """Lets requests through that the gate admits, with their caller in the scope."""

    def __init__(self, app: ASGIApp, gate: Gate, door: Door) -> None:
        self._app = app
        self._gate = gate
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; see the class."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        role = role_for(scope["path"])
        client = scope.get("client") or ("", 0)
        peer = f"http:{client[0]}:{client[1]}"
        try:
            with self._gate.audited(role, f"{scope['method']} {scope['path']}", peer) as note:
                caller = self._gate.admit(
                    role, lambda: note(self._gate.identity.identify(headers_of(scope), peer))
                )
                scope[PRINCIPAL] = caller
        except KvStoreError as error:
            await _refuse(send, error)
            return
        metered = self._metered(receive, caller)
        if role is not Role.CLIENT:
            await self._app(scope, metered, send)
            return
        try:
            with self._door.inside():
                await self._app(scope, metered, send)
        except Draining as error:
            await _refuse(send, error)

    def _metered(self, receive: Receive, caller: Principal) -> Receive:
        """Return a `receive` that counts the body's bytes against the caller's domain."""

        async def counted() -> Message:
            message = await receive()
            if body := message.get("body", b""):
                self._gate.charge(caller, len(body))
            return message

        return counted


def role_for(path: str) -> Role:
    """Return the role that a path needs."""
    return next((role for prefix, role in PREFIXES if path.startswith(prefix)), Role.WATCH)


def headers_of(scope: Scope) -> Mapping[str, str | bytes]:
    """Return a request's headers by lower-case name; raises `TooLarge` over the bound."""
    if sum(len(key) + len(value) for key, value in scope["headers"]) > MAX_HEADER_BYTES:
        raise TooLarge(f"the headers are over {MAX_HEADER_BYTES} bytes")
    return {key.decode("latin-1"): value for key, value in scope["headers"]}


def caller_of(scope: MutableMapping[str, Any]) -> Principal:
    """Return who makes a request that the gate let through."""
    principal: Principal = scope[PRINCIPAL]
    return principal


async def _refuse(send: Send, error: KvStoreError) -> None:
    status, body, headers = failure(error)
    encoded = json.dumps(body).encode()
    fields = {"content-type": "application/json", "content-length": str(len(encoded)), **headers}
    if status == 401:
        fields["www-authenticate"] = "Bearer"
    if isinstance(error, Draining):
        fields["connection"] = "close"  # the next request over it would come here again
    raw = [(key.lower().encode(), value.encode()) for key, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": encoded})
