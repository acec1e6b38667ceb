"""A KV-cache service for LLM serving: computed prefixes, given back faster than recomputing.

The public surface is `Client`, `AsyncClient`, the nouns they use and the errors they raise.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstore.client import (
        Acquired,
        AsyncClient,
        AsyncRemoteClient,
        Client,
        ClientConfig,
        Lookup,
        NodeStats,
        Reserved,
        Settled,
        SlotRef,
    )
    from kvstore.core.errors import (
        BadInput,
        Corrupt,
        Forbidden,
        KvStoreError,
        NotFound,
        Refused,
        SessionLost,
        TooLarge,
        Unauthenticated,
        Unreachable,
        Unsupported,
        WrongRoot,
    )
    from kvstore.core.names import (
        BlockName,
        ExtraKey,
        Fidelity,
        Namespace,
        NamespaceKind,
        Root,
        chain,
        pack_tokens,
    )
    from kvstore.core.outcomes import MissReason, Outcome, SettleOutcome

__all__ = [
    "Acquired",
    "AsyncClient",
    "AsyncRemoteClient",
    "BadInput",
    "BlockName",
    "Client",
    "ClientConfig",
    "Corrupt",
    "ExtraKey",
    "Fidelity",
    "Forbidden",
    "KvStoreError",
    "Lookup",
    "MissReason",
    "Namespace",
    "NamespaceKind",
    "NodeStats",
    "NotFound",
    "Outcome",
    "Refused",
    "Reserved",
    "Root",
    "SessionLost",
    "SettleOutcome",
    "Settled",
    "SlotRef",
    "TooLarge",
    "Unauthenticated",
    "Unreachable",
    "Unsupported",
    "WrongRoot",
    "chain",
    "pack_tokens",
]

_ROOMS = ("kvstore.core.errors", "kvstore.core.names", "kvstore.core.outcomes", "kvstore.client")


def __getattr__(name: str) -> Any:
    # On demand: the keeper and the kernels import `kvstore.core` and must not load grpc with it.
    if name in __all__:
        for room in _ROOMS:
            module = import_module(room)
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
