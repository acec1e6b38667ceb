"""Lanes: order, bounds, batches; and the measured rate."""

import asyncio

import pytest

from kvstore.transfer.lanes import BATCH_BYTES, BATCH_ITEMS, Lane, LaneLimits, Lanes
from kvstore.transfer.rate import Rate

LIMITS = {
    Lane.LOAD: LaneLimits(batches=2),
    Lane.PREFETCH: LaneLimits(batches=2),
    Lane.WRITE_BACK: LaneLimits(batches=1, waiting=4),
}


class Carrier:
    """Notes batches and lets them end when told to."""

    def __init__(self) -> None:
        self.begun: list[tuple[Lane, list[int]]] = []
        self.go = asyncio.Semaphore(0)
        self.lanes: Lanes[int] = Lanes(self.carry, LIMITS, batches=2)

    async def carry(self, lane: Lane, items: list[int]) -> None:
        self.begun.append((lane, items))
        await self.go.acquire()

    async def end_one(self) -> None:
        self.go.release()
        for _ in range(4):
            await asyncio.sleep(0)


async def test_urgent_lanes_go_first_and_in_order() -> None:
    one = Carrier()
    for number in range(2):
        assert one.lanes.submit(Lane.WRITE_BACK, [(number, BATCH_BYTES)])
        assert one.lanes.submit(Lane.PREFETCH, [(10 + number, BATCH_BYTES)])
    for number in range(3):
        assert one.lanes.submit(Lane.LOAD, [(20 + number, BATCH_BYTES)])
    await asyncio.sleep(0)
    for _ in range(5):
        await one.end_one()
    assert [items[0] for _, items in one.begun] == [0, 10, 20, 21, 22, 11, 1]
    await one.lanes.close()


async def test_what_somebody_waits_for_now_overtakes() -> None:
    one = Carrier()
    one.lanes.submit(Lane.LOAD, [(0, BATCH_BYTES), (1, BATCH_BYTES)])  # both places
    one.lanes.submit(Lane.PREFETCH, [(10 + n, BATCH_BYTES) for n in range(4)])
    assert one.lanes.hurry(Lane.PREFETCH, Lane.LOAD, {11, 13}.__contains__) == 2
    assert one.lanes.waiting(Lane.PREFETCH) == 2
    assert one.lanes.unfinished_bytes(Lane.PREFETCH) == 2 * BATCH_BYTES
    assert one.lanes.hurry(Lane.PREFETCH, Lane.LOAD, {11, 13}.__contains__) == 0
    one.lanes.submit(Lane.LOAD, [(2, BATCH_BYTES)])
    await asyncio.sleep(0)
    for _ in range(5):
        await one.end_one()
    assert [items[0] for _, items in one.begun] == [0, 1, 11, 13, 2, 10, 12]
    await one.end_one()
    assert one.lanes.unfinished_bytes(Lane.PREFETCH) == BATCH_BYTES
    await one.lanes.close()


async def test_no_more_overtake_than_there_is_room_for() -> None:
    one = Carrier()
    one.lanes.submit(Lane.LOAD, [(0, BATCH_BYTES), (1, BATCH_BYTES)])
    one.lanes.submit(Lane.PREFETCH, [(10 + n, BATCH_BYTES) for n in range(6)])
    assert one.lanes.hurry(Lane.PREFETCH, Lane.WRITE_BACK, lambda item: True) == 4
    assert one.lanes.waiting(Lane.PREFETCH) == 2
    await one.lanes.close()


async def test_write_backs_never_take_the_last_place() -> None:
    one = Carrier()
    for number in range(4):
        one.lanes.submit(Lane.WRITE_BACK, [(number, BATCH_BYTES)])
    await asyncio.sleep(0)
    assert len(one.begun) == 1
    one.lanes.submit(Lane.LOAD, [(9, BATCH_BYTES)])
    await asyncio.sleep(0)
    assert one.begun[-1] == (Lane.LOAD, [9])
    await one.lanes.close()


