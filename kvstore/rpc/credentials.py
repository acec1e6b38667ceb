"""What a process shows and trusts when it calls or serves: TLS material as gRPC wants it."""

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from kvstore.core.errors import BadInput
from kvstore.rpc.security import SecurityConfig, load_security


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a client trusts and shows. Secrets stay out of `repr`, and so out of logs.

    `ca` turns TLS on for everything but Unix sockets. A token is sent over TLS or a Unix socket,
    never in the clear over a network.
    """

    ca: bytes = b""
    certificate: bytes = b""
    key: bytes = field(default=b"", repr=False)
    token: str = field(default="", repr=False)
    server_name: str = ""

    @classmethod
    def of(cls, security: SecurityConfig) -> "Credentials":
        """Read what a configuration names; raises `BadInput` for a file that cannot be read."""
        return cls(
            ca=_read("ca", security.ca),
            certificate=_read("certificate", security.certificate),
            key=_read("key", security.key),
            token=security.token(),
            server_name=security.server_name,
        )

    @classmethod
    def from_file(cls, path: Path) -> "Credentials":
        """Read a `--security` file."""
        return cls.of(load_security(path))

    def channel(self) -> grpc.ChannelCredentials | None:
        """Return gRPC's form; None: plaintext, for loopback."""
        if not self.ca:
            return None
        tls = grpc.ssl_channel_credentials(
            root_certificates=self.ca,
            private_key=self.key or None,
            certificate_chain=self.certificate or None,
        )
        if not self.token:
            return tls
        return grpc.composite_channel_credentials(
            tls, grpc.access_token_call_credentials(self.token)
        )

    def ssl(self) -> ssl.SSLContext | None:
        """Return what a client's plain socket is wrapped with; None: plaintext.

        Raises `BadInput` when the material cannot be used.
        """
        if not self.ca:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_verify_locations(cadata=self.ca.decode("ascii"))
            if self.certificate:
                with _as_file(self.certificate) as certificate, _as_file(self.key) as key:
                    context.load_cert_chain(certificate, key)
        except (OSError, ValueError, ssl.SSLError) as error:
            raise BadInput(f"ca, certificate or key cannot be used: {error}") from error
        return context

    def options(self) -> list[tuple[str, str]]:
        """Return the channel options that go with them."""
        if not self.ca or not self.server_name:
            return []
        return [("grpc.ssl_target_name_override", self.server_name)]

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata that shows the token over a Unix socket."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()


NO_CREDENTIALS = Credentials()
"""Plaintext and nameless: for loopback and Unix sockets."""


def server_credentials(security: SecurityConfig) -> grpc.ServerCredentials | None:
    """Return what a TCP port serves with; None: plaintext."""
    if security.certificate is None or security.key is None:
        return None
    key, certificate = _read("key", security.key), _read("certificate", security.certificate)
    return grpc.ssl_server_credentials(
        [(key, certificate)],
        root_certificates=_read("ca", security.ca) if security.client_certificates else None,
        require_client_auth=security.client_certificates,
    )


def ssl_context(security: SecurityConfig) -> ssl.SSLContext | None:
    """Return the same for servers of HTTP; None: plaintext."""
    if security.certificate is None or security.key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(security.certificate, security.key)
        if security.client_certificates:
            context.load_verify_locations(security.ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise BadInput(f"certificate, key or ca cannot be used: {error}") from error
    return context


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """Give bytes a path, in memory: `ssl` reads certificates and keys from files only."""
    fd = os.memfd_create("kvstore-tls", os.MFD_CLOEXEC)
    try:
        os.write(fd, content)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _read(key: str, path: Path | None) -> bytes:
    if path is None:
        return b""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{key} {path}: {error.strerror}") from error
