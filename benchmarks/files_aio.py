"""Whole-file reads and writes by aiofiles and by threads of our own: docs/decisions/0004.

    python benchmarks/files_aio.py [DIRECTORY] [--blocks 64] [--pairs 9]

Each pair writes and reads as many files of 2 MiB, eight at a time, one way and then the other.
Prints one JSON object for each operation: median bytes a second of both and of their ratio.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiofiles
from prometheus_client import CollectorRegistry

from kvstore.directory.lru import Lru
from kvstore.observe.metrics import TierMetrics
from kvstore.testing.contracts import block, wanted
from kvstore.tiers.base import ReadItem, WriteItem
from kvstore.tiers.block_rows import HEADER_BYTES, pack_row
from kvstore.tiers.files import FilesTier
from kvstore.tiers.files_config import FilesConfig
from kvstore.tiers.sums import block_sum

BLOCK_BYTES = 2 << 20
AT_ONCE = 8


async def timed(work: Awaitable[object]) -> float:
    """Return the seconds that `work` takes."""
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


async def by_aiofiles_write(directory: Path, items: list[WriteItem]) -> None:
    """Write each file by aiofiles: header page, block, rename."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, item: WriteItem) -> None:
        async with turns:
            part = directory / f"{number}.part"
            row = pack_row(item.header)
            async with aiofiles.open(part, "wb") as file:
                await file.write(row + bytes(HEADER_BYTES - len(row)))
                await file.write(item.source)
            await asyncio.to_thread(os.rename, part, directory / f"{number}.block")

    await asyncio.gather(*(one(number, item) for number, item in enumerate(items)))


async def by_aiofiles_read(
    directory: Path, items: list[ReadItem], headers: list[WriteItem]
) -> None:
    """Read each file by aiofiles into its buffer and verify it in a thread."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, item: ReadItem) -> None:
        async with turns, aiofiles.open(directory / f"{number}.block", "rb") as file:
            await file.seek(HEADER_BYTES)
            await file.readinto(item.into)
            header = headers[number].header
            payload = item.into[: header.payload_bytes]
            found = await asyncio.to_thread(block_sum, payload, header.shares)
            assert found == header.sum

    await asyncio.gather(*(one(number, item) for number, item in enumerate(items)))


async def run(directory: Path, blocks: int, pairs: int) -> None:
    """Run the pairs and print what came out."""
    items = [block(number, block_bytes=BLOCK_BYTES) for number in range(blocks)]
    seconds: dict[str, list[tuple[float, float]]] = {"write": [], "read": []}
    for pair in range(pairs):
        theirs, ours = directory / f"aio-{pair}", directory / f"tier-{pair}"
        theirs.mkdir()
        config = FilesConfig(
            directory=ours, capacity_bytes=4 * blocks * BLOCK_BYTES, threads=AT_ONCE,
            writers=AT_ONCE,
        )  # fmt: skip
        tier = await FilesTier.start(config, Lru(), TierMetrics(CollectorRegistry()))
        await tier.loaded()
        ways: dict[str, tuple[Callable[[], Awaitable[object]], Callable[[], Awaitable[object]]]] = {
            "write": (
                lambda tier=tier: tier.write(items, deadline_ms=60_000),
                lambda theirs=theirs: by_aiofiles_write(theirs, items),
            ),
            "read": (
                lambda tier=tier: tier.read(wanted(items), deadline_ms=60_000),
                lambda theirs=theirs: by_aiofiles_read(theirs, wanted(items), items),
            ),
        }
        for operation, (one, other) in ways.items():
            order = [one, other] if pair % 2 else [other, one]
            took = [await timed(way()) for way in order]
            seconds[operation].append((took[0], took[1]) if pair % 2 else (took[1], took[0]))
        await tier.close()
        shutil.rmtree(theirs)
        shutil.rmtree(ours)
    size = blocks * BLOCK_BYTES
    for operation, taken in seconds.items():
        row = {
            "bench": "files",
            "case": f"{operation} 2 MiB, {AT_ONCE} at a time",
            "value": round(size / statistics.median(ours for ours, _ in taken) / 1e9, 2),
            "unit": "GB/s",
            "peer": round(size / statistics.median(theirs for _, theirs in taken) / 1e9, 2),
            "peer_name": "aiofiles",
            "ratio_to_peer": round(statistics.median(theirs / ours for ours, theirs in taken), 2),
            "runs": len(taken),
        }
        sys.stdout.write(json.dumps(row) + "\n")


def main() -> None:
    """Read the flags and run in a directory of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="kvstore-files-") as directory:
        asyncio.run(run(Path(directory), options.blocks, options.pairs))


if __name__ == "__main__":
    main()
