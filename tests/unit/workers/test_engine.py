"""The engine with a real (tiny) model and no store: batching, streams, faults."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from kvkernels import ops
from kvworkers.engine.engine import Engine
from kvworkers.engine.output import FirstTokens, Output
from kvworkers.engine.report import Reporter
from kvworkers.engine.sampling import SamplingParams
from kvworkers.engine.scheduler import Scheduler, SchedulerConfig
from kvworkers.engine.sequence import FinishReason, Request
from kvworkers.engine.work import Work
from kvworkers.models.loading import Copies, LoadedModel, load_model
from kvworkers.models.step import StepInputs
from kvworkers.pages.pool import PagePool
from prometheus_client import CollectorRegistry

from kvstore.core.errors import BadInput, Refused, TooLarge, Unreachable
from kvstore.core.names import Root, pack_tokens
from kvstore.core.outcomes import MissReason
from kvstore.directory.events import TierKind
from kvstore.directory.lru import Lru
from kvstore.directory.policy import Policy, Prompt
from kvstore.directory.publisher import Publisher
from kvstore.observe.metrics import WorkerMetrics
from tests.tiny_model import EOS, MAX_TOKENS, VOCAB, reference_reply, tiny_model


@dataclass
class Rig:
    engine: Engine
    pool: PagePool
    publisher: Publisher
    registry: CollectorRegistry
    model: Any
    memory: torch.Tensor | None = None

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


class Tampered:
    """A model whose forward can be made to fail."""

    def __init__(self, inner: LoadedModel) -> None:
        self.spec = inner.spec
        self.failures = 0
        self.not_finite = False
        self.steps: list[int] = []
        self.copies: list[list[tuple[int, int]]] = []
        self._inner = inner

    def copy_pages(self, pages: torch.Tensor, copies: Copies) -> None:
        self.copies.append(list(copies))
        self._inner.copy_pages(pages, copies)

    def forward(self, step: StepInputs, pages: torch.Tensor) -> torch.Tensor:
        self.steps.append(step.tokens.shape[0])
        if self.failures:
            self.failures -= 1
            raise RuntimeError("device fell over")
        logits = self._inner.forward(step, pages)
        return torch.full_like(logits, torch.nan) if self.not_finite else logits


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(tiny_model(), threads=1)


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"], autouse=True)
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run everything with steps in turn, as on a CPU, and begun ahead, as on a GPU."""
    monkeypatch.setattr("tests.unit.workers.test_engine.OVERLAP", request.param)


OVERLAP = False


@asynccontextmanager
async def rig(
    loaded: LoadedModel,
    *,
    pages: int = 64,
    policy: Policy | None = None,
    store: Callable[[], Any] = lambda: None,
    **bounds: Any,
) -> AsyncIterator[Rig]:
    memory = loaded.new_pool(pages)
    pool = PagePool(pages, block_bytes=memory.shape[1], policy=Lru() if policy is None else policy)
    publisher = Publisher("worker-0", 1, [TierKind.HBM], pool)
    registry = CollectorRegistry()
    model = Tampered(loaded)
    config = SchedulerConfig(max_model_tokens=MAX_TOKENS, **bounds)
    engine = Engine(
        model,  # type: ignore[arg-type]
        ops.page_view(memory, loaded.spec.layout),
        pool,
        Scheduler(config, pool),
        Reporter(publisher, WorkerMetrics(registry)),
        root=lambda: Root(b"r" * 32),
        store=store,
        overlap=OVERLAP,
    )
    engine.start()
    try:
        yield Rig(engine, pool, publisher, registry, model, memory)
    finally:
        await engine.stop(drain_ms=0)
        pool.check()
        assert pool.use().held == 0, "pages leaked"


