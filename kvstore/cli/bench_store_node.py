"""Cases of `bench store` with a real node: calls against a bare echo, blocks against memory."""

import asyncio
import itertools
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvstore.cli.bench_rows import Bench, Work
from kvstore.cli.bench_store_echo import ECHO, FIND, LEARN
from kvstore.client import AsyncClient, ClientConfig, SlotRef
from kvstore.client.replies import slot_refs
from kvstore.core.names import BlockName, Namespace, chain, pack_tokens
from kvstore.rpc.channel import open_channel
from kvstore.rpc.v1 import cache_pb2, types_pb2
from kvstore.transport.arena import ArenaMapping, ArenaSize, create_arena

MIB: Final = 1 << 20
_PATIENCE_S: Final = 20.0
_READ_BATCH: Final = 32
LOOKUP_BATCH: Final = 1_024
PUT_BATCH: Final = 64
STREAM: Final = "put sealed 2 MiB, two in flight"
_PUT_LIMIT: Final = "memcpy into an arena and then xxh3-128"
LOOKUPS: Final = "names looked up, over gRPC"
_CONFIG: Final = ClientConfig(call_ms=10_000, transfer_ms=60_000)
_Bytes = NDArray[np.uint8]


def _model(label: str) -> Namespace:
    return Namespace(weights_digest=label, kv_dtype="float32", layers=1, kv_heads=1, head_dim=32)


async def bench_calls(bench: Bench, run_dir: Path, echo: str) -> None:
    """Acquire and Settle of 1 and 2,048 resident blocks against a bare echo of the same sizes."""
    client = await AsyncClient.connect(
        run_dir, namespace=_model("calls"), payload_bytes=4096, shares=1, config=_CONFIG
    )
    async with client, open_channel(echo) as channel:
        names = chain(client.root, pack_tokens(range(2048 * 16)))
        await client.put(names, [bytes(4096)] * len(names))
        call: Any = channel.unary_unary(ECHO)  # type: ignore[call-arg]
        for count in (1, 2048):
            packed = b"".join(names[:count])
            leases: list[int] = []

            async def acquire(packed: bytes = packed, leases: list[int] = leases) -> None:
                leases.append((await client.acquire(packed)).lease)

            async def bare(request: bytes) -> None:
                await call(request, timeout=10)

            size = _acquire_reply_bytes(count)
            request = size.to_bytes(4, "little") + packed
            await bench.against(
                f"acquire {count}", acquire, partial(bare, request),
                limit_name="bare gRPC echo", repeat=50,
            )  # fmt: skip
            await client.settle(release=leases)
            await _bench_settle(bench, client, call, count)


