"""What the router is asked: whom first, without whom, and whether two workers may serve."""

import time
from array import array
from typing import Any

import pytest
from kvworkers.frontends.fleet import Offer
from kvworkers.frontends.generation import Generation, SamplingChoice
from kvworkers.frontends.placing import Placing
from kvworkers.frontends.running import Running
from kvworkers.frontends.text import Detokeniser, StopMatcher

from kvstore.core.errors import Refused
from kvstore.core.names import Root
from kvstore.router.placement import Prompt
from kvstore.router.split import Whole

OFFER = Offer("m", Root(bytes(32)), 4_096, frozenset({"a", "b", "c"}))


class Scripted:
    """A router that refuses as told, and a fleet that offers one model."""

    def __init__(self, refusals: int = 0) -> None:
        self.asked: list[Prompt] = []
        self.refusals = refusals

    def names(self, root: Root, packed: bytes) -> list[bytes]:
        return [bytes(32)] * (len(packed) // 64)

    async def route(self, prompt: Prompt, **_: float) -> Any:
        self.asked.append(prompt)
        if len(self.asked) <= self.refusals:
            raise Refused("full")
        return "decision"

    def offer(self, model: str) -> Offer:
        return OFFER


def running(said: int = 0, max_tokens: int = 8, **request: Any) -> Running:
    generation = Generation(
        request_id="r", tokens=[1] * 40, sampling=SamplingChoice(max_tokens=max_tokens), **request
    )
    return Running(
        request=generation, offer=OFFER, prompt=array("I", [1] * 40), max_tokens=max_tokens,
        arrived=time.monotonic(), deadline=time.monotonic() + 60,
        detokeniser=Detokeniser(lambda tokens: ""), matcher=StopMatcher(()),
        output=array("I", [2] * said),
    )  # fmt: skip


async def place(one: Running, *failed: str, refusals: int = 0) -> list[Prompt]:
    router: Any = Scripted(refusals)
    placing = Placing(router, router, share_domain="d", wait_ms=10, other_wait_ms=10)
    await placing.place(one, set(failed))
    return router.asked  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("one", "whole"),
    [
        (running(), None),
        (running(said=3), None),
        (running(said=7), Whole.FIRST_TOKEN),
        (running(max_tokens=1), Whole.FIRST_TOKEN),
        (running(no_store=True), Whole.NO_STORE),
        (running(no_read=True), Whole.NO_READ),
    ],
)
async def test_two_workers_may_serve_what_is_kept_and_goes_on(
    one: Running, whole: Whole | None
) -> None:
    (prompt,) = await place(one)
    assert (prompt.whole, prompt.among, prompt.tokens) == (
        whole,
        OFFER.workers,
        40 + len(one.output),
    )
    assert prompt.keeps != one.request.no_store
    assert len(prompt.names) == (0 if one.request.no_read else prompt.tokens // 16)


async def test_those_who_may_take_over_are_asked_first_until_one_has() -> None:
    one = running(said=1)
    one.hand_over(("a", "b", "gone"))
    first, anyone = await place(one, refusals=1)
    assert (first.among, first.whole) == ({"a", "b"}, Whole.HAND_OVER)
    assert (anyone.among, anyone.whole) == (OFFER.workers, Whole.HAND_OVER)
    (second,) = await place(one, "a")
    assert second.among == {"b"}
    one.taken_over()
    (later,) = await place(one)
    assert (later.among, later.whole) == (OFFER.workers, None)


async def test_another_reply_prefers_whoever_has_its_prompt_once() -> None:
    one = running()
    one.prefer = frozenset({"c"})
    (prompt,) = await place(one)
    assert (prompt.among, prompt.whole) == ({"c"}, None)
    (again,) = await place(one)
    assert again.among == OFFER.workers


async def test_one_that_failed_is_asked_again_when_there_is_no_other() -> None:
    without, anyone = await place(running(), "a", refusals=1)
    assert (without.exclude, anyone.exclude) == ({"a"}, frozenset())
