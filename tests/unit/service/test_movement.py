"""Movement between a small arena and a real NVMe tier whose disk fails, hangs and comes back."""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from kvstore.core.outcomes import MissReason, SettleOutcome
from kvstore.core.slots import SlotState
from kvstore.directory.events import TierKind
from kvstore.observe.metrics import NodeMetrics
from kvstore.service.clearing import clear
from kvstore.service.hashing import Hasher
from kvstore.service.movement import Lower, Movement, MovementLimits
from kvstore.service.reserver import Wanted
from kvstore.service.roots import keys_of
from kvstore.service.sessions import Session
from kvstore.service.store import Acquired
from kvstore.testing.devices import FaultyDisk
from kvstore.tiers.nvme import NvmeTier
from kvstore.transfer.lanes import Lane
from tests.arena_fixture import SmallStore, names, small_store
from tests.nvme_fixture import start
from tests.patience import PATIENCE_MS, until

BLOCKS = 16
LIMITS = MovementLimits(load_stall_ms=PATIENCE_MS, write_stall_ms=PATIENCE_MS)


class Rig:
    """An arena of 16 blocks over an NVMe tier of 256, and a disk with switches."""

    def __init__(
        self, small: SmallStore, tier: NvmeTier, disk: FaultyDisk, limits: MovementLimits
    ) -> None:
        self.small = small
        self.tier = tier
        self.disk = disk
        self.registry = CollectorRegistry()
        metrics = NodeMetrics(self.registry)
        self.hasher = Hasher(small.store, metrics)
        lowers = [Lower(TierKind.NVME, tier)]
        self.movement = Movement(small.store, self.hasher, lowers, metrics, limits)
        self.session, self.info = small.session(1)

    async def put(self, seed: int, count: int) -> list[bytes]:
        """Put a prompt and wait until it is below."""
        prompt = names(count, seed)
        before = len(self.tier)
        self.small.put(self.session, self.info, prompt, 0.0)
        self.hasher.wake()
        table = self.small.table
        await until(lambda: len(self.tier) == before + count and not any(table.pins))
        return prompt

    def acquire(
        self, prompt: list[bytes], *, session: Session | None = None, pending_ms: float = 1_000
    ) -> Acquired:
        answer = self.small.store.acquire(
            session or self.session, self.info, b"".join(prompt),
            reserve=0, first_block=0, now_ms=1.0, pending_ms=pending_ms,
        )  # fmt: skip
        self.movement.load(answer.loads)
        return answer

    def within(self, wait_ms: float) -> int:
        """Return how many blocks more the disk is predicted to bring in a time."""
        block_bytes = self.info.shape.block_bytes
        return self.movement.loadable_bytes(TierKind.NVME, wait_ms) // block_bytes

    async def evict(self, prompt: list[bytes]) -> None:
        table = self.small.table
        slots = [table.index[key] for key in keys_of(self.info, b"".join(prompt))]
        sealed = int(SlotState.SEALED)
        await until(lambda: all(table.state[s] == sealed and not table.pins[s] for s in slots))
        table.evict(slots, reason="test")

    async def settled(self, answer: Acquired) -> list[SlotState]:
        """Wait until no slot of the answer is reserved any more; return their states."""
        table = self.small.table
        await until(
            lambda: not (any(table.state[slot] == SlotState.RESERVED for slot in answer.slots))
        )
        return [SlotState(table.state[slot]) for slot in answer.slots]

    def release(self, answer: Acquired, session: Session | None = None) -> None:
        done = self.small.store.release(session or self.session, [answer.lease])
        assert done == [SettleOutcome.DONE]

    def good(self, prompt: list[bytes], answer: Acquired) -> bool:
        arena = self.small.arena
        return all(
            bytes(arena.block(arena.record(slot).offset, 4_000)) == name[:1] * 4_000
            and arena.name(slot) == name
            for slot, name in zip(answer.slots, prompt, strict=True)
        )


@asynccontextmanager
async def rig(directory: Path, limits: MovementLimits = LIMITS) -> AsyncIterator[Rig]:
    disk = FaultyDisk()
    with small_store(BLOCKS) as small:
        # Slots of 8 KiB here: header and one granule.
        tier = await start(directory, slots=171, device=disk)
        made = Rig(small, tier, disk, limits)
        hashing = asyncio.create_task(made.hasher.run())
        try:
            yield made
        finally:
            disk.release()
            await made.movement.close()
            await tier.close()
            hashing.cancel()
            await asyncio.gather(hashing, return_exceptions=True)


