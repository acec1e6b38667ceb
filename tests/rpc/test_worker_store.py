"""Workers and a real cache node, with a tiny model: sharing, and every way to lose the store."""

import asyncio
import random
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from kvworkers.models.loading import load_model
from kvworkers.worker import WorkerServer
from kvworkers.worker_config import WorkerConfig

from kvstore.client import AsyncClient
from kvstore.core.names import pack_tokens
from kvstore.rpc.channel import open_channel
from kvstore.rpc.v1 import types_pb2, worker_pb2, worker_pb2_grpc
from kvstore.testing.node import RunningNode, new_run_dir, start_node
from tests.patience import PATIENCE_MS, PATIENCE_S, PATIENT, until
from tests.tiny_model import VOCAB, reference_reply, tiny_model
from tests.worker_process import ask, cached_tokens


@pytest.fixture
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=64 << 20) as running:
        yield running


@asynccontextmanager
async def worker(
    run_dir: Path | None, *, name: str = "worker-0", **options: Any
) -> AsyncIterator[WorkerServer]:
    options = {
        "pool_bytes": 1 << 20,
        "threads": 1,
        "drain_ms": 0,
        "store_call_ms": PATIENCE_MS,
        **options,
    }
    node = None if run_dir is None else str(run_dir)
    server = WorkerServer(WorkerConfig(model=str(tiny_model()), node=node, name=name, **options))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def prompt_of(seed: int, tokens: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, VOCAB) for _ in range(tokens)]


def failures(server: WorkerServer, call: str, error: str) -> float:
    labels = {"call": call, "error": error}
    return server.registry.get_sample_value("kvstore_worker_store_failures_total", labels) or 0.0


async def connect(node: RunningNode) -> AsyncClient:
    spec = load_model(tiny_model()).spec
    return await AsyncClient.connect(
        node.run_dir,
        namespace=spec.namespace,
        payload_bytes=spec.layout.payload_bytes,
        shares=spec.layout.kv_heads,
        config=PATIENT,
    )


async def reserved_bytes(node: RunningNode) -> int:
    async with await connect(node) as client:
        return (await client.stats()).reserved_bytes


async def test_what_one_worker_computed_another_gets_from_the_arena(node: RunningNode) -> None:
    prompt = prompt_of(1, 100)
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(worker(node.run_dir))
        second = await stack.enter_async_context(worker(node.run_dir, name="worker-1"))
        cold = await ask(first.address, prompt, max_tokens=40, sampling={"ignore_eos": True})
        assert await first.settled(deadline_ms=PATIENCE_MS)
        sample = first.registry.get_sample_value("kvstore_worker_reachable_arena_bytes")
        assert sample is not None and sample >= 64 << 20
        hit = await ask(second.address, prompt, max_tokens=40, sampling={"ignore_eos": True})
        turn = prompt + cold.tokens + prompt_of(2, 30)
        again = await ask(second.address, turn, max_tokens=8)
        third = await stack.enter_async_context(worker(node.run_dir, name="worker-2"))
        assert await second.settled(deadline_ms=PATIENCE_MS)
        fresh = await ask(third.address, turn, max_tokens=8)
    assert cold.cache.miss_reason == types_pb2.MISS_REASON_ABSENT
    assert hit.tokens == cold.tokens
    assert (hit.cache.dram_tokens, cached_tokens(hit.cache)) == (96, 96)
    assert hit.cache.places == "node-test"
    assert again.cache.hbm_tokens >= 128, "the reply's blocks are in its own pages"
    assert fresh.cache.dram_tokens == (len(turn) - 1) // 16 * 16, "and were stored"
    assert again.tokens == fresh.tokens == reference_reply(turn, 8)


async def test_every_prompt_length_around_a_block_is_exact(node: RunningNode) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(worker(node.run_dir))
        second = await stack.enter_async_context(worker(node.run_dir, name="worker-1"))
        for tokens in (1, 15, 16, 17, 31, 32, 33, 64):
            prompt = prompt_of(300 + tokens, tokens)
            expected = reference_reply(prompt, 10)
            assert (await ask(first.address, prompt, max_tokens=10)).tokens == expected
            assert await first.settled(deadline_ms=PATIENCE_MS)
            hit = await ask(second.address, prompt, max_tokens=10)
            assert hit.tokens == expected
            assert hit.cache.dram_tokens == (tokens - 1) // 16 * 16


