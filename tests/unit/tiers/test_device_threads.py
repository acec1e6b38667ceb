"""Threads for device calls: order, bounds, and calls that nobody waits for any more."""

import asyncio
import threading
from collections.abc import AsyncIterator
from functools import partial

import pytest

from kvstore.tiers.device_threads import DeviceThreads, until_stalled
from tests.patience import PATIENCE_S, until


class Gate:
    """Calls that end when told to."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.go = threading.Event()

    def call(self, label: str) -> str:
        self.begun.append(label)
        assert self.go.wait(PATIENCE_S)
        return label


@pytest.fixture
async def threads() -> AsyncIterator[DeviceThreads]:
    made = DeviceThreads(2, 1)
    yield made
    made.close()


async def test_reads_overtake_writes_and_writes_leave_a_thread_free(
    threads: DeviceThreads,
) -> None:
    gate = Gate()
    writes = [threads.submit(partial(gate.call, f"w{n}"), write=True) for n in range(3)]
    await until(lambda: gate.begun == ["w0"])
    assert (threads.running, threads.queued) == (1, 2)
    reads = [threads.submit(partial(gate.call, f"r{n}"), write=False) for n in range(2)]
    await until(lambda: gate.begun == ["w0", "r0"])
    gate.go.set()
    results = await asyncio.gather(*(one.future for one in [*writes, *reads]))
    assert results == ["w0", "w1", "w2", "r0", "r1"]
    assert gate.begun.index("r1") < gate.begun.index("w2")


async def test_what_has_not_started_can_be_taken_back_and_what_has_cannot(
    threads: DeviceThreads,
) -> None:
    gate = Gate()
    running = [threads.submit(lambda: gate.call("running"), write=False) for _ in range(2)]
    waiting = threads.submit(lambda: gate.call("waiting"), write=False)
    await until(lambda: len(gate.begun) == 2)
    waiting.take_back()
    running[0].take_back()
    assert waiting.future.cancelled() and not running[0].future.cancelled()
    gate.go.set()
    await asyncio.gather(*(one.future for one in running))
    assert gate.begun == ["running", "running"]


async def test_failures_reach_who_waits(threads: DeviceThreads) -> None:
    def fail() -> None:
        raise OSError(5, "broken")

    with pytest.raises(OSError, match="broken"):
        await threads.submit(fail, write=True).future
    assert await threads.submit(lambda: 7, write=True).future == 7, "the thread lives on"


async def test_closing_cancels_what_waits_and_drains_what_runs() -> None:
    threads = DeviceThreads(1, 1)
    gate = Gate()
    running = threads.submit(lambda: gate.call("a"), write=False)
    waiting = threads.submit(lambda: gate.call("b"), write=False)
    await until(lambda: gate.begun == ["a"])
    threads.close()
    assert waiting.future.cancelled()
    assert threads.submit(lambda: None, write=False).future.cancelled()
    assert not await threads.drained(0.02)
    gate.go.set()
    assert await threads.drained(5)
    assert await running.future == "a"


async def test_a_stall_is_no_progress_and_not_a_long_time() -> None:
    loop = asyncio.get_running_loop()
    futures: list[asyncio.Future[None]] = [loop.create_future() for _ in range(8)]
    for number, future in enumerate(futures[:7]):
        loop.call_later(0.08 * (number + 1), future.set_result, None)
    # All together take longer than one stall; none is near one behind the one before.
    await until_stalled(futures, 0.4)
    assert [future.done() for future in futures] == [True] * 7 + [False]
    futures[7].set_result(None)
    await until_stalled(futures, 0.0)
    await until_stalled([], 0.0)
