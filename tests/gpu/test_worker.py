"""The worker's engine on a GPU: replies against plain transformers, bytes through the arena."""

import asyncio
import mmap
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import torch
from kvkernels import ops
from kvkernels.triton.replayed import ReplayedAppend, ReplayedDecode
from kvworkers.bench.rig import Rig, rig
from kvworkers.models.graphs import APPENDS, BATCHES, StepGraphs
from kvworkers.models.loading import LoadedModel
from kvworkers.models.random_weights import random_model
from kvworkers.models.step import StepInputs
from kvworkers.stream.device_mover import make_mover
from kvworkers.stream.forms import Forms
from kvworkers.stream.gate import Gate
from kvworkers.stream.registration import Registration

from kvstore.core.layout import BlockLayout, Codec

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(240),
]

PAGES = 512
STEPS = 4
"""Steps of bf16 at the size of the largest logit."""


@pytest.fixture(scope="module", params=["llama-3.1-8b", "qwen3-0.6b", "smollm2-135m"])
def model(request: pytest.FixtureRequest) -> Iterator[LoadedModel]:
    made = random_model(request.param, device="cuda", layers=4)
    yield made
    del made
    torch.cuda.empty_cache()


@asynccontextmanager
async def small_rig(model: LoadedModel) -> AsyncIterator[Rig]:
    async with rig(
        model, arena_bytes=1 << 30, step_tokens=256, batch=8, max_pages=PAGES
    ) as running:
        yield running


