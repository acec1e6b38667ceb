"""Cases of `bench store` on a disk: the NVMe tier against fio in the same minute."""

import asyncio
import json
import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry

from kvstore.cli.bench_rows import Bench
from kvstore.core.errors import Unreachable
from kvstore.core.names import BlockName, Root
from kvstore.core.outcomes import Outcome
from kvstore.directory.lru import Lru
from kvstore.observe.metrics import TierMetrics
from kvstore.tiers.base import BlockHeader, ReadItem, WriteItem
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_config import NvmeConfig
from kvstore.tiers.sums import block_sum

_BLOCK: Final = 2 << 20
_BLOCKS: Final = 256
_DEPTH: Final = 8
_ROOT: Final = Root(bytes(32))
_CASES: Final = ("nvme write 2 MiB", "nvme read 2 MiB")
_STALL_MS: Final = 60_000


async def bench_disk(bench: Bench, directory: Path) -> None:
    """Write and read 512 MiB in blocks of 2 MiB, eight at once, by the tier and by fio."""
    if not bench.wants(*_CASES):
        return
    fio = shutil.which("fio")
    config = NvmeConfig(
        directory=directory / "tier", capacity_bytes=2 << 30, threads=_DEPTH, writers=_DEPTH
    )
    tier = await NvmeTier.start(config, Lru(), TierMetrics(CollectorRegistry()))
    await tier.loaded()
    try:
        for operation, case in zip(("write", "read"), _CASES, strict=True):
            await _pairs(bench, case, operation, tier, directory, fio)
    finally:
        await tier.close()


async def _pairs(
    bench: Bench, case: str, operation: str, tier: NvmeTier, directory: Path, fio: str | None
) -> None:
    if not bench.wants(case):
        return
    buffers = memoryview(mmap.mmap(-1, _BLOCKS * _BLOCK))
    for at in range(0, len(buffers), 4096):
        buffers[at : at + 16] = os.urandom(16)
    items = _items(buffers)

    async def ours() -> float:
        if operation == "write":
            await tier.remove([(one.header.root, one.header.name) for one in items])
        started = time.perf_counter()
        outcomes = await _run(tier, operation, items)
        seconds = time.perf_counter() - started
        assert set(outcomes) == {Outcome.HIT}, outcomes
        return seconds

    amount = _BLOCKS * _BLOCK / 1e9
    if operation == "read":
        await _run(tier, "write", items)
    if fio is None:  # a value without its limit says little, and is said to
        seconds = sorted([await ours() for _ in range(bench.pairs)])[bench.pairs // 2]
        bench.row(case, amount / seconds, "GB/s", limit_name="fio is not installed")
        return
    program = fio

    async def theirs() -> float:
        return await asyncio.to_thread(_fio, program, operation, directory / "fio.data")

    await bench.against(
        case, ours, theirs, limit_name="fio, O_DIRECT, depth 8", amount=amount, unit="GB/s"
    )


def _items(buffers: memoryview) -> list[WriteItem]:
    views = [buffers[n * _BLOCK : (n + 1) * _BLOCK] for n in range(_BLOCKS)]
    return [
        WriteItem(BlockHeader(_ROOT, _name(n), _BLOCK, 8, block_sum(view, 8), position=n), view)
        for n, view in enumerate(views)
    ]


def _name(number: int) -> BlockName:
    return BlockName(number.to_bytes(8, "little") * 4)


async def _run(tier: NvmeTier, operation: str, items: Sequence[WriteItem]) -> list[Outcome]:
    if operation == "write":
        return await tier.write(items, deadline_ms=_STALL_MS)
    reads = [ReadItem(one.header.root, one.header.name, one.source) for one in items]
    return await tier.read(reads, deadline_ms=_STALL_MS)


def _fio(fio: str, operation: str, path: Path) -> float:
    """Run one fio job over as many bytes; return the seconds that its bandwidth stands for.

    Raises `Unreachable` with its words when it fails.
    """
    command = [
        fio, "--name=limit", f"--filename={path}", f"--rw={operation}", f"--bs={_BLOCK}",
        f"--size={_BLOCKS * _BLOCK}", f"--iodepth={_DEPTH}", "--ioengine=libaio", "--direct=1",
        "--output-format=json", "--fallocate=posix", "--overwrite=1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, check=False, timeout=300)
    if done.returncode:
        raise Unreachable(f"fio failed: {done.stderr.decode(errors='replace')[-500:]}")
    bytes_per_s = json.loads(done.stdout)["jobs"][0][operation]["bw_bytes"]
    return float(_BLOCKS * _BLOCK / bytes_per_s)
