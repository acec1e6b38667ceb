"""Who may talk to a port, and how: the one frozen configuration of every server and client.

Written as TOML and given to each command as `--security FILE`; docs/security.md has the keys.
Nothing here imports gRPC: the keeper checks its configuration and must stay small.
"""

import ipaddress
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from kvstore.core.errors import BadInput
from kvstore.core.limits import MAX_ID_BYTES
from kvstore.rpc.identity import Role

MAX_IDENTITIES: Final = 65_536
MIN_TOKEN_BYTES: Final = 16
MAX_TOKEN_BYTES: Final = 1_024
_DIGEST_CHARACTERS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """What one share domain may ask for. Zero: no bound."""

    calls_per_s: float = 0.0
    burst: float = 0.0
    """Calls that may come at once after a pause; zero: two seconds' worth, at least one."""
    bytes_per_s: float = 0.0
    """Of request messages and bodies."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise BadInput(f"{one.name} must be a number of at least 0, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityEntry:
    """One caller that a server knows, by the digests of its tokens or the names in its
    certificate.
    """

    name: str
    share_domain: str
    roles: frozenset[Role]
    tokens_sha256: tuple[str, ...] = field(default=(), repr=False)
    certificates: tuple[str, ...] = ()
    rate: Rate | None = None

    def __post_init__(self) -> None:
        for key in ("name", "share_domain"):
            text = getattr(self, key)
            if not isinstance(text, str) or not text or len(text.encode()) > MAX_ID_BYTES:
                raise BadInput(f"{key} must have 1 to {MAX_ID_BYTES} bytes")
        for number, digest in enumerate(self.tokens_sha256):
            if len(digest) != _DIGEST_CHARACTERS or set(digest) - set("0123456789abcdef"):
                raise BadInput(f"tokens_sha256[{number}] is not 64 lower-case hex digits")
        if not self.tokens_sha256 and not self.certificates:
            raise BadInput("give tokens_sha256 or certificates: nobody could be this identity")


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityConfig:
    """Everything that one process needs to serve and to call; the default is loopback only.

    A server proves itself with `certificate` and `key`; `ca` signs what it accepts from others,
    whom `client_certificates` obliges to show one. A client trusts `ca`, expects `server_name`
    in place of the address where that is set, and shows the same certificate and its token.
    """

    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    client_certificates: bool = False
    server_name: str = ""
    token_file: Path | None = None
    insecure_listen: bool = False
    """Listen beyond loopback with neither identities nor TLS: whoever connects is trusted."""
    audit_log: Path | None = None
    limits: Rate = field(default_factory=Rate)
    identities: tuple[IdentityEntry, ...] = ()

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise BadInput("certificate and key belong together: give both or neither")
        for key in ("certificate", "key", "ca", "token_file"):
            path = getattr(self, key)
            if path is not None and not path.is_file():
                raise BadInput(f"{key}: {path} is not a file")
        if self.client_certificates and (self.ca is None or self.certificate is None):
            raise BadInput("client_certificates needs ca, certificate and key")
        if self.token_file is not None and self.ca is None:
            raise BadInput("token_file needs ca: a token is sent over TLS only")
        self._check_identities()

    def _check_identities(self) -> None:
        if len(self.identities) > MAX_IDENTITIES:
            raise BadInput(f"{len(self.identities)} identities; {MAX_IDENTITIES} allowed")
        seen: dict[str, str] = {}
        for entry in self.identities:
            for what in (entry.name, *entry.tokens_sha256, *entry.certificates):
                other = seen.setdefault(what, entry.name)
                if other != entry.name or (what == entry.name and list(self.names).count(what) > 1):
                    raise BadInput(f"identities {other!r} and {entry.name!r} share a credential")
            if entry.certificates and not self.client_certificates:
                raise BadInput(
                    f"identities: {entry.name!r} has certificates, and client_certificates is off"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all identities."""
        return tuple(entry.name for entry in self.identities)

    @property
    def authenticates(self) -> bool:
        """Whether a stranger who reaches a port is turned away."""
        return bool(self.identities)

    def token(self) -> str:
        """Return the token that this process shows to servers; empty where it has none."""
        if self.token_file is None:
            return ""
        text = self.token_file.read_text(encoding="utf-8").strip()
        if not MIN_TOKEN_BYTES <= len(text.encode()) <= MAX_TOKEN_BYTES or not text.isascii():
            raise BadInput(
                f"token_file: {self.token_file} must hold {MIN_TOKEN_BYTES} to {MAX_TOKEN_BYTES}"
                " ASCII characters"
            )
        return text


