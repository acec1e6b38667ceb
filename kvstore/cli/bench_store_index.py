"""Cases of `bench store` about the index: lookups, memory per block, and restarts."""

import asyncio
import gc
import hashlib
import os
import time
from pathlib import Path
from typing import Final

import numpy as np
from prometheus_client import CollectorRegistry

from kvstore.cli.bench_rows import Bench
from kvstore.client import Client, ClientConfig
from kvstore.core.errors import Unreachable
from kvstore.core.limits import GRANULE_BYTES, NAME_BYTES
from kvstore.core.names import BlockName, Namespace, Root, chain, pack_tokens
from kvstore.directory.lru import Lru
from kvstore.directory.policies import make_policy
from kvstore.observe.metrics import NodeMetrics, TierMetrics
from kvstore.service.resident import resident
from kvstore.service.roots import BlockShape, RootInfo, key_column
from kvstore.service.slots import SlotTable
from kvstore.service.store import ArenaStore
from kvstore.service.store_limits import StoreLimits
from kvstore.testing.node import RunningNode
from kvstore.tiers.base import BlockHeader
from kvstore.tiers.block_rows import ROW_BYTES, pack_row, slot_bytes
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_config import NvmeConfig
from kvstore.transport.arena import ArenaMapping, ArenaSize, create_arena

_CASES: Final = ("names looked up, in process", "memory per block held", "nvme index, restart")
_SCATTERED: Final = "names looked up, scattered"
_PROMPT: Final = 2_048
LEAST_BLOCKS: Final = 16 * _PROMPT
"""The prompts that are looked up."""
_PATIENCE_S: Final = 20.0
_BLOCKS: Final = 1_000_000
_QUICK_BLOCKS: Final = 100_000
_ROOT: Final = Root(hashlib.sha256(b"bench").digest())
_SHAPE: Final = BlockShape(GRANULE_BYTES, GRANULE_BYTES, 1)


def bench_index(bench: Bench, directory: Path, blocks: int = 0) -> None:
    """Hold so many blocks and look them up; load as many from a disk.

    0: a million, 100,000 when quick.
    """
    blocks = blocks or (_QUICK_BLOCKS if bench.quick else _BLOCKS)
    if bench.wants(*_CASES[:2], _SCATTERED):
        asyncio.run(_bench_lookups(bench, blocks - blocks % _PROMPT))
    if bench.wants(_CASES[2]):
        asyncio.run(_bench_load(bench, directory / "index", blocks))


