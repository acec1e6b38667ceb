"""Calls for those who do not map the arena: tickets, lending to other nodes, bytes through gRPC."""

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from kvstore.core.errors import BadInput, Refused, SessionLost, TooLarge
from kvstore.core.limits import GRANULE_BYTES, NAME_BYTES
from kvstore.core.outcomes import Outcome, SettleOutcome
from kvstore.core.slots import SlotState
from kvstore.rpc.convert import check_id, check_names, root_from_wire
from kvstore.rpc.identity import Role
from kvstore.rpc.v1 import cache_pb2
from kvstore.service.calls import Calls
from kvstore.service.requests import Context, deadline, now_ms, patience_s, peer_host, refs, split
from kvstore.service.reserver import Wanted
from kvstore.service.roots import BlockShape, RootInfo, keys_of
from kvstore.service.sessions import Session
from kvstore.tiers.sums import block_sum
from kvstore.transfer.lanes import Lane
from kvstore.transport.bulk_wire import MAX_BLOCKS

PIECE_BYTES: Final = 1 << 20
"""Of a block in one message of Get: far below the message limit, and few enough to a block."""


PUT_STALL_S: Final = 30.0
"""A stream of Put in which nothing comes for so long is given up."""


async def _in_time(
    requests: AsyncIterator[cache_pb2.PutRequest],
) -> AsyncIterator[cache_pb2.PutRequest]:
    """Pass requests on; raises `Refused` when none comes for `PUT_STALL_S`."""
    while True:
        try:
            async with asyncio.timeout(PUT_STALL_S):
                request = await anext(requests, None)
        except TimeoutError:
            raise Refused(f"nothing came for {PUT_STALL_S} s", retry_after_ms=0) from None
        if request is None:
            return
        yield request


