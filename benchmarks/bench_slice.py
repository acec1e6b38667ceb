"""What a cached prompt saves and what a miss costs, with real worker processes and a real node.

    python benchmarks/bench_slice.py [--tokens 1500] [--rounds 7]

Each round takes a prompt that nobody has seen: worker `on` computes it (a miss with the store), the
same worker computes it with every cache turned off for the request, worker `fresh` finds it in
the arena, and `on` finds it again in its own pages. The order of the first two alternates; what the
first leaves to do in the background is done before the second starts. Ratios are medians over
the rounds. One JSON line per case on standard output; progress on standard error.
"""

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import click

from kvstore.client import AsyncClient
from kvstore.core.layout import RAW_CODEC, BlockLayout
from kvstore.core.names import Root, chain, pack_tokens
from kvstore.rpc.channel import open_channel
from kvstore.rpc.convert import namespace_from_proto
from kvstore.rpc.v1 import worker_pb2, worker_pb2_grpc
from kvstore.testing.node import start_node

HIT_BAR = 15.0
MISS_BAR = 0.98
STORE_BAR = 50.0
"""A miss spends less than 2 % of its time in the store."""
STORED_DEADLINE_S = 30.0
REPLY_TOKENS = 2


@dataclass
class Times:
    """Milliseconds to the first token, one entry per round."""

    on: list[float] = field(default_factory=list)
    off: list[float] = field(default_factory=list)
    dram: list[float] = field(default_factory=list)
    hbm: list[float] = field(default_factory=list)
    asked: list[float] = field(default_factory=list)
    """Spent on the store before the first token of a miss, as the worker says."""


@dataclass(frozen=True)
class Stage:
    """Stubs of the two workers and a client of the node."""

    on: worker_pb2_grpc.WorkerStub
    fresh: worker_pb2_grpc.WorkerStub
    client: AsyncClient
    root: Root


