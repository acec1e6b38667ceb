"""A worker of two ranks (gloo) beside one of one, over one node: the same blocks, the same tokens.

The rank that `kvworkers.ranks.holding` has started is a real process; rank 0 is in this one.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import grpc
import pytest
from kvworkers.engine.cache import StoreConfig
from kvworkers.engine.engine import Engine
from kvworkers.worker import WorkerServer
from kvworkers.worker_config import WorkerConfig

from kvstore.rpc.errors import error_from
from kvstore.testing.node import RunningNode, start_node
from tests.patience import PATIENCE_MS, PATIENCE_S
from tests.tiny_model import reference_reply, tiny_model
from tests.worker_process import Answer, ask

REPLY = 12


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=64 << 20) as running:
        yield running


@asynccontextmanager
async def worker(node: RunningNode, name: str, *, ranks: int) -> AsyncIterator[WorkerServer]:
    config = WorkerConfig(
        model=str(tiny_model()), node=str(node.run_dir), name=name, device="cpu", threads=1,
        pool_bytes=1 << 20, drain_ms=0, store_call_ms=PATIENCE_MS, tensor_parallel=ranks,
        rank_deadline_ms=PATIENCE_MS,
    )  # fmt: skip
    server = WorkerServer(config)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def prompt(salt: int) -> list[int]:
    return [(place * 37 + salt * 11) % 190 + 3 for place in range(70)]


async def hear(server: WorkerServer, salt: int, **options: Any) -> Answer:
    answer = await ask(server.address, prompt(salt), max_tokens=REPLY, **options)
    assert answer.tokens == reference_reply(prompt(salt), REPLY)
    assert await server.settled(deadline_ms=PATIENCE_MS)
    return answer


def the_other(server: WorkerServer) -> int:
    assert server._held is not None
    (pid,) = server._held.pids
    return pid


async def test_ranks_share_blocks_with_a_whole_worker_and_end_together(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU: steps begin before tokens are seen, which rank 0 then gives to the others.
    monkeypatch.setattr("kvworkers.worker.Engine", partial(Engine, overlap=True))
    # As loads of many bytes: a step is made ready before they have come.
    monkeypatch.setattr("kvworkers.worker.StoreConfig", partial(StoreConfig, grouped_bytes=1))
    async with worker(node, "two", ranks=2) as two, worker(node, "one", ranks=1) as one:
        assert two._held is not None and one._held is not None
        assert two._held.pages.memory.shape[1] * 2 == one._held.model.spec.layout.payload_bytes
        assert two._root() == one._root(), "the number of ranks is no part of a name"
        assert two._client is not None, "its session ends with any of its processes"
        assert two._client._link.access.pids == (os.getpid(), the_other(two))
        cold = await hear(two, 1)
        again = await hear(two, 1)
        there = await hear(one, 1)
        assert cold.cache.computed_tokens == 70
        assert again.cache.hbm_tokens == there.cache.dram_tokens == 64
        assert (await hear(one, 2)).cache.computed_tokens == 70
        assert (await hear(two, 2)).cache.dram_tokens == 64
        # Each rank copies its part of the page that three replies begin in the middle of.
        three = await asyncio.gather(*(hear(two, 4, siblings="of one") for _ in range(3)))
        assert sorted(answer.cache.computed_tokens for answer in three) == [0, 0, 70]
        copied = two._metrics.fork_pages.labels("copied")._value
        assert copied.get() == 2
        lost = two._metrics.rank_failures._value
        assert lost.get() == 0
        os.kill(the_other(two), signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_S):
            await two.broken.wait()
        assert lost.get() == 1
        with pytest.raises(grpc.RpcError) as refused:
            await ask(two.address, prompt(3))
        assert "ending" in str(error_from(refused.value))
        # What the lost one had reserved and not written is nobody's block.
        assert (await hear(one, 3)).cache.computed_tokens == 70
