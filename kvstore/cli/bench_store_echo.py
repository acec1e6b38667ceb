"""The bare gRPC server that calls of `bench store` are set beside, in a process of its own.

On a Unix socket like the node's, with nothing of ours in it. `Echo` answers with as many bytes as
the first four of the request say: what any call costs at least. `Learn` and `Find` are a dictionary
of names behind a handler: what any lookup costs at least.
"""

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import click
import grpc.aio

from kvstore.core.errors import Unreachable
from kvstore.core.limits import MAX_MESSAGE_BYTES, NAME_BYTES
from kvstore.testing.node import new_run_dir

ECHO: Final = "/echo/Echo"
LEARN: Final = "/echo/Learn"
FIND: Final = "/echo/Find"


class _Echo:
    """The handlers: raw bytes in and out."""

    def __init__(self) -> None:
        self._known: dict[bytes, int] = {}

    async def echo(self, request: bytes, context: Any) -> bytes:
        """Answer with as many bytes as the first four say."""
        return bytes(int.from_bytes(request[:4], "little"))

    async def learn(self, request: bytes, context: Any) -> bytes:
        """Take packed names into the dictionary."""
        for at in range(0, len(request), NAME_BYTES):
            self._known[request[at : at + NAME_BYTES]] = 1
        return b""

    async def find(self, request: bytes, context: Any) -> bytes:
        """Answer a byte for each packed name: 1 where it is known."""
        get = self._known.get
        return bytes(
            get(request[at : at + NAME_BYTES], 0) for at in range(0, len(request), NAME_BYTES)
        )


async def serve_echo(address: str) -> None:
    """Serve until standard input ends."""
    echo = _Echo()
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)])
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(work)
        for name, work in (("Echo", echo.echo), ("Learn", echo.learn), ("Find", echo.find))
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo", handlers),))
    server.add_insecure_port(address)
    await server.start()
    click.echo("ready")
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


@contextmanager
def start_echo() -> Iterator[str]:
    """Run `serve_echo` in a process and give its address."""
    run_dir = new_run_dir()
    address = f"unix:{run_dir}/echo"
    command = [sys.executable, "-m", "kvstore.cli.main", "bench", "store", "--echo", address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            if server.stdout.readline() != b"ready\n":
                raise Unreachable("the echo server did not start")
            yield address
        finally:
            server.terminate()
            shutil.rmtree(run_dir, ignore_errors=True)