class BulkCalls(Calls):
    """`Ticket`, `Lend`, `Get` and `Put`."""

    async def Ticket(
        self, request: cache_pb2.TicketRequest, context: Context
    ) -> cache_pb2.TicketReply:
        """Hand out a ticket to read leased slots, or to fill reserved ones."""
        with self._measured("Ticket"):
            session, info = self._rooted(context, request.root)
            read, write = refs(request.read, "read"), refs(request.write, "write")
            if bool(read) == bool(write):
                raise BadInput("a ticket is for slots to read or for slots to write, one of them")
            if len(read) + len(write) > MAX_BLOCKS:
                raise TooLarge(f"{len(read) + len(write)} slots; {MAX_BLOCKS} allowed")
            host, port = peer_host(context), self._parts.bulk
            if write:
                slots = self._store.writable(session, info, write)
                ticket, sums = port.take(session, info, slots, host=host), b""
            else:
                slots = self._store.readable(session, info, request.lease, read)
                await self._sealed(slots, patience_s(context, deadline_ms=1_000))
                if session.closed:
                    raise SessionLost("the session ended during the call")
                # Asked again: it may have been cleared, or the lease has run out, in between.
                slots = self._store.readable(session, info, request.lease, read)
                sums = self._sums(slots)
                ticket = port.lend(slots, session=session.number, host=host)
            return cache_pb2.TicketReply(
                ticket=ticket.token,
                bulk_address=ticket.address,
                expires_ms=ticket.expires_ms,
                sums=sums,
            )

    async def Lend(self, request: cache_pb2.LendRequest, context: Context) -> cache_pb2.LendReply:
        """Lend blocks of this node's own tiers to another node."""
        with self._measured("Lend"):
            self._needs(context, Role.PEER, "lending")
            count = check_names(request.names)
            if count > MAX_BLOCKS:
                raise TooLarge(f"{count} names; {MAX_BLOCKS} allowed")
            deadline_ms = deadline(request.deadline_ms)
            check_id(request.share_domain, "share_domain")
            shape = BlockShape(request.block_bytes, request.payload_bytes, request.shares)
            shape.check(self._store.table.space.data_bytes)
            root = root_from_wire(request.root)
            info = self._store.table.roots.open(root, shape, domain=request.share_domain)
            wait_s = patience_s(context, deadline_ms)
            outcomes = await self._bring_up(info, request.names, wait_s)
            table = self._store.table
            keys = keys_of(info, request.names)
            hits = [
                table.index[key]
                for key, outcome in zip(keys, outcomes, strict=True)
                if outcome is Outcome.HIT
            ]
            reply = cache_pb2.LendReply()
            reply.outcomes.extend(map(int, outcomes))  # type: ignore[arg-type]
            if hits:
                reply.sums = self._sums(hits)
                ticket = self._parts.bulk.lend(hits, session=0, host=peer_host(context))
                reply.ticket, reply.bulk_address = ticket.token, ticket.address
                reply.expires_ms = ticket.expires_ms
            return reply

    async def Get(
        self, request: cache_pb2.GetRequest, context: Context
    ) -> AsyncIterator[cache_pb2.GetReply]:
        """Send the bytes of the longest prefix. Slow: for languages with nothing else."""
        with self._measured("Get"):
            session, info = self._rooted(context, request.root)
            check_names(request.names)
            wait_s = patience_s(context, deadline(request.deadline_ms))
            acquired = self._store.acquire(
                session, info, request.names, reserve=0, first_block=0, now_ms=now_ms(),
                pending_ms=wait_s * 1_000,
            )  # fmt: skip
            self._below.movement.hurry(acquired.slots[acquired.ready :])
            self._below.movement.load(acquired.loads)
            try:
                names = split(request.names)
                for index, name in enumerate(names[: len(acquired.slots)]):
                    outcome = await self._readable(info, name, wait_s)
                    if outcome is not Outcome.HIT:
                        yield cache_pb2.GetReply(index=index, outcome=int(outcome))  # type: ignore[arg-type]
                        return
                    # Found anew and copied at once: a reader that dawdles outlives its lease.
                    slot = self._store.table.find(info, keys_of(info, name)[0], name)
                    assert slot is not None, "it was readable, and nothing ran in between"
                    for reply in self._pieces(info, slot, index):
                        yield reply
                if len(acquired.slots) < len(names):
                    miss = int(Outcome.MISS)
                    yield cache_pb2.GetReply(index=len(acquired.slots), outcome=miss)  # type: ignore[arg-type]
            finally:
                if acquired.lease and not session.closed:
                    self._store.release(session, [acquired.lease])

    async def Put(
        self, requests: AsyncIterator[cache_pb2.PutRequest], context: Context
    ) -> cache_pb2.PutReply:
        """Keep the blocks that a stream brings. Slow: for languages with nothing else."""
        with self._measured("Put"):
            session: Session | None = None
            info: RootInfo | None = None
            reply = cache_pb2.PutReply()
            piece: cache_pb2.PutRequest | None = None
            payload = bytearray()
            async for request in _in_time(requests):
                if session is None or info is None:
                    session, info = self._rooted(context, request.root)
                if piece is None or not payload:
                    piece, payload = request, bytearray()
                if request.name != piece.name or len(request.name) != NAME_BYTES:
                    raise BadInput(f"a name of {len(request.name)} bytes in the middle of a block")
                if len(payload) + len(request.data) > info.shape.payload_bytes:
                    raise TooLarge(f"a block of more than {info.shape.payload_bytes} bytes")
                payload += request.data
                if len(payload) == info.shape.payload_bytes:
                    outcome = self._keep(session, info, piece, payload)
                    reply.outcomes.append(int(outcome))  # type: ignore[arg-type]
                    payload = bytearray()
            if payload:
                raise BadInput(f"the last block ends after {len(payload)} bytes")
            return reply

    # -- parts -----------------------------------------------------------------------------

    async def _bring_up(self, info: RootInfo, packed: bytes, wait_s: float) -> list[Outcome]:
        """Move blocks up from this node's own disk; return what each came to."""
        await self._hasher.verify(self._store.unverified_of(info, packed), deadline_s=wait_s)
        wanted = Wanted(info, packed, keys_of(info, packed), 0, now_ms())
        movement = self._below.movement
        movement.load(movement.promoter.prefetch(wanted, wait_s * 1_000, own=True), Lane.LOAD)
        loop = asyncio.get_running_loop()
        items = list(zip(wanted.keys, split(packed), strict=True))
        try:
            async with asyncio.timeout_at(loop.time() + wait_s):
                for key, name in items:
                    while self._lendable(info, key, name) is None:
                        await self._hasher.progress()
        except TimeoutError:
            pass  # what is not there yet is late
        return [self._lendable(info, key, name) or Outcome.LATE for key, name in items]

    def _lendable(self, info: RootInfo, key: int, name: bytes) -> Outcome | None:
        """Return HIT for a block with a sum, MISS where none will come, None while one does."""
        table = self._store.table
        slot = table.find(info, key, name)
        if slot is None:
            return Outcome.MISS
        if table.state[slot] == SlotState.RESERVED:
            return None if self._below.movement.promoter.loading(slot) else Outcome.MISS
        if not table.servable[slot]:
            return Outcome.MISS
        return Outcome.HIT if table.state[slot] == SlotState.SEALED else None

    async def _sealed(self, slots: list[int], wait_s: float) -> None:
        """Wait until slots have their sums; raises `Refused` when that takes too long."""
        table = self._store.table
        try:
            async with asyncio.timeout(wait_s):
                while any(table.state[slot] == SlotState.COMMITTED for slot in slots):
                    await self._hasher.progress()
        except TimeoutError:
            raise Refused("blocks are still being hashed", retry_after_ms=10) from None

    async def _readable(self, info: RootInfo, name: bytes, wait_s: float) -> Outcome:
        key = keys_of(info, name)[0]
        try:
            async with asyncio.timeout(wait_s):
                while (outcome := self._store.outcome(info, key, name)) is None:
                    await self._hasher.progress()
        except TimeoutError:
            return Outcome.LATE
        return outcome

    def _sums(self, slots: list[int]) -> bytes:
        return b"".join(self._store.table.arena.record(slot).sum for slot in slots)

    def _payload(self, info: RootInfo, slot: int) -> memoryview:
        table = self._store.table
        offset = table.granules[slot] * GRANULE_BYTES
        return table.arena.block(offset, info.shape.block_bytes)[: info.shape.payload_bytes]

    def _pieces(self, info: RootInfo, slot: int, index: int) -> list[cache_pb2.GetReply]:
        payload, hit = self._payload(info, slot), int(Outcome.HIT)
        return [
            cache_pb2.GetReply(index=index, outcome=hit, data=bytes(payload[at : at + PIECE_BYTES]))  # type: ignore[arg-type]
            for at in range(0, len(payload), PIECE_BYTES)
        ]

    def _keep(
        self, session: Session, info: RootInfo, piece: cache_pb2.PutRequest, payload: bytearray
    ) -> Outcome:
        """Reserve, fill and commit one block at once: nobody else runs in between."""
        keys = keys_of(info, piece.name)
        wanted = Wanted(info, piece.name, keys, piece.position, now_ms())
        if self._store.outcome(info, keys[0], piece.name) is Outcome.HIT:
            return Outcome.HIT
        reserved = self._store.reserver.reserve(session, wanted, 0, 1)
        if not reserved.slots:
            return Outcome.REFUSED
        slot = reserved.slots[0]
        self._payload(info, slot)[:] = payload
        if session.arrived is not None:
            session.arrived[slot] = block_sum(memoryview(payload), info.shape.shares)
        generation = self._store.table.generation[slot]
        done = self._store.commit(session, info, [(slot, generation)], wanted.now_ms)
        self._hasher.seal_summed()
        self._hasher.wake()
        self._hasher.announce()
        kept = (SettleOutcome.DONE, SettleOutcome.DUPLICATE)
        return Outcome.HIT if done[0] in kept else Outcome.REFUSED
