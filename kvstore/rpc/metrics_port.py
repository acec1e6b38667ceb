"""`GET /metrics` on a thread of its own, for the processes whose metrics need no event loop."""

from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

from kvstore.core.errors import BadInput
from kvstore.rpc.security import SecurityConfig, check_metrics

_JOIN_S = 5.0


@dataclass(frozen=True, slots=True)
class MetricsPort:
    """A port that is served until `close`."""

    address: str
    """`host:port` as bound."""
    _server: Any
    _thread: Any

    def close(self) -> None:
        """End the server and wait for its thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=_JOIN_S)


def serve_metrics(
    flag: str, address: str, registry: CollectorRegistry, security: SecurityConfig
) -> MetricsPort:
    """Serve what `registry` holds on `host:port` (port 0: a free one), over TLS if configured.

    Raises `BadInput` naming `flag` where the address may not or cannot be listened on.
    """
    check_metrics(flag, address, security)
    host, _, port = address.rpartition(":")
    tls: dict[str, Any] = {}
    if security.certificate is not None:
        tls.update(certfile=str(security.certificate), keyfile=str(security.key))
    if security.client_certificates:
        tls.update(client_cafile=str(security.ca), client_auth_required=True)
    try:
        server, thread = start_http_server(
            int(port), addr=host.strip("[]"), registry=registry, **tls
        )
    except OSError as error:
        raise BadInput(f"{flag} {address}: cannot listen there: {error}") from error
    return MetricsPort(f"{host}:{server.server_port}", server, thread)