@contextmanager
def worker(name: str, *options: str) -> Iterator[str]:
    """Run a worker process; give its address; end it by its pid."""
    command = [sys.executable, "-m", "kvworkers.worker", "--name", name, "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ.copy())
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise click.ClickException(f"{name} did not start")
        yield json.loads(line)["address"]
    finally:
        process.terminate()
        process.wait(timeout=30)
        process.stdout.close()


async def first_token_ms(
    stub: worker_pb2_grpc.WorkerStub, prompt: bytes, *, cached: Sequence[str], off: bool = False
) -> tuple[float, float]:
    """Return the times to the first token and in the store; checks where the prompt came from."""
    request = worker_pb2.RunRequest(
        request_id="bench",
        tokens=prompt,
        sampling=worker_pb2.Sampling(max_tokens=REPLY_TOKENS, ignore_eos=True),
        no_store=off,
        no_read=off,
    )
    started, first_ms = time.perf_counter(), 0.0
    load_ms = 0.0
    async for reply in stub.Run(request, timeout=300):
        if not first_ms:
            first_ms = (time.perf_counter() - started) * 1000
            load_ms = reply.load_ms
            parts = {"hbm": reply.cache.hbm_tokens, "dram": reply.cache.dram_tokens}
            found = [tier for tier, tokens in parts.items() if tokens]
            if found != list(cached):
                raise click.ClickException(f"expected hits in {list(cached)}, got {found}")
    return first_ms, load_ms


async def stored(stage: Stage, prompt: bytes) -> None:
    """Wait until the node holds every full block of the prompt."""
    names = chain(stage.root, prompt)
    async with asyncio.timeout(STORED_DEADLINE_S):
        while True:
            if (await stage.client.lookup(names, deadline_ms=5_000)).prefix == len(names):
                return
            await asyncio.sleep(0.02)


async def one_round(stage: Stage, number: int, tokens: int, times: Times) -> None:
    """Take one new prompt through all four cases."""
    draw = random.Random(number)
    prompt = pack_tokens([draw.randrange(1_000, 40_000) for _ in range(tokens)])
    for off in (False, True) if number % 2 else (True, False):
        first_ms, load_ms = await first_token_ms(stage.on, prompt, cached=(), off=off)
        (times.off if off else times.on).append(first_ms)
        if not off:
            times.asked.append(load_ms)
            await stored(stage, prompt)
    times.dram.append((await first_token_ms(stage.fresh, prompt, cached=("dram",)))[0])
    times.hbm.append((await first_token_ms(stage.on, prompt, cached=("hbm",)))[0])
    click.echo(
        f"round {number}: on {times.on[-1]:.0f} ms, off {times.off[-1]:.0f}, "
        f"dram {times.dram[-1]:.0f}, hbm {times.hbm[-1]:.0f}",
        err=True,
    )


def row(case: str, ours: list[float], peer: list[float], peer_name: str, bar: float) -> str:
    """Return one line of DESIGN §8's format; the ratio is the median over the rounds."""
    ratio = statistics.median(p / o for o, p in zip(ours, peer, strict=True))
    return json.dumps(
        {
            "bench": "slice",
            "case": case,
            "value": round(statistics.median(ours), 2),
            "unit": "ms",
            "limit": bar,
            "limit_name": "least ratio to peer asked for",
            "ratio_to_limit": round(ratio / bar, 3),
            "peer": round(statistics.median(peer), 2),
            "peer_name": peer_name,
            "ratio_to_peer": round(ratio, 3),
            "runs": len(ours),
        }
    )


async def measure(addresses: Sequence[str], run_dir: str, *, tokens: int, rounds: int) -> Times:
    """Run all rounds against running workers."""
    times = Times()
    channels = [open_channel(address) for address in addresses]
    on, fresh = (worker_pb2_grpc.WorkerStub(channel) for channel in channels)
    told = await on.Describe(worker_pb2.DescribeRequest())
    namespace = namespace_from_proto(told.namespace)
    layout = BlockLayout(
        layers=namespace.layers,
        kv_heads=namespace.kv_heads,
        head_dim=namespace.head_dim,
        codec=RAW_CODEC[namespace.kv_dtype],
    )
    client = await AsyncClient.connect(
        run_dir,
        namespace=namespace,
        payload_bytes=layout.payload_bytes,
        shares=namespace.kv_heads,
        share_domain="default",
    )
    async with client:
        stage = Stage(on, fresh, client, Root(told.root))
        for number in range(rounds):
            await one_round(stage, number, tokens, times)
    for channel in channels:
        await channel.close(None)
    return times


@click.command()
@click.option("--tokens", default=1_500, show_default=True, help="Tokens of a prompt.")
@click.option("--rounds", default=7, show_default=True, help="Prompts; ratios are medians.")
@click.option("--threads", default=2, show_default=True, help="Compute threads of a worker.")
def main(tokens: int, rounds: int, threads: int) -> None:
    """Measure the slice: hits against cold prompts, misses against no store."""
    shared = ("--threads", str(threads), "--store-call-ms", "1000")
    with start_node(arena_bytes=(rounds + 1) * (tokens // 16 + 1) * (768 << 10)) as node:
        run_dir = str(node.run_dir)
        with (
            worker("on", "--node", run_dir, *shared) as on,
            worker("fresh", "--node", run_dir, *shared) as fresh,
        ):
            times = asyncio.run(measure((on, fresh), run_dir, tokens=tokens, rounds=rounds))
    lines = [
        row("ttft_hit_dram", times.dram, times.on, "same prompt cold", HIT_BAR),
        row("ttft_hit_hbm", times.hbm, times.on, "same prompt cold", HIT_BAR),
        row("ttft_miss_store_on", times.on, times.off, "same worker, store off", MISS_BAR),
        row("miss_in_store", times.asked, times.on, "time to the first token", STORE_BAR),
    ]
    for line in lines:
        click.echo(line)


if __name__ == "__main__":
    main()
