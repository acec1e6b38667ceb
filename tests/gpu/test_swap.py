"""Requests that make way on a GPU: bytes through private slots, replies of a storm."""

import asyncio
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from kvworkers.bench.rig import rig
from kvworkers.models.loading import LoadedModel
from kvworkers.models.random_weights import random_model
from kvworkers.stream.device_mover import DeviceMover
from kvworkers.stream.forms import Forms
from kvworkers.stream.mover import unheard

from kvstore.core.names import Fidelity
from tests.gpu.test_worker import STEPS, differences, rivals

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(240),
]

OUT = 96
PAGES = 96
COUNT = 8


@pytest.fixture(scope="module")
def model() -> Iterator[LoadedModel]:
    made = random_model("llama-3.1-8b", device="cuda", layers=4)
    yield made
    del made
    torch.cuda.empty_cache()


class Spy(DeviceMover):
    """Notes pages that go out raw, and compares them when they are back."""

    def __init__(self, pool: torch.Tensor, forms: Forms) -> None:
        super().__init__(pool, forms)
        self.out: dict[int, torch.Tensor] = {}
        self.same = 0

    async def store(
        self,
        pages: Sequence[int],
        arena: memoryview,
        offsets: Sequence[int],
        *,
        raw: bool = False,
    ) -> None:
        if raw:
            for page, offset in zip(pages, offsets, strict=True):
                self.out[offset] = self._pool[page].cpu()
        await super().store(pages, arena, offsets, raw=raw)

    async def load(
        self,
        arena: memoryview,
        offsets: Sequence[int],
        pages: Sequence[int],
        *,
        alone: bool = False,
        raw: bool = False,
        queued: Callable[[], object] = unheard,
    ) -> None:
        await super().load(arena, offsets, pages, alone=alone, raw=raw, queued=queued)
        if raw:
            for page, offset in zip(pages, offsets, strict=True):
                assert torch.equal(self._pool[page].cpu(), self.out[offset]), "other bytes"
                self.same += 1


@pytest.mark.parametrize("fidelity", [Fidelity.EXACT, Fidelity.FP8])
async def test_a_storm_over_few_pages_is_the_references(
    model: LoadedModel, fidelity: Fidelity, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Spy] = []

    def spy(pool: torch.Tensor, forms: Forms) -> Spy:
        made.append(Spy(pool, forms))
        return made[-1]

    monkeypatch.setattr("kvworkers.bench.rig.make_mover", spy)
    model.keep_as(fidelity)
    try:
        async with rig(
            model, arena_bytes=1 << 30, step_tokens=256, batch=COUNT, max_pages=PAGES
        ) as running:
            prompts = [running.prompt(70 + seed, 150 + 21 * seed) for seed in range(COUNT)]
            for _ in range(4):
                await running.ask([1] * 17, out=4, no_store=True)
            replies = await asyncio.gather(
                *(running.ask(p, out=OUT, no_store=True, no_read=True) for p in prompts)
            )
            name = "kvstore_worker_preemptions_total"
            assert running.metric(name, kind="swap") > 0
            assert running.metric(name, kind="recompute") == 0
            moved = "kvstore_worker_moved_bytes_total"
            assert running.metric(moved, direction="swap_in") > 0
        assert made[0].same > 0
    finally:
        model.keep_as(Fidelity.EXACT)
    gaps = [
        gap
        for prompt, reply in zip(prompts, replies, strict=True)
        for gap in differences(model, prompt, reply.tokens)
    ]
    others = sum(rivals(model, p, r.tokens) for p, r in zip(prompts, replies, strict=True))
    assert len(gaps) <= max(COUNT * OUT / 100, others), f"{len(gaps)}, theirs {others}"
    assert max(gaps, default=0.0) <= STEPS
