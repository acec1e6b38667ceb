"""What workers, adapters and users call: `AsyncClient`, `Client` and `AsyncRemoteClient`.

Knows: sessions, Acquire and Settle, how to read a slot safely.
Must not know: how a node decides; tensors; engines.
"""

from kvstore.client.aio import AsyncClient
from kvstore.client.blocking import Client
from kvstore.client.config import ClientConfig
from kvstore.client.remote import AsyncRemoteClient
from kvstore.client.replies import (
    Acquired,
    Lookup,
    Names,
    NodeStats,
    Reserved,
    Settled,
    SlotRef,
    TierUse,
)

__all__ = [
    "Acquired",
    "AsyncClient",
    "AsyncRemoteClient",
    "Client",
    "ClientConfig",
    "Lookup",
    "Names",
    "NodeStats",
    "Reserved",
    "Settled",
    "SlotRef",
    "TierUse",
]