def ask(prompt: list[int], *, max_tokens: int = 8, **options: Any) -> Request:
    sampling = {k: options.pop(k) for k in list(options) if k in SamplingParams.__slots__}
    return Request(
        request_id="t",
        tokens=pack_tokens(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
        **options,
    )


@dataclass
class Reply:
    tokens: list[int] = field(default_factory=list)
    first: FirstTokens | None = None
    outputs: list[Output] = field(default_factory=list)

    @property
    def finish(self) -> FinishReason | None:
        return self.outputs[-1].finish


async def run(engine: Engine, request: Request) -> Reply:
    reply = Reply()
    async for output in engine.generate(request):
        reply.tokens += output.tokens
        reply.first = reply.first or output.first
        reply.outputs.append(output)
    return reply


def prompt_of(seed: int, tokens: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, VOCAB) for _ in range(tokens)]


async def test_replies_equal_the_plain_models_alone_together_and_from_pages(
    loaded: LoadedModel,
) -> None:
    shared = prompt_of(1, 40)
    lengths = (1, 7, 15, 16, 17, 32, 48, 90)
    prompts = [prompt_of(n, n) for n in lengths]
    prompts += [shared + prompt_of(50 + i, 5) for i in range(3)]
    async with rig(loaded, step_tokens=24, max_running=8, pages=128) as it:
        together = await asyncio.gather(*(run(it.engine, ask(p, max_tokens=20)) for p in prompts))
        again = [await run(it.engine, ask(p, max_tokens=20)) for p in prompts]
        unread = [await run(it.engine, ask(p, max_tokens=20, no_read=True)) for p in prompts]
    for prompt, *replies in zip(prompts, together, again, unread, strict=True):
        expected = reference_reply(prompt, 20)
        assert [reply.tokens for reply in replies] == [expected] * 3
        finish = FinishReason.LENGTH if len(expected) == 20 else FinishReason.STOP
        assert all(reply.finish is finish for reply in replies)
    for prompt, first, second in zip(prompts, together, again, strict=True):
        assert first.first is not None and second.first is not None
        use = second.first.cache
        assert use.hbm_tokens == (len(prompt) - 1) // 16 * 16
        assert use.hbm_tokens + use.computed_tokens == len(prompt)


async def test_one_prefix_at_once_is_computed_once(loaded: LoadedModel) -> None:
    shared = prompt_of(2, 160)
    async with rig(loaded, step_tokens=32, max_running=8) as it:
        requests = [ask([*shared, token], max_tokens=2) for token in (5, 6, 7)]
        replies = await asyncio.gather(*(run(it.engine, request) for request in requests))
        cached = sorted(r.first.cache.hbm_tokens for r in replies if r.first is not None)
        assert cached == [0, 160, 160]


async def test_the_next_turn_finds_the_reply_in_pages(loaded: LoadedModel) -> None:
    prompt = prompt_of(3, 20)
    async with rig(loaded) as it:
        first = await run(it.engine, ask(prompt, max_tokens=30, ignore_eos=True))
        longer = prompt + first.tokens + prompt_of(4, 30)
        second = await run(it.engine, ask(longer, max_tokens=4))
        assert second.first is not None
        assert second.first.cache.hbm_tokens == 48
        assert second.first.cache.miss_reason is MissReason.DISABLED
    assert second.tokens == reference_reply(longer, 4)


async def test_eviction_changes_no_reply(loaded: LoadedModel) -> None:
    prompts = [prompt_of(60 + n, 50) for n in range(6)]
    async with rig(loaded, pages=6) as it:
        for _ in range(2):
            for prompt in prompts:
                reply = await run(it.engine, ask(prompt, max_tokens=6))
                assert reply.tokens == reference_reply(prompt, 6)
        assert it.pool.evictions > 10
        digest = it.publisher.digests()[0]
        assert digest.count == it.pool.use().cached
        assert it.metric("kvstore_worker_evicted_pages_total") == it.pool.evictions


async def test_a_caller_that_leaves_frees_its_pages(loaded: LoadedModel) -> None:
    async with rig(loaded) as it:
        outputs = it.engine.generate(ask(prompt_of(5, 60), max_tokens=400, ignore_eos=True))
        await anext(outputs)
        assert it.pool.use().held > 0
        await outputs.aclose()
        # Whatever step is running ends first; the next request finds its pages free.
        await run(it.engine, ask([9], max_tokens=1))
        assert it.pool.use().held == 0
        assert it.metric("kvstore_worker_requests_total", outcome="abort") == 1


