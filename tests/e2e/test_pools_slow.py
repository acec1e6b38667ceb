"""Worker processes with roles, killed in the middle: the reply is the one that nobody disturbed."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from kvworkers.frontends.pipeline import PipelineConfig
from kvworkers.frontends.server import FrontendConfig, FrontendServer, serving

from kvstore.core.names import pack_tokens
from kvstore.directory.events import TierKind
from kvstore.router import seats
from kvstore.rpc.channel import open_channel
from kvstore.rpc.v1 import inference_pb2, inference_pb2_grpc, worker_pb2
from kvstore.testing.node import RunningNode, start_node
from tests.e2e.test_pools import REPLY_TOKENS, follow, generate, prompt_of
from tests.patience import PATIENCE_S
from tests.text_model import text_model
from tests.worker_process import RunningWorker, ask, start_worker

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROLES = {"p": "prefill", "d0": "decode", "d1": "decode"}
QUICK = PipelineConfig(lost_after_ms=1_500, other_wait_ms=300)


@pytest.fixture
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=64 << 20) as node:
        yield node


@pytest.fixture
def workers(node: RunningNode) -> Iterator[dict[str, RunningWorker]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = text_model()
    with ExitStack() as stack, ThreadPoolExecutor() as starters:
        stack.callback(torch.set_num_threads, threads)
        starts = {
            name: starters.submit(
                stack.enter_context,
                start_worker(
                    model=model,
                    node=node.run_dir,
                    options=(
                        *("--name", name, "--role", role, "--threads", "1"),
                        *("--pool-bytes", str(4 << 20)),
                        *("--step-tokens", "16"),
                    ),
                ),
            )
            for name, role in ROLES.items()
        }
        yield {name: start.result() for name, start in starts.items()}


@pytest.fixture
async def frontend(
    node: RunningNode, workers: dict[str, RunningWorker], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[FrontendServer]:
    monkeypatch.setattr(seats, "KEPT_FREE", 1_000_000)  # as in `test_pools`
    async with serving(FrontendConfig(model=text_model(), pipeline=QUICK)) as server:
        await follow(server, node, {name: one.address for name, one in workers.items()})
        yield server


async def undisturbed(worker: RunningWorker, prompt: list[int]) -> list[int]:
    """Return what one worker answers by itself. Asked last: both that answer are alike before."""
    answer = await ask(
        worker.address, prompt, max_tokens=REPLY_TOKENS, sampling={"ignore_eos": True},
        no_read=True, no_store=True,
    )  # fmt: skip
    return answer.tokens


async def test_a_worker_killed_at_the_hand_over_changes_no_token(
    workers: dict[str, RunningWorker], frontend: FrontendServer
) -> None:
    prompt = prompt_of(1, 600)
    # It takes the call and nothing comes of it: so it dies before its first token for certain.
    workers["d0"].process.send_signal(signal.SIGSTOP)
    request = inference_pb2.GenerateRequest(
        tokens=inference_pb2.TokenIds(packed=pack_tokens(prompt)),
        sampling=worker_pb2.Sampling(max_tokens=REPLY_TOKENS, ignore_eos=True),
    )
    replies: list[inference_pb2.GenerateReply] = []
    async with open_channel(frontend.grpc_address) as channel:
        async for reply in inference_pb2_grpc.InferenceStub(channel).Generate(
            request, timeout=PATIENCE_S
        ):
            if not replies:
                await asyncio.sleep(0.3)  # the call is there
                workers["d0"].process.kill()
            replies.append(reply)
    said = b"".join(reply.tokens for reply in replies)
    assert list(memoryview(said).cast("I")) == await undisturbed(workers["d1"], prompt)
    assert (replies[0].worker, replies[-1].worker) == ("p", "d1")
    assert replies[-1].retries == 1
    name = "kvstore_request_retries_total"
    assert frontend.registry.get_sample_value(name, {"reason": "Unreachable"}) == 1


async def test_a_worker_killed_in_the_middle_of_a_prompt_leaves_its_blocks(
    workers: dict[str, RunningWorker], frontend: FrontendServer
) -> None:
    prompt = prompt_of(2, 1_900)
    router = frontend._router

    def settled() -> int:
        return sum(one.blocks.get(TierKind.DRAM, 0) for one in router.survey())

    asking = asyncio.create_task(generate(frontend, prompt))
    async with asyncio.timeout(PATIENCE_S):
        while settled() < 8:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.002)
    workers["p"].process.kill()
    said, replies = await asking
    assert said == await undisturbed(workers["d1"], prompt)
    assert replies[-1].retries == 1
    cache = replies[-1].cache
    assert cache.dram_tokens >= 128
    assert cache.dram_tokens + cache.computed_tokens == len(prompt)
    assert replies[-1].prefill_worker == replies[-1].worker != "p"
