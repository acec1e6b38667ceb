"""Follows one publisher through Redis or Valkey, for ever; by `Watch` while that does not work."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, Final, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError

from kvstore.core.errors import KvStoreError, Unreachable
from kvstore.directory.events import Event, Lost
from kvstore.observe.metrics import RouterMetrics
from kvstore.router.members import Member
from kvstore.router.source import EventSource
from kvstore.rpc.redis_stream import (
    EVENT_FIELD,
    NEXT_FIELD,
    Heartbeat,
    Next,
    RedisConfig,
    end_if_cancelled,
    event_in,
    heartbeat_key,
)

_ENTRIES_AT_ONCE: Final = 16
"""Entries in one answer: at most 2 MiB."""


class RedisSource:
    """An `EventSource` over the publisher's stream.

    Redis being away says nothing about the publisher. With `fallback` (its own `Watch`) it is
    followed directly until its heartbeat is found again; without, it is `Lost` until then.
    """

    def __init__(
        self,
        member: Member,
        config: RedisConfig,
        metrics: RouterMetrics,
        fallback: EventSource | None = None,
    ) -> None:
        self.publisher = member.name
        self._config = config
        self._metrics = metrics
        self._fallback = fallback

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yield what the publisher says; see `EventSource`."""
        backoff_ms = self._config.min_backoff_ms
        while True:
            try:
                async with aclosing(self._follow_once()) as stream:
                    async for event in stream:
                        backoff_ms = self._config.min_backoff_ms
                        yield event
                continue  # it writes another stream now
            except (KvStoreError, RedisError, OSError) as error:
                end_if_cancelled()
                kind = type(error).__name__
                reason = f"{kind}: {error}"
            self._metrics.source_faults.labels(source="redis", error=kind).inc()
            if self._fallback is None:
                yield Lost(reason)
                await asyncio.sleep(backoff_ms / 1_000)
                backoff_ms = min(backoff_ms * 2, self._config.max_backoff_ms)
                continue
            async with aclosing(self._watch_instead(self._fallback)) as stream:
                async for event in stream:
                    yield event

    async def _follow_once(self) -> AsyncGenerator[Event, None]:
        """Yield a stream's events; returns when the publisher went on to one we cannot join."""
        async with aclosing(self._config.connect(f"kvstore-of-{self.publisher}")) as client:
            place = Next((await self._heartbeat(client)).stream, "0")
            block_ms = min(self._config.heartbeat_ms, self._config.timeout_ms) // 2
            while True:
                answer = await client.xread({place.stream: place.after}, _ENTRIES_AT_ONCE, block_ms)
                end_if_cancelled()
                if not answer:
                    if (await self._heartbeat(client)).stream != place.stream:
                        return
                    continue
                for number, entry in _entries(answer):
                    place = Next(place.stream, number)
                    if (note := entry.get(NEXT_FIELD)) is not None:
                        place = Next.unpack(note)
                        break
                    event = event_in(entry.get(EVENT_FIELD, b""))
                    if event is not None:
                        yield event

    async def _heartbeat(self, client: Redis) -> Heartbeat:
        """Return what the publisher says of itself; raises `Unreachable` when it is silent."""
        key = heartbeat_key(self.publisher)
        raw = await cast("Awaitable[bytes | None]", client.get(key))
        end_if_cancelled()
        if raw is None:
            raise Unreachable(f"nothing heard for {self._config.heartbeat_ms} ms at {key}")
        return Heartbeat.unpack(raw)

    async def _watch_instead(self, fallback: EventSource) -> AsyncGenerator[Event, None]:
        """Yield what the publisher itself says until its heartbeat is back in Redis."""
        self._metrics.watched_instead.inc()
        back = asyncio.create_task(self._until_back(), name=f"redis of {self.publisher}")
        try:
            async with aclosing(fallback.events()) as stream:
                async for event in stream:
                    if back.done():
                        return
                    yield event
        finally:
            self._metrics.watched_instead.dec()
            back.cancel()
            await asyncio.gather(back, return_exceptions=True)

    async def _until_back(self) -> None:
        backoff_ms = self._config.min_backoff_ms
        while True:
            await asyncio.sleep(backoff_ms / 1_000)
            backoff_ms = min(backoff_ms * 2, self._config.max_backoff_ms)
            try:
                async with aclosing(self._config.connect(f"kvstore-of-{self.publisher}")) as client:
                    await self._heartbeat(client)
                    return
            except (KvStoreError, RedisError, OSError) as error:
                end_if_cancelled()
                kind = type(error).__name__
                self._metrics.source_faults.labels(source="redis", error=kind).inc()


def _entries(answer: Any) -> list[tuple[str, dict[bytes, bytes]]]:
    """Return the entries of the one stream that was read, in both shapes that servers answer."""
    streams = answer.values() if isinstance(answer, dict) else [part for _, part in answer]
    found = []
    for entries in streams:
        rows = entries[0] if entries and isinstance(entries[0], list) else entries
        found += [(number.decode(), dict(fields)) for number, fields in rows if fields]
    return found
