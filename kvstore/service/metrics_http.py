"""`GET /metrics` on an event loop: a few lines of HTTP, so that no thread touches the node's state.

Anything but that request gets 404, malformed or slow ones are dropped; at most `MAX_CONNECTIONS`.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Final

MAX_CONNECTIONS: Final = 32
REQUEST_BYTES: Final = 16 << 10
DEADLINE_S: Final = 5.0


class MetricsServer:
    """Serves what `render` returns in Prometheus' text format."""

    def __init__(self, render: Callable[[], bytes]) -> None:
        self._render = render
        self._server: asyncio.Server | None = None
        self._connections = 0

    async def start(self, address: str, tls: ssl.SSLContext | None = None) -> str:
        """Listen on `host:port` (port 0: a free one); returns the address bound."""
        host, _, port = address.rpartition(":")
        self._server = await asyncio.start_server(
            self._serve,
            host.strip("[]"),
            int(port),
            limit=REQUEST_BYTES,
            reuse_address=True,
            ssl=tls,
        )
        return f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections <= MAX_CONNECTIONS:
                async with asyncio.timeout(DEADLINE_S):
                    await self._answer(reader, writer)
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the scraper's fault and its loss
        finally:
            self._connections -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        found = method == b"GET" and path == b"/metrics"
        body = self._render() if found else b"see /metrics\n"
        writer.write(
            b"HTTP/1.1 %s\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
            b"Content-Length: %d\r\nConnection: close\r\n\r\n"
            % (b"200 OK" if found else b"404 Not Found", len(body))
        )
        writer.write(body)
        await writer.drain()
