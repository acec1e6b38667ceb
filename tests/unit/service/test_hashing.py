"""Sealing and verifying off the loop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kvstore.core.slots import SlotState
from kvstore.service import hashing as module
from kvstore.service.adopt import adopt
from kvstore.service.hashing import Hasher
from kvstore.tiers.sums import block_sum
from tests.arena_fixture import SmallStore, names, small_store
from tests.patience import PATIENCE_S


@asynccontextmanager
async def hashing(small: SmallStore) -> AsyncIterator[Hasher]:
    hasher = Hasher(small.store, small.metrics)
    task = asyncio.create_task(hasher.run())
    try:
        yield hasher
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def sealed(small: SmallStore, hasher: Hasher, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while small.table.counts[SlotState.SEALED] < count:
            await hasher.progress()


async def test_commits_are_sealed_with_their_sums() -> None:
    with small_store() as small:
        session, info = small.session(1)
        async with hashing(small) as hasher:
            small.put(session, info, names(4), 0.0)
            hasher.wake()
            await sealed(small, hasher, 4)
        for slot in small.table.index.values():
            record = small.arena.record(slot)
            payload = small.arena.block(record.offset, record.payload_bytes)
            assert record.sum == block_sum(payload, record.shares)
            payload.release()
        assert not any(small.table.pins)


async def test_a_wrong_sum_is_a_counted_miss_and_never_served() -> None:
    with small_store() as small:
        session, info = small.session(1)
        async with hashing(small) as hasher:
            small.put(session, info, names(4), 0.0)
            hasher.wake()
            await sealed(small, hasher, 4)
        slots = sorted(small.table.index.values())
        broken = slots[1]
        small.arena.block(small.arena.record(broken).offset, 1)[0] ^= 1
        later = small.again()
        adopt(later.store, 1.0)
        async with hashing(later) as hasher:
            hasher.unverified = 4
            await hasher.verify([slots[0], broken, broken], deadline_s=PATIENCE_S)
            assert later.table.servable[slots[0]]
            assert not later.table.servable[broken]
            assert later.table.state[broken] == SlotState.FREE
            assert hasher.corrupt_blocks == 1
            assert len(hasher.corrupt) == 1
            hasher.adopt(slots)
            async with asyncio.timeout(PATIENCE_S):
                while sum(later.table.servable) < 3:
                    await hasher.progress()
        assert sum(later.table.servable) == 3


async def test_a_verification_leaves_at_its_deadline() -> None:
    with small_store() as small:
        hasher = Hasher(small.store, small.metrics)  # nobody runs it
        await hasher.verify([1, 2], deadline_s=0.01)
        await hasher.verify([], deadline_s=PATIENCE_S)
        assert hasher.corrupt_blocks == 0


async def test_calls_that_want_blocks_first_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_URGENT", 2)
    with small_store() as small:
        hasher = Hasher(small.store, small.metrics)  # nobody runs it
        for _ in range(4):
            await hasher.verify([1], deadline_s=0.001)
        assert len(hasher._urgent) == 2
