"""Who is calling: the seam between transport credentials and share domains.

The server decides the identity; nothing a caller writes into a request widens it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


class Role(StrEnum):
    """What an identity may do besides using its own share domain."""

    WATCH = "watch"
    """Subscribe to everything a publisher holds: routers and peers."""
    ADMIN = "admin"
    """Clear, drain, inspect."""
    PEER = "peer"
    """Read any block that it can name, under any root: other nodes of the cluster."""
    ARENA = "arena"
    """Map the arena: sees every tenant's bytes, so workers on this host only."""


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller as the server sees it."""

    name: str
    share_domain: str
    roles: frozenset[Role] = field(default_factory=frozenset)


class Identity(Protocol):
    """Turns credentials into a principal.

    `identify` raises `Unauthenticated` when there is no acceptable credential. It must neither
    block nor be influenced by anything but credentials: `metadata` (lower-case keys) and `peer`
    (gRPC's peer string, or `unix:uid=N` for a session socket).
    """

    def identify(self, metadata: Mapping[str, str | bytes], peer: str) -> Principal: ...


class LocalIdentity:
    """Everyone who reaches the socket is the one local user: loopback and Unix sockets only.

    The socket's directory is 0700 and loopback ports belong to this machine, which is the whole
    protection; a server that listens beyond loopback has to use another Identity.
    """

    def __init__(self, share_domain: str = "default") -> None:
        self._principal = Principal("local", share_domain, frozenset(Role))

    def identify(self, metadata: Mapping[str, str | bytes], peer: str) -> Principal:
        """Return the local principal whoever asks."""
        return self._principal
