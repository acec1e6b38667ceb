"""Worker processes with the real model and a real node: greedy replies equal the plain model's.

With cache = without cache = `transformers.generate`; alone, from the arena, after eviction.
"""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kvworkers.models.provision import ensure_model

from kvstore.directory.events import Loaded, LoadRate, TierKind
from kvstore.router.members import Member
from kvstore.router.watch_source import WatchSource
from kvstore.testing.node import RunningNode, start_node
from tests.exactness import Exactness, Reference
from tests.patience import PATIENCE_S
from tests.worker_process import Answer, RunningWorker, ask, cached_tokens, start_worker

pytestmark = pytest.mark.e2e

REPLY_TOKENS = 8
SYSTEM = (
    "You are the assistant of a lighthouse museum on a northern coast. You answer visitors "
    "briefly and politely. The museum opens at nine and closes at five, on Mondays it stays "
    "closed. The tower has two hundred and twelve steps; the lamp was lit by oil until 1931 and "
    "by electricity since. Dogs may come along on a lead, but not up the tower. "
)
QUESTIONS = (
    "How many steps does the tower have, and may my dog come up with me?",
    "Grüße aus Köln! Kann ich 灯台 besichtigen? 🗼",
)


@dataclass
class Stage:
    """One node, two workers, one reference; shared by the tests of this module."""

    node: RunningNode
    workers: list[RunningWorker]
    judge: Exactness


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    model = ensure_model()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # beside two workers on two cores, more threads only spin
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        node = stack.enter_context(start_node(arena_bytes=256 << 20))
        options = ("--threads", "1", "--pool-bytes", str(48 << 20))
        with ThreadPoolExecutor() as starters:  # loading takes seconds, also side by side
            starts = [
                starters.submit(
                    stack.enter_context,
                    start_worker(
                        model=model,
                        node=node.run_dir,
                        options=("--name", f"worker-{number}", *options),
                    ),
                )
                for number in range(2)
            ]
        workers = [start.result() for start in starts]
        yield Stage(node, workers, Exactness(Reference(model)))


async def hear(stage: Stage, which: int, prompt: list[int], **fields: Any) -> Answer:
    """Ask a worker and hold its reply against the plain model's."""
    answer = await ask(stage.workers[which].address, prompt, max_tokens=REPLY_TOKENS, **fields)
    expected = stage.judge.reference.reply(prompt, REPLY_TOKENS)
    stage.judge.check(f"worker-{which}", prompt, expected, answer.tokens)
    return answer


async def test_conversations_are_exact_cold_cached_and_across_workers(stage: Stage) -> None:
    reference = stage.judge.reference
    for number, question in enumerate(QUESTIONS):
        prompt = reference.chat(("system", SYSTEM), ("user", question))
        cold = await hear(stage, 0, prompt, no_read=True, no_store=True)
        first = await hear(stage, 0, prompt)
        again = await hear(stage, 0, prompt)
        said = reference.tokenizer.decode(first.tokens)
        turn = reference.chat(
            ("system", SYSTEM), ("user", question), ("assistant", said), ("user", "Thank you!")
        )
        second = await hear(stage, 0, turn)
        other = await hear(stage, 1, turn)
        assert cached_tokens(cold.cache) == 0
        assert cached_tokens(again.cache) == (len(prompt) - 1) // 16 * 16
        assert cached_tokens(second.cache) >= len(prompt) // 16 * 16
        assert other.cache.hbm_tokens + other.cache.dram_tokens > 0
        if number == 0:
            assert other.cache.dram_tokens > 0, "nothing but the arena can have it"


async def test_lengths_around_a_block_are_exact(stage: Stage) -> None:
    words = stage.judge.reference.tokenizer(SYSTEM, add_special_tokens=False)["input_ids"]
    for tokens in (1, 5, 15, 16, 17, 32, 33):
        prompt = words[:tokens]
        for which in (0, 1):
            answer = await hear(stage, which, prompt)
            assert cached_tokens(answer.cache) <= (tokens - 1) // 16 * 16


async def test_replies_stay_exact_when_pages_are_evicted(stage: Stage) -> None:
    tokenizer = stage.judge.reference.tokenizer
    words = tokenizer(SYSTEM * 8, add_special_tokens=False)["input_ids"]
    # 48 MiB are 68 pages: no more than two of these prompts fit beside each other.
    prompts = [words[shift : shift + 330] for shift in (0, 40, 80)]
    for prompt in (*prompts, prompts[0]):
        await hear(stage, 0, prompt)
    found = await hear(stage, 1, prompts[1])
    assert found.cache.dram_tokens > 0


async def test_routers_hear_what_loading_takes(stage: Stage) -> None:
    words = stage.judge.reference.tokenizer(SYSTEM * 4, add_special_tokens=False)["input_ids"]
    prompt = words[7:207]
    await hear(stage, 0, prompt)
    loaded = await hear(stage, 1, prompt)
    assert loaded.cache.dram_tokens > 0
    source = WatchSource(Member("worker", "worker-1", stage.workers[1].address))
    rates: tuple[LoadRate, ...] = ()
    async with asyncio.timeout(PATIENCE_S), aclosing(source.events()) as events:
        async for event in events:
            rates = event.load_rates if isinstance(event, Loaded) else ()
            if rates:
                break
    assert len(rates) == 1
    rate = rates[0]
    assert rate.tier is TierKind.DRAM
    # Its rate is over all its loads, of which this one is the last.
    assert 0 < rate.s_per_token < 100 * loaded.load_ms / 1_000 / loaded.cache.dram_tokens


def test_the_run_had_few_near_ties(stage: Stage) -> None:
    assert stage.judge.replies > 0
    assert len(stage.judge.near_ties) <= stage.judge.replies // 10, stage.judge.near_ties
