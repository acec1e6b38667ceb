"""One session with one keeper: its socket, its arena, its root, and calls that survive the node.

Two things can die behind a session, and they differ:

- the **cache node**: its keeper starts another, which knows this session by its token. A call that
  finds the node gone opens the root again and is repeated, within its own deadline;
- the **keeper**: the socket ends, the session and the arena with it. `lost` turns true, calls in
  flight and later ones raise `Unreachable` at once; `AsyncClient` makes another session.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc.aio

from kvstore.client.arena import SharedArena
from kvstore.core.errors import BadInput, KvStoreError, SessionLost, Unreachable
from kvstore.core.layout import round_up
from kvstore.core.limits import GRANULE_BYTES, MAX_BLOCK_BYTES
from kvstore.core.names import Namespace, Root
from kvstore.observe.tracing import CURRENT, to_metadata
from kvstore.rpc.channel import open_channel
from kvstore.rpc.convert import namespace_to_proto
from kvstore.rpc.credentials import NO_CREDENTIALS, Credentials
from kvstore.rpc.errors import error_from
from kvstore.rpc.v1 import cache_pb2, cache_pb2_grpc
from kvstore.transport.arena import ArenaMapping
from kvstore.transport.session_socket import Grant, Hello, connect_session

SESSION_KEY: Final = "kvstore-session-bin"
SOCKET_NAME: Final = "keeper.sock"
_ATTEMPTS: Final = 4
_RETRY_PAUSE_S: Final = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What a client wants to share: the same for every session that it makes."""

    socket_path: str
    namespace: Namespace
    payload_bytes: int
    """Bytes of a block before padding."""
    shares: int
    share_domain: str
    name: str
    pids: tuple[int, ...]
    credentials: Credentials = NO_CREDENTIALS

    def __post_init__(self) -> None:
        if not 0 < self.payload_bytes <= MAX_BLOCK_BYTES:
            raise BadInput(f"payload_bytes is {self.payload_bytes}; 1 to {MAX_BLOCK_BYTES} allowed")
        if self.shares <= 0 or self.payload_bytes % self.shares:
            raise BadInput(f"payload of {self.payload_bytes} bytes in {self.shares} shares")

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in the arena, padding included."""
        return round_up(self.payload_bytes, GRANULE_BYTES)


class Session:
    """An open session. Made by `Session.start`; all methods belong to one event loop."""

    def __init__(
        self, access: Access, grant: Grant, sock: socket.socket, arena: SharedArena
    ) -> None:
        self.grant = grant
        self.arena = arena
        self.root = Root(b"")
        self.incarnation = grant.incarnation
        self.lease_ms = 0
        self.lost = False
        self.openings = 0
        """How often the root was opened: more than once means that the node was restarted."""
        self._access = access
        self._socket = sock
        self._channel = open_channel(grant.rpc)
        self._stub = cache_pb2_grpc.CacheNodeStub(self._channel)
        self._metadata: tuple[tuple[str, str | bytes], ...] = (
            (SESSION_KEY, grant.token),
            *access.credentials.metadata(),
        )
        self._untraced = grpc.aio.Metadata(*self._metadata)  # made once: a call's costs 5 us
        self._opening = asyncio.Lock()
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def start(cls, access: Access, *, arena_number: int, deadline_ms: int) -> "Session":
        """Shake hands, map the arena, open the root. Raises what `connect_session` does."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + deadline_ms / 1000
        grant, mapping, sock = await _handshake(access, deadline_ms)
        arena = SharedArena(mapping, number=arena_number, block_bytes=access.block_bytes)
        session = cls(access, grant, sock, arena)
        try:
            await session._open(ends)
        except BaseException:
            await session.close()
            raise
        return session

    def watch(self, on_lost: Callable[["Session"], None]) -> None:
        """Call `on_lost` once when the keeper hangs up."""

        def readable() -> None:
            # The keeper says nothing after its grant: readable means that it is gone.
            self._abandon()
            on_lost(self)

        self._socket.setblocking(False)
        self._loop.add_reader(self._socket, readable)

    async def call(self, method: str, request: Any, *, deadline_ms: int) -> Any:
        """Make one call of the CacheNode service; repeat it on a restarted node.

        Raises our errors only, and none later than the deadline.
        """
        ends = self._loop.time() + deadline_ms / 1000
        stub = getattr(self._stub, method)
        for attempt in range(_ATTEMPTS):
            openings = self.openings
            try:
                return await self._once(stub, request, ends)
            except grpc.aio.AioRpcError as failure:
                error = error_from(failure)
                node_gone = failure.code() is grpc.StatusCode.UNAVAILABLE
                if not (node_gone or isinstance(error, SessionLost)) or attempt + 1 == _ATTEMPTS:
                    raise error from failure
            await self._reopen(openings, ends, pause=attempt > 0)
        raise AssertionError("the last attempt returns or raises")

    async def close(self, *, writers_gone: bool = True) -> None:
        """Give everything back. Harmless when the session is lost or closed before.

        `writers_gone` false: reserved slots are kept back until the processes end.
        """
        if not self.lost and writers_gone:
            with contextlib.suppress(KvStoreError):  # the socket's end says the same
                await self.call("CloseSession", cache_pb2.CloseSessionRequest(), deadline_ms=100)
        self._abandon()
        await self._channel.close(None)

    def _abandon(self) -> None:
        self.lost = True
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()

    async def _once(
        self, stub: Any, request: Any, ends: float, *, wait_for_ready: bool = False
    ) -> Any:
        left = self._time_left(ends)
        trace = to_metadata(CURRENT.get())
        metadata = (*self._metadata, *trace) if trace else self._untraced
        call = stub(request, timeout=left, metadata=metadata, wait_for_ready=wait_for_ready)
        try:
            return await call
        except asyncio.CancelledError:
            # A closing channel cancels its calls; only our caller's own cancellation passes on.
            task = asyncio.current_task()
            if self.lost and task is not None and not task.cancelling():
                raise Unreachable("the keeper died during the call") from None
            raise

    async def _once_ready(self, stub: Any, request: Any, ends: float) -> Any:
        """Make a call as soon as the node is there; raises our errors, none after `ends`."""
        while True:
            try:
                return await self._once(stub, request, ends, wait_for_ready=True)
            except grpc.aio.AioRpcError as failure:
                error = error_from(failure)
                # The connection of a node that has just died looks ready until it is used.
                if failure.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise error from failure
                if self._loop.time() + _RETRY_PAUSE_S >= ends:
                    raise error from failure
            await asyncio.sleep(_RETRY_PAUSE_S)

    def _time_left(self, ends: float) -> float:
        if self.lost:
            raise Unreachable("the keeper is gone; a new session is being made")
        left = ends - self._loop.time()
        if left <= 0:
            raise Unreachable("the cache node did not answer within the deadline")
        return left

    async def _reopen(self, openings: int, ends: float, *, pause: bool) -> None:
        try:
            async with asyncio.timeout_at(ends):
                if pause:  # the node answers and loses us again: do not spin on it
                    await asyncio.sleep(_RETRY_PAUSE_S)
                async with self._opening:
                    if self.openings == openings:
                        await self._open(ends)
        except TimeoutError as error:
            raise Unreachable("the cache node did not come back within the deadline") from error

    async def _open(self, ends: float) -> None:
        access = self._access
        request = cache_pb2.OpenSessionRequest(
            namespace=namespace_to_proto(access.namespace),
            share_domain=access.share_domain,
            block_bytes=access.block_bytes,
            payload_bytes=access.payload_bytes,
            shares=access.shares,
            client=access.name,
        )
        reply = await self._once_ready(self._stub.OpenSession, request, ends)
        if self.root and reply.root != self.root:
            raise SessionLost("the node derives another root than before: its cluster key changed")
        self.root = Root(reply.root)
        self.incarnation = reply.incarnation
        self.lease_ms = reply.lease_ms
        self.openings += 1


