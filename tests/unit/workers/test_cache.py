"""The store link against a scripted client: what real nodes do rarely and at the wrong moment."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
from kvworkers.engine.cache import StoreConfig, StoreJob, StoreLink
from kvworkers.engine.loader import Ask
from kvworkers.stream.forms import Forms
from kvworkers.stream.mover import Mover
from prometheus_client import CollectorRegistry

from kvstore.client import SlotRef
from kvstore.core.errors import Refused, Unreachable
from kvstore.core.layout import BlockLayout, Codec
from kvstore.core.names import BlockName
from kvstore.core.outcomes import MissReason
from kvstore.directory.events import TierKind
from kvstore.observe.metrics import WorkerMetrics
from tests.patience import PATIENCE_MS, PATIENCE_S
from tests.scripted_client import ScriptedClient

LAYOUT = BlockLayout(layers=4, kv_heads=1, head_dim=16, codec=Codec.RAW16)
FORMS = Forms(LAYOUT, LAYOUT, torch.bfloat16)
BLOCK = LAYOUT.block_bytes
NAMES = [BlockName(bytes([n + 1]) * 32) for n in range(6)]


def slot(number: int) -> SlotRef:
    return SlotRef(number, 1, number * BLOCK, TierKind.DRAM, 1)


class Rig:
    def __init__(self, **config: int) -> None:
        self.client = ScriptedClient(BLOCK)
        self.client.first_block = 10
        self.registry = CollectorRegistry()
        self.pool = torch.zeros((6, BLOCK), dtype=torch.uint8)
        self.mover = Mover(self.pool, FORMS)
        self.link = StoreLink(
            self.client,  # type: ignore[arg-type]
            self.mover,
            WorkerMetrics(self.registry),
            config=StoreConfig(**config),
        )
        self.done = 0

    def job(self, **parts: Any) -> StoreJob:
        def done() -> None:
            self.done += 1

        return StoreJob(done=done, **parts)

    def failures(self, call: str, error: str) -> float | None:
        labels = {"call": call, "error": error}
        return self.registry.get_sample_value("kvstore_worker_store_failures_total", labels)


@asynccontextmanager
async def rig(**config: int) -> AsyncIterator[Rig]:
    made = Rig(**config)
    try:
        yield made
    finally:
        await made.link.close()
        made.mover.close()


async def load(it: Rig, *, usable: int = 6, recompute_ms: float = 0.0) -> Any:
    return await it.link.load(
        Ask(
            names=NAMES,
            pages=list(range(6)),
            usable=usable,
            first_block=10,
            reserve=len(NAMES),
            recompute_ms=recompute_ms,
        )
    )


async def test_ready_and_arriving_blocks_are_copied_and_the_rest_reserved() -> None:
    async with rig() as it:
        it.client.ready, it.client.pending, it.client.arrives = 2, 2, 2
        it.client.reserved = [4, 5]
        result = await load(it)
        assert result.blocks == result.found == 4 and result.tiers == {TierKind.DRAM: 4}
        assert result.reserved == {14: slot(4), 15: slot(5)}
        assert result.leases == [5] and result.reason is MissReason.ABSENT
        assert it.pool[:, 0].tolist() == [7, 7, 7, 7, 0, 0]


async def test_blocks_from_below_get_no_longer_than_computing_would_take() -> None:
    async with rig() as it:
        it.client.pending = it.client.arrives = 2
        for recompute_ms in (0.0, 37.9, 0.2, 1e9):
            await load(it, recompute_ms=recompute_ms)
        assert it.client.patience == [1_000, 1_000, 37, 37, 1, 1, 1_000, 1_000]


async def test_no_more_is_loaded_than_may_be_used() -> None:
    async with rig() as it:
        it.client.ready = 6
        result = await load(it, usable=3)
        assert (result.blocks, result.found) == (3, 6)
        assert it.pool[3:].sum() == 0


async def test_a_slot_that_changed_during_the_copy_ends_the_prefix() -> None:
    async with rig() as it:
        it.client.ready, it.client.stale = 4, {2}
        result = await load(it)
        assert (result.blocks, result.found) == (2, 2)
        assert result.reason is MissReason.LATE


async def test_blocks_that_do_not_arrive_are_computed() -> None:
    async with rig() as it:
        it.client.ready, it.client.pending, it.client.arrives = 1, 3, 1
        result = await load(it)
        assert result.blocks == 2 and result.reason is MissReason.LATE


async def test_a_failed_call_opens_the_circuit_for_a_while() -> None:
    async with rig(circuit_ms=30) as it:
        it.client.error = Unreachable("gone")
        result = await load(it)
        assert result.blocks == 0 and result.reason is MissReason.UNREACHABLE
        assert it.failures("acquire", "Unreachable") == 1
        async with asyncio.timeout(PATIENCE_S):
            while True:
                if it.link.usable:
                    break
                await asyncio.sleep(0.005)


async def test_a_refusal_is_a_miss_and_no_reason_to_stay_away() -> None:
    async with rig() as it:
        it.client.error = Refused("quota")
        assert (await load(it)).reason is MissReason.REFUSED
        assert it.link.usable


async def test_a_job_is_written_and_settled_in_one_call() -> None:
    async with rig() as it:
        it.pool[3] = 9
        it.link.submit(it.job(writes=[(3, slot(6))], aborts=[slot(7)], leases=[5], kept=[slot(1)]))
        assert await it.link.drained(deadline_ms=PATIENCE_MS)
        assert it.client.calls == ["settle"] and it.done == 1
        (told,) = it.client.settled
        assert told == {
            "commit": [slot(6)],
            "abort": [slot(7)],
            "release": [5],
            "kept_in_hbm": [slot(1)],
        }
        assert bytes(it.client.view(slot(6))) == b"\x09" * BLOCK


async def test_blocks_without_slots_get_them_first() -> None:
    async with rig() as it:
        it.client.ready, it.client.reserved = 1, [1, 2]
        it.link.submit(it.job(names=NAMES[:3], pages=[5, 4, 3], first_block=2))
        assert await it.link.drained(deadline_ms=PATIENCE_MS)
        assert it.client.calls == ["acquire", "settle"]
        assert it.client.settled[0]["commit"] == [slot(1), slot(2)]
        assert it.client.settled[0]["release"] == [5]


async def test_jobs_that_find_the_circuit_open_give_their_slots_back_later() -> None:
    async with rig(circuit_ms=20) as it:
        it.client.error = Unreachable("gone")
        await load(it)
        it.link.submit(it.job(writes=[(0, slot(3))], aborts=[slot(4)]))
        assert await it.link.drained(deadline_ms=PATIENCE_MS)
        assert it.done == 1 and it.client.settled == []
        it.client.error = None
        async with asyncio.timeout(PATIENCE_S):
            while True:
                if it.client.settled:
                    break
                await asyncio.sleep(0.005)
        assert it.client.settled[0]["abort"] == [slot(3), slot(4)]
        assert it.client.settled[0]["commit"] == []


async def test_too_many_jobs_are_dropped_and_counted() -> None:
    async with rig(max_jobs=2) as it:
        it.client.block = asyncio.Event()
        for _ in range(5):
            it.link.submit(it.job(leases=[5]))
            await asyncio.sleep(0)
        assert it.failures("store", "queue_full") == 2
        it.client.block.set()
        assert await it.link.drained(deadline_ms=PATIENCE_MS)
        assert it.done == 5


async def test_closing_gives_back_the_pages_of_jobs_left() -> None:
    async with rig() as it:
        it.client.block = asyncio.Event()
        for _ in range(3):
            it.link.submit(it.job(leases=[5]))
        await asyncio.sleep(0)
        assert not await it.link.drained(deadline_ms=10)
        await it.link.close()
        assert it.done == 3


async def test_what_is_no_number_is_given_to_nobody() -> None:
    async with rig() as it:
        it.pool.view(torch.bfloat16)[1, 3] = torch.nan
        writes = [(0, slot(4)), (1, slot(5))]
        it.link.submit(it.job(writes=writes, aborts=[slot(3)], checked=True))
        assert await it.link.drained(deadline_ms=1_000)
        (given,) = it.client.settled
        assert given["commit"] == []
        assert sorted(ref.slot for ref in given["abort"]) == [3, 4, 5]
        assert it.failures("store", "not_finite") == 1
        it.pool.view(torch.bfloat16)[1, 3] = 1.0
        it.link.submit(it.job(writes=writes, checked=True))
        assert await it.link.drained(deadline_ms=1_000)
        assert [ref.slot for ref in it.client.settled[1]["commit"]] == [4, 5]
        assert it.done == 2
