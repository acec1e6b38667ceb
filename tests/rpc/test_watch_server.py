"""The Watch loop by itself: marks on time, bounds, filters, closing."""

import asyncio
import hashlib
from collections.abc import AsyncIterator

import pytest

from kvstore.core.errors import BadInput, Refused
from kvstore.core.names import BlockName, Root
from kvstore.directory.events import Changed, TierKind
from kvstore.directory.publisher import Publisher
from kvstore.rpc.v1 import watch_pb2
from kvstore.rpc.watch_server import serve_watch
from tests.patience import PATIENCE_S

ROOT = Root(bytes(32))


class Nothing:
    def scan(self, cursor: int, limit: int) -> tuple[list[Changed], int | None]:
        return [], None


def publisher() -> Publisher:
    return Publisher("p", 1, [TierKind.HBM], Nothing())


def name(number: int) -> BlockName:
    return BlockName(hashlib.sha256(number.to_bytes(4, "little")).digest())


async def take(stream: AsyncIterator[watch_pb2.WatchReply], kind: str) -> watch_pb2.WatchReply:
    """Return the next message of a kind, within a deadline."""
    async with asyncio.timeout(PATIENCE_S):
        async for reply in stream:
            if reply.WhichOneof("what") == kind:
                return reply
    raise AssertionError("the stream ended")


async def test_changes_gather_into_one_message_and_marks_come_meanwhile() -> None:
    source = publisher()
    stream = serve_watch(source, watch_pb2.WatchRequest(), mark_period_ms=20)
    await take(stream, "end")
    for number in range(10):
        source.set(ROOT, TierKind.HBM, [name(number)])
    events = (await take(stream, "events")).events
    assert (events.first_sequence, len(events.names)) == (1, 320)
    mark = (await take(stream, "mark")).mark
    assert (mark.sequence, mark.digests[0].count) == (10, 10)
    again = (await take(stream, "mark")).mark
    assert again.sequence == 10
    await stream.aclose()
    assert source.subscribers == 0


async def test_a_busy_publisher_still_sends_marks() -> None:
    source = publisher()
    stream = serve_watch(source, watch_pb2.WatchRequest(), mark_period_ms=10)
    await take(stream, "end")
    stop = asyncio.Event()

    async def publish() -> None:
        number = 0
        while not stop.is_set():
            source.set(ROOT, TierKind.HBM, [name(number)])
            number += 1
            await asyncio.sleep(0)

    busy = asyncio.create_task(publish())
    for _ in range(3):
        await take(stream, "mark")
    stop.set()
    await busy
    await stream.aclose()


async def test_subscribers_are_bounded_and_requests_checked() -> None:
    source = publisher()
    first = serve_watch(source, watch_pb2.WatchRequest(), max_subscribers=1)
    await take(first, "begin")
    with pytest.raises(Refused):
        await take(serve_watch(source, watch_pb2.WatchRequest(), max_subscribers=1), "begin")
    await first.aclose()
    for bad in (
        watch_pb2.WatchRequest(root=b"short"),
        watch_pb2.WatchRequest(tiers=[99]),  # type: ignore[list-item]
        watch_pb2.WatchRequest(subscriber="a\nb"),
    ):
        with pytest.raises(BadInput):
            await take(serve_watch(source, bad), "begin")
    assert source.subscribers == 0
