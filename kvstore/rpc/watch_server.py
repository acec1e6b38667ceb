"""Serves `Watch` from a `Publisher`: the executor of the pure log in `kvstore.directory.publisher`.

Cache node and GPU worker use the same loop. gRPC's flow control is the backpressure: a slow
subscriber blocks only its own loop, falls behind the bounded log and gets a new snapshot.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Final

from kvstore.core.errors import Refused
from kvstore.core.limits import MARK_PERIOD_MS
from kvstore.core.names import Root
from kvstore.directory.publisher import Publisher
from kvstore.rpc.convert import check_id, event_to_reply, root_from_wire, tier_from_wire
from kvstore.rpc.v1 import watch_pb2

COALESCE_S: Final = 0.002
"""How long changes gather before they are sent: a batch of commits becomes one message."""

MAX_SUBSCRIBERS: Final = 256
"""Routers and peers of one publisher; more is a leak of subscriptions."""


async def serve_watch(
    publisher: Publisher,
    request: watch_pb2.WatchRequest,
    *,
    max_subscribers: int = MAX_SUBSCRIBERS,
    mark_period_ms: int = MARK_PERIOD_MS,
) -> AsyncGenerator[watch_pb2.WatchReply, None]:
    """Yield snapshot, events and marks until the subscriber goes away.

    Raises `BadInput` for a malformed filter and `Refused` at `max_subscribers`. Must run on the
    loop whose thread calls `publisher.set` and `publisher.delete`.
    """
    check_id(request.subscriber, "subscriber")
    root: Root | None = root_from_wire(request.root) if request.root else None
    tiers = frozenset(tier_from_wire(tier) for tier in request.tiers)
    if publisher.subscribers >= max_subscribers:
        raise Refused(f"{max_subscribers} subscribers already", retry_after_ms=1_000)
    changed = asyncio.Event()
    subscription = publisher.subscribe(changed.set, root=root, tiers=tiers)
    loop = asyncio.get_running_loop()
    mark_due = loop.time()
    try:
        while True:
            changed.clear()
            behind = False
            while (events := subscription.take()) is not None:
                for event in events:
                    yield event_to_reply(event)
                # Others run between slices of a long snapshot or backlog.
                await asyncio.sleep(0)
                if behind := loop.time() >= mark_due:
                    break
            if loop.time() >= mark_due:
                for event in subscription.mark():
                    yield event_to_reply(event)
                mark_due = loop.time() + mark_period_ms / 1_000
            if not behind:
                await changed_or_due(changed, mark_due - loop.time())
    finally:
        subscription.close()


async def changed_or_due(changed: asyncio.Event, seconds: float) -> None:
    """Return when a mark is due, or soon after something changed (so that changes gather)."""
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            await changed.wait()
            await asyncio.sleep(COALESCE_S)
    except TimeoutError:
        return