def reference(model: LoadedModel, tokens: list[int], kind: str = "sdpa") -> torch.Tensor:
    """Return plain transformers' logits [tokens, vocab], same weights."""
    model.module.set_attn_implementation(kind)
    try:
        with torch.inference_mode():
            ids = torch.tensor([tokens], device="cuda")
            logits: torch.Tensor = model.module(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        model.module.set_attn_implementation("kvstore_paged")
    return logits


def differences(model: LoadedModel, prompt: list[int], reply: list[int]) -> list[float]:
    """Teacher-forced: how far below the reference's own choice each other one lies, in steps."""
    logits = reference(model, prompt + reply)[len(prompt) - 1 : -1]
    best = logits.max(dim=-1).values
    chosen = logits[torch.arange(len(reply)), torch.tensor(reply)]
    step = torch.exp2(torch.floor(torch.log2(best.abs())) - 7)
    return [float(gap) for gap in (best - chosen) / step if gap > 0]


def rivals(model: LoadedModel, prompt: list[int], reply: list[int]) -> int:
    """Return where transformers' own two attentions choose differently on these tokens."""
    tokens = prompt + reply
    rows = slice(len(prompt) - 1, -1)
    one, two = (reference(model, tokens, kind)[rows].argmax(-1) for kind in ("sdpa", "eager"))
    return int((one != two).sum())


async def test_replies_are_the_references_cached_or_not(model: LoadedModel) -> None:
    async with small_rig(model) as running:
        prompts = [running.prompt(seed, 200 + 37 * seed) for seed in range(6)]
        cold = await asyncio.gather(*(running.ask(p, out=64) for p in prompts))
        await running.stored()
        hbm = await asyncio.gather(*(running.ask(p, out=64) for p in prompts))
        await running.empty_pages()
        arena = await asyncio.gather(*(running.ask(p, out=64) for p in prompts))
    for prompt, reply in zip(prompts, hbm, strict=True):
        assert reply.first.cache.hbm_tokens == (len(prompt) - 1) // 16 * 16
    for prompt, reply in zip(prompts, arena, strict=True):
        loaded = sum(reply.first.cache.loaded_tokens.values())
        assert loaded == (len(prompt) - 1) // 16 * 16, reply.first.cache
    for replies in (cold, hbm, arena):
        gaps = [
            gap
            for prompt, reply in zip(prompts, replies, strict=True)
            for gap in differences(model, prompt, reply.tokens)
        ]
        total = sum(len(reply.tokens) for reply in replies)
        others = sum(rivals(model, p, r.tokens) for p, r in zip(prompts, replies, strict=True))
        # Logits are bf16: near ties fall either way, for transformers' own attentions too.
        assert len(gaps) <= max(total / 100, others), f"{len(gaps)} of {total}, theirs {others}"
        assert max(gaps, default=0.0) <= STEPS, f"gaps {sorted(gaps)}"


def decode_step(rows: int, contexts: list[int], pages_each: int, vocab: int) -> StepInputs:
    draw = torch.Generator().manual_seed(rows)
    tables = torch.arange(rows * pages_each, dtype=torch.int32).view(rows, pages_each)
    lengths = torch.tensor(contexts, dtype=torch.int32)
    last = lengths.long() - 1
    slots = tables[torch.arange(rows), last // 16].long() * 16 + last % 16
    return StepInputs(
        tokens=torch.randint(0, vocab, (rows,), generator=draw),
        positions=last,
        slots=slots,
        block_tables=tables,
        context_lengths=lengths,
        query_starts=torch.arange(rows + 1, dtype=torch.int32),
        sample_rows=torch.arange(rows),
    )


@pytest.mark.parametrize("new", [5, 64, 200])
def test_a_replayed_append_is_the_step_itself(model: LoadedModel, new: int) -> None:
    view = model.page_view(model.new_pool(257))
    view.normal_(std=0.5)
    model.graphs = None
    steps = []
    for context in (new, 700, 3_000):
        at = torch.arange(context - new, context)
        steps.append(
            StepInputs(
                tokens=at % 1_000,
                positions=at,
                slots=at.clone(),
                block_tables=torch.arange(256, dtype=torch.int32)[None],
                context_lengths=torch.tensor([context], dtype=torch.int32),
                query_starts=torch.tensor([0, new], dtype=torch.int32),
                sample_rows=torch.tensor([new - 1]),
            )
        )
    plain = [model.forward(step, view).clone() for step in steps]
    try:
        model.capture(view, batch=1, max_pages=256)
        for step, expected in zip(steps, plain, strict=True):
            got = model.forward(step, view)
            assert got.shape == expected.shape
            error = float((got - expected).norm() / expected.norm())
            assert error < 4e-2, error
    finally:
        model.graphs = None


def captured(model: LoadedModel) -> StepGraphs:
    assert model.graphs is not None, "nothing was captured"
    return model.graphs


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_replayed_step_is_the_step_itself(model: LoadedModel, rows: int) -> None:
    memory = model.new_pool(257)
    view = model.page_view(memory)
    view.normal_(std=0.5)
    model.graphs = None
    longest = 40
    steps = [
        decode_step(rows, [length + 7 * row for row in range(rows)], longest, 1_000)
        for length in (17, 33, 300)
    ]
    plain = [model.forward(step, view).clone() for step in steps]
    try:
        model.capture(view, batch=8, max_pages=256)
        assert captured(model).fits(steps[0], view)
        for step, expected in zip(steps, plain, strict=True):
            got = model.forward(step, view)
            assert got.shape == expected.shape
            error = float((got - expected).norm() / expected.norm())
            assert error < 4e-2, error
    finally:
        model.graphs = None


async def test_bytes_survive_the_way_through_the_arena() -> None:
    layout = BlockLayout(layers=32, kv_heads=8, head_dim=128, codec=Codec.RAW16)
    block = layout.block_bytes
    assert block == 2 << 20
    pool = torch.randint(0, 255, (96, block), dtype=torch.uint8, device="cuda")
    arena = memoryview(mmap.mmap(-1, 128 * block))
    mover = make_mover(pool, Forms(layout, layout, torch.bfloat16))
    try:
        assert mover.registered(arena, deadline_s=60)  # type: ignore[attr-defined]
        before = pool.clone()
        out, back = list(range(48)), list(range(95, 47, -1))
        places = [(at * 37 % 128) * block for at in range(48)]
        await mover.store(out, arena, places)
        for page, place in zip(out, places, strict=True):
            assert bytes(arena[place : place + 64]) == bytes(before[page, :64].tolist())
        await mover.load(arena, places, back)
        assert torch.equal(pool[torch.tensor(back)], before[:48])
        assert torch.equal(pool[:48], before[:48])
        gate = Gate(32, changed=lambda: None)
        pool[48:].zero_()
        load = asyncio.create_task(mover.load_groups(arena, places, back, gate))
        for layers in gate.groups:
            await asyncio.to_thread(gate.pass_layer, layers.start)
        await load
        assert gate.come_groups == len(gate.groups) and torch.equal(
            pool[torch.tensor(back)], before[:48]
        )
    finally:
        mover.close()


@pytest.mark.parametrize("codec", [Codec.FP8, Codec.INT8, Codec.INT4])
async def test_blocks_are_stored_smaller_and_come_back_as_the_format_has_them(codec: Codec) -> None:
    layout = BlockLayout(layers=12, kv_heads=4, head_dim=64, codec=Codec.RAW16)
    stored = replace(layout, codec=codec)
    pool = torch.zeros((8, layout.block_bytes), dtype=torch.uint8, device="cuda")
    pages = ops.page_view(pool, layout, torch.bfloat16)
    pages.normal_()
    before = pages.clone()
    arena = memoryview(mmap.mmap(-1, 16 * stored.block_bytes))
    mover = make_mover(pool, Forms(layout, stored, torch.bfloat16))
    places = [at * stored.block_bytes for at in (9, 2, 5, 0)]
    try:
        assert mover.registered(arena, deadline_s=60)  # type: ignore[attr-defined]
        await mover.store([0, 1, 2, 3], arena, places)
        await mover.load(arena, places, [4, 5, 6, 7])
        error = float((pages[4:] - before[:4]).norm() / before[:4].norm())
        assert 0 < error < (0.15 if codec is Codec.INT4 else 0.05), error
        whole = pages[4:].clone()
        pages[4:].zero_()
        gate = Gate(12, changed=lambda: None)
        await mover.load_groups(arena, places, [4, 5, 6, 7], gate)
        assert torch.equal(pages[4:], whole)
    finally:
        mover.close()


def test_padded_sizes_are_cut_anew_for_what_is_there() -> None:
    plan = ReplayedAppend(APPENDS[1], 8, torch.device("cuda"))
    assert plan.query_tokens == APPENDS[1] and plan.tables.shape == (1, 8)
    rows = ReplayedDecode(BATCHES[1], 8, torch.device("cuda"))
    assert rows.query_tokens == BATCHES[1] == rows.contexts.shape[0]


def test_registration_ends_with_everything_known() -> None:
    arena = memoryview(mmap.mmap(-1, 8 << 20))
    registration = Registration(arena)
    assert registration.wait(deadline_s=30) and registration.registered_bytes == 8 << 20
    assert registration.is_of(arena)
    registration.close()
    assert registration.registered_bytes == 0


async def test_unregistered_memory_is_not_reached() -> None:
    layout = BlockLayout(layers=4, kv_heads=1, head_dim=16, codec=Codec.RAW16)
    pool = torch.zeros((2, layout.block_bytes), dtype=torch.uint8, device="cuda")
    arena = memoryview(mmap.mmap(-1, 16 * 4096))
    mover = make_mover(pool, Forms(layout, layout, torch.bfloat16))
    try:
        assert mover.registered(arena, deadline_s=60)  # type: ignore[attr-defined]
        assert mover.reachable(arena, [0, 15 * 4096, 16 * 4096]) == 2
        mover.forget()
    finally:
        mover.close()
