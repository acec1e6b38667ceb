"""A worker of two ranks on two GPUs (NCCL) beside one on one GPU, over one node."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from kvworkers.worker import WorkerServer
from kvworkers.worker_config import WorkerConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kvstore.testing.node import RunningNode, start_node
from tests.worker_process import Answer, ask

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.timeout(400),
]

VOCAB = 997
ARENA = 256 << 20
REPLY = 24
GAP = 0.25
"""Of the reference's logits: both orders of sums are right where it is smaller."""


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
    model: Path, node: RunningNode, name: str, *, ranks: int
) -> AsyncIterator[WorkerServer]:
    server = WorkerServer(
        WorkerConfig(
            model=str(model),
            node=str(node.run_dir),
            name=name,
            pool_bytes=64 << 20,
            drain_ms=0,
            store_call_ms=5_000,
            tensor_parallel=ranks,
        )
    )
    await server.start()
    try:
        async with asyncio.timeout(60):
            while not has_all(server):  # noqa: ASYNC110 - threads of every rank register it
                await asyncio.sleep(0.05)
        yield server
    finally:
        await server.stop()


def has_all(server: WorkerServer) -> bool:
    reachable = server.registry.get_sample_value("kvstore_worker_reachable_arena_bytes")
    return reachable is not None and reachable >= ARENA


def prompt(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, VOCAB) for _ in range(1_000)]


async def hear(server: WorkerServer, seed: int) -> Answer:
    said = await ask(server.address, prompt(seed), max_tokens=REPLY, sampling={"ignore_eos": True})
    assert await server.settled(deadline_ms=20_000)
    return said


def far_off(model: Path, seed: int, reply: list[int]) -> list[float]:
    """Teacher-forced: how far below the plain model's best each token of a reply lies."""
    plain: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    plain = plain.to("cuda").eval()
    tokens = prompt(seed) + reply
    with torch.inference_mode():
        logits = plain(torch.tensor([tokens], device="cuda")).logits[0].float()
    rows = logits[len(tokens) - len(reply) - 1 : -1]
    chosen = rows[torch.arange(len(reply)), torch.tensor(reply)]
    return [gap for gap in (rows.max(-1).values - chosen).tolist() if gap > GAP]


async def test_two_gpus_and_one_share_blocks_both_ways(model: Path, node: RunningNode) -> None:
    async with (
        worker(model, node, "two", ranks=2) as two,
        worker(model, node, "one", ranks=1) as one,
    ):
        for seed, (first, second) in enumerate(((two, one), (one, two)), 1):
            cold, again = await hear(first, seed), await hear(first, seed)
            there = await hear(second, seed)
            assert cold.cache.computed_tokens == 1_000
            assert again.cache.hbm_tokens == 992
            assert there.cache.dram_tokens == 992
            for said in (cold, again, there):
                assert len(said.tokens) == REPLY
                assert far_off(model, seed, said.tokens) == []
        together = await asyncio.gather(*(hear(two, seed) for seed in range(3, 9)))
        assert all(len(said.tokens) == REPLY for said in together)


async def test_a_gpu_that_is_lost_ends_the_worker(model: Path, node: RunningNode) -> None:
    async with worker(model, node, "two", ranks=2) as two:
        assert two._held is not None
        os.kill(two._held.pids[0], signal.SIGKILL)
        async with asyncio.timeout(30):
            await two.broken.wait()
