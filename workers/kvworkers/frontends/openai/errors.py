"""Our errors as OpenAI's clients read them. Pure."""

from typing import Any, Final

from kvstore.core.errors import (
    BadInput,
    Forbidden,
    KvStoreError,
    NotFound,
    Refused,
    TooLarge,
    Unauthenticated,
    Unreachable,
    Unsupported,
)
from kvworkers.frontends.door import Draining
from kvworkers.frontends.generation import FieldError

_STATUS: Final[tuple[tuple[type[KvStoreError], int, str], ...]] = (
    (Unauthenticated, 401, "authentication_error"),
    (Forbidden, 403, "permission_error"),
    (NotFound, 404, "invalid_request_error"),
    (BadInput, 400, "invalid_request_error"),
    (Unsupported, 400, "invalid_request_error"),
    (Draining, 503, "service_unavailable"),
    (Refused, 429, "rate_limit_error"),
    (Unreachable, 503, "service_unavailable"),
)
"""Subclasses before their bases; anything else is 500."""


def failure(error: KvStoreError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return status, body and headers that tell a client about an error."""
    status, kind = next(
        ((status, kind) for cls, status, kind in _STATUS if isinstance(error, cls)),
        (500, "server_error"),
    )
    code: str | None = None
    headers: dict[str, str] = {}
    if isinstance(error, TooLarge):
        code = "context_length_exceeded"
    elif isinstance(error, NotFound):
        code = "model_not_found"
    elif isinstance(error, Refused):
        code = None if isinstance(error, Draining) else "rate_limit_exceeded"
        headers["Retry-After"] = str(max(1, -(-error.retry_after_ms // 1_000)))
    param = error.param if isinstance(error, FieldError) else None
    body = {"error": {"message": str(error), "type": kind, "param": param, "code": code}}
    return status, body, headers
