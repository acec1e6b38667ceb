"""Keeps tenants apart on shared workers: every name of a tenant's blocks begins with its domain.

A worker names blocks under one root. What a tenant asks for gets an extra key at its first block,
derived from the share domain that the server found out, so no prompt of one tenant ever has a name
of another's: neither a hit nor a miss says anything about others, since the same look-up is made
under a name that only this domain can have.

    extra key = SHA-256("kvstore.domain.v1" ‖ length of domain ‖ domain ‖ the caller's cache_salt)
"""

import hashlib
from dataclasses import replace
from typing import Final

from kvstore.rpc.identity import Principal
from kvworkers.frontends.generation import Generation

_LABEL: Final = b"kvstore.domain.v1"


def for_tenant(request: Generation, principal: Principal, *, apart: bool) -> Generation:
    """Return the request as this caller may run it.

    `apart` is whether the frontend knows its callers; where everyone is the local user there is
    one domain, and names stay what every other client of the store derives.
    """
    if not apart:
        return request
    domain = principal.share_domain
    salt = domain_salt(domain, request.cache_salt)
    return replace(request, share_domain=domain, cache_salt=salt)


def domain_salt(domain: str, cache_salt: bytes) -> bytes:
    """Return the extra key of a domain's names, 32 bytes; different for every pair."""
    encoded = domain.encode()
    digest = hashlib.sha256(_LABEL)
    digest.update(len(encoded).to_bytes(4, "little") + encoded + cache_salt)
    return digest.digest()
