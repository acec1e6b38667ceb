"""A store over a small real arena, for tests of its parts."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry

from kvstore.core.limits import GRANULE_BYTES
from kvstore.core.names import Root
from kvstore.core.outcomes import SettleOutcome
from kvstore.directory.lru import Lru
from kvstore.observe.metrics import NodeMetrics
from kvstore.service.roots import BlockShape, RootInfo
from kvstore.service.sessions import Session
from kvstore.service.slots import SlotTable
from kvstore.service.store import ArenaStore
from kvstore.service.store_limits import StoreLimits
from kvstore.tiers.quotas import Quotas
from kvstore.transport.arena import ArenaMapping, ArenaSize, create_arena
from tests.patience import until_so

ROOT = Root(hashlib.sha256(b"root").digest())
SHAPE = BlockShape(GRANULE_BYTES, 4000, 2)


def names(count: int, seed: int = 0) -> list[bytes]:
    return [hashlib.sha256(bytes([seed, i])).digest() for i in range(count)]


class SmallStore:
    """One incarnation over an arena; `again` makes the next one over the same memory."""

    def __init__(
        self, arena: ArenaMapping, limits: StoreLimits, quotas: Quotas | None = None
    ) -> None:
        self.arena = arena
        self.limits = limits
        arena.incarnation += 1
        self.metrics = NodeMetrics(CollectorRegistry())
        self.table = SlotTable(arena, Lru(), self.metrics, node="n", quotas=quotas)
        self.store = ArenaStore(self.table, limits)

    def again(self, quotas: Quotas | None = None) -> "SmallStore":
        return SmallStore(self.arena, self.limits, quotas)

    def session(self, number: int) -> tuple[Session, RootInfo]:
        session = self.store.sessions.open(number, bytes([number]) * 16)
        info = self.table.roots.open(ROOT, SHAPE, domain="d")
        session.roots[ROOT] = info
        return session, info

    def put(self, session: Session, info: RootInfo, wanted: list[bytes], now_ms: float) -> None:
        """Reserve, fill with the name's first byte, and commit."""
        answer = self.store.acquire(
            session, info, b"".join(wanted), reserve=len(wanted), first_block=0, now_ms=now_ms
        )
        refs = [(slot, self.table.generation[slot]) for slot in answer.reserved_slots]
        for index, slot in zip(answer.reserved_names, answer.reserved_slots, strict=True):
            record = self.arena.record(slot)
            fill = wanted[index][:1] * record.payload_bytes
            self.arena.block(record.offset, record.payload_bytes)[:] = fill
        outcomes = self.store.commit(session, info, refs, now_ms)
        assert outcomes == [SettleOutcome.DONE] * len(wanted)


@contextmanager
def small_store(
    blocks: int = 16, *, quota_blocks: int = 16, private_blocks: int = 8, max_slots: int = 64
) -> Iterator[SmallStore]:
    fd = create_arena(ArenaSize(blocks * GRANULE_BYTES, max_slots))
    arena = ArenaMapping(fd, owner=True)
    limits = StoreLimits(
        lease_ms=1_000,
        claim_ms=300,
        reserve_quota_bytes=quota_blocks * GRANULE_BYTES,
        private_quota_bytes=private_blocks * GRANULE_BYTES,
    )
    try:
        yield SmallStore(arena, limits)
    finally:
        close_arena(arena)
        os.close(fd)


def close_arena(arena: ArenaMapping) -> None:
    """Unmap as soon as the threads that read it, and have told so, let go of their last view."""

    def closed() -> bool:
        try:
            arena.close()
        except BufferError:
            return False
        return True

    until_so(closed)
