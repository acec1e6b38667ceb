"""The contract of `EventSource`, over every source there is."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.names import chain, pack_tokens
from kvstore.directory.events import Began, Changed, Ended, Event, Loaded, Lost, Marked, TierKind
from kvstore.observe.metrics import RouterMetrics
from kvstore.router.members import Kind, Member
from kvstore.router.redis_source import RedisSource
from kvstore.router.source import EventSource
from kvstore.router.watch_source import WatchSource
from kvstore.rpc.redis_stream import RedisConfig, heartbeat_key
from kvstore.rpc.watch_client import WatchConfig
from tests.patience import PATIENCE_MS, PATIENCE_S
from tests.processes import Started, scripted
from tests.redis_process import RedisProcess, needs_redis, redis_process
from tests.scripted_worker import ROOT, ScriptedWorker

NAMES = list(chain(ROOT, pack_tokens(range(20 * BLOCK_TOKENS))))
PATIENT = WatchConfig(stall_ms=PATIENCE_MS, min_backoff_ms=20, max_backoff_ms=100)

MakeSource = Callable[..., EventSource]


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisProcess]:
    with redis_process() as server:
        yield server


@pytest.fixture(params=["watch", pytest.param("redis", marks=needs_redis)])
def redis(request: pytest.FixtureRequest) -> RedisProcess | None:
    """The server that events go through, None where they go straight."""
    if request.param == "watch":
        return None
    server: RedisProcess = request.getfixturevalue("redis_server")
    return server


@pytest.fixture
def make_source(redis: RedisProcess | None) -> MakeSource:
    def make(address: str, kind: Kind, patience: WatchConfig = PATIENT) -> EventSource:
        if redis is None:
            return WatchSource(Member(kind, "w", address), patience)
        # The name says where its events are; nobody else may write under it.
        config = RedisConfig(url=redis.url, min_backoff_ms=20, max_backoff_ms=100)
        metrics = RouterMetrics(CollectorRegistry())
        return RedisSource(Member(kind, "w", address), config, metrics)

    return make


@pytest.fixture
def events_redis(redis: RedisProcess | None) -> str:
    return redis.url if redis is not None else ""


@pytest.fixture(params=[TierKind.HBM, TierKind.DRAM], ids=["worker", "node"])
async def publisher(
    request: pytest.FixtureRequest, events_redis: str
) -> AsyncIterator[ScriptedWorker]:
    worker = ScriptedWorker("w", tier=request.param, events_redis=events_redis)
    worker.hold(NAMES[:4])
    await worker.start()
    if events_redis:
        await heard_at(events_redis, gone=False)
    yield worker
    await worker.stop()
    if events_redis:
        await heard_at(events_redis, gone=True)


async def heard_at(url: str, *, gone: bool) -> None:
    """Wait until the heartbeat of `w` is there, or has expired."""
    async with asyncio.timeout(PATIENCE_S), aclosing(Redis.from_url(url)) as client:
        while (await client.exists(heartbeat_key("w")) == 0) != gone:  # noqa: ASYNC110 - the server has no event
            await asyncio.sleep(0.01)


def kind_of(publisher: ScriptedWorker) -> Kind:
    return "worker" if publisher.tier is TierKind.HBM else "node"


async def until(stream: AsyncIterator[Event], kind: type[Event], limit: int = 200) -> list[Event]:
    """Return the events up to and with the first of `kind`."""
    seen: list[Event] = []
    async with asyncio.timeout(PATIENCE_S):
        async for event in stream:
            seen.append(event)
            if isinstance(event, kind):
                return seen
            assert len(seen) < limit
    raise AssertionError("the stream ended")


async def test_a_snapshot_comes_first_then_numbered_changes_and_marks(
    publisher: ScriptedWorker, make_source: MakeSource
) -> None:
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
    publisher: ScriptedWorker, make_source: MakeSource, events_redis: str
) -> None:
    async def followers() -> int:
        if not events_redis:
            return publisher.publisher.subscribers
        async with aclosing(Redis.from_url(events_redis)) as client:
            return sum(one["name"] == "kvstore-of-w" for one in await client.client_list())

    source = make_source(publisher.address, kind_of(publisher))
    async with aclosing(source.events()) as stream:
        await until(stream, Ended)
        assert await followers() == 1
    async with asyncio.timeout(PATIENCE_S):
        while await followers():  # noqa: ASYNC110 - the other end has no event
            await asyncio.sleep(0.01)


async def test_nobody_there_is_a_loss_and_not_an_error(make_source: MakeSource) -> None:
    source = make_source("127.0.0.1:1", "worker")
    async with aclosing(source.events()) as stream:
        assert isinstance((await until(stream, Lost))[-1], Lost)
        assert isinstance((await until(stream, Lost))[-1], Lost)


def follow_process(process: Started, make_source: MakeSource) -> EventSource:
    return make_source(process.ready["address"], "worker")


async def test_a_killed_publisher_is_lost_and_begins_again(
    make_source: MakeSource, events_redis: str
) -> None:
    through = ("--events-redis", events_redis)
    with scripted("w", "--hold", "3", *through) as first:
        source = follow_process(first, make_source)
        async with aclosing(source.events()) as stream:
            await until(stream, Ended)
            first.kill()
            await until(stream, Lost)
            address = str(first.ready["address"])
            with scripted("w", "--incarnation", "2", "--listen", address, *through):
                began = (await until(stream, Began))[-1]
                assert isinstance(began, Began) and began.incarnation == 2
                await until(stream, Ended)


async def test_a_stopped_publisher_is_lost_after_the_stall_and_comes_back(
    make_source: MakeSource, events_redis: str
) -> None:
    if events_redis:  # what the test before left has to expire
        await heard_at(events_redis, gone=True)
    with scripted("w", "--hold", "3", "--events-redis", events_redis) as process:
        address = process.ready["address"]
        source = make_source(address, "worker", replace(PATIENT, stall_ms=600))
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
