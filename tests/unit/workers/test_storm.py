"""A storm of long prompts over few pages: everybody ends with the tokens of the plain model."""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from kvworkers.bench.rig import Rig as BenchRig
from kvworkers.bench.storm import storm as measured
from kvworkers.engine.cache import StoreConfig, StoreLink
from kvworkers.models.loading import LoadedModel, load_model
from kvworkers.stream.mover import Mover
from prometheus_client import CollectorRegistry

from kvstore.core.errors import Corrupt, Unreachable
from kvstore.observe.metrics import WorkerMetrics
from tests.patience import PATIENCE_MS, PATIENCE_S
from tests.scripted_client import ScriptedClient
from tests.tiny_model import reference_reply, tiny_model
from tests.unit.workers.test_engine import Reply, Rig, ask, prompt_of, rig, run

PAGES = 28
OUT = 60
PROMPTS = [prompt_of(300 + n, 40 + 17 * n) for n in range(6)]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(tiny_model(), threads=1)


@pytest.fixture(autouse=True)
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin steps ahead, as on a GPU: who makes way is in one that was begun."""
    monkeypatch.setattr("tests.unit.workers.test_engine.OVERLAP", True)


class Noting(Mover):
    """Compares what comes back with what went out."""

    def __init__(self, pool: torch.Tensor, model: LoadedModel) -> None:
        super().__init__(pool, model.forms)
        self.out: dict[int, bytes] = {}
        self.back = 0
        self.held: asyncio.Event | None = None
        self.copying = asyncio.Event()
        self.fails = False

    async def store(
        self, pages: Sequence[int], arena: memoryview, offsets: Sequence[int], **options: Any
    ) -> None:
        assert options == {"raw": True}
        for page, offset in zip(pages, offsets, strict=True):
            self.out[offset] = bytes(self._pool[page].numpy())
        self.copying.set()
        if self.held is not None:
            await self.held.wait()
        if self.fails:
            raise RuntimeError("a bug")
        await super().store(pages, arena, offsets, **options)

    async def load(
        self, arena: memoryview, offsets: Sequence[int], pages: Sequence[int], **options: Any
    ) -> None:
        await super().load(arena, offsets, pages, **options)
        assert options == {"raw": True}
        for page, offset in zip(pages, offsets, strict=True):
            assert bytes(self._pool[page].numpy()) == self.out[offset], "other bytes came back"
            self.back += 1


class Storm:
    def __init__(self, engine: Rig, client: ScriptedClient, mover: Noting) -> None:
        self.rig, self.client, self.mover = engine, client, mover
        self.links: list[StoreLink] = []
        self.registry = CollectorRegistry()

    async def learn(self) -> None:
        """Let it expect short replies."""
        await run(self.rig.engine, ask([5, 6, 7], max_tokens=1, ignore_eos=True))

    async def all(self, **options: Any) -> list[Reply]:
        asked = [ask(p, max_tokens=OUT, no_store=True, **options) for p in PROMPTS]
        return list(await asyncio.gather(*(run(self.rig.engine, one) for one in asked)))

    def preemptions(self, kind: str) -> float:
        return self.rig.metric("kvstore_worker_preemptions_total", kind=kind)

    def moved(self, direction: str) -> float:
        name, labels = "kvstore_worker_moved_bytes_total", {"direction": direction}
        return self.registry.get_sample_value(name, labels) or 0.0

    def failures(self, call: str, error: str) -> float:
        labels = {"call": call, "error": error}
        name = "kvstore_worker_store_failures_total"
        return self.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def storm(loaded: LoadedModel, *, slots: int = 200, **store: Any) -> AsyncIterator[Storm]:
    links: list[StoreLink] = []
    async with rig(
        loaded,
        pages=PAGES,
        store=lambda: links[0] if links else None,
        max_running=8,
        max_waiting=64,
    ) as it:
        assert it.memory is not None
        client = ScriptedClient(it.memory.shape[1])
        client.private.room(slots)
        made = Storm(it, client, Noting(it.memory, loaded))
        link = StoreLink(
            client,  # type: ignore[arg-type]
            made.mover,
            WorkerMetrics(made.registry),
            config=StoreConfig(**store),
        )
        await made.learn()
        links.append(link)
        made.links = links
        try:
            yield made
            await it.engine.stop(drain_ms=0)
            await link.drained(deadline_ms=PATIENCE_MS)
            assert not client.private.taken, "slots leaked"
            assert link.swap.used_bytes == 0
        finally:
            await link.close()
            made.mover.close()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - the thing watched is a model in a thread
            await asyncio.sleep(0.001)  # Without a rest the interpreter is never let go.


@functools.cache
def expected() -> list[list[int]]:
    return [reference_reply(prompt, OUT) for prompt in PROMPTS]


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "ahead"])
async def test_everybody_gets_the_plain_models_tokens_through_swaps(
    loaded: LoadedModel, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.unit.workers.test_engine.OVERLAP", overlap)
    async with storm(loaded) as it:
        replies = await it.all()
        assert [reply.tokens for reply in replies] == expected()
        assert it.preemptions("swap") > 1 and it.preemptions("recompute") == 0
        assert it.mover.back > 0
        assert it.moved("swap_out") == it.moved("swap_in") > 0, "each copy was needed once"
        assert it.rig.metric("kvstore_worker_preempted") == 0


async def test_replies_that_share_pages_are_swapped_and_stay_what_each_is_alone(
    loaded: LoadedModel,
) -> None:
    # Each has private slots of its own for what it shared: they come back as separate pages.
    drawn = [
        ask(PROMPTS[2], max_tokens=OUT, temperature=1.0, seed=n, ignore_eos=True, no_store=True,
            siblings="one")
        for n in range(7)
    ]  # fmt: skip
    async with rig(loaded, pages=400) as roomy:
        alone = [await run(roomy.engine, one) for one in drawn]
    async with storm(loaded) as it:
        replies = await asyncio.gather(*(run(it.rig.engine, one) for one in drawn))
        assert [reply.tokens for reply in replies] == [reply.tokens for reply in alone]
        assert it.rig.metric("kvstore_worker_fork_pages_total", kind="copied") == 6
        assert it.preemptions("swap") > 0 and it.mover.back > 0


@pytest.mark.parametrize("why", ["no slots", "no bytes", "the node is away", "a bug"])
async def test_where_swapping_is_not_possible_it_is_computed_anew(
    loaded: LoadedModel, why: str
) -> None:
    options: dict[str, Any] = {"swap_bytes": 1} if why == "no bytes" else {}
    async with storm(loaded, slots=1 if why == "no slots" else 200, **options) as it:
        if why == "the node is away":
            it.client.private.error = Unreachable("gone")
        it.mover.fails = why == "a bug"
        replies = await it.all()
        assert [reply.tokens for reply in replies] == expected()
        assert it.preemptions("recompute") > 0
        assert it.preemptions("swap") == it.moved("swap_out") == 0
        assert (it.failures("swap", "Unreachable") > 0) == (why == "the node is away")
        assert (it.failures("swap", "unexpected") > 0) == (why == "a bug")


async def test_a_copy_that_is_lost_meanwhile_is_computed_anew(loaded: LoadedModel) -> None:
    async with storm(loaded) as it:
        tasks = asyncio.ensure_future(it.all())
        await until(lambda: it.preemptions("swap") > 0)
        it.client.private.lost = True  # A keeper was restarted: another arena, other slots.
        assert [reply.tokens for reply in await tasks] == expected()
        voids = it.registry.get_sample_value("kvstore_worker_void_blocks_total")
        assert voids and it.moved("swap_in") < it.moved("swap_out")
        it.client.private.lost = False


async def test_who_leaves_while_its_pages_are_copied_gives_everything_back(
    loaded: LoadedModel,
) -> None:
    async with storm(loaded) as it:
        it.mover.held = asyncio.Event()
        tasks = [
            asyncio.create_task(run(it.rig.engine, ask(p, max_tokens=OUT, no_store=True)))
            for p in PROMPTS
        ]
        await it.mover.copying.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert it.rig.pool.use().held > 0, "a copy reads them"
        it.mover.held.set()
        it.mover.held = None
        assert await run(it.rig.engine, ask([9], max_tokens=1))
        await until(lambda: not it.rig.pool.use().held)


async def test_who_leaves_while_it_is_away_gives_its_copy_back(loaded: LoadedModel) -> None:
    async with storm(loaded) as it:
        tasks = [
            asyncio.create_task(run(it.rig.engine, ask(p, max_tokens=OUT, no_store=True)))
            for p in PROMPTS
        ]
        await until(lambda: it.rig.metric("kvstore_worker_preempted") > 0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await run(it.rig.engine, ask([9], max_tokens=1))
        assert it.rig.metric("kvstore_worker_preempted") == 0


async def test_named_blocks_are_found_again_and_drawn_tokens_stay_the_same(
    loaded: LoadedModel,
) -> None:
    drawn = [
        ask(p, max_tokens=OUT, temperature=1.0, seed=n, ignore_eos=True)
        for n, p in enumerate(PROMPTS)
    ]
    async with rig(loaded, pages=400, max_running=8) as roomy:
        alone = [await run(roomy.engine, one) for one in drawn]
    async with storm(loaded) as it:
        replies = await asyncio.gather(*(run(it.rig.engine, one) for one in drawn))
        assert [reply.tokens for reply in replies] == [reply.tokens for reply in alone]
        assert it.preemptions("swap") > 0
        assert it.moved("swap_in") < it.moved("swap_out"), "some of it had not been given away"
        for reply, prompt in zip(replies, PROMPTS, strict=True):
            assert reply.first is not None
            use = reply.first.cache
            assert use.cached_tokens + use.computed_tokens == len(prompt)


async def test_the_benchmark_counts_who_made_way_and_compares(loaded: LoadedModel) -> None:
    async with storm(loaded) as it:
        bench = BenchRig(loaded, it.rig.engine, it.rig.pool, it.links[0], it.rig.registry)
        prompts = [prompt_of(500 + n, 40) for n in range(4)]
        busy, calm = await measured(bench, prompts, out=48)
        assert busy.preemptions > 0 == busy.recomputed == calm.preemptions
        assert busy.tpot_ms > 0 < calm.tokens_per_s
        assert it.rig.pool.use().held == 0, "the pages that were held are given back"
        with pytest.raises(Corrupt, match="pages are to be enough"):
            await measured(bench, prompts * 2, out=48)