async def test_small_items_share_a_batch_up_to_its_bounds() -> None:
    one = Carrier()
    one.lanes.submit(Lane.LOAD, [(0, BATCH_BYTES)])
    one.lanes.submit(Lane.LOAD, [(1, BATCH_BYTES)])
    for number in range(2, 2 + BATCH_ITEMS + 5):
        one.lanes.submit(Lane.LOAD, [(number, 10)])
    await asyncio.sleep(0)
    for _ in range(3):
        await one.end_one()
    assert [len(items) for _, items in one.begun] == [1, 1, BATCH_ITEMS, 5]
    assert one.lanes.unfinished_bytes(Lane.LOAD) == 5 * 10
    await one.lanes.close()


async def test_a_full_lane_refuses_and_idle_says_when_all_is_done() -> None:
    one = Carrier()
    taken = [one.lanes.submit(Lane.WRITE_BACK, [(number, BATCH_BYTES)]) for number in range(7)]
    assert taken == [1] * 5 + [0] * 2, "one under way and four waiting"
    assert one.lanes.waiting(Lane.WRITE_BACK) == 4
    assert not await one.lanes.idle(0.01)
    for _ in range(5):
        await one.end_one()
    assert await one.lanes.idle(1)
    await one.lanes.close()


async def test_closing_hands_back_what_had_not_begun() -> None:
    one = Carrier()
    for number in range(4):
        one.lanes.submit(Lane.LOAD, [(number, BATCH_BYTES)])
    await asyncio.sleep(0)
    assert await one.lanes.close() == [2, 3]
    assert not one.lanes.submit(Lane.LOAD, [(9, 1)])


async def test_a_batch_that_raises_is_told_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    done: list[int] = []

    async def carry(_: Lane, items: list[int]) -> None:
        if items == [0]:
            raise RuntimeError("broken")
        done.extend(items)

    failed: list[Lane] = []
    lanes: Lanes[int] = Lanes(carry, LIMITS, batches=1, on_failed=failed.append)
    for number in range(3):
        lanes.submit(Lane.LOAD, [(number, BATCH_BYTES)])
    assert await lanes.idle(1)
    assert done == [1, 2]
    assert "a load batch failed" in caplog.text and failed == [Lane.LOAD]
    await lanes.close()


def test_a_rate_is_bytes_over_the_time_in_which_anything_moved() -> None:
    rate = Rate(1e9)
    assert rate.bytes_within(0.5, 100_000_000) == 400_000_000
    rate.began(10.0)
    rate.began(10.1)
    rate.ended(50, 10.2)  # 50 in 0.2 s
    assert rate.bytes_per_s == pytest.approx(250)
    rate.ended(50, 10.4)
    assert rate.bytes_per_s == pytest.approx(250)
    # Idle time is not slowness.
    rate.began(99.0)
    rate.ended(1_000, 100.0)
    assert rate.bytes_per_s == pytest.approx(250 + 0.3 * 750)


def test_the_short_end_of_a_busy_time_is_no_sample() -> None:
    rate = Rate(1.0)
    for _ in range(3):
        rate.began(0.0)
    for ended in (0.06, 0.0601, 0.0602):
        rate.ended(600, ended)
    assert rate.bytes_per_s == pytest.approx(10_000), "not 1,200 bytes in 200 us"


def test_failed_transfers_say_nothing_of_the_rate() -> None:
    rate = Rate(100.0)
    rate.began(0.0)
    rate.ended(0, 5.0)
    assert (rate.bytes_per_s, rate.measured) == (100.0, False)
    assert rate.bytes_within(1.0, 200) == 0


def test_ten_times_slower_is_noticed_after_a_handful() -> None:
    rate = Rate(1.0)
    now = 0.0
    for speed in [1_000.0] * 5 + [100.0] * 8:
        rate.began(now)
        now += 1.0
        rate.ended(int(speed), now)
    assert rate.bytes_per_s < 200
