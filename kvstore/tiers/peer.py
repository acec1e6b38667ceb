"""The tier of other nodes: blocks that a neighbour holds, fetched into our own arena.

    read    who holds it → Lend (gRPC) → ticket, sums → bulk connection into the slot → sum → HIT
            a neighbour that is dead, slow or wrong: the next one that holds it
    write   refused: every node keeps what its own workers compute

A neighbour that fails is left alone for a while (one breaker each), so what it costs, it costs
once. Time is the event loop's.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, NamedTuple, Protocol

import grpc.aio

from kvstore.core.errors import BadInput, KvStoreError, Unreachable
from kvstore.core.names import BlockName, Root
from kvstore.core.outcomes import Outcome
from kvstore.observe.metrics import TierMetrics
from kvstore.rpc.channel import open_channel
from kvstore.rpc.credentials import NO_CREDENTIALS, Credentials
from kvstore.rpc.errors import error_from
from kvstore.rpc.v1 import cache_pb2, cache_pb2_grpc
from kvstore.tiers.base import ReadItem, WriteItem
from kvstore.tiers.breaker import Breaker, BreakerState
from kvstore.tiers.sums import SUM_BYTES, block_sum
from kvstore.transport.base import Ticket
from kvstore.transport.bulk import BulkTransport
from kvstore.transport.bulk_wire import MAX_BLOCKS

_NAME: Final = "peer"
_IDLE_MS: Final = 300_000.0
_SOURCES: Final = 3
"""Neighbours asked for one block before it counts as missed."""


class RootFacts(NamedTuple):
    """What blocks under a root are like, for a neighbour that has never opened it."""

    payload_bytes: int
    shares: int
    group: str
    share_domain: str


class Neighbour(NamedTuple):
    """Another node."""

    name: str
    address: str


class Neighbours(Protocol):
    """Who holds what, as far as is known: a memory of event streams, never a call."""

    def holders(self, root: Root, name: BlockName) -> Sequence[Neighbour]:
        """Return live neighbours that hold a block."""
        ...


@dataclass(slots=True)
class _Line:
    """What leads to one neighbour."""

    channel: grpc.aio.Channel
    breaker: Breaker = field(default_factory=lambda: Breaker(threshold=1))
    moving_bytes: int = 0
    used_ms: float = 0.0


@dataclass(slots=True, eq=False)
class _Wish:
    """One block that is looked for."""

    item: ReadItem
    facts: RootFacts
    asked: set[str] = field(default_factory=set)
    outcome: Outcome = Outcome.MISS


class PeerTier:
    """A `Tier` of neighbours' blocks. One event loop's."""

    name = _NAME

    def __init__(
        self,
        neighbours: Neighbours,
        facts_of: Callable[[Root], RootFacts | None],
        metrics: TierMetrics,
        *,
        streams: int = 4,
        credentials: Credentials = NO_CREDENTIALS,
    ) -> None:
        """`streams` bulk connections move at once."""
        self._neighbours = neighbours
        self._facts_of = facts_of
        self._metrics = metrics
        self._credentials = credentials
        self._transport = BulkTransport(
            streams=streams, tls=credentials.ssl(), server_name=credentials.server_name
        )
        self._lines: dict[Neighbour, _Line] = {}
        self._reading: set[asyncio.Task[list[Outcome]]] = set()
        self._closing: set[asyncio.Future[None]] = set()
        self._closed = False

    def holds(self, root: Root, name: BlockName) -> bool:
        """Say whether a live neighbour that answers lists the block."""
        return not self._closed and any(
            self._may_ask(one) for one in self._neighbours.holders(root, name)
        )

    async def read(self, batch: Sequence[ReadItem], *, deadline_ms: int) -> list[Outcome]:
        """Fetch each block from whoever holds it; see `kvstore.tiers.base`."""
        task = asyncio.ensure_future(self._read(batch, deadline_ms))
        self._reading.add(task)
        try:
            return await task
        finally:
            self._reading.discard(task)

    async def write(self, batch: Sequence[WriteItem], *, deadline_ms: int) -> list[Outcome]:
        """Refuse: what is written to a neighbour it would have to take from its own workers."""
        for item in batch:
            item.drained.set()
        return [Outcome.REFUSED] * len(batch)

    async def remove(self, blocks: Sequence[tuple[Root, BlockName]]) -> None:
        """Nothing: a neighbour's blocks are its own."""

    async def close(self) -> None:
        """Stop; reads in flight end with LATE."""
        self._closed = True
        await self._transport.close()
        for task in list(self._reading):
            task.cancel()
        await asyncio.gather(*self._reading, *self._closing, return_exceptions=True)
        for line in self._lines.values():
            await line.channel.close(None)

    def measure(self) -> None:
        """Set the gauges."""
        now_ms = self._now_ms()
        self._drop_idle(now_ms)
        states = [line.breaker.state(now_ms) for line in self._lines.values()]
        worst = max(states, default=BreakerState.CLOSED)
        self._metrics.breaker.labels(_NAME, "read").set(int(worst))
        self._metrics.in_device.labels(_NAME).set(len(self._reading))

    def _drop_idle(self, now_ms: float) -> None:
        """Close what was not used for long: a neighbour that restarts may have another address."""
        idle = [
            one
            for one, line in self._lines.items()
            if not line.moving_bytes and now_ms - line.used_ms > _IDLE_MS
        ]
        for one in idle:
            closing = asyncio.ensure_future(self._lines.pop(one).channel.close(None))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    # -- reading ---------------------------------------------------------------------------

    async def _read(self, batch: Sequence[ReadItem], deadline_ms: int) -> list[Outcome]:
        wishes: list[_Wish | None] = []
        for item in batch:
            facts = self._facts_of(item.root)
            wishes.append(None if facts is None else _Wish(item, facts))
        try:
            await self._look_for([wish for wish in wishes if wish is not None], deadline_ms)
        finally:
            for item in batch:  # a transport returns when its thread has let go of the buffers
                item.drained.set()
        outcomes = [Outcome.MISS if wish is None else wish.outcome for wish in wishes]
        for number, blocks in Counter(map(int, outcomes)).items():
            name = Outcome(number).name.lower()
            self._metrics.operations.labels(_NAME, "read", name).inc(blocks)
        hits = zip(batch, outcomes, strict=True)
        moved = sum(len(item.into) for item, outcome in hits if outcome is Outcome.HIT)
        self._metrics.moved_bytes.labels(_NAME, "read").inc(moved)
        return outcomes

    async def _look_for(self, wishes: list[_Wish], deadline_ms: int) -> None:
        """Ask source after source until every wish has its block or nobody else to ask."""
        for _ in range(_SOURCES):
            if self._closed:
                for wish in wishes:
                    wish.outcome = Outcome.REFUSED
                return
            groups = self._shared_out(wishes)
            if not groups:
                return
            try:
                await asyncio.gather(
                    *(
                        self._fetch(self._line(source), part, deadline_ms)
                        for (source, _), group in groups.items()
                        for part in _parts(group)
                    )
                )
            finally:
                for (source, _), group in groups.items():
                    self._line(source).moving_bytes -= sum(len(wish.item.into) for wish in group)
            wishes = [wish for wish in wishes if wish.outcome is not Outcome.HIT]
            if not wishes:
                return

    def _shared_out(self, wishes: list[_Wish]) -> dict[tuple[Neighbour, Root], list[_Wish]]:
        """Give every wish to a neighbour that may have it; what nobody has is left out."""
        groups: dict[tuple[Neighbour, Root], list[_Wish]] = defaultdict(list)
        for wish in wishes:
            source = self._source(wish)
            if source is not None:
                groups[(source, wish.item.root)].append(wish)
        # Afterwards: a batch stays together where one neighbour has all of it.
        for (source, _), group in groups.items():
            self._line(source).moving_bytes += sum(len(wish.item.into) for wish in group)
        return groups

    def _source(self, wish: _Wish) -> Neighbour | None:
        """Return the least busy neighbour that holds a block and was not asked for it."""
        holders = self._neighbours.holders(wish.item.root, wish.item.name)
        able = [one for one in holders if one.name not in wish.asked and self._may_ask(one)]
        if not able:
            return None
        source = min(able, key=lambda one: (self._line(one).moving_bytes, one.name))
        wish.asked.add(source.name)
        return source

    async def _fetch(self, line: _Line, wishes: list[_Wish], deadline_ms: int) -> None:
        """Fetch blocks of one root from one neighbour, and judge it."""
        if not line.breaker.enter(self._now_ms()):
            return
        failure = "abandoned"
        try:
            failure = await self._lend_and_move(line, wishes, deadline_ms)
        finally:
            if failure == "abandoned":
                line.breaker.abandoned()
            elif failure:
                line.breaker.failed(self._now_ms())
                self._metrics.device_errors.labels(_NAME, "read", failure).inc()
            else:
                line.breaker.succeeded()

    async def _lend_and_move(self, line: _Line, wishes: list[_Wish], deadline_ms: int) -> str:
        """Return what was wrong with the neighbour; empty when it did what it could."""
        try:
            reply = await self._lend(line, wishes, deadline_ms)
            hits = _granted(reply, wishes)
        except KvStoreError as error:
            for wish in wishes:
                wish.outcome = Outcome.LATE
            return type(error).__name__
        if not hits:
            return ""
        ticket = Ticket(reply.ticket, reply.bulk_address, reply.expires_ms)
        verify = partial(_verify, [wish.facts for wish in hits], _sums(reply.sums))
        views = [wish.item.into for wish in hits]
        try:
            outcomes = await self._transport.fetch(
                ticket, views, stall_deadline_ms=deadline_ms, verify=verify
            )
        except BadInput as error:  # its address is none
            for wish in hits:
                wish.outcome = Outcome.REFUSED
            return type(error).__name__
        for wish, outcome, own_sum in zip(hits, outcomes, _sums(reply.sums), strict=True):
            wish.outcome = outcome
            wish.item.sum = own_sum if outcome is Outcome.HIT else b""
        bad = [outcome for outcome in outcomes if outcome in (Outcome.LATE, Outcome.CORRUPT)]
        return bad[0].name.lower() if bad else ""

    async def _lend(
        self, line: _Line, wishes: list[_Wish], deadline_ms: int
    ) -> cache_pb2.LendReply:
        facts = wishes[0].facts
        request = cache_pb2.LendRequest(
            root=wishes[0].item.root,
            names=b"".join(wish.item.name for wish in wishes),
            block_bytes=len(wishes[0].item.into),
            payload_bytes=facts.payload_bytes,
            shares=facts.shares,
            group=facts.group,
            share_domain=facts.share_domain,
            deadline_ms=deadline_ms,
        )
        stub = cache_pb2_grpc.CacheNodeStub(line.channel)
        try:
            reply: cache_pb2.LendReply = await stub.Lend(request, timeout=deadline_ms / 1_000)
        except grpc.aio.AioRpcError as failure:
            raise error_from(failure) from failure
        return reply

    # -- neighbours ------------------------------------------------------------------------

    def _line(self, neighbour: Neighbour) -> _Line:
        line = self._lines.get(neighbour)
        if line is None:
            line = self._lines[neighbour] = _Line(
                open_channel(neighbour.address, self._credentials)
            )
        line.used_ms = self._now_ms()
        return line

    def _may_ask(self, neighbour: Neighbour) -> bool:
        line = self._lines.get(neighbour)
        return line is None or line.breaker.would_enter(self._now_ms())

    def _now_ms(self) -> float:
        return asyncio.get_running_loop().time() * 1_000


