"""Follows one vLLM engine through the KV events that it publishes over ZeroMQ, for ever.

PUB sockets drop what a slow or late subscriber cannot take and there is no snapshot. So every
connection begins with a replay of what the engine still remembers, a gap is filled by replay, and
where that does not reach far enough everything known is void. ZeroMQ's own heartbeats tell of an
engine that hangs or died; marks are made here while it is connected.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from kvstore.core.engine_hashes import EngineHashes
from kvstore.core.errors import BadInput, Unreachable
from kvstore.core.limits import MARK_PERIOD_MS, SUSPECT_AFTER_MS
from kvstore.core.names import Root
from kvstore.directory.events import Began, Changed, Ended, Event, Lost, Marked, TierKind
from kvstore.observe.metrics import RouterMetrics
from kvstore.router.vllm_events import VllmIndex

_END: Final = -1
"""Number of the message that ends a replay."""

Batch = tuple[int, bytes]
"""A message's number, and its packed events."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmConfig:
    """Where an engine publishes, and under which root its prompts are named."""

    endpoint: str
    """`tcp://host:5557`: the engine's `--kv-events-config` endpoint, ports by rank added."""
    root: Root
    replay: str = ""
    """Its `replay_endpoint`; without one a late start knows only what comes after it."""
    topic: str = ""
    hashes: EngineHashes | None = None
    """How the engine hashes, where that is known: what it publishes is then checked."""
    mark_period_ms: int = MARK_PERIOD_MS
    silent_ms: int = SUSPECT_AFTER_MS
    """An engine that leaves ZeroMQ's pings unanswered for so long is lost."""
    replay_ms: int = 5_000

    def __post_init__(self) -> None:
        for endpoint in (self.endpoint, self.replay or self.endpoint):
            if not endpoint.startswith(("tcp://", "ipc://")):
                raise BadInput(f"vLLM's endpoint {endpoint!r} is neither tcp:// nor ipc://")
        if not 0 < self.mark_period_ms < self.silent_ms or self.replay_ms <= 0:
            raise BadInput("mark_period_ms must be positive and below silent_ms, replay_ms too")


