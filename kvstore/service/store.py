"""What Acquire, Settle and the end of a session do to the arena. Pure: no clock, no loop, no RPC.

The gRPC handlers pass parsed requests and the time in and send the answers out; hashing and
waiting happen elsewhere. One instance is used from one thread.
"""

from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvstore.core.errors import BadInput, Refused
from kvstore.core.limits import NAME_BYTES
from kvstore.core.outcomes import MissReason, Outcome, SettleOutcome
from kvstore.core.slots import READABLE, SlotState
from kvstore.directory.events import TierKind
from kvstore.directory.policy import Keys, Prompt
from kvstore.service.bulk_commit import commit_all
from kvstore.service.counting import HitCounts
from kvstore.service.pins import Pins
from kvstore.service.private import PrivateSlots
from kvstore.service.promotion import Load, Promoter
from kvstore.service.reserver import NO_HINTS, Hints, Reserver, Wanted
from kvstore.service.resident import resident
from kvstore.service.roots import RootInfo, key_column, keys_of
from kvstore.service.sessions import MAX_LEASES_PER_SESSION, Leases, Session, Sessions
from kvstore.service.slots import SlotTable
from kvstore.service.store_limits import StoreLimits

_REQUESTS_MAX: Final = 64
_PINNED_SHARE: Final = 4
"""One share domain may pin a quarter of the arena."""


@dataclass(slots=True)
class Acquired:
    """The answer to one Acquire."""

    lease: int = 0
    slots: list[int] = field(default_factory=list)
    """Leased: the first `ready` may be read now, the rest once they turn readable."""
    ready: int = 0
    tiers: list[TierKind] = field(default_factory=list)
    """Where those behind the first `ready` come from; these stand in DRAM."""
    loads: list[Load] = field(default_factory=list)
    """Pending slots that nobody fills yet: the caller's to start."""
    reason: MissReason = MissReason.NONE
    reserved_names: list[int] = field(default_factory=list)
    reserved_slots: list[int] = field(default_factory=list)
    reserve_reason: MissReason = MissReason.NONE


