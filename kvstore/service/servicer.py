"""The gRPC service of a cache node: checks every field, asks the store, fills the reply."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, MutableSequence, Sequence
from contextlib import aclosing
from operator import or_
from typing import Any, Final

import numpy as np

from kvstore.core.errors import (
    BadInput,
    Forbidden,
    Refused,
    SessionLost,
    TooLarge,
    Unsupported,
)
from kvstore.core.limits import MAX_NAMES_PER_CALL, NAME_BYTES
from kvstore.core.names import BlockName, derive_root
from kvstore.core.outcomes import MissReason, Outcome, SettleOutcome
from kvstore.directory.events import TierKind
from kvstore.rpc.convert import check_id, check_names, namespace_from_proto, root_from_wire
from kvstore.rpc.gate import metadata_of
from kvstore.rpc.identity import Principal, Role
from kvstore.rpc.v1 import cache_pb2, cache_pb2_grpc, types_pb2, watch_pb2
from kvstore.rpc.watch_server import serve_watch
from kvstore.service.bulk_calls import BulkCalls
from kvstore.service.calls import SESSION_KEY, ServiceParts
from kvstore.service.clearing import clear
from kvstore.service.requests import (
    Context,
    deadline,
    now_ms,
    patience_s,
    refs,
    split,
)
from kvstore.service.reserver import Hints, Wanted
from kvstore.service.resident import held
from kvstore.service.roots import BlockShape, RootInfo, key_column, keys_of
from kvstore.service.sessions import Session
from kvstore.service.statistics import stats_reply
from kvstore.service.store import Acquired
from kvstore.transfer.lanes import Lane

MAX_WAITERS: Final = 1_024
_REASONS: Final = {reason: types_pb2.MissReason.Name(int(reason)) for reason in MissReason}
_DRAM_BIT: Final = 1 << int(TierKind.DRAM)
_SERVED_GROUP: Final = "full"
_DEPTH_COST_MAX: Final = 16.0
"""A block that costs only by what it looks back on has 2."""
MAX_PIN_MS: Final = 86_400_000
"""A day: longer is a mistake in units, or wants another tier."""


class CacheNodeService(BulkCalls, cache_pb2_grpc.CacheNodeServicer):  # type: ignore[misc]
    """Answers `CacheNode` calls; one instance per node, on one event loop."""

    def __init__(self, parts: ServiceParts) -> None:
        super().__init__(parts)
        self._waiters = 0

    # -- sessions --------------------------------------------------------------------------

    async def OpenSession(
        self, request: cache_pb2.OpenSessionRequest, context: Context
    ) -> cache_pb2.OpenSessionReply:
        """Open a root for a session."""
        with self._measured("OpenSession"):
            principal = self._principal(context)
            if request.share_domain not in ("", principal.share_domain):
                raise Forbidden(f"share domain {request.share_domain!r:.80} is not the caller's")
            check_id(request.client, "client")
            namespace = namespace_from_proto(request.namespace)
            if namespace.group != _SERVED_GROUP:
                raise Unsupported(f"layer group {namespace.group!r:.80} is not served yet")
            shape = BlockShape(request.block_bytes, request.payload_bytes, request.shares)
            shape.check(self._store.table.space.data_bytes)
            root = derive_root(self._parts.cluster_key, namespace.digest(), principal.share_domain)
            info = self._store.table.roots.open(root, shape, domain=principal.share_domain)
            session = self._opening_session(context, principal)
            session.roots[root] = info
            session.client = request.client or session.client
            return cache_pb2.OpenSessionReply(
                session_token=session.token,
                root=root,
                incarnation=self._incarnation,
                lease_ms=self._store.limits.lease_ms,
                reserve_quota_bytes=self._store.limits.reserve_quota_bytes,
                node=self._parts.name,
                session_ms=self._parts.remote.session_ms(session),
            )

    async def CloseSession(
        self, request: cache_pb2.CloseSessionRequest, context: Context
    ) -> cache_pb2.CloseSessionReply:
        """End a session at its client's word: nothing of it reads or writes any more."""
        with self._measured("CloseSession"):
            session = self._session(context)
            if session.arrived is not None:
                leases, reserved = self._parts.remote.end(session)
            else:
                leases, reserved = self._store.close(session, writers_gone=True)
            self._hasher.announce()
            return cache_pb2.CloseSessionReply(
                leases_released=leases, reservations_aborted=reserved
            )

    def _opening_session(self, context: Context, principal: Principal) -> Session:
        """Return the caller's session: its own, or a new remote one where it has none."""
        if metadata_of(context).get(SESSION_KEY):
            return self._session(context)
        return self._parts.remote.open(principal.name, now_ms())

    # -- blocks ----------------------------------------------------------------------------

    async def Acquire(
        self, request: cache_pb2.AcquireRequest, context: Context
    ) -> cache_pb2.AcquireReply:
        """Lease what is here, reserve slots for what is not."""
        with self._measured("Acquire"):
            session, info = self._rooted(context, request.root)
            count = check_names(request.names)
            if request.reserve > count:
                raise BadInput(f"reserve {request.reserve} is more than {count} names")
            if request.first_block + count > MAX_NAMES_PER_CALL:
                raise TooLarge(f"blocks beyond number {MAX_NAMES_PER_CALL} of a prompt")
            deadline_ms = deadline(request.deadline_ms)
            check_id(request.kind, "kind")
            if not 0 <= request.depth_cost <= _DEPTH_COST_MAX:
                raise BadInput(f"depth_cost {request.depth_cost}; 0 to {_DEPTH_COST_MAX} allowed")
            self._parts.recorders.note(request.first_block, request.names)
            if self._hasher.unverified:
                unverified = self._store.unverified(info, request.names)
                await self._hasher.verify(unverified, deadline_s=patience_s(context, deadline_ms))
                if session.closed:
                    raise SessionLost("the session ended during the call")
            answer = self._store.acquire(
                session,
                info,
                request.names,
                reserve=request.reserve,
                first_block=request.first_block,
                now_ms=now_ms(),
                pending_ms=deadline_ms,
                hints=Hints(request.kind, request.depth_cost),
            )
            if answer.tiers:
                self._below.movement.hurry(answer.slots[answer.ready :])
                self._below.movement.load(answer.loads)
            self._explain_corruption(info, request.names, answer)
            asyncio.get_running_loop().call_soon(self._store.flush_requests)
            return self._acquire_reply(answer)

    async def Settle(
        self, request: cache_pb2.SettleRequest, context: Context
    ) -> cache_pb2.SettleReply:
        """Commit, abort and release in one batch."""
        with self._measured("Settle"):
            session, info = self._rooted(context, request.root)
            commit = refs(request.commit, "commit")
            abort = refs(request.abort, "abort")
            # Checked and not used: nothing tells the node when a worker drops the page again.
            refs(request.kept_in_hbm, "kept_in_hbm")
            if len(request.release) > MAX_NAMES_PER_CALL:
                raise TooLarge(f"{len(request.release)} leases in one call")
            committed = self._store.commit(session, info, commit, now_ms())
            aborted = self._store.abort(session, info, abort)
            released = self._store.release(session, request.release)
            if commit or abort:
                self._hasher.seal_summed()
                self._hasher.wake()
                self._hasher.announce()
                asyncio.get_running_loop().call_soon(self._store.flush_requests)
            reply = cache_pb2.SettleReply()
            for kind, outcomes, field in (
                ("commit", committed, reply.commit),
                ("abort", aborted, reply.abort),
                ("release", released, reply.release),
            ):
                for outcome, count in _extend(field, outcomes).items():
                    self._parts.metrics.settled.labels(kind, outcome.name.lower()).inc(count)
            return reply

    async def ReservePrivate(
        self, request: cache_pb2.ReservePrivateRequest, context: Context
    ) -> cache_pb2.ReservePrivateReply:
        """Reserve slots that hold no block."""
        with self._measured("ReservePrivate"):
            session, _ = self._rooted(context, request.root)
            if session.arrived is not None:
                raise BadInput("private slots are for sessions that map the arena")
            if not 0 < request.count <= MAX_NAMES_PER_CALL:
                raise BadInput(f"count {request.count}; 1 to {MAX_NAMES_PER_CALL} allowed")
            slots, reason = self._store.private.reserve(
                session, request.block_bytes, request.count, now_ms()
            )
            self._hasher.announce()
            offsets, generations = self._store.table.places(slots)
            return cache_pb2.ReservePrivateReply(
                slots=slots,
                offsets=offsets,
                generations=generations,
                reason=_REASONS[reason],
            )

    async def Wait(self, request: cache_pb2.WaitRequest, context: Context) -> cache_pb2.WaitReply:
        """Wait until names turned readable, nobody makes them, or the deadline passed."""
        with self._measured("Wait"):
            _, info = self._rooted(context, request.root)
            check_names(request.names)
            deadline_ms = deadline(request.deadline_ms)
            if self._waiters >= MAX_WAITERS:
                raise Refused(f"{MAX_WAITERS} calls wait already", retry_after_ms=100)
            self._waiters += 1
            try:
                outcomes = await self._wait(info, request.names, deadline_ms / 1_000)
            finally:
                self._waiters -= 1
            reply = cache_pb2.WaitReply()
            reply.outcomes.extend(map(int, outcomes))  # type: ignore[arg-type]
            return reply

    async def Lookup(
        self, request: cache_pb2.LookupRequest, context: Context
    ) -> cache_pb2.LookupReply:
        """Say what is here, without a lease."""
        with self._measured("Lookup"):
            _, info = self._rooted(context, request.root)
            check_names(request.names)
            here = held(self._store.table, info, request.names, key_column(info, request.names))
            found = (here * np.uint8(_DRAM_BIT)).tobytes()
            if self._below.lowers:
                names = map(BlockName, split(request.names))
                below = (self._below.bits(info.root, name) for name in names)
                found = bytes(map(or_, found, below))
            hole = found.find(b"\0")
            return cache_pb2.LookupReply(prefix=len(found) if hole < 0 else hole, tiers=found)

    async def Prefetch(
        self, request: cache_pb2.PrefetchRequest, context: Context
    ) -> cache_pb2.PrefetchReply:
        """Start moving blocks up that are held below only."""
        with self._measured("Prefetch"):
            _, info = self._rooted(context, request.root)
            check_names(request.names)
            deadline_ms = deadline(request.deadline_ms)
            keys = keys_of(info, request.names)
            wanted = Wanted(info, request.names, keys, 0, now_ms())
            movement = self._below.movement
            loads = movement.promoter.prefetch(wanted, deadline_ms)
            return cache_pb2.PrefetchReply(started=movement.load(loads, Lane.PREFETCH))

    async def Pin(self, request: cache_pb2.PinRequest, context: Context) -> cache_pb2.PinReply:
        """Keep blocks for a time, or no longer."""
        with self._measured("Pin"):
            _, info = self._rooted(context, request.root)
            check_names(request.names)
            if request.ttl_ms > MAX_PIN_MS:
                raise BadInput(f"ttl_ms {request.ttl_ms}; {MAX_PIN_MS} allowed")
            pins = self._store.pins
            if request.ttl_ms:
                pinned = pins.pin(info, request.names, request.ttl_ms, now_ms())
            else:
                pinned = pins.unpin(info, request.names)
            return cache_pb2.PinReply(pinned=pinned)

    async def Clear(
        self, request: cache_pb2.ClearRequest, context: Context
    ) -> cache_pb2.ClearReply:
        """Forget a root, or everything, in every tier of this node."""
        with self._measured("Clear"):
            self._needs(context, Role.ADMIN, "clearing")
            root = root_from_wire(request.root) if request.root else None
            return cache_pb2.ClearReply(
                blocks=await clear(self._store, self._below.stored.values(), root)
            )

    # -- the node --------------------------------------------------------------------------

    async def Stats(
        self, request: cache_pb2.StatsRequest, context: Context
    ) -> cache_pb2.StatsReply:
        """Count what is held."""
        with self._measured("Stats"):
            self._principal(context)
            return stats_reply(
                self._parts.name,
                self._store,
                self._below.stored,
                corrupt=self._hasher.corrupt_blocks,
                uptime_s=time.monotonic() - self._parts.started_s,
            )

    async def Watch(
        self, request: watch_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[watch_pb2.WatchReply]:
        """Send a snapshot of what is held and then every change."""
        self._needs(context, Role.WATCH, "watching")
        # Closed here and now when the subscriber goes, not when garbage is collected.
        async with aclosing(serve_watch(self._store.table.publisher, request)) as replies:
            async for reply in replies:
                yield reply

    # -- parts -----------------------------------------------------------------------------

    async def _wait(self, info: RootInfo, packed: bytes, deadline_s: float) -> list[Outcome]:
        loop = asyncio.get_running_loop()
        ends = loop.time() + deadline_s
        if self._hasher.unverified:
            await self._hasher.verify(self._store.unverified(info, packed), deadline_s=deadline_s)
        items = list(zip(keys_of(info, packed), split(packed), strict=True))
        try:
            async with asyncio.timeout_at(ends):
                # One at a time: every commit wakes every waiter, so a look has to cost little.
                for key, name in items:
                    while self._store.outcome(info, key, name) is None:
                        await self._hasher.progress()
        except TimeoutError:
            pass  # what is not there yet is late
        return [self._store.outcome(info, key, name) or Outcome.LATE for key, name in items]

    def _explain_corruption(self, info: RootInfo, packed: bytes, answer: Acquired) -> None:
        """Name a block that failed its sum as the reason, once."""
        if answer.reason is not MissReason.ABSENT or not self._hasher.corrupt:
            return
        at = len(answer.slots) * NAME_BYTES
        key = keys_of(info, packed[at : at + NAME_BYTES])[0]
        if key in self._hasher.corrupt:
            del self._hasher.corrupt[key]
            answer.reason = MissReason.CORRUPT

    def _acquire_reply(self, answer: Acquired) -> cache_pb2.AcquireReply:
        """Fill the reply; what stands at its default already costs nothing."""
        slots = answer.slots
        offsets, generations = self._store.table.places(slots)
        reply = cache_pb2.AcquireReply(
            incarnation=self._incarnation,
            lease=answer.lease,
            lease_ms=self._store.limits.lease_ms if answer.lease else 0,
            ready=answer.ready,
            pending=len(slots) - answer.ready,
            slots=slots,
            offsets=offsets,
            generations=generations,
            reason=_REASONS[answer.reason],
            reserve_reason=_REASONS[answer.reserve_reason],
        )
        if answer.tiers:
            reply.tiers.extend(map(int, answer.tiers))  # type: ignore[arg-type]
        if answer.reserved_slots:
            offsets, generations = self._store.table.places(answer.reserved_slots)
            reply.reserved_names.extend(answer.reserved_names)
            reply.reserved_slots.extend(answer.reserved_slots)
            reply.reserved_offsets.extend(offsets)
            reply.reserved_generations.extend(generations)
        return reply


def _extend(
    field: MutableSequence[Any], outcomes: Sequence[SettleOutcome]
) -> Mapping[SettleOutcome, int]:
    """Put outcomes into a reply; returns how many there are of each.

    Thousands are mostly all alike, and an enum's member costs more to convert than to store.
    """
    first = outcomes[0] if outcomes else SettleOutcome.DONE
    if outcomes.count(first) == len(outcomes):
        field.extend([int(first)] * len(outcomes))
        return {first: len(outcomes)} if outcomes else {}
    field.extend(map(int, outcomes))
    return Counter(outcomes)
