"""The one place where our errors become gRPC status codes, and back.

The class name travels in trailing metadata, so a client raises the very class that the server
raised; a peer that does not know the class still gets the closest status code.
"""

from typing import Final

import grpc.aio

from kvstore.core import errors
from kvstore.core.errors import KvStoreError

ERROR_KEY: Final = "kvstore-error"
RETRY_AFTER_KEY: Final = "kvstore-retry-after-ms"

STATUS: Final[dict[type[KvStoreError], grpc.StatusCode]] = {
    errors.BadInput: grpc.StatusCode.INVALID_ARGUMENT,
    errors.WrongRoot: grpc.StatusCode.PERMISSION_DENIED,
    errors.TooLarge: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.Refused: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.SessionLost: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Unreachable: grpc.StatusCode.UNAVAILABLE,
    errors.Unsupported: grpc.StatusCode.UNIMPLEMENTED,
    errors.Corrupt: grpc.StatusCode.DATA_LOSS,
}
"""Every leaf and every inner class that can be raised; a test walks the tree against it."""

_OVERSIZED: Final = "message larger than max"
_BY_NAME: Final = {cls.__name__: cls for cls in STATUS}

_BY_STATUS: Final[dict[grpc.StatusCode, type[KvStoreError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.BadInput,
    grpc.StatusCode.OUT_OF_RANGE: errors.TooLarge,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.Forbidden,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Refused,
    grpc.StatusCode.FAILED_PRECONDITION: errors.SessionLost,
    grpc.StatusCode.UNAVAILABLE: errors.Unreachable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.Unreachable,
    grpc.StatusCode.CANCELLED: errors.Unreachable,
    grpc.StatusCode.UNIMPLEMENTED: errors.Unsupported,
    grpc.StatusCode.DATA_LOSS: errors.Corrupt,
}


def status_of(error: KvStoreError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """Return status code, message and trailing metadata for an error raised by a handler."""
    # A room may refine an error for its own use; on the wire it is the one of the tree.
    cls = next(base for base in type(error).__mro__ if base in STATUS)
    trailing: list[tuple[str, str]] = [(ERROR_KEY, cls.__name__)]
    if isinstance(error, errors.Refused) and error.retry_after_ms:
        trailing.append((RETRY_AFTER_KEY, str(error.retry_after_ms)))
    return STATUS[cls], str(error), tuple(trailing)


def error_from(failure: grpc.RpcError) -> KvStoreError:
    """Return the error that a failed call stands for.

    `failure` is what grpc raises on the client: it carries `code`, `details` and trailing metadata.
    """
    if not isinstance(failure, grpc.aio.AioRpcError | grpc.Call):
        return errors.Unreachable(f"call failed without a status: {failure!r}")
    trailing: dict[str, str | bytes] = dict(failure.trailing_metadata() or ())  # type: ignore[arg-type]
    message = failure.details() or str(failure.code())
    cls = _BY_NAME.get(_text(trailing.get(ERROR_KEY)))
    if cls is None and _OVERSIZED in message:
        cls = errors.TooLarge  # grpc itself refused it, on either side, with the status of a quota
    if cls is None:
        cls = _BY_STATUS.get(failure.code(), errors.Unreachable)
    if cls is errors.Refused:
        retry_after = _text(trailing.get(RETRY_AFTER_KEY)) or "0"
        return errors.Refused(message, int(retry_after) if retry_after.isdigit() else 0)
    return cls(message)


def _text(value: str | bytes | None) -> str:
    if value is None:
        return ""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
