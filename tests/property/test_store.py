"""The arena's state machine against a simple model, with real shared memory underneath.

Writers fill their slots with bytes that follow from the name, so that every lease can be checked
for the bytes it must show. The machine restarts too: a new store adopts the same arena.
"""

import hashlib
import os
from collections import Counter
from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule
from prometheus_client import CollectorRegistry

from kvstore.core.limits import GRANULE_BYTES
from kvstore.core.names import Root
from kvstore.core.outcomes import MissReason, SettleOutcome
from kvstore.core.slots import READABLE, SlotState
from kvstore.directory.events import Began, Changed, Digest, Ended, Marked, TierKind
from kvstore.directory.lru import Lru
from kvstore.directory.publisher import Subscription, xor_prefixes
from kvstore.observe.metrics import NodeMetrics
from kvstore.service import bulk_commit
from kvstore.service.adopt import adopt
from kvstore.service.roots import BlockShape, RootInfo
from kvstore.service.sessions import Session
from kvstore.service.slots import SlotTable
from kvstore.service.store import ArenaStore
from kvstore.service.store_limits import StoreLimits
from kvstore.tiers.quotas import QuotaRule, Quotas
from kvstore.tiers.sums import block_sum
from kvstore.transport.arena import ArenaMapping, ArenaSize, create_arena
from tests.private_rules import PrivateRules

GRANULES = 24
SHAPES = (
    BlockShape(GRANULE_BYTES, 4000, 2),
    BlockShape(3 * GRANULE_BYTES, 3 * GRANULE_BYTES - 96, 4),
)
ROOTS = tuple(Root(hashlib.sha256(bytes([i])).digest()) for i in range(len(SHAPES)))
NAMES = [hashlib.sha256(bytes([0, i])).digest() for i in range(12)]
QUOTA_BYTES = 6 * GRANULE_BYTES
LIMITS = StoreLimits(
    lease_ms=1_000,
    claim_ms=300,
    reserve_quota_bytes=GRANULES // 2 * GRANULE_BYTES,
    private_quota_bytes=GRANULES // 3 * GRANULE_BYTES,
)

PREFIXES = st.tuples(st.integers(0, 11), st.integers(1, 8)).map(lambda at: NAMES[at[0] :][: at[1]])


def payload(root: int, name: bytes) -> bytes:
    return hashlib.shake_128(ROOTS[root] + name).digest(SHAPES[root].payload_bytes)


