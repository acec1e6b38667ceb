"""Events through a real Redis that dies, comes back, forgets, and is written to by the past."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from kvstore.core.errors import BadInput
from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.names import chain, pack_tokens
from kvstore.directory.events import Began, Changed, Ended, Event, Lost, TierKind
from kvstore.directory.view import ClusterView, Health
from kvstore.observe.metrics import RedisMetrics, RouterMetrics
from kvstore.router.members import Member, Members
from kvstore.router.placement import Prompt
from kvstore.router.redis_source import RedisSource
from kvstore.router.router import Router, RouterConfig
from kvstore.router.watch_source import WatchSource
from kvstore.rpc.event_writers import check_redis, written_to_redis
from kvstore.rpc.redis_publisher import RedisPublisher
from kvstore.rpc.redis_stream import (
    EVENT_FIELD,
    Heartbeat,
    Next,
    RedisConfig,
    event_in,
    heartbeat_key,
    hidden,
)
from kvstore.rpc.watch_client import WatchConfig
from tests.patience import PATIENCE_MS, PATIENCE_S, until
from tests.processes import started
from tests.redis_process import RedisProcess, free_port, needs_redis, redis_process
from tests.scripted_worker import ROOT, ScriptedWorker

NAMES = list(chain(ROOT, pack_tokens(range(400 * BLOCK_TOKENS))))
pytestmark = needs_redis


@pytest.fixture
def server() -> Iterator[RedisProcess]:
    with redis_process() as server:
        yield server


def config(server: RedisProcess, *, stream_names: int = 1 << 18) -> RedisConfig:
    return RedisConfig(
        url=server.url, mark_period_ms=50, heartbeat_ms=10_000, stream_names=stream_names,
        min_backoff_ms=20, max_backoff_ms=100,
    )  # fmt: skip


@asynccontextmanager
async def written(
    server: RedisProcess, incarnation: int = 1, **options: int
) -> AsyncIterator[tuple[ScriptedWorker, RedisMetrics]]:
    """A worker `w` that listens, and whose events a task of its own writes."""
    worker = ScriptedWorker("w", incarnation=incarnation)
    await worker.start()
    metrics = RedisMetrics(CollectorRegistry())
    writer = RedisPublisher(worker.publisher, config(server, **options), metrics)
    task = asyncio.create_task(writer.run())
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not (  # noqa: ASYNC110
                metrics.connected._value.get() or next(iter(metrics.faults.collect())).samples
            ):
                await asyncio.sleep(0.01)
        yield worker, metrics
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await worker.stop()


class Followed:
    """A view that a source's events are applied to, as a router would."""

    def __init__(self, source: RedisSource) -> None:
        self.view = ClusterView()
        self.view.follow("w", host="", now_ms=0.0)
        self.seen: list[Event] = []
        self.resyncs: list[str] = []
        self._source = source

    async def run(self) -> None:
        async with aclosing(self._source.events()) as stream:
            async for event in stream:
                self.seen.append(event)
                reason = self.view.apply("w", event, 0.0)
                if reason is not None:
                    self.resyncs.append(str(reason))

    def blocks(self) -> int:
        reach = self.view.reach("w", (), 0.0)
        return self.view.match(ROOT, NAMES, [reach])[0].blocks

    async def until_blocks(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.blocks() != count or self.view.health("w", 0.0) is not Health.LIVE:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@asynccontextmanager
async def followed(
    server: RedisProcess, fallback: WatchSource | None = None, metrics: RouterMetrics | None = None
) -> AsyncIterator[Followed]:
    member = Member("worker", "w", "127.0.0.1:1")
    metrics = metrics or RouterMetrics(CollectorRegistry())
    one = Followed(RedisSource(member, config(server), metrics, fallback))
    task = asyncio.create_task(one.run())
    try:
        yield one
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_killed_server_that_comes_back_empty_is_written_and_read_anew(
    server: RedisProcess,
) -> None:
    async with written(server) as (worker, metrics), followed(server) as one:
        worker.hold(NAMES[:7])
        await one.until_blocks(7)
        server.kill()
        worker.hold(NAMES[:20])  # nobody writes it down; the next snapshot has it
        async with asyncio.timeout(PATIENCE_S):
            while not isinstance(one.seen[-1], Lost):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert one.view.health("w", 0.0) is Health.LOST
        await until(lambda: metrics.connected._value.get() == 0)
        server.start()
        await one.until_blocks(20)
        assert metrics.connected._value.get() == 1 and not one.resyncs


async def test_without_the_server_members_are_watched_and_then_no_longer(
    server: RedisProcess,
) -> None:
    metrics = RouterMetrics(CollectorRegistry())
    async with written(server) as (worker, _):
        watch = WatchSource(Member("worker", "w", worker.address), WatchConfig(min_backoff_ms=20))
        async with followed(server, watch, metrics) as one:
            worker.hold(NAMES[:7])
            await one.until_blocks(7)
            assert worker.publisher.subscribers == 1  # the writer
            server.kill()
            worker.hold(NAMES[:20])
            await one.until_blocks(20)
            assert metrics.watched_instead._value.get() == 1
            assert not any(isinstance(event, Lost) for event in one.seen)
            server.start()
            async with asyncio.timeout(PATIENCE_S):
                while metrics.watched_instead._value.get():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            worker.drop(NAMES[10:20])
            await one.until_blocks(10)
            assert worker.publisher.subscribers == 1


async def test_streams_stay_short_and_readers_go_on_without_a_new_snapshot(
    server: RedisProcess,
) -> None:
    async with written(server, stream_names=256) as (worker, metrics), followed(server) as one:
        await one.until_blocks(0)
        for start in range(0, 400, 20):
            worker.hold(NAMES[: start + 20])
            await one.until_blocks(start + 20)
        assert metrics.streams._value.get() >= 2
        assert sum(isinstance(event, Ended) for event in one.seen) == 1, "one snapshot only"
        assert not one.resyncs
        async with followed(server) as late:
            await late.until_blocks(400)
        async with aclosing(Redis.from_url(server.url)) as client:
            raw: Any = await client.get(heartbeat_key("w"))
            alive, names = Heartbeat.unpack(raw), 0
            entries: Any = await client.xrange(alive.stream)
            for _, entry in entries:
                event = event_in(entry[EVENT_FIELD])
                names += len(event.names) if isinstance(event, Changed) else 0
            assert names <= 400 + 2 * 256
            for key in await client.keys("kvstore:*"):
                assert 0 < await client.pttl(key) <= 30_000, "what nobody writes must expire"


async def test_a_stream_that_the_server_dropped_begins_anew(server: RedisProcess) -> None:
    async with written(server) as (worker, metrics), followed(server) as one:
        worker.hold(NAMES[:7])
        await one.until_blocks(7)
        async with aclosing(Redis.from_url(server.url)) as client:
            await client.flushall()
        worker.hold(NAMES[:9])
        await one.until_blocks(9)
        assert metrics.streams._value.get() == 2
        assert metrics.faults.labels(error="Refused")._value.get() == 1


async def test_the_past_does_not_write_over_the_present(server: RedisProcess) -> None:
    async with AsyncExitStack() as stack:
        new, _ = await stack.enter_async_context(written(server, incarnation=9))
        one = await stack.enter_async_context(followed(server))
        new.hold(NAMES[:5])
        await one.until_blocks(5)
        old, metrics = await stack.enter_async_context(written(server, incarnation=8))
        old.hold(NAMES[:50])
        async with asyncio.timeout(PATIENCE_S):
            while not metrics.faults.labels(error="Refused")._value.get():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        new.hold(NAMES[:6])
        await one.until_blocks(6)
        assert not one.resyncs


async def test_rubbish_in_the_server_is_a_loss_and_not_an_error(server: RedisProcess) -> None:
    async with aclosing(Redis.from_url(server.url)) as client:
        for rubbish in (b"{", b"[]", b'{"incarnation": 1}'):
            await client.set(heartbeat_key("w"), rubbish)
            async with followed(server) as one, asyncio.timeout(PATIENCE_S):
                while not one.seen:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            lost = one.seen[0]
            assert isinstance(lost, Lost) and "not a heartbeat" in lost.reason
        await client.set(heartbeat_key("w"), Heartbeat(1, "x", "s").pack())
        await client.xadd("s", {EVENT_FIELD: b"\xff\xff"})
        async with followed(server) as one, asyncio.timeout(PATIENCE_S):
            while not one.seen:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert isinstance(one.seen[0], Lost) and "no event" in one.seen[0].reason


async def test_a_router_told_of_the_server_routes_by_it(server: RedisProcess) -> None:
    async with written(server) as (worker, _):
        worker.hold(NAMES[:7])
        metrics = RouterMetrics(CollectorRegistry())
        async with Router(metrics=metrics, config=RouterConfig(events_redis=server.url)) as router:
            router.set_members(Members.of([Member("worker", "w", worker.address)]))
            prompt = Prompt(ROOT, NAMES[:8], 8 * BLOCK_TOKENS)
            assert (await router.route(prompt, wait_ms=PATIENCE_MS)).worker == "w"
            async with asyncio.timeout(PATIENCE_S):
                while router.explain(prompt).hit_tokens != 7 * BLOCK_TOKENS:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert worker.publisher.subscribers == 1, "by Redis, not by Watch"


async def test_no_url_writes_nowhere(server: RedisProcess) -> None:
    worker = ScriptedWorker("w")
    async with written_to_redis(worker.publisher, "", CollectorRegistry()):
        assert worker.publisher.subscribers == 0
    async with written_to_redis(worker.publisher, server.url, CollectorRegistry()):
        async with asyncio.timeout(PATIENCE_S):
            while not worker.publisher.subscribers:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert worker.publisher.subscribers == 0


def test_what_is_no_url_is_refused_without_its_password() -> None:
    for url in ("http://secret@host", "127.0.0.1:6379", f"redis://host:{free_port()}x/0"):
        with pytest.raises(BadInput, match="--events-redis") as refused:
            check_redis("--events-redis", url)
        assert "secret" not in str(refused.value)
    assert hidden("redis://me:secret@h:1/2") == "redis://h:1/2"
    check_redis("--events-redis", "")
    with pytest.raises(BadInput, match="heartbeat_ms"):
        RedisConfig(url="redis://h", heartbeat_ms=100)
    with pytest.raises(BadInput, match="stream_names"):
        RedisConfig(url="redis://h", stream_names=0)
    with pytest.raises(BadInput, match="end of a stream"):
        Next.unpack(b"{}")


async def test_the_node_command_writes_its_events(server: RedisProcess, tmp_path: Path) -> None:
    arguments = ["-m", "kvstore.cli.main", "node", "--json", "--run-dir", str(tmp_path / "run"),
                 "--name", "real-node", "--arena-bytes", str(64 << 20),
                 "--events-redis", server.url]  # fmt: skip
    with started(arguments) as node:
        key = heartbeat_key("real-node")
        async with aclosing(Redis.from_url(server.url)) as client, asyncio.timeout(PATIENCE_S):
            while not await client.exists(key):  # noqa: ASYNC110 - the server has no event
                await asyncio.sleep(0.05)
        member = Member("node", "real-node", str(node.ready["listen"]))
        source = RedisSource(member, config(server), RouterMetrics(CollectorRegistry()))
        async with aclosing(source.events()) as stream, asyncio.timeout(PATIENCE_S):
            began = await anext(stream)
        assert isinstance(began, Began) and began.publisher == "real-node"
        assert TierKind.DRAM in began.tiers
