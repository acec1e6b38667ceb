"""A whole worker on a GPU: its server, its cache node, its pages."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from kvworkers.worker import WorkerServer
from kvworkers.worker_config import WorkerConfig
from transformers import LlamaConfig, LlamaForCausalLM

from kvstore.core.errors import Refused
from kvstore.testing.node import RunningNode, start_node
from tests.worker_process import ask

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(180),
]

VOCAB = 997
ARENA = 256 << 20
IGNORE_EOS = {"ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(3)
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=ARENA, deadline_s=60.0) as running:
        yield running


@asynccontextmanager
async def worker(
    model: Path, node: RunningNode, *, name: str, pool_bytes: int | None = None
) -> AsyncIterator[WorkerServer]:
    config = WorkerConfig(
        model=str(model), node=str(node.run_dir), name=name, pool_bytes=pool_bytes,
        drain_ms=0, store_call_ms=5_000,
    )  # fmt: skip
    server = WorkerServer(config)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def has_all(server: WorkerServer) -> bool:
    reachable = server.registry.get_sample_value("kvstore_worker_reachable_arena_bytes")
    return reachable is not None and reachable >= ARENA


async def registered(server: WorkerServer) -> None:
    """Wait until copies can go to and from all of the arena."""
    async with asyncio.timeout(30):
        while not has_all(server):  # noqa: ASYNC110 - a thread registers it
            await asyncio.sleep(0.05)


async def test_a_worker_chooses_the_gpu_and_another_takes_its_blocks(
    model: Path, node: RunningNode
) -> None:
    draw = random.Random(1)
    prompt = [draw.randrange(3, VOCAB) for _ in range(1_000)]
    async with worker(model, node, name="worker-0", pool_bytes=64 << 20) as first:
        await registered(first)
        cold = await ask(first.address, prompt, max_tokens=16, sampling=IGNORE_EOS)
        again = await ask(first.address, prompt, max_tokens=16, sampling=IGNORE_EOS)
        assert await first.settled(deadline_ms=20_000)
    async with worker(model, node, name="worker-1", pool_bytes=64 << 20) as second:
        await registered(second)
        hit = await ask(second.address, prompt, max_tokens=16, sampling=IGNORE_EOS)
    assert cold.cache.hbm_tokens == cold.cache.dram_tokens == 0
    assert again.cache.hbm_tokens == 992
    assert hit.cache.dram_tokens == 992
    assert hit.tokens == again.tokens, "the same bytes and the same step give the same tokens"


async def test_pages_that_a_gpu_has_no_room_for_are_refused_before_it_serves(
    model: Path, node: RunningNode
) -> None:
    with pytest.raises(Refused, match="pool_bytes"):
        async with worker(model, node, name="worker-2", pool_bytes=1 << 50):
            pass
