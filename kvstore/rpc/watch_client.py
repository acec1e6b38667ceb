"""Follows one publisher through its `Watch` call, for ever."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

import grpc.aio

from kvstore.core.errors import BadInput, KvStoreError, Unreachable
from kvstore.core.limits import MARK_PERIOD_MS
from kvstore.core.names import Root
from kvstore.directory.events import Event, Lost
from kvstore.rpc.channel import open_channel
from kvstore.rpc.convert import event_from_reply
from kvstore.rpc.credentials import NO_CREDENTIALS, Credentials
from kvstore.rpc.errors import error_from
from kvstore.rpc.v1 import cache_pb2_grpc, watch_pb2, worker_pb2_grpc

PublisherKind = Literal["node", "worker"]


@dataclass(frozen=True, slots=True)
class WatchConfig:
    """How patient a follower is. Milliseconds."""

    subscriber: str = "router"
    """Who we are, for people."""
    root: Root | None = None
    """Follow blocks under this root alone; marks then speak of more than is told."""
    stall_ms: int = 20 * MARK_PERIOD_MS
    """Without any message for so long the call is given up and made anew."""
    min_backoff_ms: int = 100
    max_backoff_ms: int = 2_000

    def __post_init__(self) -> None:
        if not MARK_PERIOD_MS < self.stall_ms:
            raise BadInput(f"stall_ms {self.stall_ms} is not above the {MARK_PERIOD_MS} of a mark")
        if not 0 < self.min_backoff_ms <= self.max_backoff_ms:
            raise BadInput("backoff must be positive and min_backoff_ms at most max_backoff_ms")


class WatchClient:
    """Reconnects with backoff, says `Lost` whenever a call ended.

    Nothing is queued here: gRPC's flow control holds the publisher back while the view works.
    """

    def __init__(
        self,
        address: str,
        kind: PublisherKind,
        config: WatchConfig | None = None,
        credentials: Credentials = NO_CREDENTIALS,
    ) -> None:
        self._credentials = credentials
        self._address = address
        self._kind = kind
        self._config = config or WatchConfig()
        self._credentials = credentials

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yield what the publisher says; never raises for a fault of it or of the network."""
        backoff_ms = self._config.min_backoff_ms
        while True:
            reason = "its stream ended"
            try:
                async with aclosing(self._follow_once()) as stream:
                    async for event in stream:
                        backoff_ms = self._config.min_backoff_ms
                        yield event
            except KvStoreError as error:
                reason = f"{type(error).__name__}: {error}"
            yield Lost(reason)
            await asyncio.sleep(backoff_ms / 1_000)
            backoff_ms = min(backoff_ms * 2, self._config.max_backoff_ms)

    async def _follow_once(self) -> AsyncGenerator[Event, None]:
        """Yield the events of one call; raises our errors when it fails or stalls."""
        request = watch_pb2.WatchRequest(
            subscriber=self._config.subscriber, root=self._config.root or b""
        )
        async with open_channel(self._address, self._credentials) as channel:
            call = self._open(channel, request)
            try:
                while (reply := await self._read(call)) is not None:
                    event = event_from_reply(reply)
                    if event is not None:
                        yield event
            except grpc.aio.AioRpcError as failure:
                raise error_from(failure) from failure
            finally:
                call.cancel()

    def _open(
        self, channel: grpc.aio.Channel, request: watch_pb2.WatchRequest
    ) -> "grpc.aio.UnaryStreamCall[watch_pb2.WatchRequest, watch_pb2.WatchReply]":
        """Make the call: nodes and workers serve the same messages under their own names."""
        if self._kind == "worker":
            return worker_pb2_grpc.WorkerStub(channel).Watch(request)  # type: ignore[no-any-return]
        return cache_pb2_grpc.CacheNodeStub(channel).Watch(request)  # type: ignore[no-any-return]

    async def _read(
        self, call: "grpc.aio.UnaryStreamCall[watch_pb2.WatchRequest, watch_pb2.WatchReply]"
    ) -> watch_pb2.WatchReply | None:
        """Return the next message, None at the end; raises `Unreachable` on silence."""
        try:
            async with asyncio.timeout(self._config.stall_ms / 1_000):
                reply = await call.read()
        except TimeoutError:
            raise Unreachable(f"nothing heard for {self._config.stall_ms} ms") from None
        return reply if isinstance(reply, watch_pb2.WatchReply) else None
