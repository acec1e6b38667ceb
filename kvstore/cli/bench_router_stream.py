"""How long an event takes from a publisher into the view of a router: real gRPC, one process."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

from kvstore.core.limits import NAME_BYTES
from kvstore.core.names import BlockName, Root
from kvstore.directory.events import Changed, TierKind
from kvstore.directory.publisher import Publisher
from kvstore.directory.view import ClusterView
from kvstore.router.members import Member
from kvstore.router.watch_source import WatchSource
from kvstore.rpc.channel import listen, make_server
from kvstore.rpc.interceptors import Context
from kvstore.rpc.v1 import cache_pb2_grpc, watch_pb2
from kvstore.rpc.watch_server import serve_watch

ROOT = Root(b"bench root of a stream".ljust(NAME_BYTES, b"."))
DEADLINE_S = 30.0


class _Empty:
    """Holdings of a publisher that starts with nothing."""

    def scan(self, cursor: int, limit: int) -> tuple[list[Changed], int | None]:
        return [], None


class _Node(cache_pb2_grpc.CacheNodeServicer):  # type: ignore[misc]
    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    async def Watch(
        self, request: watch_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[watch_pb2.WatchReply]:
        async for reply in serve_watch(self._publisher, request):
            yield reply


async def seconds_until_visible(count: int) -> list[float]:
    """Publish `count` blocks one after the other; return the seconds until each was seen."""
    publisher = Publisher("node", 1, [TierKind.DRAM], _Empty(), host="host")
    server, _ = make_server()
    cache_pb2_grpc.add_CacheNodeServicer_to_server(_Node(publisher), server)
    address = listen(server, "127.0.0.1:0")
    await server.start()
    try:
        async with asyncio.timeout(DEADLINE_S):
            return await _follow(publisher, Member("node", "node", address), count)
    finally:
        await server.stop(0)


async def _follow(publisher: Publisher, member: Member, count: int) -> list[float]:
    view, times, sent, published = ClusterView(), list[float](), 0, 0.0
    view.follow(member.name, host="host", now_ms=0.0)
    async with aclosing(WatchSource(member).events()) as events:
        async for event in events:
            view.apply(member.name, event, 0.0)
            known = view.publisher(member.name)
            assert known is not None
            if isinstance(event, Changed):
                assert len(view) == len(times) + 1, "what was applied can be seen"
                times.append(time.perf_counter() - published)
            if len(times) == count:
                break
            if known.joined and sent == len(times):
                name = BlockName(sent.to_bytes(NAME_BYTES, "little"))
                sent += 1
                published = time.perf_counter()
                publisher.set(ROOT, TierKind.DRAM, [name])
    return times
