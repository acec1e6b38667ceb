"""The asynchronous client: what workers and adapters call."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, Self

from prometheus_client import CollectorRegistry

from kvstore.client import checks
from kvstore.client.config import ClientConfig
from kvstore.client.copies import Payload, WriteGate, get_copies, get_into, put_copies
from kvstore.client.link import Link
from kvstore.client.private import PrivateSlots
from kvstore.client.replies import (
    Acquired,
    Lookup,
    Names,
    NodeStats,
    Settled,
    SlotRef,
    acquired_from,
    lookup_from,
    outcomes_from,
    packed_names,
    settled_from,
    slot_refs,
    stats_from,
)
from kvstore.client.session import Access, Session, socket_path
from kvstore.core.errors import BadInput
from kvstore.core.limits import MAX_NAMES_PER_CALL
from kvstore.core.names import Namespace, Root
from kvstore.core.outcomes import Outcome, SettleOutcome
from kvstore.observe.metrics import ClientMetrics
from kvstore.rpc.credentials import NO_CREDENTIALS, Credentials
from kvstore.rpc.v1 import cache_pb2

_MAX_POSITION: Final = (1 << 32) - 1


class AsyncClient:
    """A session with this host's cache node; belongs to the event loop that connected it.

    Every call has a deadline (`ClientConfig` has the defaults) and raises only `KvStoreError`s: a
    cache that is gone costs one deadline, and nothing at all once that is known (`connected`).
    Sessions come back by themselves; what was leased or reserved under an old one is void under
    the new one, and `still`, `view` and `settle` know the difference.
    """

    def __init__(self, link: Link) -> None:
        """For `connect`: use that."""
        self.on_new_session: Callable[[AsyncClient], None] | None = None
        """Called after a keeper's restart, with the new arena already mapped."""
        self.private = PrivateSlots(link)
        """Room of the arena that holds no blocks."""
        self._link = link
        link.on_new_session = self._announce

    @classmethod
    async def connect(
        cls,
        where: str | Path,
        *,
        namespace: Namespace,
        payload_bytes: int,
        shares: int,
        share_domain: str = "",
        name: str = "",
        pids: Sequence[int] = (),
        config: ClientConfig | None = None,
        metrics: ClientMetrics | None = None,
        credentials: Credentials | None = None,
    ) -> Self:
        """Open a session on a node's run directory (or on its keeper's socket itself).

        `payload_bytes` is a block before padding and `shares` its KV heads. `pids` are the
        processes that write through this session when they are others than this one. A token
        in `credentials` makes the session one of that identity's share domain. Raises
        `Unreachable` when no keeper or no node answers in time, `Refused`, `BadInput`, `Forbidden`.
        """
        config = config or ClientConfig()
        access = Access(
            socket_path=socket_path(where),
            namespace=namespace,
            payload_bytes=payload_bytes,
            shares=shares,
            share_domain=share_domain,
            name=name or f"pid {os.getpid()}",
            pids=tuple(pids) or (os.getpid(),),
            credentials=credentials or NO_CREDENTIALS,
        )
        session = await Session.start(access, arena_number=1, deadline_ms=config.connect_ms)
        metrics = metrics or ClientMetrics(CollectorRegistry())
        metrics.sessions.labels("connected").inc()
        return cls(Link(access, config, metrics, session))

    @property
    def connected(self) -> bool:
        """Whether the keeper holds our session now. The node behind it may still be restarting."""
        return self._link.connected

    @property
    def config(self) -> ClientConfig:
        """Default deadlines."""
        return self._link.config

    @property
    def root(self) -> Root:
        """The root that names are chained from."""
        return self._session.root

    @property
    def incarnation(self) -> int:
        """Incarnation of the node when the root was last opened."""
        return self._session.incarnation

    @property
    def lease_ms(self) -> int:
        """How long a lease lasts when it is not released."""
        return self._session.lease_ms

    @property
    def node(self) -> str:
        """Name of the cache node."""
        return self._session.grant.node

    @property
    def address(self) -> str:
        """Where the node serves gRPC."""
        return self._session.grant.rpc

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in the arena, padding included."""
        return self._link.access.block_bytes

    @property
    def arena(self) -> memoryview:
        """The data of the whole arena; `SlotRef.offset` counts from its start."""
        return self._session.arena.mapping.data

    @property
    def arena_fd(self) -> int:
        """The descriptor of its memory, ours: for processes whose pids the session names."""
        return self._session.arena.mapping.descriptor

    def view(self, ref: SlotRef) -> memoryview:
        """Return a block's bytes in place, padding included, writable.

        A reader has to ask `still` after it used them; a writer writes only what it reserved.
        Raises `SessionLost` for a slot from before the keeper's restart.
        """
        return self._session.arena.view(ref)

    def still(self, ref: SlotRef) -> bool:
        """Say whether the slot still holds the block that it was leased for, readable.

        Call it after a copy and before the copy is used: a lease may have run out meanwhile.
        """
        return self._session.arena.still(ref)

    is_ready = still

    async def wait_ready(self, refs: Sequence[SlotRef], *, deadline_ms: int | None = None) -> int:
        """Wait until all of `refs` are readable; return how many are, counted from the first.

        Costs no call. Comes back early when the next one cannot turn readable any more.
        """
        deadline = checks.deadline(deadline_ms, self.config.transfer_ms)
        return await self._session.arena.wait_ready(refs, deadline_s=deadline / 1000)

    async def acquire(
        self,
        names: Names,
        *,
        reserve: int = 0,
        deadline_ms: int | None = None,
        pending_ms: int | None = None,
        first_block: int = 0,
        kind: str = "",
        depth_cost: float = 0.0,
    ) -> Acquired:
        """Lease the longest prefix of `names` that is here, and reserve slots for what follows.

        At most `reserve` slots are reserved; each has to be committed or aborted by `settle`.
        `first_block` is the position of `names[0]` in its prompt, in blocks. The node starts moving
        up what it holds below DRAM and predicts to arrive within `pending_ms` (the deadline where
        none is given); `wait_ready` waits for that. `kind` (what sort of request it is) and
        `depth_cost` (what a block costs more to compute for each one before it, as a share of the
        first one's cost; 0: not known) are what the node's policy learns from.
        """
        deadline = checks.deadline(deadline_ms, self.config.call_ms)
        patience = checks.deadline(pending_ms, deadline)
        checks.bounded("reserve", reserve, MAX_NAMES_PER_CALL)
        checks.bounded("first_block", first_block, _MAX_POSITION)
        session = self._session
        request = cache_pb2.AcquireRequest(
            root=session.root,
            names=packed_names(names),
            reserve=reserve,
            deadline_ms=patience,
            first_block=first_block,
            kind=kind,
            depth_cost=depth_cost,
        )
        if not reserve:
            reply = await self._link.call(session, "Acquire", request, deadline)
            return checks.read(acquired_from, reply, session.arena.number)
        reply = await self._link.acquire(session, request, deadline)
        acquired = checks.read(acquired_from, reply, session.arena.number)
        self._link.hold(session, (item.slot for item in acquired.reserved))
        return acquired

    async def prefetch(self, names: Names, *, deadline_ms: int | None = None) -> int:
        """Start moving up blocks held below DRAM only; return how many. Nothing is leased.

        Only what is predicted to arrive within the deadline is started, in prefix order.
        """
        deadline = checks.deadline(deadline_ms, self.config.transfer_ms)
        session = self._session
        request = cache_pb2.PrefetchRequest(
            root=session.root, names=packed_names(names), deadline_ms=deadline
        )
        reply = await self._link.call(session, "Prefetch", request, self.config.call_ms)
        return int(reply.started)

    async def pin(self, names: Names, *, ttl_ms: int) -> int:
        """Keep those of `names` that are in DRAM for `ttl_ms`; return how many are kept.

        Fewer than asked for: not there, or over the share domain's quota. 0 ends their pins.
        """
        checks.bounded("ttl_ms", ttl_ms, _MAX_POSITION)
        session = self._session
        request = cache_pb2.PinRequest(root=session.root, names=packed_names(names), ttl_ms=ttl_ms)
        reply = await self._link.call(session, "Pin", request, self.config.call_ms)
        return int(reply.pinned)

    async def clear(self, *, everything: bool = False, deadline_ms: int | None = None) -> int:
        """Forget this client's root, or every root, in all tiers of the node; return the blocks.

        Needs the admin role. A block counts once for each tier that held it.
        """
        deadline = checks.deadline(deadline_ms, self.config.transfer_ms)
        session = self._session
        request = cache_pb2.ClearRequest(root=b"" if everything else session.root)
        reply = await self._link.call(session, "Clear", request, deadline)
        return int(reply.blocks)

    async def settle(
        self,
        *,
        commit: Iterable[SlotRef] = (),
        abort: Iterable[SlotRef] = (),
        release: Iterable[int] = (),
        kept_in_hbm: Iterable[SlotRef] = (),
        deadline_ms: int | None = None,
    ) -> Settled:
        """Commit written slots, abort others, release leases: one call, one outcome per item.

        Slots from before the keeper's restart are STALE without asking. May be repeated: what was
        done is ALREADY. After a failure unsettled slots go back to the node within seconds.
        `kept_in_hbm`: blocks whose copy the caller lists in HBM; the node does not use it yet.
        """
        deadline = checks.deadline(deadline_ms, self.config.call_ms)
        session = self._session
        commits, aborts = list(commit), list(abort)
        ours = [ref for ref in commits if ref.arena == session.arena.number]
        unwanted = [ref for ref in aborts if ref.arena == session.arena.number]
        kept = [ref for ref in kept_in_hbm if ref.arena == session.arena.number]
        try:
            request = cache_pb2.SettleRequest(
                root=session.root,
                commit=slot_refs(ours),
                abort=slot_refs(unwanted),
                release=list(release),
                kept_in_hbm=slot_refs(kept),
                incarnation=session.incarnation,
            )
        except (TypeError, ValueError) as error:
            raise BadInput(f"not a lease: {error}") from error
        done = False
        try:
            reply = await self._link.call(session, "Settle", request, deadline)
            done = True
        finally:
            self._link.let_go(ours)
            self._link.let_go(unwanted)
            if not done and (ours or unwanted):
                self._link.sweep_soon()
        settled = checks.read(settled_from, reply)
        return Settled(
            commit=checks.with_stale(commits, settled.commit, session.arena.number),
            abort=checks.with_stale(aborts, settled.abort, session.arena.number),
            release=settled.release,
        )

    def release(self, lease: int) -> None:
        """Release a lease soon, with others in one call, and wait for nothing.

        For readers whose next `acquire` shall not wait for the end of the last one. A failure is
        counted and nothing more: the lease runs out by itself. Raises `BadInput` for no lease.
        """
        self._link.release_soon(lease)

    async def wait(self, names: Names, *, deadline_ms: int | None = None) -> list[Outcome]:
        """Wait in the node until blocks are readable; for those who hold no slots of them."""
        deadline = checks.deadline(deadline_ms, self.config.transfer_ms)
        session = self._session
        request = cache_pb2.WaitRequest(
            root=session.root, names=packed_names(names), deadline_ms=deadline
        )
        # The node answers LATE at the deadline: let that answer come through.
        reply = await self._link.call(session, "Wait", request, deadline + self.config.call_ms)
        return checks.read(outcomes_from, reply)

    async def lookup(self, names: Names, *, deadline_ms: int | None = None) -> Lookup:
        """Say what is here, without a lease: a hint."""
        deadline = checks.deadline(deadline_ms, self.config.call_ms)
        session = self._session
        request = cache_pb2.LookupRequest(root=session.root, names=packed_names(names))
        return checks.read(lookup_from, await self._link.call(session, "Lookup", request, deadline))

    async def stats(self, *, deadline_ms: int | None = None) -> NodeStats:
        """Return the node's sizes, hits and misses."""
        deadline = checks.deadline(deadline_ms, self.config.call_ms)
        reply = await self._link.call(self._session, "Stats", cache_pb2.StatsRequest(), deadline)
        return checks.read(stats_from, reply)

    async def get(self, names: Names, *, deadline_ms: int | None = None) -> list[bytes]:
        """Return copies of the longest prefix of blocks that is here, payload only.

        Every copy was verified by its slot's generation after it was made. Retries nothing.
        """
        deadline = checks.deadline(deadline_ms, self.config.transfer_ms)
        return await get_copies(self, self._link, names, deadline)

    async def get_into(
        self,
        names: Names,
        buffers: Sequence[memoryview],
        *,
        deadline_ms: int | None = None,
        gate: WriteGate | None = None,
    ) -> int:
        """Copy the longest prefix that is here into `buffers`; return how many blocks.

        One writable buffer for each name, of the payload's size or more. What lies behind the
        blocks that came is rubbish. Buffers that are used again and again cost a copy; the fresh
        memory of `get` costs several. When this returns or raises nobody writes to them any more;
        closing the `gate` ends that sooner, from any thread.
        """
        deadline = checks.deadline(deadline_ms, self.config.transfer_ms)
        return await get_into(self, self._link, names, buffers, deadline, gate or WriteGate())

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
        computing it, or because it is full.
        """
        deadline = checks.deadline(deadline_ms, self.config.transfer_ms)
        return await put_copies(
            self, self._link, names, payloads, first_block=first_block, deadline_ms=deadline
        )

    async def close(self) -> None:
        """End the session: leases and reserved slots go back. Harmless when repeated.

        Whoever writes to slots that it reserved has to stop before. Copies of `put` are waited for.
        """
        await self._link.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self.close()

    @property
    def _session(self) -> Session:
        return self._link.session

    def _announce(self) -> None:
        if self.on_new_session is not None:
            self.on_new_session(self)
