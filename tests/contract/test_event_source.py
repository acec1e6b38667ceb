"""The contract of `EventSource`, over every source there is."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import pytest

from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.names import chain, pack_tokens
from kvstore.directory.events import Began, Changed, Ended, Event, Loaded, Lost, Marked, TierKind
from kvstore.router.members import Kind, Member
from kvstore.router.source import EventSource
from kvstore.router.watch_source import WatchSource
from kvstore.rpc.watch_client import WatchConfig
from tests.processes import Started, scripted
from tests.scripted_worker import ROOT, ScriptedWorker

NAMES = list(chain(ROOT, pack_tokens(range(20 * BLOCK_TOKENS))))
FAST = WatchConfig(stall_ms=600, min_backoff_ms=20, max_backoff_ms=100)

MakeSource = Callable[[str, Kind], EventSource]


@pytest.fixture(params=["watch"])
def make_source(request: pytest.FixtureRequest) -> MakeSource:
    def make(address: str, kind: Kind) -> EventSource:
        return WatchSource(Member(kind, "w", address), FAST)

    return make


@pytest.fixture(params=[TierKind.HBM, TierKind.DRAM], ids=["worker", "node"])
async def publisher(request: pytest.FixtureRequest) -> AsyncIterator[ScriptedWorker]:
    worker = ScriptedWorker("w", tier=request.param)
    await worker.start()
    yield worker
    await worker.stop()


def kind_of(publisher: ScriptedWorker) -> Kind:
    return "worker" if publisher.tier is TierKind.HBM else "node"


async def until(stream: AsyncIterator[Event], kind: type[Event], limit: int = 200) -> list[Event]:
    """Return the events up to and with the first of `kind`."""
    seen: list[Event] = []
    async with asyncio.timeout(10):
        async for event in stream:
            seen.append(event)
            if isinstance(event, kind):
                return seen
            assert len(seen) < limit
    raise AssertionError("the stream ended")


async def test_a_snapshot_comes_first_then_numbered_changes_and_marks(
    publisher: ScriptedWorker, make_source: MakeSource
) -> None:
    publisher.hold(NAMES[:4])
    source = make_source(publisher.address, kind_of(publisher))
    async with aclosing(source.events()) as stream:
        snapshot = await until(stream, Ended)
        assert isinstance(snapshot[0], Began)
        assert (snapshot[0].publisher, snapshot[0].incarnation) == ("w", 1)
        assert snapshot[0].tiers == (publisher.tier,)
        names = [n for e in snapshot if isinstance(e, Changed) for n in e.names]
        assert sorted(names) == sorted(NAMES[:4])
        assert all(e.first_sequence == 0 for e in snapshot if isinstance(e, Changed))
        publisher.hold(NAMES[4:6])
        publisher.drop(NAMES[:1])
        changes: list[Changed] = []
        while sum(len(change.names) for change in changes) < 3:
            changes += [e for e in await until(stream, Changed) if isinstance(e, Changed)]
        assert [(c.deleted, list(c.names), c.first_sequence) for c in changes] == [
            (False, NAMES[4:6], 5),
            (True, NAMES[:1], 7),
        ]
        mark = (await until(stream, Marked))[-1]
        assert isinstance(mark, Marked) and mark.sequence == 7
        assert mark.digests[0].count == 5
        if publisher.tier is TierKind.HBM:
            assert isinstance((await until(stream, Loaded))[-1], Loaded)


async def test_closing_the_generator_ends_the_subscription(
    publisher: ScriptedWorker, make_source: MakeSource
) -> None:
    source = make_source(publisher.address, kind_of(publisher))
    async with aclosing(source.events()) as stream:
        await until(stream, Ended)
        assert publisher.publisher.subscribers == 1
    async with asyncio.timeout(5):
        while publisher.publisher.subscribers:  # noqa: ASYNC110 - the other end has no event
            await asyncio.sleep(0.01)


async def test_nobody_there_is_a_loss_and_not_an_error(make_source: MakeSource) -> None:
    source = make_source("127.0.0.1:1", "worker")
    async with aclosing(source.events()) as stream:
        assert isinstance((await until(stream, Lost))[-1], Lost)
        assert isinstance((await until(stream, Lost))[-1], Lost)


def follow_process(process: Started, make_source: MakeSource) -> EventSource:
    return make_source(process.ready["address"], "worker")


async def test_a_killed_publisher_is_lost_and_begins_again(make_source: MakeSource) -> None:
    with scripted("w", "--hold", "3") as first:
        source = follow_process(first, make_source)
        async with aclosing(source.events()) as stream:
            await until(stream, Ended)
            first.kill()
            await until(stream, Lost)
            address = str(first.ready["address"])
            with scripted("w", "--incarnation", "2", "--listen", address):
                began = (await until(stream, Began))[-1]
                assert isinstance(began, Began) and began.incarnation == 2
                await until(stream, Ended)


async def test_a_stopped_publisher_is_lost_after_the_stall_and_comes_back(
    make_source: MakeSource,
) -> None:
    with scripted("w", "--hold", "3") as process:
        source = follow_process(process, make_source)
        async with aclosing(source.events()) as stream:
            await until(stream, Marked)
            process.signal(signal.SIGSTOP)
            lost = (await until(stream, Lost))[-1]
            assert isinstance(lost, Lost) and "nothing heard" in lost.reason
            process.signal(signal.SIGCONT)
            await until(stream, Ended)


def test_patience_is_validated() -> None:
    with pytest.raises(Exception, match="stall_ms"):
        WatchConfig(stall_ms=100)
    with pytest.raises(Exception, match="backoff"):
        WatchConfig(min_backoff_ms=0)
