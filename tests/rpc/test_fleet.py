"""What a frontend knows of its workers, and one call to one of them."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from kvworkers.frontends.attempt import attempt
from kvworkers.frontends.fleet import Fleet

from kvstore.core.errors import NotFound, Refused, Unreachable
from kvstore.core.names import pack_tokens
from kvstore.router.members import Member, Members
from kvstore.rpc.v1 import worker_pb2
from tests.patience import PATIENCE_MS, PATIENCE_S
from tests.scripted_worker import ROOT, ScriptedWorker

RUN = worker_pb2.RunRequest(tokens=pack_tokens([1]), sampling=worker_pb2.Sampling(max_tokens=4))


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    fleet = Fleet("default")
    yield fleet
    await fleet.close()


@pytest.fixture
async def worker() -> AsyncIterator[ScriptedWorker]:
    worker = ScriptedWorker("w")
    await worker.start()
    yield worker
    await worker.stop()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - another task changes it
            await asyncio.sleep(0.01)


def members(*workers: ScriptedWorker) -> Members:
    return Members.of(Member("worker", one.name, one.address) for one in workers)


async def test_offers_join_the_workers_of_a_model(fleet: Fleet, worker: ScriptedWorker) -> None:
    small = ScriptedWorker("small", max_model_tokens=100)
    other = ScriptedWorker("other", model="another")
    await small.start()
    await other.start()
    with pytest.raises(Unreachable):
        fleet.offer("scripted")
    fleet.set_members(members(worker, small, other))
    await eventually(lambda: all(map(fleet.knows, ("w", "small", "other"))))
    assert list(fleet.offers()) == ["another", "scripted"]
    offer = fleet.offer("scripted")
    assert (offer.root, offer.max_model_tokens) == (ROOT, 100)
    assert offer.workers == {"w", "small"}
    with pytest.raises(NotFound, match="another, scripted"):
        fleet.offer("")
    fleet.set_members(members(worker))
    assert fleet.offer("").workers == {"w"}
    with pytest.raises(Unreachable, match="small has left"):
        fleet.stub("small")
    await small.stop()
    await other.stop()


async def test_a_worker_that_is_not_up_yet_is_asked_until_it_answers(fleet: Fleet) -> None:
    late = ScriptedWorker("late")
    await late.start()
    address = late.address
    await late.stop()
    fleet.set_members(Members.of([Member("worker", "late", address)]))
    await asyncio.sleep(0)
    assert not fleet.knows("late")
    late = ScriptedWorker("late", model="renamed")
    await late.start(address)
    await eventually(lambda: fleet.knows("late"))
    late.model = "again"
    fleet.refresh("late")
    fleet.refresh("nobody")
    await eventually(lambda: list(fleet.offers()) == ["again"])
    await late.stop()


async def run(fleet: Fleet, silence_ms: float = 0.0) -> list[worker_pb2.RunReply]:
    replies = attempt(
        fleet.stub("w"), RUN,
        timeout_s=PATIENCE_S, silence_ms=lambda: silence_ms, lost_after_ms=1_000,
    )  # fmt: skip
    return [reply async for reply in replies]


async def test_an_attempt_ends_with_its_reason(fleet: Fleet, worker: ScriptedWorker) -> None:
    fleet.set_members(members(worker))
    replies = await run(fleet)
    assert [reply.finish_reason for reply in replies] == [""] * 4 + ["length"]


async def test_an_attempt_raises_what_the_worker_raised(
    fleet: Fleet, worker: ScriptedWorker
) -> None:
    fleet.set_members(members(worker))
    worker.faults.refuse = Refused("full", 70)
    with pytest.raises(Refused) as refused:
        await run(fleet)
    assert refused.value.retry_after_ms == 70


async def test_silence_on_both_streams_is_a_loss_and_cancels_the_call(
    fleet: Fleet, worker: ScriptedWorker
) -> None:
    fleet.set_members(members(worker))
    worker.faults.hang_after = 1
    with pytest.raises(Unreachable, match="silent"):
        await run(fleet, silence_ms=2_000.0)
    await eventually(lambda: worker.running == 0)
    assert worker.cancelled == 1


async def test_a_request_that_comes_before_the_first_worker_waits_for_it(
    fleet: Fleet, worker: ScriptedWorker
) -> None:
    with pytest.raises(Unreachable, match="no worker is ready yet"):
        await fleet.offered("scripted", wait_ms=10)
    offered = [fleet.offered("scripted", wait_ms=PATIENCE_MS) for _ in range(3)]
    waiting = [asyncio.create_task(one) for one in offered]
    await asyncio.sleep(0)
    fleet.set_members(members(worker))
    for offer in await asyncio.gather(*waiting):
        assert offer.workers == {"w"}
    assert (await fleet.offered("", wait_ms=0)).model == "scripted"