def _parts(group: list[_Wish]) -> list[list[_Wish]]:
    return [group[at : at + MAX_BLOCKS] for at in range(0, len(group), MAX_BLOCKS)]


def _granted(reply: cache_pb2.LendReply, wishes: list[_Wish]) -> list[_Wish]:
    """Return the wishes that a ticket is for; the others get the neighbour's word.

    Raises `Unreachable` for an answer that does not fit the question.
    """
    known = {int(outcome): outcome for outcome in Outcome}
    if len(reply.outcomes) != len(wishes) or not known.keys() >= set(reply.outcomes):
        raise Unreachable("the neighbour's answer is not one outcome for each block")
    hits: list[_Wish] = []
    for wish, number in zip(wishes, reply.outcomes, strict=True):
        wish.outcome = known[number]
        if wish.outcome is Outcome.HIT:
            wish.outcome = Outcome.LATE  # until its bytes are here
            hits.append(wish)
    if len(reply.sums) != SUM_BYTES * len(hits) or (hits and not reply.ticket):
        raise Unreachable("the neighbour's answer has no sums for its blocks")
    return hits


def _sums(packed: bytes) -> list[bytes]:
    return [packed[at : at + SUM_BYTES] for at in range(0, len(packed), SUM_BYTES)]


def _verify(facts: list[RootFacts], sums: list[bytes], index: int, block: memoryview) -> bool:
    """Say whether a block's payload has its sum; runs in the thread that received it."""
    one = facts[index]
    return block_sum(block[: one.payload_bytes], one.shares) == sums[index]
