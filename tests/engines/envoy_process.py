"""A real Envoy before engines, as a gateway would configure it: picker by external processing."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BINARY = os.environ.get("KVSTORE_ENVOY", "") or shutil.which("envoy") or ""

_EXT = "type.googleapis.com/envoy.extensions"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _filters(body_mode: str) -> list[dict[str, Any]]:
    trailers = "SEND" if body_mode == "FULL_DUPLEX_STREAMED" else "SKIP"
    processor = {
        "@type": f"{_EXT}.filters.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": "picker"}},
        "message_timeout": "5s",
        "processing_mode": {
            "request_header_mode": "SEND", "response_header_mode": "SEND",
            "request_body_mode": body_mode, "response_body_mode": body_mode,
            "request_trailer_mode": trailers, "response_trailer_mode": trailers,
        },
    }  # fmt: skip
    router = {"@type": f"{_EXT}.filters.http.router.v3.Router"}
    return [
        {"name": "envoy.filters.http.ext_proc", "typed_config": processor},
        {"name": "envoy.filters.http.router", "typed_config": router},
    ]


def _listener(port: int, body_mode: str) -> dict[str, Any]:
    route = {"match": {"prefix": "/"}, "route": {"cluster": "engines", "timeout": "30s"}}
    manager = {
        "@type": f"{_EXT}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "front",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": _filters(body_mode),
    }
    name = "envoy.filters.network.http_connection_manager"
    return {
        "name": "front",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [{"filters": [{"name": name, "typed_config": manager}]}],
    }


def configuration(port: int, picker: str, body_mode: str) -> dict[str, Any]:
    """Return the whole configuration: engines are wherever the picker's header says."""
    host, _, picker_port = picker.rpartition(":")
    address = {"socket_address": {"address": host, "port_value": int(picker_port)}}
    options = {
        "@type": f"{_EXT}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    clusters = [
        {
            "name": "engines", "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED",
            "connect_timeout": "2s",
            "original_dst_lb_config": {
                "use_http_header": True, "http_header_name": "x-gateway-destination-endpoint"
            },
        },
        {
            "name": "picker", "type": "STATIC", "connect_timeout": "2s",
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options
            },
            "load_assignment": {
                "cluster_name": "picker",
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
            },
        },
    ]  # fmt: skip
    return {"static_resources": {"listeners": [_listener(port, body_mode)], "clusters": clusters}}


@contextmanager
def envoy(directory: Path, picker: str, body_mode: str) -> Iterator[str]:
    """Run Envoy until the block ends; yields its URL."""
    port = free_port()
    path = directory / "envoy.json"
    path.write_text(json.dumps(configuration(port, picker, body_mode)))
    command = [BINARY, "-c", str(path), "--concurrency", "1", "--disable-hot-restart", "-l", "warn"]
    process = subprocess.Popen(command)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)
