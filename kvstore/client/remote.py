"""The client for those who cannot map the arena: other hosts, other users, other containers.

    get     Acquire ─ Wait ─ Ticket ─▶ bulk port ─▶ buffers, verified ─ Settle(release)
    put     Acquire(reserve) ─ Ticket ─▶ buffers ─▶ bulk port, verified ─ Settle(commit)

Bytes cross by plain sockets in threads, several at once, and are held against the sums that the
node made when it sealed the blocks. A session that is lost with its node comes back by itself.
"""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import grpc.aio

from kvstore.client.config import ClientConfig, check_deadline
from kvstore.client.copies import Payload
from kvstore.client.replies import (
    Acquired,
    Lookup,
    Names,
    NodeStats,
    SlotRef,
    acquired_from,
    lookup_from,
    outcomes_from,
    packed_names,
    settled_from,
    slot_refs,
    stats_from,
)
from kvstore.client.session import SESSION_KEY
from kvstore.core.errors import BadInput, KvStoreError, SessionLost, Unreachable
from kvstore.core.layout import round_up
from kvstore.core.limits import GRANULE_BYTES, NAME_BYTES
from kvstore.core.names import Namespace, Root
from kvstore.core.outcomes import Outcome, SettleOutcome
from kvstore.rpc.channel import open_channel
from kvstore.rpc.convert import namespace_to_proto
from kvstore.rpc.errors import error_from
from kvstore.rpc.v1 import cache_pb2, cache_pb2_grpc
from kvstore.tiers.sums import SUM_BYTES, block_sum
from kvstore.transport.base import Ticket
from kvstore.transport.bulk import DEFAULT_STREAMS, BulkTransport
from kvstore.transport.bulk_wire import MAX_BLOCKS

_STREAM_BYTES: Final = 8 << 20
"""A batch is cut into streams of at least this: a smaller one is over before another has begun."""
_Result = TypeVar("_Result")


