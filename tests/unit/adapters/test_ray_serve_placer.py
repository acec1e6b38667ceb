"""Replicas ranked for Ray Serve, without Ray: by what is assumed and by what engines say."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from kvstore.adapters.ray_serve.assumed import AssumedSource
from kvstore.adapters.ray_serve.placer import Replica, ReplicaPlacer
from kvstore.adapters.ray_serve.settings import ServeSettings
from kvstore.core.errors import BadInput
from kvstore.core.names import Root, chain, pack_tokens
from kvstore.directory.events import Began, Changed, Ended, Event, Marked
from kvstore.directory.view import ClusterView
from tests.patience import until
from tests.scripted_vllm import ScriptedVllm, stored

ROOT = Root(bytes(32))
NAMES = list(chain(ROOT, pack_tokens(range(160))))


def prompt(first: int, blocks: int = 20) -> dict[str, Any]:
    return {"model": "m", "prompt": list(range(first, first + 16 * blocks + 1))}


@pytest.fixture
async def placer() -> AsyncIterator[ReplicaPlacer]:
    placer = ReplicaPlacer(ServeSettings.of({"assumed_blocks": 100}))
    placer.set_replicas([Replica("a"), Replica("b"), Replica("c")])
    await until(lambda: placer.live() == 3)
    yield placer
    await placer.close()


async def served(placer: ReplicaPlacer, request: str, body: Any, among: str = "abc") -> str:
    """Place a request where the router says, and end it."""
    ranked = await placer.place(request, body, among)
    assert sorted(ranked) == sorted(among)
    placer.routed(request, ranked[0])
    placer.completed(request, ranked[0])
    return ranked[0]


async def test_a_prompt_follows_its_beginning_while_in_flight_and_after(
    placer: ReplicaPlacer,
) -> None:
    first = (await placer.place("1", prompt(0), "abc"))[0]

    async def follows() -> bool:  # as soon as the first one's prefill is expected to be over
        return (await placer.place("2", prompt(0, 24), "abc"))[0] == first

    await until(follows)
    placer.completed("1", first)
    placer.completed("2", first)
    await until(lambda: placer.blocks() == 24)
    assert await served(placer, "3", prompt(0, 24)) == first
    assert await served(placer, "4", prompt(0), "".join({"a", "b", "c"} - {first})) != first


async def test_other_prompts_spread(placer: ReplicaPlacer) -> None:
    firsts = [(await placer.place(str(at), prompt(at * 10_000), "abc"))[0] for at in range(3)]
    assert sorted(firsts) == ["a", "b", "c"]


async def test_a_request_that_went_elsewhere_counts_there(placer: ReplicaPlacer) -> None:
    best, second, _ = await placer.place("1", prompt(0), "abc")
    placer.routed("1", second)

    async def moved() -> bool:
        ranked = await placer.place("probe", prompt(0), "abc")
        placer.completed("probe", "nobody")
        return ranked[0] == second

    await until(moved)
    assert best != second


async def test_asked_again_a_request_is_booked_once(placer: ReplicaPlacer) -> None:
    for _ in range(3):
        await placer.place("1", prompt(0), "abc")
    placer.completed("1", "a")
    placer.completed("1", "a")  # what is unknown changes nothing
    placer.routed("unknown", "a")
    firsts = [(await placer.place(str(at), prompt(at * 10_000), "abc"))[0] for at in range(2, 5)]
    assert sorted(firsts) == ["a", "b", "c"]


async def test_requests_without_a_prompt_go_by_load(placer: ReplicaPlacer) -> None:
    busy = (await placer.place("1", prompt(0), "abc"))[0]
    assert (await placer.place("2", None, "abc"))[0] != busy
    assert (await placer.place("3", {"prompt": 5}, "abc"))[0] != busy


async def test_replicas_that_nobody_follows_are_no_opinion(placer: ReplicaPlacer) -> None:
    assert await placer.place("1", prompt(0), ["z"]) == []
    placer.set_replicas([Replica("b")])
    assert await placer.place("2", prompt(0), "abc") == ["b"]


async def test_engines_that_publish_are_believed() -> None:
    engines = [ScriptedVllm(), ScriptedVllm()]
    for engine in engines:
        await engine.start()
    placer = ReplicaPlacer(ServeSettings())
    placer.set_replicas(
        [Replica(n, "h", e.endpoint, e.replay) for n, e in zip("ab", engines, strict=True)]
    )
    await until(lambda: placer.live() == 2)
    await engines[1].publish(stored(prompt(0)["prompt"]))
    await until(lambda: placer.blocks() == 20)
    for number in range(3):
        assert await served(placer, str(number), prompt(0), "ab") == "b"
    assert placer.blocks() == 20  # what was sent there is not assumed of those that speak
    await placer.close()
    for engine in engines:
        await engine.stop()


async def test_what_is_assumed_is_bounded_and_adds_up() -> None:
    source = AssumedSource("a", max_blocks=8)
    view = ClusterView()
    view.follow("a", host="", now_ms=0.0)
    seen: list[Event] = []

    async def follow() -> None:
        async with aclosing(source.events()) as events:
            async for event in events:
                seen.append(event)
                assert view.apply("a", event, 0.0) is None, event  # no digest disagrees

    task = asyncio.create_task(follow())
    await until(lambda: any(isinstance(event, Marked) for event in seen))
    assert isinstance(seen[0], Began) and isinstance(seen[1], Ended)
    source.assume(ROOT, NAMES[:6])
    other = list(chain(Root(bytes([1]) * 32), pack_tokens(range(64))))
    source.assume(Root(bytes([1]) * 32), other)
    assert len(source) == 8

    def held() -> int:
        return view.match(ROOT, NAMES, [view.reach("a", (), 0.0)])[0].blocks

    await until(lambda: held() == 4)  # of a prompt that is forgotten the end goes first
    source.assume(ROOT, NAMES)  # longer than the bound: its first blocks
    assert len(source) == 8
    await until(lambda: held() == 8)
    marks = sum(isinstance(event, Marked) for event in seen)
    await until(lambda: sum(isinstance(event, Marked) for event in seen) > marks)
    assert not any(isinstance(event, Changed) and not event.first_sequence for event in seen)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"tokenizr": "x"}, "tokenizr"), ({"tokenizer": 5}, "tokenizer"), ({"nodes": "x"}, "nodes"),
        ({"base_models": [1]}, "base_models"), ({"root": "xyz"}, "root"), ({"root": "00"}, "root"),
        ({"assumed_blocks": 0}, "assumed_blocks"), ({"assumed_blocks": "9"}, "assumed_blocks"),
        ({"hash": "md5"}, "md5"), ({"nodes": ["nowhere"]}, "nowhere"),
    ],
    ids=range(10),
)  # fmt: skip
def test_wrong_settings_are_named(said: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        ServeSettings.of(said)


def test_settings_are_what_the_deployment_said() -> None:
    found = ServeSettings.of(
        {"root": "01" * 32, "nodes": ["n=127.0.0.1:7@10.0.0.1"], "events": "tcp://{host}:5557",
         "hash": "sha256_cbor", "base_models": ["m"]}
    )  # fmt: skip
    assert found.root == bytes([1]) * 32 and found.hashes is not None
    assert [(one.name, one.kind, one.host) for one in found.nodes] == [("n", "node", "10.0.0.1")]
    assert (found.events, found.base_models) == ("tcp://{host}:5557", frozenset({"m"}))
