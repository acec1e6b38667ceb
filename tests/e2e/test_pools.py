"""Real engines with roles over a real node: replies of two workers equal those of one."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import pytest_asyncio
from kvworkers import worker_service
from kvworkers.frontends.server import FrontendConfig, FrontendServer, serving
from kvworkers.worker import WorkerServer
from kvworkers.worker_config import WorkerConfig

from kvstore.core.names import pack_tokens
from kvstore.directory.view import Health
from kvstore.router import seats
from kvstore.router.members import Member
from kvstore.rpc.channel import open_channel
from kvstore.rpc.v1 import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from kvstore.testing.node import RunningNode, start_node
from tests.patience import PATIENCE_MS, PATIENCE_S
from tests.text_model import VOCAB, text_model
from tests.worker_process import ask

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

STEP_TOKENS = 64
REPLY_TOKENS = 12


@dataclass
class Pools:
    """A worker for prompts and one for answers, a node, and a frontend over them."""

    workers: dict[str, WorkerServer]
    frontend: FrontendServer

    def tokens(self, worker: str, source: str) -> float:
        """Return what an engine counts of prompt tokens by where they came from."""
        name = "kvstore_worker_prompt_tokens_total"
        registry = self.workers[worker].registry
        return registry.get_sample_value(name, {"source": source}) or 0.0

    async def alone(self, prompt: Sequence[int], **sampling: Any) -> list[int]:
        """Return what one worker answers by itself, without any cache."""
        answer = await ask(
            self.workers["d"].address, list(prompt), max_tokens=REPLY_TOKENS,
            sampling={"ignore_eos": True, **sampling}, no_read=True, no_store=True,
        )  # fmt: skip
        return answer.tokens

    async def together(
        self, prompt: Sequence[int], **sampling: Any
    ) -> tuple[list[int], list[inference_pb2.GenerateReply]]:
        """Return what the cluster answers, and its messages."""
        return await generate(self.frontend, prompt, **sampling)


async def generate(
    frontend: FrontendServer, prompt: Sequence[int], **sampling: Any
) -> tuple[list[int], list[inference_pb2.GenerateReply]]:
    wanted = {"max_tokens": REPLY_TOKENS, "ignore_eos": True, **sampling}
    request = inference_pb2.GenerateRequest(
        tokens=inference_pb2.TokenIds(packed=pack_tokens(prompt)),
        sampling=worker_pb2.Sampling(**wanted),
    )
    async with open_channel(frontend.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        replies = [reply async for reply in stub.Generate(request, timeout=PATIENCE_S)]
    packed = b"".join(reply.tokens for reply in replies)
    return list(memoryview(packed).cast("I")), replies


async def follow(frontend: FrontendServer, node: RunningNode, workers: dict[str, str]) -> None:
    """Serve with these, once the router has heard of all of them and of their roles."""
    members = [Member("worker", name, address) for name, address in workers.items()]
    await frontend.set_members([*members, Member("node", node.name, node.listen)])
    router = frontend._router
    async with asyncio.timeout(PATIENCE_S):
        while not (  # noqa: ASYNC110 - the view tells nobody
            all(map(frontend.worker_ready, workers))
            and all(one.load is not None for one in router.survey() if one.kind == "worker")
            and router.health(node.name) is Health.LIVE
        ):
            await asyncio.sleep(0.01)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pools() -> AsyncIterator[Pools]:
    model = text_model()
    async with AsyncExitStack() as stack:
        # This model computes a prompt faster than anything moves: without a thumb on the scales
        # no split would pay, as it should not.
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(seats, "KEPT_FREE", 1_000_000)
        # Cores are shared: what a late block costs is another test's.
        patch.setattr(worker_service, "SETTLE_MS", 30_000)
        node = stack.enter_context(start_node(arena_bytes=64 << 20))
        frontend = await stack.enter_async_context(serving(FrontendConfig(model=model)))
        workers = {}
        for name, role in (("p", "prefill"), ("d", "decode")):
            workers[name] = await started(stack, model, node, name, role)
        await follow(frontend, node, {name: one.address for name, one in workers.items()})
        yield Pools(workers, frontend)


async def started(
    stack: AsyncExitStack, model: Path, node: RunningNode, name: str, role: str
) -> WorkerServer:
    worker = WorkerServer(
        WorkerConfig(
            model=str(model), node=node.run_dir, name=name, role=role, pool_bytes=4 << 20,
            threads=1, drain_ms=0, step_tokens=STEP_TOKENS, store_call_ms=PATIENCE_MS,
        )
    )  # fmt: skip
    await worker.start()
    stack.push_async_callback(worker.stop)
    return worker


def prompt_of(seed: int, tokens: int) -> list[int]:
    draw = Random(seed)
    return [draw.randrange(3, 250) for _ in range(tokens)]


@pytest.mark.parametrize("tokens", [400, 401, 415], ids=["whole blocks", "one more", "15 more"])
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.9, "seed": 11, "has_seed": True}], ids=["greedy", "seeded"]
)
async def test_a_reply_of_two_workers_is_that_of_one(
    pools: Pools, tokens: int, sampling: dict[str, Any]
) -> None:
    prompt = prompt_of(tokens + len(sampling), tokens)
    expected = await pools.alone(prompt, **sampling)
    before = {name: pools.tokens(*name) for name in (("d", "dram"), ("d", "computed"))}
    said, replies = await pools.together(prompt, **sampling)
    assert said == expected
    assert len(said) == REPLY_TOKENS
    assert (replies[0].worker, replies[-1].worker, replies[-1].prefill_worker) == ("p", "d", "p")
    # Every full block came from the arena: what is left is the tail and the first token.
    full = tokens // 16 * 16
    assert pools.tokens("d", "dram") - before["d", "dram"] == full
    assert pools.tokens("d", "computed") - before["d", "computed"] == tokens + 1 - full
    # The account is the prompt's, as the worker that computed it has it.
    cache = replies[-1].cache
    assert (cache.prompt_tokens, cache.computed_tokens) == (tokens, tokens)
    assert replies[-1].retries == 0


async def test_the_next_turn_finds_what_both_have_made(pools: Pools) -> None:
    prompt = prompt_of(77, 300)
    no_text = dict.fromkeys(range(261, VOCAB), -100.0)  # what no prompt can have
    said, _ = await pools.together(prompt, logit_bias=no_text)
    turn = [*prompt, *said, *prompt_of(78, 100)]
    expected = await pools.alone(turn)
    again, replies = await pools.together(turn)
    assert again == expected
    cached = replies[-1].cache.hbm_tokens + replies[-1].cache.dram_tokens
    assert cached >= 304, "the prompt and what was said of the reply"
    assert cached + replies[-1].cache.computed_tokens == len(turn)


async def test_blocks_settle_as_chunks_end(pools: Pools) -> None:
    name, labels = "kvstore_worker_move_seconds_count", {"direction": "store"}
    registry = pools.workers["p"].registry
    before = registry.get_sample_value(name, labels) or 0
    await pools.together(prompt_of(5, 5 * STEP_TOKENS))
    assert (registry.get_sample_value(name, labels) or 0) - before >= 5


async def test_what_own_pages_have_is_in_the_arena_too(pools: Pools) -> None:
    prompt = prompt_of(6, 320)
    _, replies = await pools.together(prompt, max_tokens=1)
    assert replies[-1].worker == "p", "a single token needs nobody else"
    worker = pools.workers["p"]
    assert worker._client is not None
    assert await worker.settled(deadline_ms=PATIENCE_MS)
    await worker._client.clear()  # what it has in its own pages is nowhere else now
    before = pools.tokens("p", "hbm"), pools.tokens("d", "computed")
    await pools.together([*prompt[:310], *prompt_of(7, 10)])
    assert pools.tokens("p", "hbm") - before[0] == 304
    assert pools.tokens("d", "computed") - before[1] == 1


async def test_a_call_ends_when_every_block_is_stored(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, may_go = pools.workers["p"], asyncio.Event()
    assert worker._link is not None
    mover = worker._link._mover
    store = mover.store

    async def held(*arguments: Any) -> None:
        await may_go.wait()
        await store(*arguments)

    monkeypatch.setattr(mover, "store", held)
    name, labels = "kvstore_worker_store_failures_total", {"call": "hand_over", "error": "late"}
    before = worker.registry.get_sample_value(name, labels) or 0
    request = worker_pb2.RunRequest(
        tokens=pack_tokens(prompt_of(9, 100)), hand_over=True,
        sampling=worker_pb2.Sampling(max_tokens=1, ignore_eos=True),
    )  # fmt: skip
    async with open_channel(worker.address) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Run(request, timeout=PATIENCE_S)
        first = await call.read()
        assert first.tokens and not first.finish_reason, "it waits for nothing"
        end = asyncio.ensure_future(call.read())
        await asyncio.wait([end], timeout=0.1)
        assert not end.done()
        may_go.set()
        assert (await end).finish_reason == "length"
        may_go.clear()
        monkeypatch.setattr(worker_service, "SETTLE_MS", 20)
        request.tokens = pack_tokens(prompt_of(10, 100))
        call = worker_pb2_grpc.WorkerStub(channel).Run(request, timeout=PATIENCE_S)
        ends = [reply.finish_reason async for reply in call]
    assert ends == ["", "length"], "whoever goes on computes what is late"
    assert worker.registry.get_sample_value(name, labels) == before + 1
    may_go.set()


async def test_a_worker_for_prompts_gives_nobody_more(pools: Pools) -> None:
    with pytest.raises(Exception, match="role prefill gives first tokens only"):
        await ask(pools.workers["p"].address, prompt_of(8, 20), max_tokens=2)
    with pytest.raises(Exception, match="hand_over excludes no_store"):
        await ask(
            pools.workers["p"].address, prompt_of(8, 20), max_tokens=1, hand_over=True,
            no_store=True,
        )  # fmt: skip