class AsyncRemoteClient:
    """A session with a cache node over TCP; belongs to the event loop that connected it.

    Every call has a deadline and raises only `KvStoreError`s.
    """

    def __init__(
        self, address: str, opening: cache_pb2.OpenSessionRequest, config: ClientConfig
    ) -> None:
        """For `connect`: use that."""
        self.config = config
        self.root = Root(b"")
        self.node = ""
        self._opening = opening
        self._channel = open_channel(address)
        self._stub = cache_pb2_grpc.CacheNodeStub(self._channel)
        self._token = b""
        self._reopening = asyncio.Lock()
        self._transport = BulkTransport()
        self._keeping: asyncio.Task[None] | None = None
        self._session_ms = 0

    @classmethod
    async def connect(
        cls,
        address: str,
        *,
        namespace: Namespace,
        payload_bytes: int,
        shares: int,
        share_domain: str = "",
        name: str = "",
        config: ClientConfig | None = None,
    ) -> Self:
        """Open a session at `host:port` of a node's gRPC port.

        `payload_bytes` is a block before padding and `shares` its KV heads. Raises `Unreachable`
        when the node does not answer in time, `Refused`, `BadInput`, `Forbidden`.
        """
        opening = cache_pb2.OpenSessionRequest(
            namespace=namespace_to_proto(namespace),
            share_domain=share_domain,
            block_bytes=round_up(payload_bytes, GRANULE_BYTES),
            payload_bytes=payload_bytes,
            shares=shares,
            client=name or f"pid {os.getpid()}",
        )
        client = cls(address, opening, config or ClientConfig())
        try:
            await client._open(client.config.connect_ms)
        except BaseException:
            await client.close()
            raise
        client._keeping = asyncio.create_task(client._keep(), name="remote session")
        return client

    @property
    def block_bytes(self) -> int:
        """Bytes of a block on the wire, padding included."""
        return int(self._opening.block_bytes)

    @property
    def payload_bytes(self) -> int:
        """Bytes of a block before padding."""
        return int(self._opening.payload_bytes)

    async def lookup(self, names: Names, *, deadline_ms: int | None = None) -> Lookup:
        """Say what is at the node, without a lease: a hint."""
        request = partial(cache_pb2.LookupRequest, names=packed_names(names))
        reply = await self._call("Lookup", request, self._limit(deadline_ms, self.config.call_ms))
        return lookup_from(reply)

    async def stats(self, *, deadline_ms: int | None = None) -> NodeStats:
        """Return the node's sizes, hits and misses."""
        limit = self._limit(deadline_ms, self.config.call_ms)
        return stats_from(await self._call("Stats", _rootless(cache_pb2.StatsRequest), limit))

    async def get(self, names: Names, *, deadline_ms: int | None = None) -> list[memoryview]:
        """Return the payloads of the longest prefix that the node has, verified."""
        count = len(packed_names(names)) // NAME_BYTES
        buffers = [memoryview(bytearray(self.block_bytes)) for _ in range(count)]
        got = await self.get_into(names, buffers, deadline_ms=deadline_ms)
        return [buffer[: self.payload_bytes] for buffer in buffers[:got]]

    async def get_into(
        self, names: Names, buffers: Sequence[memoryview], *, deadline_ms: int | None = None
    ) -> int:
        """Fill `buffers` (`block_bytes` each) with the longest prefix; return how many blocks.

        Buffers beyond those hold rubbish.
        """
        limit = self._limit(deadline_ms, self.config.transfer_ms)
        packed = packed_names(names)
        if any(len(buffer) != self.block_bytes for buffer in buffers):
            raise BadInput(f"a buffer is not {self.block_bytes} bytes long")
        if len(buffers) != len(packed) // NAME_BYTES:
            raise BadInput(f"{len(buffers)} buffers for {len(packed) // NAME_BYTES} names")
        request = partial(cache_pb2.AcquireRequest, names=packed, deadline_ms=limit)
        acquired = acquired_from(await self._call("Acquire", request, limit), 0)
        try:
            refs = acquired.ready + await self._arrived(acquired, packed, limit)
            return await self._fetch(acquired.lease, refs, buffers, limit)
        finally:
            if acquired.lease:
                await self._release(acquired.lease)

    async def put(
        self,
        names: Names,
        payloads: Sequence[Payload],
        *,
        first_block: int = 0,
        deadline_ms: int | None = None,
    ) -> list[SettleOutcome | None]:
        """Store `payloads[i]` under `names[i]`; return what became of each.

        None: the node gave no slot for it, because it has the block, because another session is
        computing it, or because it is full; or its bytes did not get there.
        """
        limit = self._limit(deadline_ms, self.config.transfer_ms)
        packed = packed_names(names)
        count = len(packed) // NAME_BYTES
        sources = [memoryview(payload).cast("B") for payload in payloads]
        if len(sources) != count:
            raise BadInput(f"{len(sources)} payloads for {count} names")
        if any(len(source) != self.payload_bytes for source in sources):
            raise BadInput(f"a payload is not {self.payload_bytes} bytes long")
        request = partial(
            cache_pb2.AcquireRequest, names=packed, reserve=count, first_block=first_block
        )
        acquired = acquired_from(await self._call("Acquire", request, limit), 0)
        slots = [item.slot for item in acquired.reserved]
        padded = [self._padded(sources[item.index]) for item in acquired.reserved]
        sent: list[Outcome] = []
        try:
            sent = await self._send(slots, padded, limit)
        finally:
            kept = [ref for ref, one in zip(slots, sent, strict=False) if one is Outcome.HIT]
            given = [ref for ref in slots if ref not in kept]
            settled = await self._settle(kept, given, acquired.lease, limit)
        outcomes: list[SettleOutcome | None] = [None] * count
        committed = dict(zip(kept, settled, strict=True))
        for item in acquired.reserved:
            outcomes[item.index] = committed.get(item.slot)
        return outcomes

    async def close(self) -> None:
        """End the session. Harmless when repeated."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        if self._token:
            with contextlib.suppress(KvStoreError):  # the node ends what is not heard of
                await self._once("CloseSession", cache_pb2.CloseSessionRequest(), 100)
            self._token = b""
        await self._transport.close()
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # -- bytes -----------------------------------------------------------------------------

    async def _fetch(
        self, lease: int, refs: list[SlotRef], buffers: Sequence[memoryview], limit: int
    ) -> int:
        """Fetch leased slots; return how many came whole, counted from the first."""

        async def one(start: int, stop: int) -> list[Outcome]:
            request = partial(
                cache_pb2.TicketRequest, read=slot_refs(refs[start:stop]), lease=lease
            )
            reply = await self._call("Ticket", request, limit)
            verify = partial(self._is_whole, reply.sums)
            return await self._transport.fetch(
                _ticket(reply), buffers[start:stop], stall_deadline_ms=limit, verify=verify
            )

        outcomes = await self._in_streams(len(refs), one)
        hits = [outcome is Outcome.HIT for outcome in outcomes]
        return hits.index(False) if False in hits else len(hits)

    async def _send(
        self, slots: list[SlotRef], blocks: Sequence[memoryview], limit: int
    ) -> list[Outcome]:
        async def one(start: int, stop: int) -> list[Outcome]:
            request = partial(cache_pb2.TicketRequest, write=slot_refs(slots[start:stop]))
            reply = await self._call("Ticket", request, limit)
            return await self._transport.send(
                _ticket(reply), blocks[start:stop], stall_deadline_ms=limit, digest=self._digest
            )

        return await self._in_streams(len(slots), one)

    async def _in_streams(
        self, count: int, one: Callable[[int, int], Awaitable[list[Outcome]]]
    ) -> list[Outcome]:
        """Cut a batch into parts that move at once, and put their outcomes together again."""
        least = max(1, _STREAM_BYTES // self.block_bytes)
        part = min(max(least, -(-count // DEFAULT_STREAMS)), MAX_BLOCKS)
        moves = [one(start, min(start + part, count)) for start in range(0, count, part)]
        return [outcome for outcomes in await asyncio.gather(*moves) for outcome in outcomes]

    def _digest(self, block: memoryview) -> bytes:
        return block_sum(block[: self.payload_bytes], int(self._opening.shares))

    def _is_whole(self, sums: bytes, index: int, block: memoryview) -> bool:
        return self._digest(block) == sums[index * SUM_BYTES : (index + 1) * SUM_BYTES]

    def _padded(self, payload: memoryview) -> memoryview:
        if self.payload_bytes == self.block_bytes:
            return payload
        return memoryview(bytes(payload) + bytes(self.block_bytes - self.payload_bytes))

    # -- calls -----------------------------------------------------------------------------

    async def _arrived(self, acquired: Acquired, packed: bytes, limit: int) -> list[SlotRef]:
        """Wait for what is on its way; return what is there, counted from the first."""
        if not acquired.pending:
            return []
        first = len(acquired.ready) * NAME_BYTES
        wanted = packed[first : first + len(acquired.pending) * NAME_BYTES]
        request = partial(cache_pb2.WaitRequest, names=wanted, deadline_ms=limit)
        reply = await self._call("Wait", request, limit + self.config.call_ms)
        hits = [outcome is Outcome.HIT for outcome in outcomes_from(reply)]
        return acquired.pending[: hits.index(False) if False in hits else len(hits)]

    async def _settle(
        self, commit: list[SlotRef], abort: list[SlotRef], lease: int, limit: int
    ) -> list[SettleOutcome]:
        request = partial(
            cache_pb2.SettleRequest,
            commit=slot_refs(commit),
            abort=slot_refs(abort),
            release=[lease] if lease else [],
        )
        return settled_from(await self._call("Settle", request, limit)).commit

    async def _release(self, lease: int) -> None:
        request = partial(cache_pb2.SettleRequest, release=[lease])
        with contextlib.suppress(KvStoreError):  # it runs out by itself
            await self._call("Settle", request, self.config.call_ms)

    async def _call(self, method: str, request: Callable[..., Any], limit: int) -> Any:
        """Make a call under our root, once more after the node has lost us."""
        token = self._token
        try:
            return await self._once(method, request(root=self.root), limit)
        except SessionLost:
            async with self._reopening:
                if self._token == token:
                    await self._open(limit)
            return await self._once(method, request(root=self.root), limit)

    async def _once(self, method: str, request: Any, limit: int) -> Any:
        metadata = ((SESSION_KEY, self._token),) if self._token else ()
        stub = getattr(self._stub, method)
        try:
            return await stub(request, timeout=limit / 1_000, metadata=metadata)
        except grpc.aio.AioRpcError as failure:
            raise error_from(failure) from failure

    async def _open(self, limit: int) -> None:
        self._token = b""
        reply = await self._once("OpenSession", self._opening, limit)
        if self.root and reply.root != self.root:
            raise SessionLost("the node derives another root than before: its cluster key changed")
        self.root, self.node = Root(reply.root), str(reply.node)
        self._token, self._session_ms = bytes(reply.session_token), int(reply.session_ms)
        if not self._session_ms:
            raise Unreachable("the node's answer does not say how long the session lives")

    async def _keep(self) -> None:
        """Be heard of a few times in each life of a session."""
        while True:
            await asyncio.sleep(self._session_ms / 3_000)
            with contextlib.suppress(KvStoreError):  # the next call of the user tells
                await self._call("Settle", cache_pb2.SettleRequest, self.config.call_ms)

    @staticmethod
    def _limit(asked: int | None, default: int) -> int:
        return default if asked is None else check_deadline("deadline_ms", asked)


def _rootless(request: Callable[[], _Result]) -> Callable[..., _Result]:
    return lambda root: request()


def _ticket(reply: cache_pb2.TicketReply) -> Ticket:
    return Ticket(bytes(reply.ticket), str(reply.bulk_address), int(reply.expires_ms))