async def _bench_lookups(bench: Bench, blocks: int) -> None:
    fd = create_arena(ArenaSize((blocks + _PROMPT) * GRANULE_BYTES, blocks + _PROMPT))
    before = _resident_bytes()
    store, info = _empty_store(ArenaMapping(fd, owner=True))
    for prompt in range(blocks // _PROMPT):
        _hold(store, info, _names(prompt))
    gc.collect()
    if bench.wants(_CASES[1]):
        grown = max(1.0, (_resident_bytes() - before) / blocks)
        bench.row(_CASES[1], grown, f"B at {blocks:,}", limit=300.0,
                  limit_name="DESIGN's bound", ratio=300.0 / grown, runs=1)  # fmt: skip
    prompts = [_names(number * 7 % (blocks // _PROMPT)) for number in range(16)]
    await _against_set(bench, _CASES[0], store, info, prompts)
    # The slots of no two neighbours lie side by side: each name is looked for in the index.
    names = np.frombuffer(b"".join(prompts), f"V{NAME_BYTES}").reshape(16, _PROMPT).T
    scattered = [part.tobytes() for part in names.reshape(16, _PROMPT)]
    await _against_set(bench, _SCATTERED, store, info, scattered)
    os.close(fd)


async def _against_set(
    bench: Bench, case: str, store: ArenaStore, info: RootInfo, prompts: list[bytes]
) -> None:
    """Look up prompts of `_PROMPT` names that are held, and the same in a set of Python's."""
    known = {prompt[at : at + NAME_BYTES] for prompt in prompts for at in range(0, len(prompt), 32)}

    async def ours() -> None:
        for prompt in prompts:
            assert len(resident(store.table, info, prompt, key_column(info, prompt))) == _PROMPT

    async def limit() -> None:
        for prompt in prompts:
            for at in range(0, len(prompt), NAME_BYTES):
                assert prompt[at : at + NAME_BYTES] in known

    await bench.against(
        case, ours, limit, limit_name="a bare set of as few names",
        amount=len(prompts) * _PROMPT / 1e6, unit="M/s",
    )  # fmt: skip


def _empty_store(arena: ArenaMapping) -> tuple[ArenaStore, RootInfo]:
    table = SlotTable(arena, make_policy("ours"), NodeMetrics(CollectorRegistry()), node="bench")
    store = ArenaStore(table, StoreLimits(reserve_quota_bytes=arena.size.data_bytes))
    return store, table.roots.open(_ROOT, _SHAPE, domain="bench")


def _hold(store: ArenaStore, info: RootInfo, packed: bytes) -> None:
    """Put one prompt's blocks through the same steps that a client's go through."""
    session = store.sessions.by_number(1) or store.sessions.open(1, bytes(16))
    answer = store.acquire(session, info, packed, reserve=_PROMPT, first_block=0, now_ms=0.0)
    refs = [(slot, store.table.generation[slot]) for slot in answer.reserved_slots]
    store.commit(session, info, refs, 0.0)
    store.flush_requests()
    store.table.seal(answer.reserved_slots, [bytes(16)] * len(answer.reserved_slots))
    store.to_seal.clear()


def _names(prompt: int) -> bytes:
    """Return the packed names of a made-up prompt: as random as digests are."""
    seed = np.random.Generator(np.random.PCG64(prompt))
    return seed.bytes(_PROMPT * NAME_BYTES)


def _resident_bytes() -> int:
    """Return the private memory of this process; the arena itself is shared and not counted."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


async def _bench_load(bench: Bench, directory: Path, blocks: int) -> None:
    """Start a tier over the row files of `blocks` blocks."""
    segments = _write_rows(directory, blocks)
    config = NvmeConfig(directory=directory, capacity_bytes=segments << 30)
    seconds: list[float] = []
    for _ in range(3):
        started = time.perf_counter()
        tier = await NvmeTier.start(config, Lru(), TierMetrics(CollectorRegistry()))
        await tier.loaded()
        seconds.append(time.perf_counter() - started)
        assert len(tier) == blocks
        await tier.introduced()  # else a thread of it may outlive `close`, and the lock with it
        await tier.close()
    taken = sorted(seconds)[1]
    bench.row(_CASES[2], taken, f"s for {blocks:,} blocks", limit=3.0,
              limit_name="the bound for a million", ratio=3.0 / taken, runs=3)  # fmt: skip


def _write_rows(directory: Path, blocks: int) -> int:
    """Write the row files of `blocks` blocks of 2 MiB; returns how many segments of 1 GiB."""
    directory.mkdir()
    size = slot_bytes(2 << 20)
    slots = (1 << 30) // size
    segments = max(16, -(-blocks // slots))
    for number in range(-(-blocks // slots)):
        rows = b"".join(
            pack_row(BlockHeader(_ROOT, BlockName(name), 2 << 20, 8, name[:16]))
            for name in _split(_names(number))[: min(slots, blocks - number * slots)]
        )
        stem = directory / f"segment-{number:06d}-{size}"
        stem.with_suffix(".rows").write_bytes(rows.ljust(slots * ROW_BYTES, b"\0"))
        with stem.with_suffix(".data").open("wb") as data:
            data.truncate(slots * size)  # sparse: only the index is measured
    return segments


def _split(packed: bytes) -> list[bytes]:
    return [packed[at : at + NAME_BYTES] for at in range(0, len(packed), NAME_BYTES)]


def bench_restart(bench: Bench, node: RunningNode) -> None:
    """Kill the node and wait until its keeper's next one serves a sealed block again."""
    model = Namespace(
        weights_digest="restart", kv_dtype="float32", layers=1, kv_heads=1, head_dim=32
    )
    seconds: list[float] = []
    config = ClientConfig(call_ms=20_000, connect_ms=20_000)
    with Client.connect(
        node.run_dir, namespace=model, payload_bytes=1 << 20, shares=8, config=config
    ) as client:
        names = chain(client.root, pack_tokens(range(64 * 16)))
        client.put(names, [bytes([n]) * (1 << 20) for n in range(64)])
        ends = time.monotonic() + _PATIENCE_S
        while client.stats().slots["committed"]:
            if time.monotonic() > ends:
                raise Unreachable("the node did not seal what was put")
            time.sleep(0.01)
        for _ in range(3):
            incarnation = node.kill_node()
            started = time.perf_counter()
            assert len(client.get(names, deadline_ms=20_000)) == 64
            seconds.append(time.perf_counter() - started)
            node.wait_restarted(incarnation)
            time.sleep(1.0)  # a node that dies at once is started later and later
    taken = sorted(seconds)[1]
    bench.row("node restart", taken, "s until 64 MiB are served again", limit=2.0,
              limit_name="the bound", ratio=2.0 / taken, runs=3)  # fmt: skip