class StoreMachine(PrivateRules):
    def __init__(self) -> None:
        super().__init__()
        self.least, bulk_commit._LEAST = bulk_commit._LEAST, 2  # two at once are many here
        self.fd = create_arena(ArenaSize(GRANULES * GRANULE_BYTES, 32))
        self.arena = ArenaMapping(self.fd, owner=True)
        self.now_ms = 0.0
        self.numbers = 0
        self.reserved: dict[int, dict[int, tuple[int, int, bytes]]] = {}
        """session → slot → (generation, root, name): what the model thinks is being written."""
        self.leases: dict[int, tuple[int, int, list[tuple[int, int, bytes]]]] = {}
        """lease → (session, root, [(slot, generation, name)])."""
        self.expires: dict[int, float] = {}
        self.start()

    def start(self) -> None:
        self.arena.incarnation += 1
        metrics = NodeMetrics(CollectorRegistry())
        quotas = Quotas([QuotaRule("domain", "d0", {"dram": QUOTA_BYTES})])
        self.table = SlotTable(self.arena, Lru(), metrics, node="n", quotas=quotas)
        self.store = ArenaStore(self.table, LIMITS)
        for number in self.reserved:
            self.store.sessions.open(number, number.to_bytes(16, "little"))
        self.subscription: Subscription = self.table.publisher.subscribe(lambda: None)
        self.seen: set[tuple[bytes, bytes]] = set()

    def session(self, draw: int) -> Session:
        number = sorted(self.reserved)[draw % len(self.reserved)]
        session = self.store.sessions.by_number(number)
        assert session is not None
        return session

    def info(self, session: Session, root: int) -> RootInfo:
        info = self.table.roots.open(ROOTS[root], SHAPES[root], domain=f"d{root}")
        session.roots[ROOTS[root]] = info
        return info

    # -- rules -----------------------------------------------------------------------------

    @rule()
    def open_session(self) -> None:
        if len(self.reserved) < 3:
            self.numbers += 1
            self.store.sessions.open(self.numbers, self.numbers.to_bytes(16, "little"))
            self.reserved[self.numbers] = {}
            self.private[self.numbers] = {}

    @precondition(lambda self: self.reserved)
    @rule(
        who=st.integers(0, 2),
        root=st.integers(0, 1),
        names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=8) | PREFIXES,
        reserve=st.integers(0, 8),
        patience_ms=st.sampled_from([0, 0, LIMITS.claim_ms]),
    )
    def acquire(
        self, who: int, root: int, names: list[bytes], reserve: int, patience_ms: int
    ) -> None:
        self.pass_time(patience_ms)
        session = self.session(who)
        info = self.info(session, root)
        wanted = min(reserve, len(names))
        answer = self.store.acquire(
            session, info, b"".join(names), reserve=wanted, first_block=3, now_ms=self.now_ms
        )
        self.read(root, names, answer.slots)
        assert (answer.lease != 0) == bool(answer.slots)
        assert (answer.reason is MissReason.NONE) == (len(answer.slots) == len(names))
        if answer.lease:
            held = [
                (slot, self.table.generation[slot], name)
                for slot, name in zip(answer.slots, names, strict=False)
            ]
            self.leases[answer.lease] = (session.number, root, held)
            self.expires[answer.lease] = self.now_ms + LIMITS.lease_ms
        assert len(answer.reserved_slots) <= wanted
        taken = {slot for mine in self.reserved.values() for slot in mine}
        for index, slot in zip(answer.reserved_names, answer.reserved_slots, strict=True):
            assert slot not in taken, "one slot for two writers"
            taken.add(slot)
            self.reserved[session.number][slot] = (
                self.table.generation[slot], root, names[index],
            )  # fmt: skip

    @precondition(lambda self: self.reserved)
    @rule(who=st.integers(0, 2), root=st.integers(0, 1), names=PREFIXES)
    def put(self, who: int, root: int, names: list[bytes]) -> None:
        """Do what a worker does in one go: acquire, write, commit; and the node seals."""
        self.acquire(who, root, names, len(names), 0)
        self.settle(who, len(names), write=True)
        self.seal(100)

    def read(self, root: int, names: list[bytes], slots: list[int]) -> None:
        for slot, name in zip(slots, names, strict=False):
            record = self.arena.record(slot)
            assert (record.root, record.name) == (ROOTS[root], name)
            found = bytes(self.arena.block(record.offset, record.payload_bytes))
            assert found == payload(root, name), "another block's bytes"

    @precondition(lambda self: self.reserved)
    @rule(who=st.integers(0, 2), count=st.integers(1, 4), write=st.booleans())
    def settle(self, who: int, count: int, write: bool) -> None:
        session = self.session(who)
        mine = self.reserved[session.number]
        for slot in list(mine)[:count]:
            generation, root, name = mine.pop(slot)
            info = self.info(session, root)
            refs = [(slot, generation)]
            if not write:
                assert self.store.abort(session, info, refs) == [SettleOutcome.DONE]
                assert self.store.abort(session, info, refs) == [SettleOutcome.ALREADY]
                continue
            record = self.arena.record(slot)
            self.arena.block(record.offset, record.payload_bytes)[:] = payload(root, name)
            [outcome] = self.store.commit(session, info, refs, self.now_ms)
            [again] = self.store.commit(session, info, refs, self.now_ms)
            if outcome is SettleOutcome.DONE:
                assert again is SettleOutcome.ALREADY
            else:
                assert (outcome, again) == (SettleOutcome.DUPLICATE, SettleOutcome.STALE)

    @precondition(lambda self: len(self.reserved) > 1 and any(self.reserved.values()))
    @rule(commit=st.booleans())
    def settle_a_foreign_slot(self, commit: bool) -> None:
        owner = next(number for number, slots in self.reserved.items() if slots)
        other = next(number for number in self.reserved if number != owner)
        session = self.store.sessions.by_number(other)
        assert session is not None
        slot, (generation, root, _) = next(iter(self.reserved[owner].items()))
        info = self.info(session, root)
        refs = [(slot, generation)]
        outcomes = (
            self.store.commit(session, info, refs, self.now_ms)
            if commit
            else self.store.abort(session, info, refs)
        )
        assert outcomes == [SettleOutcome.NOT_YOURS]
        wrong = [(slot, generation + 1), (10_000, 1), (slot, 0)]
        assert self.store.commit(session, info, wrong, self.now_ms) == [SettleOutcome.NOT_YOURS] * 3

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 20))
    def release(self, which: int) -> None:
        lease = sorted(self.leases)[which % len(self.leases)]
        number, _, _ = self.leases.pop(lease)
        session = self.store.sessions.by_number(number)
        assert session is not None
        assert self.store.release(session, [lease]) == [SettleOutcome.DONE]
        assert self.store.release(session, [lease]) == [SettleOutcome.ALREADY]
        assert self.store.release(session, [lease + 9_999]) == [SettleOutcome.NOT_YOURS]

    @rule(count=st.integers(1, 4))
    def seal(self, count: int) -> None:
        for _ in range(min(count, len(self.store.to_seal))):
            slot, generation = self.store.to_seal.popleft()
            if (
                self.table.generation[slot] == generation
                and self.table.state[slot] == SlotState.COMMITTED
            ):
                self.table.seal([slot], [self.sum(slot)])

    def sum(self, slot: int) -> bytes:
        record = self.arena.record(slot)
        return block_sum(self.arena.block(record.offset, record.payload_bytes), record.shares)

    @rule(ms=st.sampled_from([10, 200, 400, 1_001]))
    def pass_time(self, ms: int) -> None:
        self.now_ms += ms
        over = [lease for lease in self.leases if self.expires[lease] <= self.now_ms]
        assert self.store.expire(self.now_ms) == len(over)
        for lease in over:
            del self.leases[lease]

    @precondition(lambda self: self.reserved)
    @rule(who=st.integers(0, 2), lingers=st.booleans())
    def close_session(self, who: int, lingers: bool) -> None:
        session = self.session(who)
        leases = [lease for lease, held in self.leases.items() if held[0] == session.number]
        for lease in leases:
            del self.leases[lease]
        mine = self.reserved.pop(session.number)
        private = self.private.pop(session.number)
        if lingers:
            assert self.store.close(session, writers_gone=False) == (len(leases), 0)
            for slot, (generation, _, _) in mine.items():
                word = self.arena.word(slot)
                assert word == (generation, SlotState.RESERVED, session.number)
            assert all(self.arena.word(slot).state is SlotState.RESERVED for slot in private)
            leases = []
        freed = len(mine) + len(private)
        assert self.store.close(session, writers_gone=True) == (len(leases), freed)
        self.store.sessions.forget(session)

    @rule(corrupt=st.booleans())
    def restart(self, corrupt: bool) -> None:
        self.take_events()
        sealed = [s for s in range(32) if self.table.state[s] == SlotState.SEALED]
        broken = sealed[0] if sealed and corrupt else None
        if broken is not None:
            self.arena.block(self.arena.record(broken).offset, 1)[0] ^= 1
        generations = [self.arena.word(slot).generation for slot in range(32)]
        self.start()
        found = adopt(self.store, self.now_ms)
        assert found.sealed == len(sealed)
        assert found.unreadable == 0
        assert [self.arena.word(slot).generation for slot in range(32)] == generations
        self.leases.clear()
        for slot in sealed:
            assert not self.table.servable[slot], "served before it was verified"
            if self.sum(slot) == self.arena.record(slot).sum:
                assert slot != broken
                self.table.servable[slot] = 1
            else:
                assert slot == broken
                self.table.evict([slot], reason="corrupt")
        for number, mine in self.reserved.items():
            session = self.store.sessions.by_number(number)
            assert session is not None
            assert session.reserved == set(mine)
            assert session.private == set(self.private[number])

    # -- what always holds -----------------------------------------------------------------

    @invariant()
    def bytes_belong_to_one_block(self) -> None:
        used = sorted(
            (self.table.granules[slot] * GRANULE_BYTES, self.table.root_of(slot).shape.block_bytes)
            for slot in range(32)
            if self.table.state[slot] != SlotState.FREE
        )
        for (start, size), (following, _) in pairwise(used):
            assert start + size <= following, "two blocks share bytes"
        assert not used or sum(used[-1]) <= GRANULES * GRANULE_BYTES

    @invariant()
    def reservations_stand(self) -> None:
        for number, mine in self.reserved.items():
            session = self.store.sessions.by_number(number)
            assert session is not None
            for slot, (generation, root, name) in mine.items():
                assert self.arena.word(slot) == (generation, SlotState.RESERVED, number)
                assert self.arena.record(slot).name == name
                assert self.table.root_of(slot).root == ROOTS[root]
            expected = sum(SHAPES[root].block_bytes for _, root, _ in mine.values())
            assert session.reserved_bytes == expected <= LIMITS.reserve_quota_bytes

    @invariant()
    def leases_hold(self) -> None:
        pins: Counter[int] = Counter()
        for _, root, held in self.leases.values():
            for slot, generation, _ in held:
                pins[slot] += 1
                word = self.arena.word(slot)
                assert word.generation == generation
                assert word.state in READABLE
            self.read(root, [name for _, _, name in held], [slot for slot, _, _ in held])
        assert all(self.table.pins[slot] == pins[slot] for slot in range(32))

    @invariant()
    def the_books_are_exact(self) -> None:
        table = self.table
        sizes = {True: 0, False: 0}
        counts: Counter[SlotState] = Counter()
        for slot in range(32):
            word = self.arena.word(slot)
            assert word.generation == table.generation[slot]
            assert word.state == table.state[slot]
            if word.state is not SlotState.FREE:
                counts[word.state] += 1
                sizes[word.state in READABLE] += table.root_of(slot).shape.block_bytes
        assert sizes == {True: table.used_bytes, False: table.reserved_bytes}
        found = {state: table.counts[state] for state in SlotState if table.counts[state] > 0}
        assert found == counts
        readable = {s for s in range(32) if table.state[s] in READABLE}
        assert readable <= set(table.index.values())
        assert len(table.policy) == len(readable)
        used = sum(chunk.used for chunk in table.space.chunks())
        assert used == sum(counts.values())

    @invariant()
    def every_byte_is_charged_and_none_beyond_the_quota(self) -> None:
        held: Counter[bytes] = Counter()
        for slot in range(32):
            if self.table.state[slot] not in (SlotState.FREE, SlotState.DRAINING):
                info = self.table.root_of(slot)
                held[info.root] += info.shape.block_bytes
        book = self.table.book
        assert book.by_root == held
        assert sum(book.by_domain.values()) == sum(held.values())
        assert held[ROOTS[0]] <= QUOTA_BYTES

    @invariant()
    def what_is_published_is_what_is_sealed(self) -> None:
        self.take_events()
        sealed = {
            (self.table.root_of(slot).root, self.arena.name(slot))
            for slot in range(32)
            if self.table.state[slot] == SlotState.SEALED
        }
        assert {(root, name) for root, name in self.seen} == sealed
        [mark] = self.subscription.mark()
        assert isinstance(mark, Marked)
        xor = 0
        for root, name in self.seen:
            xor ^= xor_prefixes(Root(root), [name])  # type: ignore[list-item]
        assert mark.digests == (Digest(TierKind.DRAM, len(sealed), xor),)

    def take_events(self) -> None:
        while (events := self.subscription.take()) is not None:
            for event in events:
                if isinstance(event, Began):
                    self.seen.clear()
                elif isinstance(event, Changed):
                    blocks = {(event.root, name) for name in event.names}
                    self.seen = self.seen - blocks if event.deleted else self.seen | blocks
                else:
                    assert isinstance(event, Ended)

    def teardown(self) -> None:
        bulk_commit._LEAST = self.least
        for number in list(self.reserved):
            session = self.store.sessions.by_number(number)
            assert session is not None
            self.store.close(session, writers_gone=True)
            self.store.sessions.forget(session)
        assert len(self.store.leases) == 0
        assert self.table.reserved_bytes == 0
        assert not any(self.table.pins)
        self.table.evict(list(self.table.index.values()), reason="test")
        assert self.table.used_bytes == 0
        assert not self.table.index
        for chunk in list(self.table.space.chunks()):
            self.table.space.dissolve(chunk)
        assert self.table.space.free_bytes == GRANULES * GRANULE_BYTES, "bytes leaked"
        self.arena.close()
        os.close(self.fd)


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestStore = StoreMachine.TestCase
