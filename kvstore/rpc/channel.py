"""Channels and servers with the same bounds everywhere."""

from collections.abc import Sequence
from typing import Any, Final

import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1._async import HealthServicer  # pyright: ignore[reportMissingImports]

from kvstore.core.errors import BadInput
from kvstore.core.limits import MAX_MESSAGE_BYTES
from kvstore.rpc.credentials import NO_CREDENTIALS, Credentials, server_credentials
from kvstore.rpc.gate import Gate
from kvstore.rpc.interceptors import ErrorInterceptor
from kvstore.rpc.security import SecurityConfig, check_listen

NO_SECURITY: Final = SecurityConfig()
"""Loopback only, and everyone there is the local user."""

_OPTIONS: Final[list[tuple[str, int]]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A node restarted by its keeper is back within a second; the default backoff grows to 120 s.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
]
_RECONNECT_MS: Final = 1_000
_LOCAL_RECONNECT_MS: Final = 100
"""On its own host a try costs nothing, and waiting longer would double what a restart costs."""


def open_channel(address: str, credentials: Credentials = NO_CREDENTIALS) -> grpc.aio.Channel:
    """Return a channel to `unix:/path` or `host:port`: over TLS where `credentials` name a CA.

    A Unix socket is always plaintext, and so is everything without credentials.
    """
    # A proxy from the environment must never see loopback or cluster traffic.
    local = address.startswith("unix:")
    options = [
        *_OPTIONS,
        # Of two options of one name gRPC takes the first.
        ("grpc.max_reconnect_backoff_ms", _LOCAL_RECONNECT_MS if local else _RECONNECT_MS),
        ("grpc.enable_http_proxy", 0),
        *credentials.options(),
    ]
    secure = None if local else credentials.channel()
    if secure is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, secure, options=options)


def make_server(
    *,
    gate: Gate | None = None,
    interceptors: Sequence[Any] = (),
    max_concurrent: int = 4_096,
) -> tuple[grpc.aio.Server, HealthServicer]:
    """Return an unstarted server with error mapping, bounds and the standard health service.

    `gate` decides who may call; without one everyone may, which is for tests and loopback.
    Beyond `max_concurrent` calls in flight gRPC answers RESOURCE_EXHAUSTED by itself.
    """
    options = [
        *_OPTIONS,
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ]
    server = grpc.aio.server(
        interceptors=[ErrorInterceptor(gate), *interceptors],
        options=options,
        maximum_concurrent_rpcs=max_concurrent,
    )
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    return server, health


def listen(server: grpc.aio.Server, address: str, security: SecurityConfig = NO_SECURITY) -> str:
    """Bind `address` (`unix:/path` or `host:port`, port 0 for a free one); return the bound one.

    Raises `BadInput` naming the address when it cannot be bound, or may not be: beyond loopback
    a port needs identities and TLS.
    """
    secure = None
    if not address.startswith("unix:"):
        check_listen("address", address, security)
        secure = server_credentials(security)
    try:
        if secure is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, secure)
    except RuntimeError as error:
        raise BadInput(f"cannot listen on {address}: {error}") from error
    if address.startswith("unix:"):
        return address
    host = address.rpartition(":")[0]
    return f"{host}:{port}"
