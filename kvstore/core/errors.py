"""The one tree of errors that this package raises on purpose.

A cache miss is a value (`kvstore.core.outcomes.Outcome`), never an exception; a bug is an
`assert`. What stands here is a broken promise: a caller's mistake, or a part that cannot
serve now. `kvstore.rpc.errors` is the single place that maps this tree to gRPC codes.

    KvStoreError
    ├── BadInput            the caller must change the request; retrying cannot help
    │   ├── WrongRoot       a root that this session has not opened
    │   └── TooLarge        over a fixed limit: message, prompt, block, batch
    ├── Unauthenticated     the caller's identity is missing or unknown
    ├── Forbidden           the identity is known and may not do this
    ├── NotFound            a thing named by the caller (model, booking) does not exist
    ├── Refused             not now: full, draining, over quota; retry after `retry_after_ms`
    ├── SessionLost         the session is unknown to this incarnation; open it again
    ├── Unreachable         a peer or a device did not answer within its deadline
    ├── Unsupported         the call is defined and not served here
    └── Corrupt             bytes failed their checksum; the block is already gone
"""


class KvStoreError(Exception):
    """Base of every error this package raises on purpose."""


class BadInput(KvStoreError):
    """The request cannot be served as written; the message names the input at fault."""


class WrongRoot(BadInput):
    """The root was not handed to this session by this cluster."""


class TooLarge(BadInput):
    """The input is over a fixed limit; the message gives the limit."""


class Unauthenticated(KvStoreError):
    """No identity, or one that is not known here."""


class Forbidden(KvStoreError):
    """The identity is known and lacks the role for this call."""


class NotFound(KvStoreError):
    """A model, booking or node named by the caller does not exist."""


class Refused(KvStoreError):
    """Not now: full, draining or over quota. The caller may retry.

    `retry_after_ms` is the refuser's estimate, 0 where it has none. Kept in `args` so that
    the error survives pickling between actors.
    """

    def __init__(self, message: str, retry_after_ms: int = 0) -> None:
        super().__init__(message, retry_after_ms)
        self.retry_after_ms = retry_after_ms

    def __str__(self) -> str:
        return str(self.args[0])


class SessionLost(KvStoreError):
    """The session or incarnation is gone; open a new session and try again."""


class Unreachable(KvStoreError):
    """A peer or device did not answer within its deadline."""


class Unsupported(KvStoreError):
    """The call is part of the interface and is not served by this build."""


class Corrupt(KvStoreError):
    """Bytes failed their checksum; the block is already gone."""
