"""Steps that follow a load: replies stay right whatever becomes of it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

import pytest
import torch
from kvkernels import ops
from kvworkers.engine.cache import StoreConfig, StoreLink
from kvworkers.engine.scheduler import Scheduler
from kvworkers.models.loading import LoadedModel, load_model
from kvworkers.stream.gate import Gate
from kvworkers.stream.mover import Mover
from prometheus_client import CollectorRegistry

from kvstore.core.errors import Unreachable
from kvstore.core.names import Root, chain, pack_tokens
from kvstore.core.outcomes import MissReason
from kvstore.observe.metrics import WorkerMetrics
from tests.patience import PATIENCE_S
from tests.scripted_client import ScriptedClient
from tests.tiny_model import reference_reply, tiny_model
from tests.unit.workers.test_engine import Reply, Rig, ask, prompt_of, rig, run

PROMPT = prompt_of(21, 100)
BLOCKS = 6


class HeldMover(Mover):
    """Moves a group when the test allows it, or fails there."""

    def __init__(self, pool: torch.Tensor, model: LoadedModel) -> None:
        super().__init__(pool, model.forms)
        self.allowed = asyncio.Semaphore(0)
        self.moved = 0
        self.whole = 0
        self.fails_at = -1

    async def load(self, arena: memoryview, offsets: Any, pages: Any, **how: Any) -> None:
        self.whole += 1
        await super().load(arena, offsets, pages, **how)

    async def load_groups(self, arena: memoryview, offsets: Any, pages: Any, gate: Gate) -> None:
        try:
            movement = self._movement(arena, offsets, pages)
            for layers in gate.groups:
                await self.allowed.acquire()
                if self.moved == self.fails_at:
                    raise Unreachable("the copy failed")
                await self._do(partial(ops.load_layers, movement, layers))
                self.moved += 1
                gate.come()
        finally:
            gate.end()


class Following:
    """An engine over a store that holds `PROMPT`'s first blocks."""

    def __init__(self, engine: Rig, client: ScriptedClient, mover: HeldMover) -> None:
        self.rig, self.client, self.mover = engine, client, mover

    def ask(self, **options: Any) -> "asyncio.Task[Reply]":
        return asyncio.create_task(run(self.rig.engine, ask(PROMPT, **options)))

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not holds():  # noqa: ASYNC110 - the thing watched is a model in a thread
                await asyncio.sleep(0.001)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(tiny_model(), threads=1)


async def blocks_of(loaded: LoadedModel) -> list[bytes]:
    """Compute `PROMPT` and return the bytes of its blocks."""
    async with rig(loaded) as it:
        await run(it.engine, ask(PROMPT, max_tokens=1))
        root = Root(b"r" * 32)
        pages = it.pool.match(root, chain(root, pack_tokens(PROMPT))[:BLOCKS])
        assert len(pages) == BLOCKS and it.memory is not None
        it.pool.release(pages, now_ms=0.0)
        return [bytes(it.memory[page].numpy()) for page in pages]


@asynccontextmanager
async def following(loaded: LoadedModel) -> AsyncIterator[Following]:
    blocks = await blocks_of(loaded)
    client = ScriptedClient(len(blocks[0]))
    for number, block in enumerate(blocks):
        client.view(client.slot(number))[:] = block
    client.ready = BLOCKS
    made: list[StoreLink] = []
    async with rig(loaded, store=lambda: made[0] if made else None) as it:
        assert it.memory is not None
        mover = HeldMover(it.memory, loaded)
        link = StoreLink(
            client,  # type: ignore[arg-type]
            mover,
            WorkerMetrics(CollectorRegistry()),
            config=StoreConfig(grouped_bytes=1),
        )
        made.append(link)
        try:
            yield Following(it, client, mover)
        finally:
            for _ in range(8):
                mover.allowed.release()
            await it.engine.stop(drain_ms=0)
            await link.close()
            mover.close()


async def test_a_step_computes_while_its_load_still_comes(loaded: LoadedModel) -> None:
    async with following(loaded) as it:
        reply = it.ask(max_tokens=8)
        await it.until(lambda: it.rig.model.steps == [4])
        assert it.mover.moved == 0, "it is made ready before anything has come"
        it.mover.allowed.release()
        await it.until(lambda: it.mover.moved == 1)
        assert not reply.done(), "its second layer is not there"
        it.mover.allowed.release()
        said = await reply
        assert said.tokens == reference_reply(PROMPT, 8)
        assert said.first is not None and said.first.cache.cached_tokens == 96
        assert it.rig.model.steps[0] == 4 and max(it.rig.model.steps[1:]) == 1
        again = await it.ask(max_tokens=8)
        assert again.first is not None and again.first.cache.hbm_tokens == 96


