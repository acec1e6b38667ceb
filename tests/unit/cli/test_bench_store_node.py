"""Cases of `bench store` with a real node and the bare echo, run once and small."""

import asyncio
import random
from typing import Any

import pytest

from kvstore.cli import bench_store_node
from kvstore.cli.bench_rows import Bench
from kvstore.cli.bench_store_echo import ECHO, FIND, LEARN, start_echo
from kvstore.rpc.channel import open_channel
from kvstore.testing.node import start_node
from tests.patience import PATIENCE_S


def test_lookups_calls_and_reads_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_store_node, "LOOKUP_BATCH", 64)
    one = Bench("store", "*", pairs=1, as_json=True)
    monkeypatch.setattr(bench_store_node, "PUT_BATCH", 2)
    options = ("--policy", "lru")
    with start_node(arena_bytes=320 << 20, options=options) as node, start_echo() as echo:
        asyncio.run(_a_dictionary_is_one(echo))
        asyncio.run(bench_store_node.bench_lookups(one, node.run_dir, echo))
        asyncio.run(bench_store_node._bench_reads(one, node.run_dir, 1))
        asyncio.run(bench_store_node._bench_put(one, node.run_dir))
        asyncio.run(bench_store_node.bench_stream(one, node.run_dir))
    assert [row["case"] for row in one.rows] == [
        "names looked up, over gRPC",
        "get in place 1 MiB",
        "get copied 1 MiB",
        "get as bytes 1 MiB",
        "put sealed 2 MiB",
        "put sealed 2 MiB, two in flight",
    ]
    assert all(row["value"] > 0 and row["ratio_to_limit"] > 0 for row in one.rows)


async def _a_dictionary_is_one(echo: str) -> None:
    """What ours is set beside has to do the same: find what it learnt, and nothing else."""
    names = random.Random(1).randbytes(32 * 100)
    async with open_channel(echo) as channel:
        call: dict[str, Any] = {
            name: channel.unary_unary(name)  # type: ignore[call-arg]
            for name in (ECHO, LEARN, FIND)
        }
        asked = (77).to_bytes(4, "little") + b"rest"
        assert await call[ECHO](asked, timeout=PATIENCE_S) == bytes(77)
        await call[LEARN](names[: 32 * 60], timeout=PATIENCE_S)
        assert await call[FIND](names, timeout=PATIENCE_S) == b"\1" * 60 + b"\0" * 40
