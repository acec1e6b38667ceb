"""What Acquire, Settle and the end of a session do to the arena. Pure: no clock, no loop, no RPC.

The gRPC handlers pass parsed requests and the time in and send the answers out; hashing and
waiting happen elsewhere. One instance is used from one thread.
"""

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvstore.core.limits import NAME_BYTES
from kvstore.core.outcomes import MissReason, Outcome, SettleOutcome
from kvstore.core.slots import READABLE, SlotState
from kvstore.directory.policy import Prompt
from kvstore.service.roots import RootInfo
from kvstore.service.sessions import MAX_LEASES_PER_SESSION, Leases, Session, Sessions
from kvstore.service.slots import SlotTable, keys_of

_REQUESTS_MAX: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """Times and bounds of one arena."""

    lease_ms: int = 30_000
    claim_ms: int = 5_000
    """How long a reservation keeps others from computing the same block."""
    reserve_quota_bytes: int
    """Bytes one session may have reserved and not settled."""


@dataclass(slots=True)
class Acquired:
    """The answer to one Acquire."""

    lease: int = 0
    slots: list[int] = field(default_factory=list)
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
        self._requests: list[Prompt] = []
        """What was asked for and not told to the policy yet: Acquire defers it past its answer."""
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
    ) -> Acquired:
        """Lease the longest prefix of `packed` names and reserve slots for what follows."""
        keys = keys_of(info, packed)
        answer = Acquired()
        answer.slots = self.prefix(info, packed, keys)
        found = len(answer.slots)
        if found < len(keys):
            answer.reason = self._why(info, packed, keys[found], found, now_ms)
        if found and len(session.leases) >= MAX_LEASES_PER_SESSION:
            answer.slots, found, answer.reason = [], 0, MissReason.REFUSED
        elif found:
            pins = self.table.pins
            for slot in answer.slots:
                pins[slot] += 1
            answer.lease = self.leases.grant(session, answer.slots, now_ms + self.limits.lease_ms)
        self._remember(info, keys, first_block, now_ms)
        if reserve:
            self._reserve(session, info, packed, keys, found, reserve, first_block, now_ms, answer)
        self._count(info, answer)
        return answer

    def prefix(self, info: RootInfo, packed: bytes, keys: list[int]) -> list[int]:
        """Return the slots of the longest prefix that may be leased now."""
        table = self.table
        servable = table.servable
        slots: list[int] = []
        for slot in map(table.index.get, keys):
            if slot is None or not servable[slot]:
                break
            slots.append(slot)
        # A key is a hint. One comparison of all full names instead of one for each.
        names = table.arena.names(slots)
        roots = set(map(table.root_number.__getitem__, slots))
        if names == packed[: len(names)] and roots <= {info.number}:
            return slots
        for index, slot in enumerate(slots):
            if not table.holds(slot, info, packed[index * NAME_BYTES : (index + 1) * NAME_BYTES]):
                return slots[:index]
        raise AssertionError("the names differ and every one of them is equal")

    def unverified(self, info: RootInfo, packed: bytes) -> Iterator[int]:
        """Iterate over slots in the resident prefix that were adopted and not verified yet."""
        table = self.table
        for index, key in enumerate(keys_of(info, packed)):
            slot = table.find(info, key, packed[index * NAME_BYTES : (index + 1) * NAME_BYTES])
            if slot is None or table.state[slot] not in READABLE:
                return
            if not table.servable[slot]:
                yield slot

    def _why(
        self, info: RootInfo, packed: bytes, key: int, index: int, now_ms: float
    ) -> MissReason:
        """Return why the prefix ends before name `index`."""
        slot = self.table.find(info, key, packed[index * NAME_BYTES : (index + 1) * NAME_BYTES])
        if slot is None:
            return MissReason.ABSENT
        if self.table.state[slot] == SlotState.RESERVED:
            return MissReason.COMPUTING if self._claimed(slot, now_ms) else MissReason.ABSENT
        return MissReason.LATE

    def _claimed(self, slot: int, now_ms: float) -> bool:
        return now_ms - self.table.claimed_ms[slot] < self.limits.claim_ms

    def _reserve(
        self,
        session: Session,
        info: RootInfo,
        packed: bytes,
        keys: list[int],
        found: int,
        wanted: int,
        first_block: int,
        now_ms: float,
        answer: Acquired,
    ) -> None:
        """Reserve slots for names after the prefix that nobody holds or computes."""
        table = self.table
        block_bytes = info.shape.block_bytes
        for index in range(found, len(keys)):
            missing = wanted - len(answer.reserved_slots)
            name = packed[index * NAME_BYTES : (index + 1) * NAME_BYTES]
            holder = table.index.get(keys[index])
            if holder is not None and not self._may_take_over(holder, info, name, now_ms):
                if table.state[holder] == SlotState.RESERVED:
                    answer.reserve_reason = MissReason.COMPUTING
                continue
            if session.reserved_bytes + block_bytes > self.limits.reserve_quota_bytes:
                answer.reserve_reason = MissReason.REFUSED
                return
            slot = self._reserve_one(session, info, name, keys, index, first_block, missing, now_ms)
            if slot is None:
                answer.reserve_reason = MissReason.REFUSED
                return
            answer.reserved_names.append(index)
            answer.reserved_slots.append(slot)
            if len(answer.reserved_slots) == wanted:
                answer.reserve_reason = MissReason.NONE  # whatever was skipped on the way
                return

    def _may_take_over(self, holder: int, info: RootInfo, name: bytes, now_ms: float) -> bool:
        """Say whether a block that somebody claimed may be computed by another now.

        Never when the holder has another full name: two blocks of one key cannot both be indexed.
        """
        return (
            self.table.state[holder] == SlotState.RESERVED
            and not self._claimed(holder, now_ms)
            and self.table.holds(holder, info, name)
        )

    def _reserve_one(
        self,
        session: Session,
        info: RootInfo,
        name: bytes,
        keys: list[int],
        index: int,
        first_block: int,
        missing: int,
        now_ms: float,
    ) -> int | None:
        """Reserve a slot for `keys[index]`; later ones may want one in this call too."""
        table = self.table
        for _ in range(2):
            slot = table.reserve(
                info,
                name,
                keys[index],
                parent=keys[index - 1] if index else 0,
                position=first_block + index,
                session=session.number,
                now_ms=now_ms,
            )
            if slot is not None:
                session.reserved.add(slot)
                session.reserved_bytes += info.shape.block_bytes
                return slot
            # The policy has to know of this request: what it asks for must not go first.
            self.flush_requests()
            newcomers = self._reservable(session, info, keys[index:])[:missing]
            if not table.make_room(info.shape.block_bytes, newcomers, now_ms):
                return None
        return None

    def _reservable(self, session: Session, info: RootInfo, keys: list[int]) -> list[int]:
        """Return those of `keys` that this call can reserve: room for more would cost blocks.

        What is asked for can be far more than the quota allows or than names that nobody holds.
        """
        quota = self.limits.reserve_quota_bytes - session.reserved_bytes
        unheld = [key for key in keys if key not in self.table.index]
        return unheld[: quota // info.shape.block_bytes] or keys[:1]

    # -- Settle ----------------------------------------------------------------------------

    def commit(
        self, session: Session, info: RootInfo, refs: Sequence[tuple[int, int]], now_ms: float
    ) -> list[SettleOutcome]:
        """Make reserved slots readable; `refs` are (slot, generation) in prefix order."""
        outcomes: list[SettleOutcome] = []
        committed: list[int] = []
        for slot, generation in refs:
            outcome = self._standing(session, info, slot, generation)
            if outcome is SettleOutcome.DONE:
                self._unreserve(session, slot)
                if self.table.commit(slot):
                    committed.append(slot)
                    self.to_seal.append((slot, generation))
                else:
                    outcome = SettleOutcome.DUPLICATE
            elif outcome is SettleOutcome.ALREADY and self.table.state[slot] not in READABLE:
                outcome = SettleOutcome.STALE  # aborted, a duplicate, or evicted since
            outcomes.append(outcome)
        self.table.tell_inserted(committed, now_ms)
        return outcomes

    def abort(
        self, session: Session, info: RootInfo, refs: Sequence[tuple[int, int]]
    ) -> list[SettleOutcome]:
        """Give reserved slots back unwritten."""
        outcomes: list[SettleOutcome] = []
        for slot, generation in refs:
            outcome = self._standing(session, info, slot, generation)
            if outcome is SettleOutcome.DONE:
                self._unreserve(session, slot)
                self.table.free(slot)
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

    def _standing(
        self, session: Session, info: RootInfo, slot: int, generation: int
    ) -> SettleOutcome:
        """Return how a (slot, generation) stands to the session; DONE: it may be settled now."""
        table = self.table
        if slot >= len(table.state) or generation > table.generation[slot] or not generation:
            return SettleOutcome.NOT_YOURS
        if generation < table.generation[slot]:
            return SettleOutcome.STALE
        if table.root_number[slot] != info.number:
            return SettleOutcome.NOT_YOURS
        if slot in session.reserved:
            return SettleOutcome.DONE
        if table.state[slot] == SlotState.RESERVED:
            return SettleOutcome.NOT_YOURS
        # An adopted slot's writer is unknown; its commit was carried out before the restart.
        return (
            SettleOutcome.ALREADY
            if table.writer[slot] in (session.number, 0)
            else SettleOutcome.NOT_YOURS
        )

    def _unreserve(self, session: Session, slot: int) -> None:
        session.reserved.remove(slot)
        session.reserved_bytes -= self.table.root_of(slot).shape.block_bytes

    def _drop_lease(self, session: Session, lease: int) -> None:
        pins = self.table.pins
        for slot in self.leases.drop(lease, session):
            pins[slot] -= 1

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
            self._unreserve(session, slot)
            self.table.free(slot)
        return len(leases), len(reserved)

    def expire(self, now_ms: float) -> int:
        """End leases whose time is over; returns how many."""
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
        """Tell the policy what was asked for so far."""
        prompts, self._requests = self._requests, []
        for prompt in prompts:
            self.table.policy.request(prompt)

    def _remember(self, info: RootInfo, keys: list[int], first_block: int, now_ms: float) -> None:
        self._requests.append(
            Prompt(
                keys=array("Q", keys),
                now_ms=now_ms,
                first_block=first_block,
                block_bytes=info.shape.block_bytes,
                share_domain=info.domain,
            )
        )
        if len(self._requests) >= _REQUESTS_MAX:
            self.flush_requests()

    def _count(self, info: RootInfo, answer: Acquired) -> None:
        metrics = self.table.metrics
        self.hit_blocks += len(answer.slots)
        metrics.hit_blocks.labels("dram").inc(len(answer.slots))
        metrics.hit_bytes.labels("dram").inc(len(answer.slots) * info.shape.block_bytes)
        if answer.reason is not MissReason.NONE:
            self.misses += 1
            metrics.misses.labels(answer.reason.name.lower()).inc()
        metrics.reserved_blocks.inc(len(answer.reserved_slots))
