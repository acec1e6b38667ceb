"""Writes a publisher's events to Redis or Valkey: one more subscriber of its log.

Runs beside the `Watch` server in nodes and workers, on the loop that owns the `Publisher`. When the
server is away nothing waits for it: the log is bounded, and whoever comes back starts a new stream
with a new snapshot.
"""

import asyncio
import logging
import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import RedisError
from redis.typing import EncodableT, FieldT

from kvstore.core.errors import Refused
from kvstore.directory.events import Changed, Ended, Event
from kvstore.directory.publisher import Publisher, Subscription
from kvstore.observe.metrics import RedisMetrics
from kvstore.rpc.convert import event_to_reply
from kvstore.rpc.redis_stream import (
    EVENT_FIELD,
    NEXT_FIELD,
    Heartbeat,
    Next,
    RedisConfig,
    end_if_cancelled,
    heartbeat_key,
    hidden,
    stream_key,
)
from kvstore.rpc.watch_server import changed_or_due

_MESSAGE_NAMES: Final = 16
"""What a message without names counts in a stream's bound: about as many bytes."""

_TAKES_AT_ONCE: Final = 16
"""Slices in one pipeline: at most 2 MiB."""

# An older incarnation that still runs somewhere must not take the key back.
_BEAT: Final = """
local held = redis.call('GET', KEYS[1])
if held then
  local other = cjson.decode(held)
  if other.writer ~= ARGV[1] and other.incarnation > tonumber(ARGV[2]) then return 0 end
end
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
return 1
"""

_log = logging.getLogger(__name__)


class _Stream:
    """One stream being written: its place in the log, and how much lies behind its snapshot."""

    def __init__(self, key: str, subscription: Subscription) -> None:
        self.key = key
        self.subscription = subscription
        self.ended_id = ""
        """Entry that ends the snapshot; empty until it is written."""
        self.behind = 0
        """Names written since then."""
        self._made = False

    async def pump(self, client: Redis) -> bool:
        """Write a bounded piece; True when everything is written."""
        events: list[Event] = []
        caught_up = False
        for _ in range(_TAKES_AT_ONCE):
            taken = self.subscription.take()
            if caught_up := taken is None:
                break
            events += taken or ()
        await self.write(client, events)
        return caught_up

    async def write(self, client: Redis, events: Sequence[Event]) -> None:
        """Append events. Raises `Refused` when the server has dropped the stream."""
        if not events:
            return
        pipeline = client.pipeline(transaction=False)
        for event in events:
            entry: dict[FieldT, EncodableT] = {
                EVENT_FIELD: event_to_reply(event).SerializeToString()
            }
            # A stream that was expired, evicted or flushed must not go on without its snapshot.
            pipeline.xadd(self.key, entry, nomkstream=self._made)
            self._made = True
        for number, event in zip(await pipeline.execute(), events, strict=True):
            if number is None:
                raise Refused(f"the server dropped {self.key}")
            if isinstance(event, Ended):
                self.ended_id, self.behind = number.decode(), 0
            names = len(event.names) if isinstance(event, Changed) else 0
            self.behind += max(names, _MESSAGE_NAMES)


class RedisPublisher:
    """Keeps one publisher's stream written until cancelled."""

    def __init__(self, publisher: Publisher, config: RedisConfig, metrics: RedisMetrics) -> None:
        self._publisher = publisher
        self._config = config
        self._metrics = metrics

    async def run(self) -> None:
        """Write for ever; a server that is away is tried again with growing pauses."""
        config = self._config
        backoff_ms = config.min_backoff_ms
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            try:
                await self._write_until_fault()
            except (RedisError, OSError, Refused) as error:
                end_if_cancelled()
                self._metrics.faults.labels(error=type(error).__name__).inc()
                _log.warning("events to %s stopped: %s", hidden(config.url), error)
            finally:
                self._metrics.connected.set(0)
            if loop.time() - began_s > config.max_backoff_ms / 1_000:
                backoff_ms = config.min_backoff_ms
            await asyncio.sleep(backoff_ms / 1_000)
            backoff_ms = min(2 * backoff_ms, config.max_backoff_ms)

    async def _write_until_fault(self) -> None:
        # Each way out unsubscribes: a log must not wake a writer that is gone.
        async with AsyncExitStack() as stack:
            client = self._config.connect(f"kvstore-{self._publisher.name}")
            await stack.enter_async_context(aclosing(client))
            await _Writer(self._publisher, self._config, self._metrics, client, stack).run()


class _Writer:
    """One connection's life: streams one after the other, and the heartbeat."""

    def __init__(
        self,
        publisher: Publisher,
        config: RedisConfig,
        metrics: RedisMetrics,
        client: Redis,
        stack: AsyncExitStack,
    ) -> None:
        self._publisher = publisher
        self._config = config
        self._metrics = metrics
        self._client = client
        self._stack = stack
        self._writer = secrets.token_hex(8)
        self._changed = asyncio.Event()
        self._numbers = 0
        self._current = self._new_stream()
        self._following: _Stream | None = None

    def _new_stream(self) -> _Stream:
        self._numbers += 1
        publisher = self._publisher
        key = stream_key(publisher.name, publisher.incarnation, self._writer, self._numbers)
        # A callable of its own: the log tells subscribers apart by it.
        subscription = publisher.subscribe(lambda: self._changed.set())
        self._stack.callback(subscription.close)
        self._metrics.streams.inc()
        return _Stream(key, subscription)

    async def run(self) -> None:
        """Write until the connection fails; raises `Refused` when a newer incarnation writes."""
        loop = asyncio.get_running_loop()
        mark_due = loop.time()
        while True:
            end_if_cancelled()
            self._changed.clear()
            caught_up = await self._current.pump(self._client)
            if self._following is not None:
                caught_up = await self._move(self._following) and caught_up
            elif self._current.ended_id and self._current.behind > self._config.stream_names:
                self._following = self._new_stream()
                caught_up = False
            if loop.time() >= mark_due:
                await self._beat()
                mark_due = loop.time() + self._config.mark_period_ms / 1_000
            self._metrics.connected.set(1)
            if caught_up:
                await changed_or_due(self._changed, mark_due - loop.time())
            else:
                await asyncio.sleep(0)

    async def _move(self, following: _Stream) -> bool:
        """Write the next stream; once it is as far as the current one, take it instead."""
        old = self._current
        # The old one must hold all that the next one's snapshot covers before readers go over.
        if not (await following.pump(self._client) and await old.pump(self._client)):
            return False
        self._current, self._following = following, None
        await self._beat()
        note = Next(following.key, following.ended_id).pack()
        await self._client.xadd(old.key, {NEXT_FIELD: note})
        await self._client.pexpire(old.key, self._config.linger_ms)
        old.subscription.close()
        return True

    async def _beat(self) -> None:
        """Renew the heartbeat, and write a mark."""
        await self._current.write(self._client, self._current.subscription.mark())
        publisher, key = self._publisher, self._current.key
        beat = Heartbeat(publisher.incarnation, self._writer, key)
        kept = await self._client.eval(
            _BEAT, 1, heartbeat_key(publisher.name), self._writer, str(publisher.incarnation),
            beat.pack(), str(self._config.heartbeat_ms),
        )  # fmt: skip
        if not kept:
            raise Refused(f"a newer incarnation of {publisher.name} writes")
        await self._client.pexpire(key, self._config.linger_ms)
