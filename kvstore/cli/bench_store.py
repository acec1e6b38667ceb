"""`kvstore bench store`: the cache node and its tiers, each beside its limit, on this machine."""

import asyncio
import shutil
import tempfile
from pathlib import Path

import click

from kvstore.cli.bench_rows import Bench
from kvstore.cli.bench_store_disk import bench_disk
from kvstore.cli.bench_store_echo import serve_echo, start_echo
from kvstore.cli.bench_store_index import LEAST_BLOCKS, bench_index, bench_restart
from kvstore.cli.bench_store_node import (
    LOOKUPS,
    STREAM,
    bench_blocks,
    bench_calls,
    bench_lookups,
    bench_stream,
)
from kvstore.cli.bench_store_peer import bench_peers, pour
from kvstore.cli.bench_store_policy import bench_policies
from kvstore.cli.bench_store_tls import bench_tls
from kvstore.core.errors import BadInput
from kvstore.testing.node import start_node

_CALLS = ("acquire 1", "acquire 2048", "settle 1", "settle 2048")
_BLOCKS = ("get in place 1 MiB", "get in place 4 MiB", "get copied 1 MiB", "get copied 4 MiB",
           "get as bytes 1 MiB", "get as bytes 4 MiB", "put sealed 2 MiB")  # fmt: skip


@click.command(short_help="Measure the cache node and its tiers.")
@click.option("--case", "pattern", default="*", metavar="GLOB", help="Only cases like this.")
@click.option("--quick", is_flag=True, help="Fewer pairs and smaller indexes: about a minute.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per case.")
@click.option(
    "--disk",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory on the disk to measure; 3 GiB are written there. [a temporary one]",
)
@click.option(
    "--blocks",
    type=click.IntRange(LEAST_BLOCKS, 100_000_000),
    help="Blocks held by the cases of the index; 10,000,000 take 5 GB and minutes. [1,000,000]",
)
@click.option("--echo", hidden=True, default="", help="Serve the bare echo here instead.")
@click.option("--pour", "pour_bytes", hidden=True, default=0, help="Serve a bare socket instead.")
def store(
    pattern: str,
    quick: bool,
    as_json: bool,
    disk: Path | None,
    blocks: int | None,
    echo: str,
    pour_bytes: int,
) -> None:
    """Measure calls, reads and writes, the index, policies, restarts and the NVMe tier."""
    if echo:
        asyncio.run(serve_echo(echo))
        return
    if pour_bytes:
        pour(pour_bytes)
        return
    bench = Bench("store", pattern, pairs=7 if quick else 9, quick=quick, as_json=as_json)
    directory = Path(tempfile.mkdtemp(prefix="kvstore-bench-", dir=disk))
    try:
        if bench.wants(*_CALLS, *_BLOCKS, LOOKUPS, "node restart"):
            _measure_node(bench)
        if bench.wants(STREAM):
            with start_node(arena_bytes=1 << 30, options=("--policy", "lru")) as node:
                asyncio.run(bench_stream(bench, node.run_dir))
        bench_peers(bench, directory)
        bench_tls(bench, directory)
        bench_index(bench, directory, blocks or 0)
        bench_policies(bench)
        asyncio.run(bench_disk(bench, directory))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if not bench.rows:
        raise BadInput(f"--case {pattern!r} is like no case")
    bench.finish()


def _measure_node(bench: Bench) -> None:
    if bench.wants(LOOKUPS):
        # On a node of its own: beside the blocks of other cases some would find no slot.
        with start_node(arena_bytes=1 << 30) as node, start_echo() as echo:
            asyncio.run(bench_lookups(bench, node.run_dir, echo))
    with start_node(arena_bytes=1 << 30) as node, start_echo() as echo:
        if bench.wants(*_CALLS):
            asyncio.run(bench_calls(bench, node.run_dir, echo))
        if bench.wants(*_BLOCKS):
            asyncio.run(bench_blocks(bench, node.run_dir))
        if bench.wants("node restart"):
            bench_restart(bench, node)