async def bench_lookups(bench: Bench, run_dir: Path, echo: str) -> None:
    """Look names up over gRPC, 1,024 a call, against a bare handler with a dictionary of as many.

    Those asked for lie in 32 prompts, in the order in which a prompt names them.
    """
    prompts = 32
    client = await AsyncClient.connect(
        run_dir, namespace=_model("lookups"), payload_bytes=4096, shares=1, config=_CONFIG
    )
    async with client, open_channel(echo) as channel:
        learn: Any = channel.unary_unary(LEARN)  # type: ignore[call-arg]
        find: Any = channel.unary_unary(FIND)  # type: ignore[call-arg]
        asked: list[bytes] = []
        for prompt in range(prompts):
            tokens = np.full(2 * LOOKUP_BATCH * 16, prompt, np.uint32).tobytes()
            names = chain(client.root, tokens)
            await client.put(names, [bytes(4096)] * len(names))
            packed = b"".join(names)
            await learn(packed, timeout=10)
            asked += [packed[: len(packed) // 2], packed[len(packed) // 2 :]]
        await _all_sealed(client)

        async def ours() -> None:
            for packed in asked:
                assert (await client.lookup(packed)).prefix == LOOKUP_BATCH

        async def bare() -> None:
            for packed in asked:
                assert (await find(packed, timeout=10)).count(1) == LOOKUP_BATCH

        await bench.against(
            LOOKUPS, ours, bare, limit_name="bare gRPC handler with a dict",
            amount=len(asked) * LOOKUP_BATCH / 1e6, unit="M/s",
        )  # fmt: skip


async def _bench_settle(bench: Bench, client: AsyncClient, call: Any, count: int) -> None:
    """Commit `count` reserved slots, each run for blocks of its own.

    Every run starts when nothing waits to be hashed any more, and has its own clock: the blocks of
    the run before are not on its account. Its own blocks are being hashed while it is answered.
    """
    case = f"settle {count}"
    if not bench.wants(case):
        return
    repeat = 50 if count == 1 else 2
    prompts = itertools.count(1 + 1_000 * count)  # no block in common with another case
    prepared: list[list[SlotRef]] = []
    for _ in range((bench.pairs + 1) * repeat):
        tokens = np.full(count * 16, next(prompts), np.uint32).tobytes()
        fresh = chain(client.root, tokens)
        acquired = await client.acquire(fresh, reserve=count)
        prepared.append([item.slot for item in acquired.reserved])
        assert len(prepared[-1]) == count, "the arena is too small for this case"

    asked, answered = _settle_bytes(prepared[-1])
    request = answered.to_bytes(4, "little") + bytes(asked - 4)

    async def settle() -> float:
        await _all_sealed(client)
        started = time.perf_counter()
        await client.settle(commit=prepared.pop())
        return time.perf_counter() - started

    async def bare() -> float:
        await _all_sealed(client)
        await call(bytes(4), timeout=10)  # as awake as the node is, which was asked just now
        started = time.perf_counter()
        await call(request, timeout=10)
        return time.perf_counter() - started

    await bench.against(case, settle, bare, limit_name="bare gRPC echo", repeat=repeat)


def _acquire_reply_bytes(count: int) -> int:
    """Return the size of the answer to an Acquire of `count` resident blocks."""
    reply = cache_pb2.AcquireReply(
        incarnation=1, lease=1 << 40, lease_ms=30_000, ready=count, slots=range(count),
        offsets=range(count), generations=[1] * count, tiers=[types_pb2.TIER_DRAM] * count,
    )  # fmt: skip
    return len(reply.SerializeToString())


def _settle_bytes(commit: Sequence[SlotRef]) -> tuple[int, int]:
    """Return the sizes of a Settle that commits these slots, and of its answer."""
    request = cache_pb2.SettleRequest(root=bytes(32), commit=slot_refs(commit), incarnation=1)
    done = cache_pb2.SETTLE_OUTCOME_DONE
    reply = cache_pb2.SettleReply(commit=[done] * len(commit))
    return len(request.SerializeToString()), len(reply.SerializeToString())


async def _all_sealed(client: AsyncClient) -> None:
    """Wait until the node has hashed everything that was committed."""
    async with asyncio.timeout(_PATIENCE_S):
        while (await client.stats()).slots["committed"]:  # noqa: ASYNC110 - by another process
            await asyncio.sleep(0.001)  # a node that is asked all the time hashes slower


async def bench_blocks(bench: Bench, run_dir: Path) -> None:
    """Batches through the client: read in place, copied out, put and sealed."""
    for mib in (1, 4):
        await _bench_reads(bench, run_dir, mib)
    if bench.wants("put sealed 2 MiB"):
        await _bench_put(bench, run_dir)


async def _bench_reads(bench: Bench, run_dir: Path, mib: int) -> None:
    cases = [f"get {how} {mib} MiB" for how in ("in place", "copied", "as bytes")]
    if not bench.wants(*cases):
        return
    size = mib * MIB
    private = [np.frombuffer(os.urandom(size), np.uint8) for _ in range(_READ_BATCH)]
    async with await AsyncClient.connect(
        run_dir, namespace=_model(f"get {mib}"), payload_bytes=size, shares=8, config=_CONFIG
    ) as client:
        names = chain(client.root, pack_tokens(range(_READ_BATCH * 16)))
        await client.put(names, [block.data for block in private])
        works = (_in_place(client, names, private), _copied(client, names, private),
                 _as_bytes(client, names, private))  # fmt: skip
        for case, (ours, limit, limit_name) in zip(cases, works, strict=True):
            await bench.against(
                case, ours, limit, limit_name=limit_name,
                amount=_READ_BATCH * size / 1e9, unit="GB/s", repeat=4,
            )  # fmt: skip


_Pair = tuple[Work, Work, str]
"""What is measured, its limit, and what that is."""


def _in_place(client: AsyncClient, names: list[BlockName], private: list[_Bytes]) -> _Pair:
    into = np.ones_like(private[0])

    async def ours() -> None:
        acquired = await client.acquire(names)
        assert len(acquired.ready) == len(names)
        for ref in acquired.ready:
            into[:] = np.frombuffer(client.view(ref), np.uint8)
            assert client.still(ref)
        client.release(acquired.lease)

    async def limit() -> None:
        for block in private:
            into[:] = block

    return ours, limit, "memcpy from private memory"


def _copied(client: AsyncClient, names: list[BlockName], private: list[_Bytes]) -> _Pair:
    held = [np.ones_like(block) for block in private]
    buffers = [buffer.data for buffer in held]

    async def ours() -> None:
        assert await client.get_into(names, buffers) == len(names)

    async def limit() -> None:
        for block, buffer in zip(private, held, strict=True):
            buffer[:] = block

    return ours, limit, "memcpy into the same buffers"


def _as_bytes(client: AsyncClient, names: list[BlockName], private: list[_Bytes]) -> _Pair:
    async def ours() -> None:
        assert len(await client.get(names)) == len(names)

    async def limit() -> None:
        held = [bytes(block.data) for block in private]
        del held

    return ours, limit, "bytes() of private memory"


async def _bench_put(bench: Bench, run_dir: Path) -> None:
    """64 blocks of 2 MiB, copied, committed and sealed, against memcpy and xxh3-128 of as much."""
    async with await _putting(run_dir, "put") as client:
        private, limit = _put_limit()
        prompts = itertools.count(1)

        async def put() -> None:
            assert None not in await client.put(_fresh(client, next(prompts)), private)
            await _all_sealed(client)

        await bench.against(
            "put sealed 2 MiB", put, limit, limit_name=_PUT_LIMIT,
            amount=PUT_BATCH * 2 * MIB / 1e9, unit="GB/s",
        )  # fmt: skip


async def bench_stream(bench: Bench, run_dir: Path) -> None:
    """Six such batches, two of them under way at once: what a program puts that has more to put.

    The node has to take newcomers whatever they are worth: `--policy lru`.
    """
    batches = 6
    async with await _putting(run_dir, "stream") as client:
        private, limit = _put_limit()
        prompts = itertools.count(1)

        async def put() -> None:
            turns = asyncio.Semaphore(2)

            async def one() -> None:
                async with turns:
                    assert None not in await client.put(_fresh(client, next(prompts)), private)

            await asyncio.gather(*(one() for _ in range(batches)))
            await _all_sealed(client)

        async def limits() -> None:
            for _ in range(batches):
                await limit()

        await bench.against(
            STREAM, put, limits, limit_name=_PUT_LIMIT,
            amount=batches * PUT_BATCH * 2 * MIB / 1e9, unit="GB/s",
        )  # fmt: skip


async def _putting(run_dir: Path, label: str) -> AsyncClient:
    return await AsyncClient.connect(
        run_dir, namespace=_model(label), payload_bytes=2 * MIB, shares=8, config=_CONFIG
    )


def _fresh(client: AsyncClient, prompt: int) -> list[BlockName]:
    return chain(client.root, np.full(PUT_BATCH * 16, prompt, np.uint32).tobytes())


def _put_limit() -> tuple[list[memoryview], Work]:
    """Return payloads, and what copies them into an arena of as many and sums them there."""
    private = [memoryview(os.urandom(2 * MIB)) for _ in range(PUT_BATCH)]
    descriptor = create_arena(ArenaSize(PUT_BATCH * 2 * MIB, PUT_BATCH))
    arena = ArenaMapping(descriptor, owner=True)
    os.close(descriptor)
    arena.prefault()
    slots = np.frombuffer(arena.data, np.uint8).reshape(PUT_BATCH, 2 * MIB)

    async def limit() -> None:
        for slot, block in zip(slots, private, strict=True):
            slot[:] = np.frombuffer(block, np.uint8)
        for slot in slots:
            xxhash.xxh3_128_digest(slot.data)

    return private, limit
