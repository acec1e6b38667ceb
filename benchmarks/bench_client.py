"""What a local client gets out of a real node, each against its limit, in interleaved pairs.

    python benchmarks/bench_client.py [--pairs 9]

- `acquire`: one call for 1 and for 2,048 resident names, against a bare gRPC echo of messages of
  the very same sizes, through the same client library and a server process of its own;
- `get in place`: 32 blocks of 1 MiB leased, each hashed where it lies, checked and released,
  against hashing the same number of private bytes;
- `get copied` and `put`: the same batch copied, against `bytes(memoryview)` of private memory.

Prints one JSON row a case (DESIGN §8). `ratio_to_limit` is oriented so that 1 is as fast as the
limit and less is slower.
"""

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click
import grpc.aio
import xxhash

from kvstore import AsyncClient, BlockName, ClientConfig, Namespace, chain, pack_tokens
from kvstore.rpc.channel import listen, make_server, open_channel
from kvstore.rpc.v1 import cache_pb2
from kvstore.testing.node import new_run_dir, start_node

BLOCK = 1 << 20
BATCH = 32
MODEL = Namespace(weights_digest="bench", kv_dtype="float32", layers=16, kv_heads=8, head_dim=64)
SMALL = Namespace(weights_digest="small", kv_dtype="float32", layers=1, kv_heads=1, head_dim=32)
CONFIG = ClientConfig(call_ms=10_000, transfer_ms=60_000)
Work = Callable[[], Awaitable[object]]


async def timed(work: Work, repeat: int) -> float:
    """Return seconds per run of `work`, the mean over `repeat` runs."""
    started = time.perf_counter()
    for _ in range(repeat):
        await work()
    return (time.perf_counter() - started) / repeat


async def compare(ours: Work, limit: Work, *, pairs: int, repeat: int = 1) -> tuple[float, float]:
    """Return (median seconds of ours, median of limit/ours over interleaved pairs)."""
    await timed(ours, repeat)
    await timed(limit, repeat)
    times = [(await timed(ours, repeat), await timed(limit, repeat)) for _ in range(pairs)]
    return (
        statistics.median(ours_s for ours_s, _ in times),
        statistics.median(limit_s / ours_s for ours_s, limit_s in times),
    )


def row(case: str, value: float, unit: str, limit: str, ratio: float, pairs: int) -> None:
    """Print one result."""
    fields = {
        "bench": "client",
        "case": case,
        "value": round(value, 4),
        "unit": unit,
        "limit": round(value / ratio if unit == "GB/s" else value * ratio, 4),
        "limit_name": limit,
        "ratio_to_limit": round(ratio, 3),
        "peer": None,
        "peer_name": None,
        "ratio_to_peer": None,
        "runs": pairs,
    }
    click.echo(json.dumps(fields))


async def bench_acquire(run_dir: Path, echo: str, pairs: int) -> None:
    """Acquire against a bare echo of the same bytes."""
    async with (
        await AsyncClient.connect(
            run_dir, namespace=SMALL, payload_bytes=4096, shares=1, config=CONFIG
        ) as client,
        open_channel(echo) as channel,
    ):
        names = list(chain(client.root, pack_tokens(range(2048 * 16))))
        await client.put(names, [bytes(4096)] * len(names))
        call: Any = channel.unary_unary("/echo/Echo")  # type: ignore[call-arg]
        for count in (1, 2048):
            packed = b"".join(names[:count])
            reply = _reply_like(count)
            size = len(reply).to_bytes(4, "little")
            leases: list[int] = []

            async def ours(packed: bytes = packed, leases: list[int] = leases) -> None:
                acquired = await client.acquire(packed)
                leases.append(acquired.lease)

            async def bare(request: bytes = size + packed) -> None:
                await call(request, timeout=10)

            seconds, ratio = await compare(ours, bare, pairs=pairs, repeat=50)
            row(f"acquire {count}", seconds * 1e6, "us", "bare gRPC echo", ratio, pairs)
            await client.settle(release=leases)


async def bench_blocks(run_dir: Path, pairs: int) -> None:
    """Batches of 32 blocks of 1 MiB."""
    private = [memoryview(os.urandom(BLOCK)) for _ in range(BATCH)]
    async with await AsyncClient.connect(
        run_dir, namespace=MODEL, payload_bytes=BLOCK, shares=8, config=CONFIG
    ) as client:
        names = list(chain(client.root, pack_tokens(range(BATCH * 16))))
        await client.put(names, private)
        digest = xxhash.xxh3_128_digest
        prompts = iter(range(1, 1 << 30))

        async def in_place() -> None:
            acquired = await client.acquire(names)
            for ref in acquired.ready:
                digest(client.view(ref))
                assert client.still(ref)
            await client.settle(release=[acquired.lease])

        async def copied() -> None:
            assert len(await client.get(names)) == BATCH

        async def put() -> None:
            fresh: list[BlockName] = list(
                chain(client.root, pack_tokens([next(prompts)] * BATCH * 16))
            )
            await client.put(fresh, private)

        async def hashes() -> None:
            for block in private:
                digest(block)

        async def copies() -> None:
            held = [bytes(block) for block in private]
            del held

        gigabytes = BATCH * BLOCK / 1e9
        for case, ours, limit, name in (
            ("get in place, hashed", in_place, hashes, "xxh3 of private memory"),
            ("get copied", copied, copies, "bytes() of private memory"),
            ("put", put, copies, "bytes() of private memory"),
        ):
            seconds, ratio = await compare(ours, limit, pairs=pairs)
            row(f"{case}, 32 x 1 MiB", gigabytes / seconds, "GB/s", name, ratio, pairs)


def _reply_like(count: int) -> bytes:
    return cache_pb2.AcquireReply(
        incarnation=1,
        lease=1 << 40,
        ready=count,
        slots=range(count),
        offsets=range(count),
        generations=[1] * count,
    ).SerializeToString()


async def serve_echo(address: str) -> None:
    """Answer any call with as many bytes as the first four of the request say."""

    async def echo(request: bytes, context: Any) -> bytes:
        return bytes(int.from_bytes(request[:4], "little"))

    server, _ = make_server()
    handler = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("echo", {"Echo": handler}),)
    )
    listen(server, address)
    await server.start()
    click.echo("ready")
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


@click.command()
@click.option("--pairs", default=9, show_default=True, help="Interleaved pairs a case.")
@click.option("--echo", hidden=True, default="", help="Serve the echo on this address instead.")
def main(pairs: int, echo: str) -> None:
    """Run every case."""
    if echo:
        asyncio.run(serve_echo(echo))
        return
    address = f"unix:{new_run_dir()}/echo"
    with (
        start_node(arena_bytes=512 << 20) as node,
        subprocess.Popen(
            [sys.executable, __file__, "--echo", address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as server,
    ):
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        try:
            asyncio.run(bench_acquire(node.run_dir, address, pairs))
            asyncio.run(bench_blocks(node.run_dir, pairs))
        finally:
            server.terminate()
            shutil.rmtree(Path(address.removeprefix("unix:")).parent)


if __name__ == "__main__":
    main()