async def test_a_deadline_ends_a_request_running_or_waiting(loaded: LoadedModel) -> None:
    async with rig(loaded, max_running=1, step_tokens=16) as it:
        long = ask(prompt_of(6, 60), max_tokens=400, ignore_eos=True, deadline_ms=40)
        waiting = ask(prompt_of(7, 10), max_tokens=400, deadline_ms=20)
        ends = await asyncio.gather(
            run(it.engine, long), run(it.engine, waiting), return_exceptions=True
        )
        for end in ends:
            assert isinstance(end, Unreachable) and "deadline passed" in str(end)
        # The step that was running ends first.
        assert await run(it.engine, ask([9], max_tokens=1))
        assert it.metric("kvstore_worker_requests_total", outcome="failed") == 2


async def test_a_failing_step_fails_its_requests_and_no_others(loaded: LoadedModel) -> None:
    async with rig(loaded) as it:
        it.model.failures = 1
        with pytest.raises(Unreachable, match="step failed"):
            await run(it.engine, ask(prompt_of(8, 30)))
        reply = await run(it.engine, ask(prompt_of(8, 30)))
        assert reply.tokens == reference_reply(prompt_of(8, 30), 8)
        assert not it.engine.broken.is_set()
        assert it.metric("kvstore_worker_requests_total", outcome="failed") == 1


async def test_a_model_that_fails_step_after_step_is_broken(loaded: LoadedModel) -> None:
    async with rig(loaded) as it:
        it.model.failures = 1_000
        for _ in range(3):
            with pytest.raises(Unreachable):
                await run(it.engine, ask([5, 6]))
        assert it.engine.broken.is_set() and it.engine.load().draining
        with pytest.raises(Refused):
            await run(it.engine, ask([5, 6]))


async def test_logits_that_are_not_finite_fail_the_request(loaded: LoadedModel) -> None:
    async with rig(loaded) as it:
        it.model.not_finite = True
        with pytest.raises(Unreachable, match="not finite"):
            await run(it.engine, ask([5, 6]))


async def test_pages_that_gave_rubbish_are_served_to_nobody(loaded: LoadedModel) -> None:
    prompt = prompt_of(12, 70)
    async with rig(loaded, step_tokens=32) as it:
        it.model.not_finite = True
        with pytest.raises(Unreachable, match="not finite"):
            await run(it.engine, ask(prompt))
        it.model.not_finite = False
        reply = await run(it.engine, ask(prompt))
        assert reply.first is not None and reply.first.cache.cached_tokens == 0
        assert reply.tokens == reference_reply(prompt, 8)


async def test_a_loop_that_fails_leaves_nobody_waiting(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Scheduler, follows: object) -> list[Work]:
        raise AssertionError("a bug")

    async with rig(loaded) as it:
        monkeypatch.setattr(Scheduler, "plan", fail)
        with pytest.raises(Unreachable, match="broken"):
            await run(it.engine, ask([5, 6]))
        assert it.engine.broken.is_set()
        with pytest.raises(Refused):
            await run(it.engine, ask([5, 6]))


async def test_the_end_of_a_worker_is_not_the_end_of_a_reply(loaded: LoadedModel) -> None:
    async with rig(loaded) as it:
        outputs = it.engine.generate(ask([5, 6], max_tokens=400, ignore_eos=True))
        await anext(outputs)
        await it.engine.stop(drain_ms=0)
        with pytest.raises(Unreachable, match="ending"):
            _ = [output async for output in outputs]


async def test_routers_hear_of_a_request_before_the_running_step_ends(loaded: LoadedModel) -> None:
    async with rig(loaded) as it:
        outputs = it.engine.generate(ask([5, 6], max_tokens=400, ignore_eos=True))
        await anext(outputs)
        second = asyncio.create_task(run(it.engine, ask(prompt_of(13, 90), max_tokens=1)))
        await asyncio.sleep(0)
        load = it.publisher.load
        assert load is not None and load.queued_tokens == 90
        assert load.queued_token_depths == 90 * 90 / 2, "its tokens have 0 to 90 before them"
        await second
        await outputs.aclose()