async def test_a_block_comes_back_whole_sealed_and_without_pins(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        prompt = await made.put(1, 8)
        await made.evict(prompt)
        answer = made.acquire(prompt)
        assert (answer.ready, answer.reason) == (0, MissReason.NONE)
        assert answer.tiers == [TierKind.NVME] * 8
        assert set(await made.settled(answer)) <= {SlotState.COMMITTED, SlotState.SEALED}
        assert made.good(prompt, answer)
        made.release(answer)
        await until(lambda: made.small.table.counts[SlotState.SEALED] == 8)
        assert not any(made.small.table.pins)
        assert made.small.table.reserved_bytes == made.movement.promoter.loader.reserved_bytes == 0
        assert made.disk.writes < 8 * 3 + 4, "what came from below is not written again"


async def test_a_resident_block_behind_a_hole_is_leased_too(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        prompt = await made.put(1, 6)
        await made.evict(prompt[2:4])
        answer = made.acquire(prompt)
        dram, nvme = TierKind.DRAM, TierKind.NVME
        assert (answer.ready, answer.tiers) == (2, [nvme, nvme, dram, dram])
        await made.settled(answer)
        assert made.good(prompt, answer)
        made.release(answer)


async def test_two_who_ask_share_one_flight(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        prompt = await made.put(1, 4)
        await made.evict(prompt)
        other, _ = made.small.session(2)
        first, second = made.acquire(prompt), made.acquire(prompt, session=other)
        assert (first.slots, second.loads) == (second.slots, [])
        reads = made.disk.reads
        await made.settled(first)
        assert made.disk.reads == reads + 4
        made.release(first)
        made.release(second, other)
        assert made.good(prompt, second)


async def test_without_time_nothing_is_started(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        prompt = await made.put(1, 4)
        await made.evict(prompt)
        answer = made.acquire(prompt, pending_ms=0)
        assert (answer.slots, answer.reason) == ([], MissReason.LATE)
        assert made.small.table.counts[SlotState.RESERVED] == 0


async def test_a_slow_disk_is_asked_for_what_it_can_bring_in_time(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        prompt = await made.put(1, 8)
        await made.evict(prompt)
        assert made.within(10) >= 8, "nothing is known of this disk yet"
        made.disk.delay_s = 0.03
        answer = made.acquire(prompt)
        await made.settled(answer)
        made.release(answer)
        await made.evict(prompt)
        # 4 threads at 30 ms a block: however busy the machine, not more than 2 come in 10 ms.
        await until(lambda: made.within(1_000) > 0)
        assert made.within(10) <= 2
        wait_ms = next(ms for ms in range(1, 100_000) if made.within(ms) >= 3)
        answer = made.acquire(prompt, pending_ms=wait_ms)
        assert (len(answer.slots), answer.reason) == (3, MissReason.LATE)
        await made.settled(answer)
        made.release(answer)


async def test_a_disk_that_fails_ends_the_wait_and_frees_the_slots(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        prompt = await made.put(1, 4)
        await made.evict(prompt)
        made.disk.fail_reads = errno.EIO
        answer = made.acquire(prompt)
        states = await made.settled(answer)
        assert set(states) == {SlotState.DRAINING}, "readers that wait see that it will not come"
        made.release(answer)
        counts = made.small.table.counts
        assert (counts[SlotState.DRAINING], counts[SlotState.RESERVED]) == (0, 0)
        assert made.small.table.used_bytes == made.small.table.reserved_bytes == 0


async def test_a_hung_disk_keeps_its_slots_until_it_lets_go(tmp_path: Path) -> None:
    async with rig(tmp_path, replace(LIMITS, load_stall_ms=400)) as made:
        prompt = await made.put(1, 2)
        await made.evict(prompt)
        made.disk.hang()
        answer = made.acquire(prompt)
        await until(lambda: made.tier.in_device == 2)
        assert set(await made.settled(answer)) == {SlotState.DRAINING}
        made.release(answer)
        table = made.small.table
        assert table.counts[SlotState.DRAINING] == 2, "the device may still write into them"
        # Others compute these blocks meanwhile, in other slots.
        made.small.put(made.session, made.info, prompt, 5_000.0)
        ready = made.acquire(prompt)
        assert (ready.ready, made.good(prompt, ready)) == (2, True)
        assert not set(ready.slots) & set(answer.slots)
        made.disk.release()
        await until(lambda: not table.counts[SlotState.DRAINING])
        assert made.good(prompt, ready)
        made.release(ready)


async def test_a_block_that_another_computed_meanwhile_is_kept_once(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        prompt = await made.put(1, 1)
        await made.evict(prompt)
        made.disk.delay_s = 0.05
        answer = made.acquire(prompt)
        # The claim of the loader is old: another session takes the block over and is first.
        other, _ = made.small.session(2)
        made.small.put(other, made.info, [*names(1, 9), *prompt], 5_000.0)
        assert await made.settled(answer) == [SlotState.DRAINING]
        made.release(answer)
        assert made.small.table.counts[SlotState.DRAINING] == 0
        again = made.acquire(prompt)
        assert (again.ready, made.good(prompt, again)) == (1, True)
        made.release(again)


async def test_loads_make_room_but_never_drop_what_the_same_call_leased(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        prompt = await made.put(1, 8)
        await made.evict(prompt[4:])
        await made.put(2, 12)
        answer = made.acquire(prompt)
        assert len(answer.slots) == 8
        await made.settled(answer)
        assert made.good(prompt, answer)
        made.release(answer)


async def test_a_root_cleared_while_its_blocks_come_up_stays_cleared(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        prompt = await made.put(1, 2)
        await made.evict(prompt)
        made.disk.hang()
        answer = made.acquire(prompt)
        await until(lambda: made.tier.in_device == 2)
        clearing = asyncio.create_task(clear(made.small.store, [made.tier], made.info.root))
        await asyncio.sleep(0)
        made.disk.release()
        await clearing
        assert set(await made.settled(answer)) == {SlotState.DRAINING}
        made.release(answer)
        await until(lambda: not made.small.table.counts[SlotState.DRAINING])
        again = made.acquire(prompt)
        assert (again.slots, again.reason) == ([], MissReason.ABSENT)


async def test_a_tier_that_closes_writes_what_was_only_committed(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        made.small.put(made.session, made.info, names(8), 0.0)
        made.hasher.wake()
        assert made.small.table.counts[SlotState.COMMITTED] == 8
        assert await made.hasher.sealed(5)
        assert await made.movement.flush(5)
        assert len(made.tier) == 8


async def test_prefetched_blocks_come_up_unpinned(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        prompt = await made.put(1, 4)
        await made.evict(prompt)
        packed = b"".join(prompt)
        wanted = Wanted(made.info, packed, keys_of(made.info, packed), 0, 1.0)
        loads = made.movement.promoter.prefetch(wanted, 1_000)
        assert made.movement.load(loads, Lane.PREFETCH) == 4
        await until(lambda: made.small.table.counts[SlotState.SEALED] == 4)
        assert not any(made.small.table.pins)


async def test_a_full_queue_of_write_backs_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(tmp_path) as made:
        lanes = made.movement._lanes[TierKind.NVME]
        monkeypatch.setattr(lanes, "submit", lambda *_: 0)
        made.small.put(made.session, made.info, names(3), 0.0)
        made.hasher.wake()
        await until(lambda: made.small.table.counts[SlotState.SEALED] == 3)
        labels = {"tier": "nvme", "reason": "queue"}
        count = made.registry.get_sample_value("kvstore_node_unwritten_blocks_total", labels)
        assert count == 3


async def test_a_refused_load_gives_its_slots_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(tmp_path) as made:
        prompt = await made.put(1, 3)
        await made.evict(prompt)
        monkeypatch.setattr(made.movement._lanes[TierKind.NVME], "submit", lambda *_: 0)
        answer = made.acquire(prompt)
        assert set(await made.settled(answer)) == {SlotState.DRAINING}
        made.release(answer)
        assert made.small.table.counts[SlotState.DRAINING] == 0


async def test_flushing_waits_for_what_is_not_below(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        made.disk.delay_s = 0.005
        made.small.put(made.session, made.info, names(8), 0.0)
        made.hasher.wake()
        await until(lambda: made.small.table.counts[SlotState.SEALED] == 8)
        assert not await made.movement.flush(0.001)
        assert await made.movement.flush(5)
        assert len(made.tier) == 8


async def test_crossings_are_counted_and_timed_both_ways(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        prompt = await made.put(1, 3)
        await made.evict(prompt)
        answer = made.acquire(prompt)
        await made.settled(answer)
        size = made.info.shape.block_bytes
        for source, target in (("dram", "nvme"), ("nvme", "dram")):
            labels = {"source": source, "target": target}
            value = made.registry.get_sample_value
            assert value("kvstore_node_crossed_bytes_total", labels) == 3 * size
            count = value("kvstore_node_crossing_seconds_count", labels)
            assert count is not None and 1 <= count <= 3
        made.release(answer)


async def test_a_batch_that_breaks_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(tmp_path) as made:

        async def broken(*_: object) -> None:
            raise RuntimeError("no such thing as this disk")

        monkeypatch.setattr(made.movement, "_write_back", broken)
        made.small.put(made.session, made.info, names(2), 0.0)
        made.hasher.wake()

        def failed() -> float:
            labels = {"lane": "write_back"}
            name = "kvstore_node_failed_batches_total"
            return made.registry.get_sample_value(name, labels) or 0

        await until(lambda: failed() > 0)


async def test_a_prefetch_that_somebody_asks_for_goes_with_the_loads(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        prompt = await made.put(1, 8)
        await made.evict(prompt)
        packed = b"".join(prompt)
        made.disk.hang()
        wanted = Wanted(made.info, packed, keys_of(made.info, packed), 0, 1.0)
        lanes = made.movement._lanes[TierKind.NVME]
        blocked = [made.movement.load([load], Lane.PREFETCH) for load in
                   made.movement.promoter.prefetch(wanted, 10_000)]  # fmt: skip
        assert blocked == [1] * 8
        await asyncio.sleep(0)
        waiting = lanes.waiting(Lane.PREFETCH)
        answer = made.acquire(prompt)
        made.movement.hurry(answer.slots[answer.ready :])
        assert waiting > 0
        assert lanes.waiting(Lane.PREFETCH) == 0
        made.disk.release()
        assert await made.settled(answer) == [SlotState.SEALED] * 8
        assert made.good(prompt, answer)
        made.release(answer)