@pytest.mark.parametrize("good", [0, 3])
async def test_blocks_given_away_under_a_step_are_computed(loaded: LoadedModel, good: int) -> None:
    async with following(loaded) as it:
        it.client.stale = {good}
        reply = it.ask(max_tokens=8)
        it.mover.allowed.release()
        await it.until(lambda: it.rig.model.steps == [4])
        it.mover.allowed.release()
        said = await reply
        assert said.tokens == reference_reply(PROMPT, 8)
        assert said.first is not None and said.first.cache.cached_tokens == good * 16
        assert said.first.cache.miss_reason is MissReason.LATE
        assert it.rig.model.steps[1] == 100 - good * 16, "the first step counts for nothing"


class Remembers:
    """A constraint that allows everything and writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def allow(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def take(self, token: int) -> None:
        self.told.append(token)


async def test_what_a_void_step_would_say_is_not_remembered(loaded: LoadedModel) -> None:
    async with following(loaded) as it:
        it.client.stale = {2}
        form = Remembers()
        reply = it.ask(max_tokens=8, constraint=form, frequency_penalty=0.01)
        it.mover.allowed.release()
        await it.until(lambda: it.rig.model.steps == [4])
        it.mover.allowed.release()
        said = await reply
        assert said.first is not None and said.first.cache.cached_tokens == 32
        assert form.told[: len(said.tokens)] == said.tokens


@pytest.mark.parametrize("fails_at", [0, 1])
async def test_a_load_that_fails_under_a_step_costs_only_itself(
    loaded: LoadedModel, fails_at: int
) -> None:
    async with following(loaded) as it:
        it.mover.fails_at = fails_at
        reply = it.ask(max_tokens=8)
        for _ in range(2):
            it.mover.allowed.release()
        said = await reply
        assert said.tokens == reference_reply(PROMPT, 8)
        assert said.first is not None and said.first.cache.cached_tokens == 0
        assert said.first.cache.miss_reason is MissReason.UNREACHABLE


async def test_beside_others_nothing_waits_for_a_load(loaded: LoadedModel) -> None:
    async with following(loaded) as it:
        other = ask(prompt_of(22, 30), max_tokens=200, ignore_eos=True, no_read=True)
        outputs = it.rig.engine.generate(other)
        await anext(outputs)
        said = await it.ask(max_tokens=8)
        assert said.tokens == reference_reply(PROMPT, 8)
        assert said.first is not None and said.first.cache.cached_tokens == 96
        assert (it.mover.whole, it.mover.moved) == (1, 0)
        await outputs.aclose()


async def test_who_comes_while_a_load_is_followed_is_served_too(loaded: LoadedModel) -> None:
    async with following(loaded) as it:
        reply = it.ask(max_tokens=8)
        it.mover.allowed.release()
        await it.until(lambda: it.rig.model.steps == [4])
        other = asyncio.create_task(
            run(it.rig.engine, ask(prompt_of(23, 20), max_tokens=8, no_read=True))
        )
        await asyncio.sleep(0)
        it.mover.allowed.release()
        assert (await reply).tokens == reference_reply(PROMPT, 8)
        assert (await other).tokens == reference_reply(prompt_of(23, 20), 8)


async def test_a_caller_that_leaves_under_a_followed_load_frees_its_pages(
    loaded: LoadedModel,
) -> None:
    async with following(loaded) as it:
        reply = it.ask(max_tokens=8)
        it.mover.allowed.release()
        await it.until(lambda: it.rig.model.steps == [4])
        reply.cancel()
        await asyncio.gather(reply, return_exceptions=True)
        assert it.rig.pool.use().held > 0, "a step and a copy are writing them"
        it.mover.allowed.release()
        await it.until(lambda: it.rig.pool.use().held == 0)


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("a_turn", [1, 2, 3])
async def test_a_prompt_is_settled_while_its_reply_goes_on(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, at_once: int, a_turn: int
) -> None:
    """Whoever gives the last block its name: the step's end, or the turn between two steps."""
    async with following(loaded) as it:
        defaults = Scheduler.name_blocks.__kwdefaults__
        assert defaults is not None
        monkeypatch.setitem(defaults, "limit", at_once)
        monkeypatch.setattr("kvworkers.engine.engine._NAMED_A_TURN", a_turn)
        for _ in range(2):
            it.mover.allowed.release()
        outputs = it.rig.engine.generate(ask(PROMPT, max_tokens=300, ignore_eos=True))
        async with asyncio.timeout(PATIENCE_S), aclosing(outputs):
            async for _ in outputs:
                if it.client.settled:
                    break
        (settled,) = it.client.settled
        assert settled["release"] == [5]
        assert [ref.slot for ref in settled["kept_in_hbm"]] == list(range(BLOCKS))