class VllmSource:
    """An `EventSource` of tier `hbm`, without load: vLLM's events do not tell it."""

    def __init__(self, publisher: str, config: VllmConfig, metrics: RouterMetrics) -> None:
        self.publisher = publisher
        self._config = config
        self._metrics = metrics

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yield what the engine says; see `EventSource`."""
        while True:
            try:
                async with aclosing(self._follow_once()) as stream:
                    async for event in stream:
                        yield event
            except (BadInput, Unreachable, zmq.ZMQError) as error:
                kind = type(error).__name__
                self._metrics.source_faults.labels(source="vllm", error=kind).inc()
                yield Lost(str(error))
            await asyncio.sleep(self._config.mark_period_ms / 1_000)

    async def _follow_once(self) -> AsyncGenerator[Event, None]:
        """Yield the events of one connection; raises `Unreachable` when it ends."""
        config = self._config
        with _subscribed(config) as (context, socket, monitor):
            await self._connected(monitor)
            index, sequence = VllmIndex(config.root, config.hashes), 0
            batches = await self._replayed(context, 0)
            while True:
                # A fresh picture: what is known so far is its snapshot.
                if batches and batches[0][0] != 0:
                    index = VllmIndex(config.root, config.hashes)
                for _, payload in batches:
                    self._apply(index, payload)
                last = batches[-1][0] if batches else -1
                sequence = index.digest().count
                yield self._began(sequence)
                for change in index.held():
                    yield change
                yield Ended(sequence)
                gap: Batch | None = None
                async with aclosing(self._live(socket, monitor, context, last)) as live:
                    async for batch, whole in live:
                        if not whole:
                            gap = batch
                            break
                        for change in self._apply(index, batch[1]) if batch is not None else ():
                            yield replace(change, first_sequence=sequence + 1)
                            sequence += len(change.names)
                        if batch is None:
                            yield Marked(sequence, (index.digest(),))
                self._metrics.source_faults.labels(source="vllm", error="gap").inc()
                index = VllmIndex(config.root, config.hashes)
                batches = [gap] if gap is not None else []

    def _apply(self, index: VllmIndex, payload: bytes) -> list[Changed]:
        before = index.disagreed
        changes = index.apply(payload)
        if index.disagreed > before:
            faults = self._metrics.source_faults.labels(source="vllm", error="hash")
            faults.inc(index.disagreed - before)
        return changes

    def _began(self, sequence: int) -> Began:
        # Engines have no incarnation; a connection is the closest thing to it.
        return Began(self.publisher, time.time_ns() // 1_000_000, sequence, (TierKind.HBM,))

    async def _connected(self, monitor: Any) -> None:
        """Wait until the engine has answered; raises `Unreachable`."""
        try:
            async with asyncio.timeout(self._config.silent_ms / 1_000):
                while (await recv_monitor_message(monitor))["event"] != _UP:
                    pass
        except TimeoutError:
            raise Unreachable(f"nobody answers at {self._config.endpoint}") from None

    async def _live(
        self, socket: Any, monitor: Any, context: Any, last: int
    ) -> AsyncGenerator[tuple[Batch | None, bool], None]:
        """Yield batches in order, None when a mark is due, and (batch, False) behind a gap."""
        poller = zmq.asyncio.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            left_ms = max(0, int((due_s - loop.time()) * 1_000))
            ready = dict(await poller.poll(left_ms))
            if monitor in ready and (await recv_monitor_message(monitor))["event"] == _DOWN:
                raise Unreachable(f"nothing heard from {self._config.endpoint}: disconnected")
            if socket in ready:
                batch = _batch(await socket.recv_multipart())
                missing: Sequence[Batch] = ()
                if last >= 0 and batch[0] > last + 1:
                    replayed = await self._replayed(context, last + 1)
                    missing = [one for one in replayed if last < one[0] < batch[0]]
                    if [number for number, _ in missing] != list(range(last + 1, batch[0])):
                        yield batch, False
                for one in (*missing, batch):
                    if one[0] > last:  # replay and stream can both bring a message
                        last = one[0]
                        yield one, True
            if loop.time() >= due_s:
                due_s = loop.time() + self._config.mark_period_ms / 1_000
                yield None, True

    async def _replayed(self, context: Any, first: int) -> list[Batch]:
        """Return what the engine remembers from a number on; nothing without a replay endpoint."""
        if not self._config.replay:
            return []
        found: list[Batch] = []
        with context.socket(zmq.DEALER) as dealer:
            dealer.connect(self._config.replay)
            try:
                async with asyncio.timeout(self._config.replay_ms / 1_000):
                    await dealer.send_multipart([b"", first.to_bytes(8, "big")])
                    while (batch := _batch(await dealer.recv_multipart()))[0] != _END:
                        found.append(batch)
            except TimeoutError:
                raise Unreachable(f"no replay from {self._config.replay}") from None
        return found


_UP: Final = zmq.Event.HANDSHAKE_SUCCEEDED
_DOWN: Final = zmq.Event.DISCONNECTED


@contextmanager
def _subscribed(config: VllmConfig) -> Any:
    """Yield a context, its connecting SUB socket, and the one that tells of the connection."""
    context = zmq.asyncio.Context()
    try:
        socket = context.socket(zmq.SUB)
        socket.set(zmq.HEARTBEAT_IVL, config.mark_period_ms)
        socket.set(zmq.HEARTBEAT_TIMEOUT, config.silent_ms)
        socket.set(zmq.RCVHWM, 100_000)
        socket.set(zmq.SUBSCRIBE, config.topic.encode())
        monitor = socket.get_monitor_socket(_UP | _DOWN)
        socket.connect(config.endpoint)
        yield context, socket, monitor
    finally:
        # Not `term`, which waits for sockets: nothing is owed to an engine that is gone.
        context.destroy(linger=0)


def _batch(frames: Sequence[bytes]) -> Batch:
    """Return number and payload of `[…, number, payload]`, the end of both kinds of messages."""
    if len(frames) < 2 or len(frames[-2]) != 8:
        raise BadInput(f"a message of {len(frames)} frames has no number")
    return int.from_bytes(frames[-2], "big", signed=True), frames[-1]
