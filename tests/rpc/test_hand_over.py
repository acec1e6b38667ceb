"""What a user sees of a request that two workers serve, and what each of them is asked."""

import asyncio
from array import array
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from kvworkers.frontends.pipeline import PipelineConfig
from kvworkers.frontends.server import FrontendConfig, FrontendServer, serving

from kvstore.core.errors import Refused
from kvstore.directory.events import TierKind, WorkerRole
from kvstore.directory.view import Health
from kvstore.router.members import Kind, Member
from kvstore.rpc.channel import open_channel
from kvstore.rpc.v1 import inference_pb2, inference_pb2_grpc, worker_pb2
from tests.byte_tokenizer import make_byte_tokenizer
from tests.patience import PATIENCE_S
from tests.processes import Started, scripted
from tests.scripted_worker import ScriptedWorker

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PROMPT = "word " * 200
QUICK = PipelineConfig(lost_after_ms=1_500, wait_ms=2_000, other_wait_ms=300)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_tokenizer(tmp_path_factory.mktemp("byte-tokenizer"))


class Pools:
    """A frontend over scripted workers with roles, and the cache node of their host."""

    def __init__(self, frontend: FrontendServer, stack: AsyncExitStack) -> None:
        self.frontend = frontend
        self._stack = stack
        self._members: list[Member] = []

    async def worker(self, name: str, role: str, **options: Any) -> ScriptedWorker:
        one = ScriptedWorker(name, role=WorkerRole(role), **options)
        await one.start()
        self._stack.push_async_callback(one.stop)
        self._add("worker", name, one.address)
        return one

    def process(self, name: str, role: str, *arguments: str) -> Started:
        one = self._stack.enter_context(scripted(name, "--role", role, *arguments))
        self._add("worker", name, one.ready["address"])
        return one

    def _add(self, kind: Kind, name: str, address: str) -> None:
        self._members.append(Member(kind, name, address, "host-a"))

    async def begin(self) -> None:
        """Serve with all of them, once the router knows their roles."""
        node = ScriptedWorker("node", tier=TierKind.DRAM)
        await node.start()
        self._stack.push_async_callback(node.stop)
        self._add("node", "node", node.address)
        await self.frontend.set_members(self._members)
        router = self.frontend._router
        workers = [member.name for member in self._members if member.kind == "worker"]
        async with asyncio.timeout(PATIENCE_S):
            while not (  # noqa: ASYNC110 - the view tells nobody
                all(map(self.frontend.worker_ready, workers))
                and all(one.load is not None for one in router.survey() if one.kind == "worker")
                and router.health("node") is Health.LIVE
            ):
                await asyncio.sleep(0.01)

    async def generate(
        self, *, max_tokens: int = 100, **fields: Any
    ) -> list[inference_pb2.GenerateReply]:
        request = inference_pb2.GenerateRequest(
            text=PROMPT, sampling=worker_pb2.Sampling(max_tokens=max_tokens), **fields
        )
        async with open_channel(self.frontend.grpc_address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            return [reply async for reply in stub.Generate(request)]

    def count(self, name: str, **labels: str) -> float:
        return self.frontend.registry.get_sample_value(name, labels) or 0.0

    def splits(self, outcome: str) -> float:
        return self.count("kvstore_router_splits_total", outcome=outcome)


@pytest.fixture
async def pools(model: Path) -> AsyncIterator[Pools]:
    async with AsyncExitStack() as stack:
        frontend = await stack.enter_async_context(
            serving(FrontendConfig(model=model, pipeline=QUICK))
        )
        yield Pools(frontend, stack)


def text(replies: list[inference_pb2.GenerateReply]) -> str:
    return "".join(reply.text for reply in replies)


async def test_one_computes_the_prompt_and_another_goes_on(pools: Pools) -> None:
    first, then = await pools.worker("p", "prefill"), await pools.worker("d", "decode")
    await pools.begin()
    replies = await pools.generate()
    assert text(replies) == LETTERS
    assert (replies[-1].finish_reason, replies[-1].output_tokens) == ("stop", len(LETTERS))
    assert [reply.worker for reply in replies if reply.text] == ["p"] + ["d"] * 25
    assert (replies[0].prefill_worker, replies[-1].prefill_worker) == ("p", "p")
    assert replies[-1].retries == 0
    assert replies[0].cache == replies[-1].cache
    (asked,), (later,) = first.requests, then.requests
    assert (asked.hand_over, asked.sampling.max_tokens, asked.reply_tokens) == (True, 1, 0)
    assert (later.hand_over, later.sampling.max_tokens, later.reply_tokens) == (False, 99, 1)
    assert array("I", later.tokens) == array("I", asked.tokens) + array("I", [ord("A")])
    assert replies[0].cache.prompt_tokens == len(asked.tokens) // 4
    assert (pools.splits("split"), pools.splits("hand_over")) == (1, 1)
    assert pools.count("kvstore_hand_over_seconds_count") == 1
    assert pools.count("kvstore_ttft_seconds_count", cached="no") == 1


async def test_a_request_that_may_not_be_kept_stays_whole(pools: Pools) -> None:
    first, then = await pools.worker("p", "prefill"), await pools.worker("d", "decode")
    await pools.begin()
    assert text(await pools.generate(no_store=True)) == LETTERS
    assert text(await pools.generate(no_read=True)) == LETTERS
    assert (len(first.requests), len(then.requests)) == (0, 2)
    assert (pools.splits("no_store"), pools.splits("no_read"), pools.splits("split")) == (1, 1, 0)


async def test_a_single_token_needs_no_second_worker(pools: Pools) -> None:
    first, then = await pools.worker("p", "prefill"), await pools.worker("d", "decode")
    await pools.begin()
    replies = await pools.generate(max_tokens=1)
    assert (text(replies), replies[-1].finish_reason) == ("A", "length")
    assert (len(first.requests), len(then.requests)) == (1, 0)
    assert not first.requests[0].hand_over


async def test_a_reply_that_ends_with_its_first_token_is_not_handed_over(pools: Pools) -> None:
    await pools.worker("p", "prefill")
    then = await pools.worker("d", "decode")
    await pools.begin()
    replies = await pools.generate(stop=["A"])
    assert (text(replies), replies[-1].finish_reason) == ("", "stop")
    assert then.requests == []


async def test_without_a_worker_for_prompts_the_others_serve(pools: Pools) -> None:
    then = await pools.worker("d", "decode")
    await pools.begin()
    replies = await pools.generate()
    assert (text(replies), replies[0].prefill_worker) == (LETTERS, "d")
    assert not then.requests[0].hand_over
    assert pools.splits("no_prefill") == 1


async def test_workers_for_prompts_alone_answer_nobody(pools: Pools) -> None:
    first = await pools.worker("p", "prefill")
    await pools.begin()
    with pytest.raises(Exception, match="no worker is alive"):
        await pools.generate()
    assert first.requests == []


async def test_another_takes_over_when_the_first_choice_dies_at_the_hand_over(
    pools: Pools,
) -> None:
    first = await pools.worker("p", "prefill")
    pools.process("d0", "decode", "--die-after", "0")
    then = await pools.worker("d1", "decode")
    await pools.begin()
    replies = await pools.generate()
    assert text(replies) == LETTERS
    assert (replies[0].worker, replies[-1].worker, replies[-1].retries) == ("p", "d1", 1)
    assert len(first.requests) == 1
    assert then.requests[0].reply_tokens == 1


async def test_another_takes_over_when_the_first_choice_is_full(pools: Pools) -> None:
    await pools.worker("p", "prefill")
    full = await pools.worker("d0", "decode")
    full.faults.refuse = Refused("full", 50)
    await pools.worker("d1", "decode")
    await pools.begin()
    replies = await pools.generate()
    assert (text(replies), replies[-1].worker, replies[-1].retries) == (LETTERS, "d1", 1)


@pytest.mark.parametrize("after", [0, 1], ids=["mid-prompt", "before it says that it ended"])
async def test_another_goes_on_when_the_first_one_dies(pools: Pools, after: int) -> None:
    pools.process("p", "prefill", "--die-after", str(after))
    then = await pools.worker("d", "decode")
    await pools.begin()
    replies = await pools.generate()
    assert (text(replies), replies[-1].worker, replies[-1].retries) == (LETTERS, "d", 1)
    assert then.requests[0].reply_tokens == after


async def test_several_replies_are_handed_over_each(pools: Pools) -> None:
    await pools.worker("p", "prefill")
    then = await pools.worker("d", "decode")
    await pools.begin()
    url = f"http://{pools.frontend.http_address}"
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=PATIENCE_S) as http:
        fields = {"model": "scripted", "prompt": PROMPT, "n": 3, "max_tokens": 26}
        reply = (await http.post("/v1/completions", json=fields)).json()
        shown = (await http.get("/console/state")).json()
        entry = next(one for one in shown["requests"] if one["prefill_worker"] == "p")
        told = (await http.get(f"/console/requests/{entry['id']}")).json()
    assert [choice["text"] for choice in reply["choices"]] == [LETTERS] * 3
    assert reply["usage"]["prompt_tokens"] == len(PROMPT)
    assert len(then.requests) == 3
    assert entry["worker"] == "d"
    assert "split: p computes the prompt, then d takes over" in told["explanation"]
    assert "not split: hand_over" in told["explanation"]