async def test_what_cannot_run_is_refused_before_any_work(loaded: LoadedModel) -> None:
    async with rig(loaded, pages=4, max_waiting=1, max_running=1) as it:
        with pytest.raises(BadInput, match=f"token id {VOCAB}"):
            await run(it.engine, ask([1, VOCAB]))
        with pytest.raises(BadInput, match="stop token id 5000"):
            await run(it.engine, ask([1], stop_token_ids=frozenset({5000})))
        with pytest.raises(TooLarge):
            await run(it.engine, ask(prompt_of(9, 60), max_tokens=20))
        assert it.model.steps == []
        assert it.metric("kvstore_worker_requests_total", outcome="refused") == 3


async def test_stop_tokens_and_the_end_of_sequence_are_not_part_of_the_reply(
    loaded: LoadedModel,
) -> None:
    prompt = prompt_of(10, 12)
    async with rig(loaded) as it:
        plain = await run(it.engine, ask(prompt, max_tokens=12, ignore_eos=True))
        stop = plain.tokens[5]
        stopped = await run(it.engine, ask(prompt, max_tokens=12, stop_token_ids=frozenset({stop})))
    expected = plain.tokens[: plain.tokens.index(stop)]
    assert stopped.tokens == [t for t in expected if t != EOS][: len(stopped.tokens)]
    assert stopped.finish is FinishReason.STOP


async def test_seeds_and_logprobs_do_not_depend_on_company(loaded: LoadedModel) -> None:
    request = ask(prompt_of(11, 20), temperature=1.0, seed=11, logprobs=3, max_tokens=10)
    async with rig(loaded) as it:
        alone = await run(it.engine, request)
        others = [ask(prompt_of(n, 9), temperature=1.0) for n in range(4)]
        company, *_ = await asyncio.gather(
            run(it.engine, request), *(run(it.engine, other) for other in others)
        )
        rest = ask(prompt_of(11, 20) + alone.tokens[:4], temperature=1.0, seed=11, max_tokens=6)
        resumed = await run(it.engine, rest)
    assert alone.tokens == company.tokens
    assert resumed.tokens == alone.tokens[4:], "a retry goes on as the lost worker would have"
    logprobs = [entry for output in alone.outputs for entry in output.logprobs]
    assert [entry.token_ids[0] for entry in logprobs] == alone.tokens
    assert all(len(entry.token_ids) == 4 for entry in logprobs)


async def test_draining_lets_running_requests_finish(loaded: LoadedModel) -> None:
    async with rig(loaded) as it:
        running = asyncio.create_task(run(it.engine, ask([5, 6], max_tokens=40, ignore_eos=True)))
        await asyncio.sleep(0)
        await it.engine.stop(drain_ms=20_000)
        assert (await running).finish is FinishReason.LENGTH
        with pytest.raises(Refused):
            await run(it.engine, ask([5]))


class _Listening(Lru):
    """LRU that notes what it is told of requests."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Prompt] = []

    def request(self, prompt: Prompt) -> None:
        self.heard.append(prompt)
        super().request(prompt)


async def test_what_a_request_is_and_costs_reaches_the_policy_of_the_pages(
    loaded: LoadedModel,
) -> None:
    policy = _Listening()
    async with rig(loaded, policy=policy) as it:
        await run(it.engine, ask(prompt_of(1, 100), kind="tool"))
        for tokens in range(1, 8):  # a measured worker, whose steps get dearer with depth
            it.engine.rates.prefill(16 * tokens, 0, 1e-3 * tokens + 1e-3 * tokens**2)
        await run(it.engine, ask(prompt_of(2, 100)))
    first, second = policy.heard
    assert (first.kind, second.kind) == ("tool", "")
    assert first.share_domain == second.share_domain == (b"r" * 32).hex()
    assert 0 < second.depth_cost <= 2
    assert len(first.keys) == 6, "full blocks only"