class ArenaStore:
    """The arena with its sessions: reservations, leases, commits."""

    def __init__(self, table: SlotTable, limits: StoreLimits, *, first_lease: int = 1) -> None:
        self.table = table
        self.limits = limits
        self.sessions = Sessions()
        self.leases = Leases(first_lease)
        self.to_seal: deque[tuple[int, int]] = deque()
        """(slot, generation) of committed slots whose bytes have to be hashed."""
        self.summed: list[tuple[int, bytes]] = []
        """Committed slots whose sums came with their bytes: they can be sealed at once."""
        self.reserver = Reserver(
            table, limits.reserve_quota_bytes, limits.claim_ms, self.flush_requests
        )
        self.private = PrivateSlots(table, limits.private_quota_bytes, self.flush_requests)
        self.promoter: Promoter | None = None
        """Set where tiers below DRAM exist."""
        self.on_request: Callable[[Prompt], None] | None = None
        """Told of every request, after the table's own policy: evidence for the tiers below."""
        self.pins = Pins(table, table.space.data_bytes // _PINNED_SHARE)
        self._requests: list[Prompt] = []
        """What was asked for and not told to the policy yet: Acquire defers it past its answer."""
        self._counts = HitCounts(table.metrics)
        self.hit_blocks = 0
        self.misses = 0

    # -- Acquire ---------------------------------------------------------------------------

    def acquire(
        self,
        session: Session,
        info: RootInfo,
        packed: bytes,
        *,
        reserve: int,
        first_block: int,
        now_ms: float,
        pending_ms: float = 0.0,
        hints: Hints = NO_HINTS,
    ) -> Acquired:
        """Lease the longest prefix of `packed` names and reserve slots for what follows.

        `pending_ms` is how long the caller would wait for blocks that have to be moved up first.
        """
        column = key_column(info, packed)
        answer = Acquired(slots=resident(self.table, info, packed, column))
        answer.ready = len(answer.slots)
        # Nothing asks for the keys where every block is here.
        keys: list[int] = column.tolist() if answer.ready < len(column) else []
        wanted = Wanted(info, packed, keys, first_block, now_ms)
        self._remember(info, array("Q", column.tobytes()), first_block, now_ms, hints)
        if len(session.leases) < MAX_LEASES_PER_SESSION:
            self._lease(session, wanted, pending_ms, answer)
        elif answer.slots:
            answer.slots, answer.ready, answer.reason = [], 0, MissReason.REFUSED
        found = len(answer.slots)
        if found < len(keys) and answer.reason is MissReason.NONE:
            answer.reason = self._why(wanted, found)
        if reserve:
            held = self.reserver.reserve(session, wanted, found, reserve)
            answer.reserved_names, answer.reserved_slots, answer.reserve_reason = held
        self._count(info, answer, len(column))
        return answer

    def _lease(self, session: Session, wanted: Wanted, pending_ms: float, answer: Acquired) -> None:
        """Lease what is ready and what follows it from below within `pending_ms`."""
        # Pinned first: making room for what comes must not drop what is here.
        self.table.pin(answer.slots)
        if self.promoter is not None and answer.ready < len(wanted.keys):
            pending = self.promoter.pending(wanted, answer.ready, pending_ms)
            answer.slots += pending.slots
            answer.tiers = pending.tiers
            answer.loads = pending.loads
            if len(answer.slots) < len(wanted.keys):
                answer.reason = pending.reason
        if answer.slots:
            expires_ms = wanted.now_ms + self.limits.lease_ms
            answer.lease = self.leases.grant(session, answer.slots, expires_ms)

    def unverified(self, info: RootInfo, packed: bytes) -> Iterator[int]:
        """Iterate over slots in the resident prefix that were adopted and not verified yet."""
        table = self.table
        for index, key in enumerate(keys_of(info, packed)):
            slot = table.find(info, key, packed[index * NAME_BYTES : (index + 1) * NAME_BYTES])
            if slot is None or table.state[slot] not in READABLE:
                return
            if not table.servable[slot]:
                yield slot

    def unverified_of(self, info: RootInfo, packed: bytes) -> Iterator[int]:
        """Iterate over adopted slots of any of the names that were not verified yet."""
        table = self.table
        for index, key in enumerate(keys_of(info, packed)):
            slot = table.find(info, key, packed[index * NAME_BYTES : (index + 1) * NAME_BYTES])
            if slot is not None and table.state[slot] in READABLE and not table.servable[slot]:
                yield slot

    def readable(
        self, session: Session, info: RootInfo, lease: int, refs: Sequence[tuple[int, int]]
    ) -> list[int]:
        """Return slots that a lease holds, readable at these generations.

        Raises `BadInput` for slots that are not the lease's, `Refused` for one that is void.
        """
        held = self.leases.get(lease)
        if held is None or held.session != session.number:
            raise Refused(f"lease {lease} is not held by this session", retry_after_ms=0)
        leased, table = set(held.slots), self.table
        for slot, generation in refs:
            if slot not in leased or table.root_number[slot] != info.number:
                raise BadInput(f"slot {slot} is not one of lease {lease}")
            if table.generation[slot] != generation or not table.servable[slot]:
                raise Refused(f"slot {slot} is not readable at {generation}", retry_after_ms=0)
        return [slot for slot, _ in refs]

    def writable(
        self, session: Session, info: RootInfo, refs: Sequence[tuple[int, int]]
    ) -> list[int]:
        """Return slots that a remote session has reserved; raises `BadInput` for any other."""
        if session.arrived is None:
            raise BadInput("this session maps the arena: it writes in place")
        if len({slot for slot, _ in refs}) < len(refs):
            raise BadInput("a slot stands twice in one request")
        for slot, generation in refs:
            if self._standing(session, info, slot, generation) is not SettleOutcome.DONE:
                raise BadInput(f"slot {slot} at {generation} is not reserved by this session")
        return [slot for slot, _ in refs]

    def _why(self, wanted: Wanted, index: int) -> MissReason:
        """Return why the prefix ends before name `index`."""
        slot = self.table.find(wanted.info, wanted.keys[index], wanted.name(index))
        if slot is None:
            return MissReason.ABSENT
        if self.table.state[slot] == SlotState.RESERVED:
            claimed = self.reserver.claimed(slot, wanted.now_ms)
            return MissReason.COMPUTING if claimed else MissReason.ABSENT
        return MissReason.LATE

    # -- Settle ----------------------------------------------------------------------------

    def commit(
        self, session: Session, info: RootInfo, refs: Sequence[tuple[int, int]], now_ms: float
    ) -> list[SettleOutcome]:
        """Make reserved slots readable; `refs` are (slot, generation) in prefix order."""
        if commit_all(self.table, session, info, refs, now_ms):
            self.to_seal.extend(refs)
            return [SettleOutcome.DONE] * len(refs)
        outcomes: list[SettleOutcome] = []
        committed: list[int] = []
        table = self.table
        for slot, generation in refs:
            outcome = self._standing(session, info, slot, generation)
            if outcome is SettleOutcome.DONE and not self._filled(session, slot):
                outcome = SettleOutcome.NOT_YOURS  # yet: its bytes have not come
            elif outcome is SettleOutcome.DONE:
                outcome = self._commit(session, slot)
                if outcome is SettleOutcome.DONE:
                    committed.append(slot)
            elif outcome is SettleOutcome.ALREADY and table.state[slot] not in READABLE:
                outcome = SettleOutcome.STALE  # aborted, a duplicate, or evicted since
            outcomes.append(outcome)
        table.insertions.tell(committed, now_ms)
        return outcomes

    def abort(
        self, session: Session, info: RootInfo, refs: Sequence[tuple[int, int]]
    ) -> list[SettleOutcome]:
        """Give reserved slots back unwritten."""
        outcomes: list[SettleOutcome] = []
        for slot, generation in refs:
            outcome = self._standing(session, info, slot, generation)
            if self.private.holds(session, slot, generation):
                outcome = SettleOutcome.DONE
                self.private.give_back(session, slot)
            elif outcome is SettleOutcome.DONE:
                self._give_back(session, slot)
            elif outcome is SettleOutcome.ALREADY and self.table.state[slot] in READABLE:
                outcome = SettleOutcome.STALE  # committed before: too late to abort
            outcomes.append(outcome)
        return outcomes

    def release(self, session: Session, leases: Sequence[int]) -> list[SettleOutcome]:
        """End leases."""
        outcomes: list[SettleOutcome] = []
        for lease in leases:
            held = self.leases.get(lease)
            if held is None:
                known = self.leases.known(lease)
                outcomes.append(SettleOutcome.ALREADY if known else SettleOutcome.NOT_YOURS)
            elif held.session != session.number:
                outcomes.append(SettleOutcome.NOT_YOURS)
            else:
                self._drop_lease(session, lease)
                outcomes.append(SettleOutcome.DONE)
        return outcomes

    def _commit(self, session: Session, slot: int) -> SettleOutcome:
        """Make one slot readable, unless somebody else's copy is there already."""
        self.reserver.unreserve(session, slot)
        block_sum = session.arrived.pop(slot) if session.arrived is not None else None
        holder = self.table.index.get(self.table.key[slot])
        if holder is not None and holder != slot and self.table.state[holder] in READABLE:
            self.table.give_up(slot)  # which may be pinned: the rest of its ticket still moves
            return SettleOutcome.DUPLICATE
        committed = self.table.commit(slot)
        assert committed, "somebody else holds the block, and it was looked for"
        if block_sum is None:
            self.to_seal.append((slot, self.table.generation[slot]))
        else:
            self.summed.append((slot, block_sum))
        return SettleOutcome.DONE

    def _give_back(self, session: Session, slot: int) -> None:
        """End a reservation unwritten; a slot that is being filled drains first."""
        self.reserver.unreserve(session, slot)
        if session.arrived is not None:
            session.arrived.pop(slot, None)
        self.table.give_up(slot)

    def _filled(self, session: Session, slot: int) -> bool:
        """Say whether a reserved slot may be committed: a remote writer's bytes must have come."""
        return session.arrived is None or slot in session.arrived

    def _standing(
        self, session: Session, info: RootInfo, slot: int, generation: int
    ) -> SettleOutcome:
        """Return how a (slot, generation) stands to the session; DONE: it may be settled now."""
        table = self.table
        if slot in session.reserved and generation == table.generation[slot]:
            mine = table.root_number[slot] == info.number
            return SettleOutcome.DONE if mine else SettleOutcome.NOT_YOURS
        if slot >= len(table.state) or generation > table.generation[slot] or not generation:
            return SettleOutcome.NOT_YOURS
        if generation < table.generation[slot]:
            return SettleOutcome.STALE
        other = table.root_number[slot] != info.number
        if other and not self.private.owns(table.root_of(slot)):
            return SettleOutcome.NOT_YOURS
        if table.state[slot] == SlotState.RESERVED:
            return SettleOutcome.NOT_YOURS
        # An adopted slot's writer is unknown; its commit was carried out before the restart.
        return (
            SettleOutcome.ALREADY
            if table.writer[slot] in (session.number, 0)
            else SettleOutcome.NOT_YOURS
        )

    def _drop_lease(self, session: Session, lease: int) -> None:
        self.table.unpin(self.leases.drop(lease, session))

    # -- ends ------------------------------------------------------------------------------

    def close(self, session: Session, *, writers_gone: bool) -> tuple[int, int]:
        """End a session; returns (leases released, reservations freed).

        While a process of it may still write (`writers_gone` false) its reserved slots stay
        reserved: giving them away would let it write into another's block.
        """
        leases = list(session.leases)
        for lease in leases:
            self._drop_lease(session, lease)
        self.sessions.close(session)
        if not writers_gone:
            return len(leases), 0
        reserved = list(session.reserved)
        for slot in reserved:
            self._give_back(session, slot)
        private = list(session.private)
        for slot in private:
            self.private.give_back(session, slot)
        return len(leases), len(reserved) + len(private)

    def clear(self, root_number: int | None, first: int, last: int) -> int:
        """Forget the blocks in slots `[first, last)`, under one root or all; returns how many.

        Reservations stay: what is being written is new.
        """
        table = self.table
        dropped = 0
        for slot in range(first, min(last, len(table.state))):
            if table.state[slot] not in READABLE:
                continue
            if root_number is None or table.root_number[slot] == root_number:
                self.pins.end(slot)
                table.drop(slot, reason="cleared")
                dropped += 1
        return dropped

    def expire(self, now_ms: float) -> int:
        """End leases and pins whose time is over; returns how many leases."""
        self.pins.expire(now_ms)
        over = self.leases.expired(now_ms)
        for lease, number in over:
            session = self.sessions.by_number(number)
            assert session is not None, "a lease outlived its session"
            self._drop_lease(session, lease)
        return len(over)

    # -- looking ---------------------------------------------------------------------------

    def outcome(self, info: RootInfo, key: int, name: bytes) -> Outcome | None:
        """Return HIT when the block may be read, MISS when nobody makes it, None while one does."""
        slot = self.table.find(info, key, name)
        if slot is None:
            return Outcome.MISS
        return Outcome.HIT if self.table.servable[slot] else None

    def flush_requests(self) -> None:
        """Tell the policy what was asked for and committed so far."""
        prompts, self._requests = self._requests, []
        policy = self.table.policy  # which also hears what was committed, if it has not yet
        for prompt in prompts:
            policy.request(prompt)
            if self.on_request is not None:
                self.on_request(prompt)

    def _remember(
        self, info: RootInfo, keys: Keys, first_block: int, now_ms: float, hints: Hints
    ) -> None:
        self._requests.append(
            Prompt(
                keys=keys,
                now_ms=now_ms,
                first_block=first_block,
                block_bytes=info.shape.block_bytes,
                share_domain=info.domain,
                kind=hints.kind,
                depth_cost=hints.depth_cost,
            )
        )
        if len(self._requests) >= _REQUESTS_MAX:
            self.flush_requests()

    def _count(self, info: RootInfo, answer: Acquired, asked: int) -> None:
        self.hit_blocks += len(answer.slots)
        by_tier = {TierKind.DRAM: answer.ready}
        if answer.tiers:
            by_tier = Counter(answer.tiers)
            by_tier[TierKind.DRAM] += answer.ready
        self._counts.hit(info.domain, by_tier, info.shape.block_bytes)
        if answer.reason is not MissReason.NONE:
            self.misses += 1
            self._counts.miss(info.domain, answer.reason, asked - len(answer.slots))
        self.table.metrics.reserved_blocks.inc(len(answer.reserved_slots))
