"""The scrubber: whose turn it is, and what becomes of a block whose bytes went bad."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry

from kvstore.core.limits import GRANULE_BYTES
from kvstore.core.outcomes import MissReason
from kvstore.core.slots import SlotState
from kvstore.observe.metrics import NodeMetrics
from kvstore.service.hashing import Hasher
from kvstore.service.scrubbing import LEAST_BYTES, Scrubber
from tests.arena_fixture import SHAPE, SmallStore, names, small_store
from tests.patience import PATIENCE_S, until


@asynccontextmanager
async def sealed(small: SmallStore, count: int) -> AsyncIterator[tuple[Hasher, CollectorRegistry]]:
    """Return a running hasher over `count` sealed blocks."""
    registry = CollectorRegistry()
    hasher = Hasher(small.store, NodeMetrics(registry))
    hashing = asyncio.create_task(hasher.run())
    session, info = small.session(1)
    small.put(session, info, names(count), 0.0)
    hasher.wake()
    await until(lambda: small.table.counts[SlotState.SEALED] == count)
    try:
        yield hasher, registry
    finally:
        hashing.cancel()
        await asyncio.gather(hashing, return_exceptions=True)


async def test_every_idle_block_has_its_turn_at_the_rate() -> None:
    small_blocks = 8
    with small_store() as small:
        async with sealed(small, small_blocks) as (hasher, _):
            scrubber = Scrubber(small.table, hasher, bytes_per_s=1)
            assert scrubber.turn() == [], "nothing is owed yet"
            held = {slot for slot in range(16) if small.table.state[slot] == SlotState.SEALED}
            seen: list[int] = []
            for _ in range(small_blocks // 2):
                scrubber._owed = 2 * max(SHAPE.payload_bytes, LEAST_BYTES)
                turn = scrubber.turn()
                assert len(turn) == 2
                seen += turn
            assert set(seen) == held, "each once before any twice"
            small.table.pin([seen[0]])
            scrubber._owed = 1e9
            assert set(scrubber.turn()) == held - {seen[0]}, "who is read is not idle"


async def test_good_blocks_stay_and_are_counted() -> None:
    with small_store() as small:
        async with sealed(small, 4) as (hasher, registry):
            slots = list(small.table.index.values())
            await hasher.scrub(slots)
            await until(
                lambda: (
                    registry.get_sample_value("kvstore_node_scrubbed_bytes_total")
                    == 4 * SHAPE.payload_bytes
                )
            )
            assert small.table.counts[SlotState.SEALED] == 4


async def test_a_block_that_went_bad_is_dropped_and_its_lease_void() -> None:
    with small_store() as small:
        async with sealed(small, 4) as (hasher, registry):
            session, info = small.session(2)
            held = small.store.acquire(
                session, info, b"".join(names(1)), reserve=0, first_block=0, now_ms=1.0
            )
            slots = list(small.table.index.values())
            for slot in slots[:2]:
                small.arena.block(small.table.granules[slot] * GRANULE_BYTES, 4_000)[17] ^= 1
            await hasher.scrub(slots)
            await until(lambda: hasher.corrupt_blocks == 2)
            states = [small.table.state[slot] for slot in slots]
            assert states[0] == SlotState.DRAINING, "leased: void at once, free when let go"
            assert states[1] == SlotState.FREE
            assert states[2:] == [SlotState.SEALED] * 2
            labels = {"tier": "dram"}
            corrupt = registry.get_sample_value("kvstore_node_corrupt_blocks_total", labels)
            assert corrupt == 2
            small.store.release(session, [held.lease])
            assert small.table.state[slots[0]] == SlotState.FREE
            again = small.store.acquire(
                session, info, b"".join(names(4)), reserve=0, first_block=0, now_ms=1.0
            )
            assert (again.slots, again.reason) == ([], MissReason.ABSENT)


async def test_blocks_that_went_before_their_turn_hold_nobody_up() -> None:
    with small_store() as small:
        async with sealed(small, 2) as (hasher, _):
            slots = list(small.table.index.values())
            small.table.evict(slots, reason="test")
            async with asyncio.timeout(PATIENCE_S):
                await hasher.scrub(slots)


async def test_a_rate_of_zero_scrubs_nothing() -> None:
    with small_store() as small:
        hasher = Hasher(small.store, NodeMetrics(CollectorRegistry()))
        async with asyncio.timeout(PATIENCE_S):
            await Scrubber(small.table, hasher, bytes_per_s=0).run()