def load_security(path: Path | None) -> SecurityConfig:
    """Return what a file says, or the default for None; paths in it are relative to it.

    Raises `BadInput` naming the file and the key at fault.
    """
    if path is None:
        return SecurityConfig()
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        # A parser's message may quote the line: it says where, which is enough.
        raise BadInput(f"--security {path}: {_reason(error)}") from None
    try:
        return _security(raw, path.parent)
    except BadInput as error:
        raise BadInput(f"--security {path}: {error}") from error


def check_listen(flag: str, address: str, security: SecurityConfig) -> None:
    """Raise `BadInput` unless `address` is `host:port` that may be listened on.

    Beyond loopback a port needs identities and TLS, or the word that it shall have neither.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise BadInput(f"{flag} {address!r} is not host:port")
    if is_loopback(address) or security.insecure_listen:
        return
    if not security.authenticates:
        raise BadInput(
            f"{flag} {address!r} is not a loopback address: --security must name identities,"
            " or set insecure_listen = true"
        )
    if security.certificate is None:
        raise BadInput(
            f"{flag} {address!r} is not a loopback address: tokens would cross the network in"
            " the clear; --security must name certificate and key, or set insecure_listen = true"
        )


def check_metrics(flag: str, address: str, security: SecurityConfig) -> None:
    """Raise `BadInput` unless metrics may be served on `address`.

    A scraper shows a certificate: ports of metrics know no tokens.
    """
    check_listen(flag, address, security)
    if not (is_loopback(address) or security.client_certificates or security.insecure_listen):
        raise BadInput(
            f"{flag} {address!r} is not a loopback address: metrics need client_certificates ="
            " true in --security, or insecure_listen = true"
        )


def is_loopback(address: str) -> bool:
    """Say whether `host:port` is on loopback."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: whoever answers for it decides where it leads
        return False


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return str(error.strerror)
    if isinstance(error, tomllib.TOMLDecodeError):
        return f"not TOML: {error}"
    return "not UTF-8"


_PATHS: Final = ("certificate", "key", "ca", "token_file", "audit_log")
_SCALARS: Final[dict[str, type]] = {
    **dict.fromkeys(_PATHS, str),
    "client_certificates": bool,
    "server_name": str,
    "insecure_listen": bool,
    "limits": dict,
    "identities": list,
}


def _security(raw: Mapping[str, Any], base: Path) -> SecurityConfig:
    _check_keys(raw, _SCALARS, "")
    made = dict(raw)
    for key in _PATHS:
        if key in made:
            made[key] = base / made[key]
    made["limits"] = _rate(raw.get("limits", {}), "limits")
    made["identities"] = tuple(
        _identity(entry, f"identities[{number}]")
        for number, entry in enumerate(raw.get("identities", ()))
    )
    return SecurityConfig(**made)


_ENTRY: Final[dict[str, type]] = {
    "name": str, "share_domain": str, "roles": list, "tokens_sha256": list, "certificates": list,
    "limits": dict,
}  # fmt: skip


def _identity(raw: Any, where: str) -> IdentityEntry:
    if not isinstance(raw, dict):
        raise BadInput(f"{where} is not a table")
    _check_keys(raw, _ENTRY, f"{where}.")
    for key in ("name", "share_domain", "roles"):
        if key not in raw:
            raise BadInput(f"{where}.{key} is missing")
    for key in ("roles", "tokens_sha256", "certificates"):
        if not all(isinstance(one, str) for one in raw.get(key, ())):
            raise BadInput(f"{where}.{key} must be a list of strings")
    for role in raw["roles"]:
        if role not in list(Role):
            raise BadInput(f"{where}.roles: {role!r} is none of {', '.join(Role)}")
    try:
        return IdentityEntry(
            name=raw["name"],
            share_domain=raw["share_domain"],
            roles=frozenset(Role(role) for role in raw["roles"]),
            tokens_sha256=tuple(raw.get("tokens_sha256", ())),
            certificates=tuple(raw.get("certificates", ())),
            rate=_rate(raw["limits"], "limits") if "limits" in raw else None,
        )
    except BadInput as error:
        raise BadInput(f"{where}.{error}") from error


def _rate(raw: Mapping[str, Any], where: str) -> Rate:
    known = {one.name: object for one in fields(Rate)}
    _check_keys(raw, known, f"{where}.")
    try:
        return Rate(**raw)
    except BadInput as error:
        raise BadInput(f"{where}.{error}") from error


def _check_keys(raw: Mapping[str, Any], known: Mapping[str, type], prefix: str) -> None:
    for key, value in raw.items():
        if key not in known:
            raise BadInput(f"{prefix}{key} is not a key; known are {', '.join(sorted(known))}")
        if not isinstance(value, known[key]):
            raise BadInput(f"{prefix}{key} must be a {known[key].__name__}")