def socket_path(where: str | Path) -> str:
    """Return the keeper's socket for a run directory, or `where` when it is a socket itself."""
    path = Path(where)
    return str(path / SOCKET_NAME if path.is_dir() else path)


async def _handshake(access: Access, deadline_ms: int) -> tuple[Grant, ArenaMapping, socket.socket]:
    """Do the blocking part in a thread; a cancelled caller leaves nothing open."""
    loop = asyncio.get_running_loop()
    work = loop.run_in_executor(None, _handshake_blocking, access, deadline_ms)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(_discard)
        raise


def _handshake_blocking(
    access: Access, deadline_ms: int
) -> tuple[Grant, ArenaMapping, socket.socket]:
    hello = Hello(access.name, access.pids)
    grant, arena_fd, sock = connect_session(access.socket_path, hello, deadline_ms=deadline_ms)
    try:
        mapping = ArenaMapping(arena_fd)
        mapping.prefault_soon()
        return grant, mapping, sock
    except OSError as error:
        sock.close()
        raise Unreachable(f"the arena cannot be mapped: {error}") from error
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(arena_fd)


def _discard(work: "asyncio.Future[tuple[Grant, ArenaMapping, socket.socket]]") -> None:
    if not work.cancelled() and work.exception() is None:
        work.result()[2].close()
