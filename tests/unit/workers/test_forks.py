"""Several replies to one prompt over one set of pages, with a real (tiny) model."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from kvworkers.engine.sequence import Request
from kvworkers.models.loading import LoadedModel, load_model

from kvstore.core.errors import Unreachable
from kvstore.core.outcomes import MissReason
from tests.tiny_model import reference_reply, tiny_model
from tests.unit.workers.test_engine import Reply, Rig, ask, prompt_of, rig, run

pytestmark = pytest.mark.timeout(60)

PROMPT = prompt_of(70, 40)
"""Two full pages, and half of a third."""
OUT = 24


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(tiny_model(), threads=1)


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"], autouse=True)
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.workers.test_engine.OVERLAP", request.param)


def sibling(seed: int | None, prompt: list[int] = PROMPT, **options: Any) -> Request:
    drawn = {} if seed is None else {"seed": seed, "temperature": 1.0}
    fields = {"max_tokens": OUT, "ignore_eos": True, "siblings": "one", **drawn, **options}
    return ask(prompt, **fields)


async def together(it: Rig, requests: list[Request]) -> list[Reply]:
    return list(await asyncio.gather(*(run(it.engine, one) for one in requests)))


async def singles(loaded: LoadedModel, requests: list[Request]) -> list[list[int]]:
    """Return what each gives alone, on a worker of its own."""
    tokens = []
    for one in requests:
        async with rig(loaded) as it:
            tokens.append((await run(it.engine, one)).tokens)
    return tokens


def forked(it: Rig, kind: str) -> float:
    return it.metric("kvstore_worker_fork_pages_total", kind=kind)


@pytest.mark.parametrize(
    "options",
    [{}, {"no_store": True}, {"no_read": True}, {"logprobs": 2}, {"frequency_penalty": 1.5}],
    ids=["kept", "no_store", "no_read", "logprobs", "penalties"],
)
async def test_seeded_replies_fork_and_are_what_each_is_alone(
    loaded: LoadedModel, options: dict[str, Any]
) -> None:
    requests = [sibling(seed, **options) for seed in (3, 4, 5)]
    async with rig(loaded) as it:
        replies = await together(it, requests)
        assert forked(it, "shared") == 4 and forked(it, "copied") == 2
        assert [len(copies) for copies in it.model.copies] == [2], "one call for both"
        ((source, _), (same, _)) = it.model.copies[0]
        assert source == same
        assert sum(it.model.steps[:1]) == 40 and max(it.model.steps[1:]) <= 3, "nothing twice"
    assert [reply.tokens for reply in replies] == await singles(loaded, requests)
    assert len({tuple(reply.tokens) for reply in replies}) == 3
    uses = [reply.first.cache for reply in replies if reply.first is not None]
    assert sorted(use.hbm_tokens for use in uses) == [0, 40, 40]
    assert sorted(use.computed_tokens for use in uses) == [0, 0, 40]
    assert sum(use.miss_reason is MissReason.NONE for use in uses) == 2


async def test_greedy_replies_fork_too(loaded: LoadedModel) -> None:
    async with rig(loaded) as it:
        replies = await together(it, [sibling(None) for _ in range(4)])
        assert forked(it, "copied") == 3
    expected = reference_reply(PROMPT, OUT)
    for reply in replies:
        assert reply.tokens[: len(expected)] == expected
        assert reply.tokens == replies[0].tokens


async def test_a_prompt_that_fills_its_pages_is_shared_whole(loaded: LoadedModel) -> None:
    requests = [sibling(seed, PROMPT[:32]) for seed in (3, 4, 5)]
    async with rig(loaded) as it:
        replies = await together(it, requests)
        assert forked(it, "shared") == 4 and forked(it, "copied") == 0
        assert it.model.copies == [[]]
    assert [reply.tokens for reply in replies] == await singles(loaded, requests)


@pytest.mark.parametrize("no_store", [False, True])
async def test_a_reply_that_ends_with_its_first_token_is_forked_from(
    loaded: LoadedModel, no_store: bool
) -> None:
    requests = [sibling(seed, max_tokens=1, no_store=no_store) for seed in (3, 4, 5)]
    async with rig(loaded) as it:
        replies = await together(it, requests)
        assert forked(it, "copied") == 2 and it.model.steps == [40]
        assert it.pool.use().cached == (0 if no_store else 2)
    assert [reply.tokens for reply in replies] == await singles(loaded, requests)


async def test_who_comes_late_forks_from_whoever_lives(loaded: LoadedModel) -> None:
    requests = [sibling(seed, no_store=True) for seed in (3, 4, 5)]
    async with rig(loaded) as it:
        async with aclosing(it.engine.generate(sibling(9, no_store=True, max_tokens=400))) as first:
            await anext(first)
            second = await run(it.engine, requests[0])
            outputs = it.engine.generate(sibling(9, no_store=True, max_tokens=400))
            await anext(outputs)
        # The first one's caller has left; this one finds the prompt with the one that runs.
        async with aclosing(outputs):
            third = await run(it.engine, requests[1])
        assert forked(it, "copied") == 3 and it.model.steps.count(40) == 1
    assert [second.tokens, third.tokens] == await singles(loaded, requests[:2])


async def test_others_share_nothing(loaded: LoadedModel) -> None:
    async with rig(loaded) as it:
        await together(
            it,
            [
                sibling(3, no_store=True),
                sibling(3, no_store=True, siblings="two"),
                sibling(3, no_store=True, cache_salt=b"salt"),
                sibling(3, [*PROMPT[:-1], 7], no_store=True),
                sibling(None, no_store=True),
                sibling(3),
            ],
        )
        assert not it.model.copies and forked(it, "shared") == 0


async def test_a_fork_whose_caller_left_meanwhile_leaves_nothing(loaded: LoadedModel) -> None:
    async with rig(loaded) as it:
        outputs = [it.engine.generate(sibling(seed)) for seed in (3, 4, 5)]
        waits = [asyncio.ensure_future(anext(one)) for one in outputs]
        await waits[0]
        # The others wait for the copy, or have it just now.
        for wait in waits[1:]:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        for one in outputs:
            await one.aclose()
        await run(it.engine, ask([9], max_tokens=1))
        assert it.pool.use().held == 0


async def test_the_next_one_computes_where_the_first_one_fails(loaded: LoadedModel) -> None:
    requests = [sibling(seed) for seed in (3, 4)]
    async with rig(loaded) as it:
        it.model.failures = 1
        failed, reply = await asyncio.gather(
            *(run(it.engine, one) for one in requests), return_exceptions=True
        )
        assert isinstance(failed, Unreachable) and isinstance(reply, Reply)
        assert not it.model.copies
    assert [reply.tokens] == await singles(loaded, requests[1:])


@pytest.mark.parametrize("pages", [9, 12])
async def test_forks_over_few_pages_make_way_and_end(loaded: LoadedModel, pages: int) -> None:
    requests = [sibling(seed, max_tokens=60, no_store=True) for seed in range(3, 9)]
    async with rig(loaded, pages=pages) as it:
        await run(it.engine, ask([5, 6], max_tokens=1))  # It expects short replies.
        replies = await together(it, requests)
        assert forked(it, "copied") > 0
        assert it.metric("kvstore_worker_preemptions_total", kind="recompute") > 0
    assert [reply.tokens for reply in replies] == await singles(loaded, requests)


async def test_a_copy_that_fails_ends_the_worker_and_nobody_waits(loaded: LoadedModel) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    async with rig(loaded) as it:
        it.model.copy_pages = broken
        replies = await asyncio.gather(
            *(run(it.engine, sibling(seed)) for seed in (3, 4, 5)), return_exceptions=True
        )
        assert all(isinstance(reply, Unreachable) for reply in replies)
        assert it.engine.broken.is_set()