async def test_no_store_no_read_and_salts_keep_apart(node: RunningNode) -> None:
    prompt = prompt_of(3, 64)
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(worker(node.run_dir))
        second = await stack.enter_async_context(worker(node.run_dir, name="worker-1"))

        async def cached(server: WorkerServer, **fields: Any) -> int:
            answer = await ask(server.address, prompt, **fields)
            assert await server.settled(deadline_ms=PATIENCE_MS)
            assert answer.tokens == reference_reply(prompt, 8)
            return cached_tokens(answer.cache)

        assert await cached(first, no_store=True) == 0
        assert await cached(first) == 0, "no_store left nothing in pages"
        assert await cached(second, no_read=True) == 0
        assert await cached(second, cache_salt=b"a") == 0
        assert await cached(first, cache_salt=b"a") == 48
        assert await cached(first, cache_salt=b"b") == 0
    assert await reserved_bytes(node) == 0


async def test_a_tiny_arena_and_pool_evict_and_stay_exact() -> None:
    # 31 blocks a prompt: 40 pages hold one of them, the arena's 512 slots 16 of these 20.
    prompts = [prompt_of(400 + n, 500) for n in range(20)]
    async with AsyncExitStack() as stack:
        node = stack.enter_context(start_node(arena_bytes=2 << 20))
        servers = [
            await stack.enter_async_context(
                worker(node.run_dir, name=f"worker-{n}", pool_bytes=40 * 4096)
            )
            for n in range(2)
        ]
        for turn, prompt in enumerate((*prompts, *prompts[:2], *prompts[-3:])):
            server = servers[turn % 2]
            answer = await ask(server.address, prompt, max_tokens=6)
            assert answer.tokens == reference_reply(prompt, 6)
            assert await server.settled(deadline_ms=PATIENCE_MS)
        for server in servers:
            opened = {"reason": "connected"}
            assert server.registry.get_sample_value("kvstore_client_sessions_total", opened) == 1
            assert server.registry.get_sample_value("kvstore_worker_evicted_pages_total")
        async with await connect(node) as client:
            stats = await client.stats()
        assert stats.reserved_bytes == 0
        assert sum(tier.evictions for tier in stats.tiers.values()) > 0


async def test_a_killed_node_costs_nothing_but_hits_and_comes_back(node: RunningNode) -> None:
    kept, new = prompt_of(5, 80), prompt_of(6, 80)
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(worker(node.run_dir))
        await ask(first.address, kept)
        assert await first.settled(deadline_ms=PATIENCE_MS)
        incarnation = node.incarnation
        node.kill_node()
        answers = await asyncio.gather(*(ask(first.address, p) for p in (new, kept)))
        assert [a.tokens for a in answers] == [reference_reply(p, 8) for p in (new, kept)]
        node.wait_restarted(incarnation)
        second = await stack.enter_async_context(worker(node.run_dir, name="worker-1"))
        hit = await ask(second.address, kept)
        assert hit.cache.dram_tokens == 64
        assert hit.tokens == reference_reply(kept, 8)

        async def stores_again() -> bool:
            prompt = prompt_of(random.randrange(10**6), 40)
            await ask(first.address, prompt)
            assert await first.settled(deadline_ms=PATIENCE_MS)
            found = await ask(second.address, prompt)
            return found.cache.dram_tokens == 32

        await until(stores_again)


async def test_a_hanging_node_delays_one_request_by_one_deadline(node: RunningNode) -> None:
    async with worker(node.run_dir, store_call_ms=250) as server:
        await ask(server.address, prompt_of(7, 40))
        assert await server.settled(deadline_ms=PATIENCE_MS)
        node.signal_node(signal.SIGSTOP)
        try:
            first = await ask(server.address, prompt_of(8, 40))
            second = await ask(server.address, prompt_of(9, 40))
        finally:
            node.signal_node(signal.SIGCONT)
        assert first.cache.miss_reason == types_pb2.MISS_REASON_UNREACHABLE
        assert second.cache.miss_reason == types_pb2.MISS_REASON_UNREACHABLE
        assert first.load_ms >= 200 and second.load_ms == 0, "the circuit is open"
        assert failures(server, "acquire", "Unreachable") == 1
        assert first.tokens == reference_reply(prompt_of(8, 40), 8)


