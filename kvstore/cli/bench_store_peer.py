"""Cases of `bench store` over loopback TCP: reads from another node, against a bare socket.

The bare socket is a process that pours blocks of memory into every connection; its reader fills
the same buffers with `recv_into` and sums each block once: what any verified read costs at least.
"""

import asyncio
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import click
import numpy as np
import xxhash

from kvstore.cli.bench_rows import Bench, Work
from kvstore.client import AsyncClient, AsyncRemoteClient, ClientConfig
from kvstore.core.errors import Unreachable
from kvstore.core.names import BlockName, Namespace, Root, chain
from kvstore.testing.node import RunningNode, start_node

MIB: Final = 1 << 20
BATCH_BYTES: Final = 64 * MIB
_ARENA_BYTES: Final = 1536 * MIB
"""Every pair's batch once, and room to spare."""
_SHARES: Final = 8
CONFIG: Final = ClientConfig(call_ms=10_000, transfer_ms=60_000)
_SEEN_S: Final = 20.0
_SIZES: Final = (1, 4)
_CASES: Final = tuple(
    f"{what} {mib} MiB"
    for mib in _SIZES
    for what in ("peer read", "remote get", "remote get single", "remote put")
)


def bench_peers(bench: Bench, directory: Path) -> None:
    """Blocks of 1 and 4 MiB in batches of 64 MiB: node to node, and node to remote client."""
    if not bench.wants(*_CASES):
        return
    key, peers = directory / "cluster.key", directory / "peers.json"
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)
    options = ("--cluster-key-file", str(key), "--peers", str(peers), "--policy", "lru")
    with ExitStack() as stack:
        holder, reader = (
            stack.enter_context(
                start_node(arena_bytes=_ARENA_BYTES, name=name, options=options, deadline_s=120)
            )
            for name in ("holder", "reader")
        )
        listed = [{"name": node.name, "address": node.listen} for node in (holder, reader)]
        peers.write_text(json.dumps({"peers": listed}))
        for mib in _SIZES:
            with start_pouring(mib * MIB) as port:
                asyncio.run(_bench_size(bench, holder, reader, mib, port))


async def _bench_size(
    bench: Bench, holder: RunningNode, reader: RunningNode, mib: int, port: int
) -> None:
    size = mib * MIB
    batch = BATCH_BYTES // size
    buffers = [memoryview(bytearray(size)) for _ in range(batch)]

    async def bare() -> None:
        await asyncio.to_thread(drink, port, buffers)

    async def one_bare() -> None:
        await asyncio.to_thread(drink, port, buffers[:1])

    label = f"peer {mib}"
    there = await AsyncRemoteClient.connect(
        holder.listen, namespace=model(label), payload_bytes=size, shares=_SHARES, config=CONFIG
    )
    limit_name = "bare recv_into and xxh3-128"
    async with there:
        names = names_of(there.root, 0, batch)
        blocks = [os.urandom(size) for _ in range(batch)]
        assert None not in await there.put(names, blocks)

        async def get() -> None:
            assert await there.get_into(names, buffers) == batch

        async def single() -> None:
            assert await there.get_into(names[:1], buffers[:1]) == 1

        prompts = itertools.count(1_000_000)

        async def put() -> None:
            assert None not in await there.put(names_of(there.root, next(prompts), batch), blocks)

        gigabytes = BATCH_BYTES / 1e9
        await bench.against(
            f"remote get {mib} MiB", get, bare, limit_name=limit_name,
            amount=gigabytes, unit="GB/s",
        )  # fmt: skip
        await bench.against(
            f"remote get single {mib} MiB", single, one_bare, limit_name=limit_name,
            amount=size / 1e9, unit="GB/s", repeat=16,
        )  # fmt: skip
        await bench.against(
            f"remote put {mib} MiB", put, bare, limit_name=limit_name,
            amount=gigabytes, unit="GB/s",
        )  # fmt: skip
        if bench.wants(f"peer read {mib} MiB"):
            await _bench_peer_read(bench, there, reader, mib, bare)


async def _bench_peer_read(
    bench: Bench, there: AsyncRemoteClient, reader: RunningNode, mib: int, bare: Work
) -> None:
    """Batches that only the other node holds, each once: then they are here."""
    size = mib * MIB
    batch = BATCH_BYTES // size
    here = await AsyncClient.connect(
        reader.run_dir,
        namespace=model(f"peer {mib}"),
        payload_bytes=size,
        shares=_SHARES,
        config=CONFIG,
    )
    async with here:
        fresh: list[list[BlockName]] = []
        for number in range(bench.pairs + 1):
            names = names_of(there.root, 1 + number, batch)
            assert None not in await there.put(names, [os.urandom(size) for _ in range(batch)])
            fresh.append(names)
        async with asyncio.timeout(_SEEN_S):
            for names in fresh:
                while (await here.lookup(names)).prefix < batch:  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.01)

        async def read() -> None:
            acquired = await here.acquire(fresh.pop(), pending_ms=60_000)
            assert len(acquired.pending) == batch, "the blocks were not all at the neighbour"
            assert await here.wait_ready(acquired.pending, deadline_ms=60_000) == batch
            await here.settle(release=[acquired.lease])

        await bench.against(
            f"peer read {mib} MiB", read, bare, limit_name="bare recv_into and xxh3-128",
            amount=BATCH_BYTES / 1e9, unit="GB/s",
        )  # fmt: skip


def model(label: str) -> Namespace:
    """Return the namespace of one case."""
    return Namespace(weights_digest=label, kv_dtype="float32", layers=1, kv_heads=1, head_dim=32)


def names_of(root: Root, prompt: int, count: int) -> list[BlockName]:
    """Return the names of a made-up prompt's blocks."""
    return chain(root, np.full(count * 16, prompt, np.uint32).tobytes())


def drink(port: int, buffers: list[memoryview]) -> None:
    """Fill buffers from a bare socket and sum each."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        for buffer in buffers:
            at = 0
            while at < len(buffer):
                moved = sock.recv_into(buffer[at:])
                if not moved:
                    raise Unreachable("the bare socket ended")
                at += moved
            xxhash.xxh3_128_digest(buffer)


def pour(size: int) -> None:
    """Send blocks of `size` bytes into every connection until it is closed; the port is printed."""
    blocks = [memoryview(os.urandom(size)) for _ in range(max(1, BATCH_BYTES // size))]

    def serve(sock: socket.socket) -> None:
        with sock:
            try:
                for block in itertools.cycle(blocks):
                    sock.sendall(block)
            except OSError:
                return  # the reader has had enough

    with socket.create_server(("127.0.0.1", 0)) as listener:
        click.echo(str(listener.getsockname()[1]))
        sys.stdout.flush()
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=serve, args=(sock,), daemon=True).start()


@contextmanager
def start_pouring(size: int) -> Iterator[int]:
    """Run `pour` in a process and give its port."""
    command = [sys.executable, "-m", "kvstore.cli.main", "bench", "store", "--pour", str(size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            yield int(server.stdout.readline())
        finally:
            server.terminate()
