"""Identities from bearer tokens and client certificates.

Only digests of tokens are kept, so neither a configuration file nor a memory dump of a server
gives one away; finding a token's owner is one hash and one look-up, whoever it is.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Final

from kvstore.core.errors import Unauthenticated
from kvstore.rpc.identity import Identity, LocalIdentity, Principal, Role
from kvstore.rpc.security import MAX_TOKEN_BYTES, IdentityEntry, SecurityConfig

AUTHORIZATION: Final = "authorization"
_SCHEME: Final = "bearer "
_REFUSED: Final = "no known identity: send `authorization: Bearer TOKEN` or a client certificate"


def digest_of(token: str) -> str:
    """Return what `tokens_sha256` holds for a token."""
    return hashlib.sha256(token.encode()).hexdigest()


class KnownIdentities:
    """The listed identities; a token decides where one is shown, else the certificate.

    `local_sockets`: who reaches a Unix socket of this server without a token is the local user,
    since the directory of the socket is 0700; with a token it may act for that token's domain.
    """

    def __init__(self, entries: Sequence[IdentityEntry], *, local_sockets: bool = False) -> None:
        self._by_token: dict[str, Principal] = {}
        self._by_certificate: dict[str, Principal] = {}
        self._local = LocalIdentity() if local_sockets else None
        for entry in entries:
            principal = Principal(entry.name, entry.share_domain, entry.roles)
            for digest in entry.tokens_sha256:
                self._by_token[digest] = principal
            for name in entry.certificates:
                self._by_certificate[name] = principal

    def identify(
        self, metadata: Mapping[str, str | bytes], peer: str, certificate: Sequence[str] = ()
    ) -> Principal:
        """Return whose credentials these are; see `Identity`."""
        local = peer.startswith("unix:") and self._local is not None
        header = metadata.get(AUTHORIZATION)
        if header is not None:
            principal = self._by_token.get(digest_of(_token(header)))
            if principal is None:
                raise Unauthenticated(_REFUSED)
            if local:
                return Principal(
                    principal.name, principal.share_domain, principal.roles | {Role.ARENA}
                )
            return principal
        if local:
            assert self._local is not None
            return self._local.identify(metadata, peer)
        for name in certificate:
            if name in self._by_certificate:
                return self._by_certificate[name]
        raise Unauthenticated(_REFUSED)


def identity_of(security: SecurityConfig, *, local_sockets: bool = False) -> Identity:
    """Return what identifies callers under a configuration."""
    if security.authenticates:
        return KnownIdentities(security.identities, local_sockets=local_sockets)
    return LocalIdentity()


def _token(header: str | bytes) -> str:
    text = header.decode("latin-1") if isinstance(header, bytes) else header
    if len(text) > MAX_TOKEN_BYTES + len(_SCHEME) or not text.lower().startswith(_SCHEME):
        raise Unauthenticated(_REFUSED)
    token = text[len(_SCHEME) :].strip()
    if not token.isascii():  # lone surrogates could not even be encoded
        raise Unauthenticated(_REFUSED)
    return token