async def test_a_worker_goes_on_without_a_keeper_and_joins_the_next() -> None:
    with start_node(arena_bytes=16 << 20) as node:
        async with worker(node.run_dir) as server:
            await ask(server.address, prompt_of(10, 40))
            assert await server.settled(deadline_ms=PATIENCE_MS)
            node.kill_keeper()
            alone = await ask(server.address, prompt_of(11, 40))
            assert alone.tokens == reference_reply(prompt_of(11, 40), 8)
            assert alone.cache.miss_reason == types_pb2.MISS_REASON_UNREACHABLE
            with start_node(node.run_dir, arena_bytes=16 << 20) as successor:

                async def stores_again() -> bool:
                    prompt = prompt_of(random.randrange(10**6), 40)
                    answer = await ask(server.address, prompt)
                    assert answer.tokens == reference_reply(prompt, 8)
                    return answer.cache.miss_reason == types_pb2.MISS_REASON_ABSENT

                await until(stores_again)
                assert await reserved_bytes(successor) >= 0


async def test_a_worker_that_starts_first_joins_the_node_later() -> None:
    run_dir = new_run_dir()
    async with worker(run_dir) as server:
        early = await ask(server.address, prompt_of(12, 40))
        assert early.cache.miss_reason == types_pb2.MISS_REASON_DISABLED
        assert failures(server, "connect", "Unreachable") >= 1
        with start_node(run_dir, arena_bytes=16 << 20):

            async def joined() -> bool:
                answer = await ask(server.address, prompt_of(random.randrange(10**6), 40))
                return answer.cache.miss_reason == types_pb2.MISS_REASON_ABSENT

            await until(joined)
    shutil.rmtree(run_dir)


async def test_callers_that_leave_during_prefill_leave_no_slot_reserved(node: RunningNode) -> None:
    async with worker(node.run_dir, step_tokens=16) as server:
        async with open_channel(server.address) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            calls = [
                stub.Run(
                    worker_pb2.RunRequest(
                        tokens=pack_tokens(prompt_of(20 + n, 300)),
                        sampling=worker_pb2.Sampling(max_tokens=100, ignore_eos=True),
                    ),
                    timeout=PATIENCE_S,
                )
                for n in range(3)
            ]
            await calls[0].read()
            for call in calls:
                call.cancel()

        async def given_back() -> bool:
            assert await server.settled(deadline_ms=PATIENCE_MS)
            idle = server.registry.get_sample_value("kvstore_worker_running") == 0
            return idle and await reserved_bytes(node) == 0

        await until(given_back)


@pytest.mark.parametrize("fidelity", ["fp8", "int8", "int4"])
async def test_a_lossy_store_shares_among_its_own_and_with_no_others(
    node: RunningNode, fidelity: str
) -> None:
    prompt = prompt_of(31, 100)
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(worker(node.run_dir, fidelity=fidelity))
        second = await stack.enter_async_context(
            worker(node.run_dir, name="worker-1", fidelity=fidelity)
        )
        exact = await stack.enter_async_context(worker(node.run_dir, name="worker-2"))
        cold = await ask(first.address, prompt, max_tokens=4)
        assert await first.settled(deadline_ms=PATIENCE_MS)
        hit = await ask(second.address, prompt, max_tokens=4)
        other = await ask(exact.address, prompt, max_tokens=4)
        moved = first.registry.get_sample_value(
            "kvstore_worker_moved_bytes_total", {"direction": "store"}
        )
    assert cold.tokens == other.tokens == reference_reply(prompt, 4)
    assert hit.cache.dram_tokens == 96, "its own kind finds it"
    assert cached_tokens(other.cache) == 0, "an exact worker names other blocks"
    spec = load_model(tiny_model()).spec
    assert moved is not None and moved <= 6 * spec.layout.block_bytes
