"""vLLM's KV events: its traps, over real ZeroMQ sockets."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from prometheus_client import CollectorRegistry

from kvstore.core.errors import BadInput
from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.names import Root, chain, pack_tokens
from kvstore.directory.events import Began, Changed, Ended, Event, Lost, Marked, TierKind
from kvstore.directory.view import ClusterView, Health
from kvstore.observe.metrics import RouterMetrics
from kvstore.router.members import Members, parse_vllm
from kvstore.router.placement import Prompt
from kvstore.router.router import Router, RouterConfig
from kvstore.router.vllm_events import VllmIndex
from kvstore.router.vllm_source import VllmConfig, VllmSource
from tests.patience import PATIENCE_MS, PATIENCE_S
from tests.scripted_vllm import ScriptedVllm, batch, hashes, removed, stored

ROOT = Root(bytes(range(32)))
TOKENS = list(range(20 * BLOCK_TOKENS))
NAMES = list(chain(ROOT, pack_tokens(TOKENS)))


@pytest.fixture
async def engine() -> AsyncIterator[ScriptedVllm]:
    engine = ScriptedVllm()
    await engine.start()
    yield engine
    await engine.stop()


def source(engine: ScriptedVllm, *, replay: bool = True) -> VllmSource:
    config = VllmConfig(
        endpoint=engine.endpoint, root=ROOT, replay=engine.replay if replay else "",
        mark_period_ms=50, silent_ms=20_000, replay_ms=PATIENCE_MS,
    )  # fmt: skip
    return VllmSource("v", config, RouterMetrics(CollectorRegistry()))


class Followed:
    """A view that follows, and what it was told."""

    def __init__(self, followed: VllmSource) -> None:
        self.view, self.seen = ClusterView(), list[Event]()
        self.view.follow("v", host="", now_ms=0.0)
        self._source = followed

    async def __aenter__(self) -> "Followed":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert not self._task.done(), self._task.exception()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        async with aclosing(self._source.events()) as stream:
            async for event in stream:
                self.seen.append(event)
                assert self.view.apply("v", event, 0.0) is None, event

    async def until(self, blocks: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.blocks() != blocks or self.view.health("v", 0.0) is not Health.LIVE:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def blocks(self) -> int:
        reach = self.view.reach("v", (), 0.0)
        return self.view.match(ROOT, NAMES, [reach])[0].blocks


async def test_a_snapshot_by_replay_then_numbered_changes_and_marks(engine: ScriptedVllm) -> None:
    await engine.publish(stored(TOKENS[:64]))
    async with aclosing(source(engine).events()) as stream:
        seen = [await anext(stream) for _ in range(4)]
        began, held, ended, mark = seen
        assert isinstance(began, Began) and began.tiers == (TierKind.HBM,)
        assert isinstance(held, Changed) and (list(held.names), held.first_sequence) == (
            NAMES[:4],
            0,
        )
        assert ended == Ended(4)
        assert isinstance(mark, Marked) and mark.digests[0].count == 4
        await engine.publish(stored(TOKENS[:96], first=4), removed(hashes(TOKENS)[:1]))
        changes: list[Changed] = []
        async with asyncio.timeout(PATIENCE_S):
            while len(changes) < 2:
                event = await anext(stream)
                changes += [event] if isinstance(event, Changed) else []
        assert [(c.deleted, list(c.names), c.first_sequence) for c in changes] == [
            (False, NAMES[4:6], 5),
            (True, NAMES[:1], 7),
        ]


async def test_what_was_dropped_is_replayed(engine: ScriptedVllm) -> None:
    async with Followed(source(engine)) as one:
        await one.until(0)
        await engine.publish(stored(TOKENS[:64]))
        await engine.publish(stored(TOKENS[:96], first=4), lost=True)
        await engine.publish(stored(TOKENS[:128], first=6))
        await one.until(8)
        assert engine.replays == 2 and sum(isinstance(e, Began) for e in one.seen) == 1


async def test_a_gap_that_cannot_be_filled_voids_what_was_known(engine: ScriptedVllm) -> None:
    async with Followed(source(engine, replay=False)) as one:
        await one.until(0)
        await engine.publish(stored(TOKENS[:64]))
        await one.until(4)
        await engine.publish({"type": "AllBlocksCleared"}, lost=True)
        await engine.publish(stored(TOKENS[:32]))
        await one.until(2)
        assert sum(isinstance(event, Began) for event in one.seen) == 2


async def test_an_engine_that_goes_is_lost_and_one_that_comes_back_is_empty() -> None:
    engine = ScriptedVllm()
    await engine.start()
    endpoint = engine.endpoint
    async with Followed(source(engine, replay=False)) as one:
        await one.until(0)
        await engine.publish(stored(TOKENS[:64]))
        await one.until(4)
        await engine.stop()
        async with asyncio.timeout(PATIENCE_S):
            while not isinstance(one.seen[-1], Lost):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        again = ScriptedVllm()
        await again.start(endpoint)
        await one.until(0)
        await again.stop()


async def test_a_router_routes_to_an_engine_that_holds_the_prompt(engine: ScriptedVllm) -> None:
    await engine.publish(stored(TOKENS[:64]))
    text = f"v=127.0.0.1:8000,{engine.endpoint},{engine.replay}"
    member, events = parse_vllm(text, ROOT)
    config = RouterConfig(events_vllm={"v": events})
    async with Router(metrics=RouterMetrics(CollectorRegistry()), config=config) as router:
        router.set_members(Members.of([member]))
        decision = await router.route(Prompt(ROOT, NAMES, len(TOKENS)), wait_ms=PATIENCE_MS)
        assert (decision.address, decision.hit_tokens) == ("127.0.0.1:8000", 64)


def names_in(changes: list[Changed]) -> list[tuple[bool, list[bytes]]]:
    return [(change.deleted, list(change.names)) for change in changes]


def test_copies_are_counted_and_unknown_removals_ignored() -> None:
    index = VllmIndex(ROOT)
    first = hashes(TOKENS)[:1]
    assert names_in(index.apply(batch(stored(TOKENS[:16])))) == [(False, NAMES[:1])]
    assert index.apply(batch(stored(TOKENS[:16]))) == []
    assert index.apply(batch(removed(first))) == []
    assert names_in(index.apply(batch(removed(first)))) == [(True, NAMES[:1])]
    assert index.apply(batch(removed(first))) == []
    assert (index.digest().count, index.digest().xor_prefixes) == (0, 0)
    index.apply(batch(stored(TOKENS[:48])))
    cleared = index.apply(batch({"type": "AllBlocksCleared"}, {"type": "SomethingNew"}))
    assert names_in(cleared) == [(True, NAMES[:3])] and index.digest().count == 0


def test_hashes_of_bytes_and_ints_are_one_and_large_blocks_are_several_names() -> None:
    index = VllmIndex(ROOT)
    (key,) = hashes(TOKENS[:64], 64)
    whole = b"\x07" * 24 + key.to_bytes(8, "big")
    event = stored(TOKENS[:64], size=64) | {"block_hashes": [whole]}
    assert names_in(index.apply(batch(event))) == [(False, NAMES[:4])]
    assert names_in(index.apply(batch(stored(TOKENS[:128], first=1, size=64)))) == [
        (False, NAMES[4:8])
    ]
    assert names_in(index.apply(batch(removed([key])))) == [(True, NAMES[:4])]


def test_what_a_name_would_not_cover_is_left_out() -> None:
    index = VllmIndex(ROOT)
    left_out = [
        stored(TOKENS[:48], extra_keys=[["salt"], None, None]),
        stored(TOKENS[:96], first=4),  # its parent is unknown
        stored(TOKENS[:16]) | {"token_ids": []},
        stored(TOKENS[:16], size=8),
        stored(TOKENS[:16], medium="CPU"),
        stored(TOKENS[:16], group_idx=1),
        stored(TOKENS[:16], kv_cache_spec_kind="mamba"),
    ]
    assert index.apply(batch(*left_out)) == []
    assert index.skipped == 3 + 2 + 1 + 2 + 1 + 1 + 1
    half = stored(TOKENS[:48], extra_keys=[None, ["image"], None])
    assert names_in(index.apply(batch(half))) == [(False, NAMES[:1])]


def test_an_adapter_has_a_root_of_its_own() -> None:
    index = VllmIndex(ROOT)
    event = stored(TOKENS[:16], lora_name="a", extra_keys=[["a"]])
    (change,) = index.apply(batch(event))
    assert change.root != ROOT and list(change.names) != NAMES[:1]


@pytest.mark.parametrize(
    "payload",
    [b"\xc1", batch()[:-3], b"\x01", b"\x93\x01\x02\x03", b"\x92\x01\x91\x05",
     batch(stored(TOKENS[:16]) | {"token_ids": [-1] * 16}), batch(removed([b"x"])),
     batch(stored(TOKENS[:16]) | {"block_hashes": 7})],
)  # fmt: skip
def test_rubbish_is_refused(payload: bytes) -> None:
    with pytest.raises(BadInput):
        VllmIndex(ROOT).apply(payload)


def test_addresses_are_checked() -> None:
    for text in ("v=127.0.0.1:8000", "v=127.0.0.1:8000,", "127.0.0.1:8000,tcp://h:1"):
        with pytest.raises(BadInput):
            parse_vllm(text, ROOT)
    with pytest.raises(BadInput, match="tcp"):
        VllmConfig(endpoint="h:1", root=ROOT)
    with pytest.raises(BadInput, match="mark_period_ms"):
        VllmConfig(endpoint="tcp://h:1", root=ROOT, mark_period_ms=2_000)
