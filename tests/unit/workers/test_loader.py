"""Long prefixes are asked for in two calls; what the second says never spoils the first."""

import asyncio
from typing import Any

import pytest
import torch
from kvworkers.engine import loader
from kvworkers.engine.loader import Ask, Loader, LoadResult
from kvworkers.stream.forms import Forms
from kvworkers.stream.gate import Follower, Gate
from kvworkers.stream.mover import Mover
from prometheus_client import CollectorRegistry

from kvstore.core.errors import KvStoreError, Unreachable
from kvstore.core.layout import BlockLayout, Codec
from kvstore.core.names import BlockName
from kvstore.core.outcomes import MissReason
from kvstore.observe.metrics import WorkerMetrics
from tests.patience import PATIENCE_S
from tests.scripted_client import ScriptedClient

LAYOUT = BlockLayout(layers=4, kv_heads=1, head_dim=16, codec=Codec.RAW16)
BLOCK = LAYOUT.block_bytes
COUNT = 12


class Rig:
    def __init__(self) -> None:
        self.client = ScriptedClient(BLOCK, slots=COUNT)
        self.pool = torch.zeros((COUNT, BLOCK), dtype=torch.uint8)
        self.mover = Mover(self.pool, Forms(LAYOUT, LAYOUT, torch.bfloat16))
        self.begun: list[int] = []
        self.gates: list[Gate] = []
        self.loader = Loader(
            self.client,  # type: ignore[arg-type]
            self.mover,
            WorkerMetrics(CollectorRegistry()),
            call_ms=100,
            pending_ms=100,
            grouped_bytes=1,
            failed=self._failed,
        )

    def _failed(self, call: str, error: KvStoreError) -> MissReason:
        return MissReason.UNREACHABLE

    def _begun(self, blocks: int, gate: Gate) -> None:
        self.begun.append(blocks)
        self.gates.append(gate)

    async def load(self, *, follow: bool = True) -> LoadResult:
        names = [BlockName(bytes([n + 1]) * 32) for n in range(COUNT)]
        ask = Ask(names=names, pages=list(range(COUNT)), usable=11, first_block=0, reserve=COUNT)
        follower = Follower(self._begun, lambda: None) if follow else None
        return await self.loader.load(ask, follower)

    @property
    def loaded(self) -> list[bool]:
        return [bool(page.any()) for page in self.pool]


@pytest.fixture
async def it(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(loader, "HEAD_BYTES", 2 * BLOCK)
    made = Rig()
    yield made
    made.mover.close()


async def test_a_long_prefix_is_asked_for_in_two_calls(it: Rig) -> None:
    it.client.ready = 9
    it.client.reserved = [7, 8]
    result = await it.load()
    assert it.client.asked == [(0, 2, 0), (2, 10, 10)]
    assert result.blocks == result.found == 9 and result.leases == [5, 5]
    assert [ref.slot for ref in result.kept] == list(range(9))
    assert set(result.reserved) == {9, 10}, "counted from the second call's first name"
    assert it.loaded == [True] * 9 + [False] * 3
    assert it.begun == [9] and it.gates[0].come_groups == len(it.gates[0].groups)


async def test_beside_others_and_for_short_ones_one_call_is_enough(it: Rig) -> None:
    it.client.ready = 9
    assert (await it.load(follow=False)).blocks == 9
    assert it.client.asked == [(0, 12, 12)] and it.begun == []


@pytest.mark.parametrize("ready", [0, 1, 2])
async def test_a_head_that_is_not_all_there_is_all_there_is(it: Rig, ready: int) -> None:
    it.client.ready = ready
    result = await it.load()
    assert it.client.asked[1] == (ready, 12 - ready, min(12, 12 - ready))
    assert result.blocks == result.found == ready
    assert it.loaded == [True] * ready + [False] * (12 - ready)


async def test_a_head_that_was_given_away_ends_the_load(it: Rig) -> None:
    it.client.ready, it.client.stale = 9, {1}
    result = await it.load()
    assert (result.blocks, result.found, result.reason) == (1, 1, MissReason.LATE)
    assert result.leases == [5, 5], "both are to be released"


class HeldMover(Mover):
    """Says that a load is queued, and copies it when the test lets it, or fails."""

    def __init__(self, pool: torch.Tensor, forms: Forms) -> None:
        super().__init__(pool, forms)
        self.let = asyncio.Event()
        self.fails = False

    async def load(self, arena: Any, offsets: Any, pages: Any, **how: Any) -> None:
        how["queued"]()
        async with asyncio.timeout(PATIENCE_S):
            await self.let.wait()
        if self.fails:
            raise Unreachable("the arena is gone")
        await super().load(arena, offsets, pages, alone=True)


@pytest.mark.parametrize("fails", [False, True])
async def test_the_rest_comes_behind_a_head_that_is_still_copied(
    it: Rig, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    mover = HeldMover(it.pool, it.mover.forms)
    monkeypatch.setattr(it.loader, "_mover", mover)
    it.client.ready, mover.fails = 9, fails
    load = asyncio.create_task(it.load())
    async with asyncio.timeout(PATIENCE_S):
        while sum(it.loaded) < 7:  # noqa: ASYNC110 - pages that a thread writes
            await asyncio.sleep(0.001)
    assert it.loaded[:2] == [False, False] and not load.done()
    mover.let.set()
    result = await load
    assert result.blocks == (0 if fails else 9)
    assert result.leases == [5, 5]
    assert result.reason is (MissReason.UNREACHABLE if fails else MissReason.ABSENT)
    mover.close()


async def test_a_load_that_is_called_off_ends_with_its_copies(
    it: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    mover = HeldMover(it.pool, it.mover.forms)
    monkeypatch.setattr(it.loader, "_mover", mover)
    it.client.ready = 9
    load = asyncio.create_task(it.load())
    async with asyncio.timeout(PATIENCE_S):
        while sum(it.loaded) < 7:  # noqa: ASYNC110 - pages that a thread writes
            await asyncio.sleep(0.001)
    load.cancel()
    await asyncio.wait([load], timeout=0.05)
    assert not load.done(), "a copy writes pages that others would get"
    mover.let.set()
    await asyncio.wait([load], timeout=PATIENCE_S)
    assert load.cancelled() and it.loaded == [True] * 9 + [False] * 3
    mover.close()


async def test_a_second_call_that_fails_leaves_the_head(
    it: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    it.client.ready = 9
    first = it.client.acquire

    async def acquire(names: Any, **options: Any) -> Any:
        if options["first_block"]:
            await asyncio.sleep(0)
            raise Unreachable("gone")
        return await first(names, **options)

    monkeypatch.setattr(it.client, "acquire", acquire)
    result = await it.load()
    assert (result.blocks, result.reason, result.leases) == (2, MissReason.UNREACHABLE, [5])


async def test_a_node_that_is_away_costs_one_call(it: Rig) -> None:
    it.client.error = Unreachable("gone")
    result = await it.load()
    assert it.client.calls == ["acquire"]
    assert (result.blocks, result.reason) == (0, MissReason.UNREACHABLE)


async def test_blocks_on_their_way_are_waited_for_behind_a_head(it: Rig) -> None:
    it.client.ready, it.client.pending, it.client.arrives = 5, 6, 4
    result = await it.load()
    assert (result.blocks, result.found, result.reason) == (9, 9, MissReason.LATE)
    assert it.begun == [9], "only what comes last is followed"
